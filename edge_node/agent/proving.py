"""One trial of an artifact: run where it can do no harm, held against what the release promised, its proof kept.

It must not know plans, boards or what becomes of a failure.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Protocol

from edge_node.agent import reconcile
from edge_node.agent.model_files import GOLDEN, MODEL, ModelFiles
from inference.external_data import DataFile, stored
from inference.trial_report import TrialReport
from streams.folds.wanted import Wanted


class Trials(Protocol):
    async def trial(
        self,
        path: Path,
        sha256: str,
        golden_path: Path | None = None,
        rtol: float = ...,
        atol: float = ...,
        *,
        files: tuple[DataFile, ...] = (),
    ) -> TrialReport: ...


class NotProven(Exception):
    """The model is not what the release says: `phase` is trial or golden."""

    def __init__(self, phase: str, cause: str) -> None:
        super().__init__(cause)
        self.phase, self.cause = phase, cause


class Proving:
    """`runtime` is what a proof is good for."""

    def __init__(self, trials: Trials, files: ModelFiles, runtime: str) -> None:
        self._trials, self._files, self._runtime = trials, files, runtime

    async def prove(self, wanted: Wanted) -> float:
        """Milliseconds of the trial. Raises NotProven, or MlcdnError where there was no trial."""
        golden = wanted.released.golden
        artifact, files = wanted.released.artifact, stored(wanted.released.files, self._files.folder)
        path = self._files.path(artifact.sha256, MODEL)
        began = time.perf_counter()
        if golden is None:
            report = await self._trials.trial(path, artifact.sha256, files=files)
        else:
            golden_path = self._files.path(golden.sha256, GOLDEN)
            report = await self._trials.trial(path, artifact.sha256, golden_path, golden.rtol, golden.atol, files=files)
        ms = (time.perf_counter() - began) * 1e3
        if cause := report.reason if not report.ok else _unlike(wanted, report):
            raise NotProven("golden" if report.golden == "failed" else "trial", cause)
        await asyncio.to_thread(self._files.prove, reconcile.proof_of(wanted, self._runtime), artifact.sha256)
        return ms


def _unlike(wanted: Wanted, report: TrialReport) -> str:
    """How the model's tensors differ from those that the release promised to clients; empty when they do not."""
    released = wanted.released
    for what, promised, found in (
        ("input", released.inputs, report.inputs),
        ("output", released.outputs, report.outputs),
    ):
        says = {t.name: (t.datatype, len(t.shape)) for t in promised}
        has = {t.name: (t.datatype, len(t.shape)) for t in found}
        if says != has:
            names = ", ".join(sorted(n for n in says.keys() | has.keys() if says.get(n) != has.get(n)))
            return f"its {what}s are not those of the release: {names}"
    return ""
