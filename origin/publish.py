"""Publishing: a file becomes an artifact, an artifact becomes a signed release that the log took.

A release, numbered as the code is marked:
 1. the file is tried in a limited child, its golden test included, and once more with the files that it names, where
    those are to be released; the event is made, and its inputs and outputs are held against those served now: what cannot
    be released leaves nothing behind;
 2. the artifacts (and the golden file) are uploaded, read back and verified;
 3. the log is read and folded, and the next sequence chosen;
 4. the signed event is appended;
 5. the log is read back: did the fold take it? The loser of a race signs again with a higher sequence.

Laws: facts are written last, so whoever reads the event can get what it names; a publish that dies leaves nothing, or an
unreferenced object, or a complete release; a retry after a lost race means what the first try meant.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec

from inference.trial import run_trial
from inference.trial_report import TrialLimits, TrialReport
from origin import data_files, signature
from origin.read_back import read_on
from origin.release_request import GOLDEN_MAX_BYTES, Published, ReleaseEvent, ReleaseRequest, published, released
from origin.signature import Change, SignatureChanged
from schemas import names
from schemas.errors import BadInput, Conflict, ModelRefused, NotFound, Refusal
from schemas.events import (
    Artifact,
    File,
    Golden,
    ModelReleased,
    ModelRetired,
    ModelRolledBack,
)
from streams.artifacts import ArtifactStore, describe
from streams.folds import releases
from streams.folds.releases import Releases
from streams.log.record import LogReader
from streams.log.writer import Writer, wall_clock_ms

__all__ = ["Published", "Publisher", "ReleaseRequest", "SignatureChanged"]

TRIES: Final = 8
_TRIAL: Final = TrialLimits()
LOST_RACE: Final = (Refusal.SEQUENCE_NOT_HIGHER, Refusal.SEQUENCE_CONFLICT)
Progress = Callable[[str, int, int], None]
"""What, how much of it, out of how much; bytes."""


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress is shown."""


class Publisher:
    """The library call behind the command line and the admin API. `writer` signs with a key that may release."""

    def __init__(
        self,
        store: ArtifactStore,
        writer: Writer,
        reader: LogReader,
        roots: tuple[bytes, ...],
        limits: TrialLimits = _TRIAL,
    ) -> None:
        self._store, self._writer, self._reader, self.roots, self._limits = store, writer, reader, roots, limits

    async def publish(self, request: ReleaseRequest, progress: Progress = _silent) -> Published:
        """Tries, uploads and releases; returns once the log took the event, which is before any node serves it.

        `progress` is called, from another thread, with what is done, how many bytes of it, out of how many. Nothing is
        uploaded on `BadInput` (a value or file that cannot be used), `ModelRefused` (the artifact must not be served, fails
        its golden test, or the golden file is none) and `SignatureChanged` (a `Conflict`). `Conflict` also when races
        were lost or the key may not release this; `Unreachable` names the part that is away, and publishing again is
        safe.
        """
        await asyncio.to_thread(self._fits, request.path)
        artifact = await asyncio.to_thread(
            describe, request.path, lambda digest: names.model_object_key(request.model, digest),
        )  # fmt: skip
        proof = await asyncio.to_thread(_read_golden, request)
        report, files = await asyncio.to_thread(self._try, request, artifact)  # 1
        template = released(request, artifact, report, None if proof is None else proof[0], files)
        state, _ = await asyncio.to_thread(read_on, self._reader, Releases.initial(self.roots), None)
        changes = _compared(request, template, state)
        await self._upload(request, template, proof, progress)  # 2

        def event(sequence: int, state: Releases) -> ModelReleased:
            nonlocal changes
            # Again: what is served may be another version than before the upload, or before a lost race.
            changes = _compared(request, template, state)
            return msgspec.structs.replace(template, sequence=sequence, created_at_ms=wall_clock_ms())

        done = await self._append(request.model, event, state)
        return replace(done, trial=report, changes=changes)

    async def rollback(self, model: str, to_version: str | None, *, author: str, reason: str) -> Published:
        """Back to the artifact of `to_version`, or of the release before the one that is wanted now."""
        target: ModelReleased | None = None

        def event(sequence: int, state: Releases) -> ModelRolledBack:
            nonlocal target
            # Chosen once: "the one before", asked again after a lost race, would be the one before the winner. Two
            # operators who roll back at once would go back two releases.
            target = target or _rollback_target(state, model, to_version)
            return ModelRolledBack(
                model=model,
                version=target.version,
                sequence=sequence,
                to_digest=target.digest,
                author=author,
                reason=reason,
            )

        return await self._append(model, event)

    async def retire(self, model: str, *, author: str, reason: str) -> Published:
        def event(sequence: int, state: Releases) -> ModelRetired:
            history = state.models.get(model)
            if history is None or history.retired:
                raise NotFound(f"no model {model} is served")
            return ModelRetired(model=model, sequence=sequence, author=author, reason=reason)

        return await self._append(model, event)

    def _fits(self, path: Path) -> None:
        """As the trial will find, before gigabytes are read for their digest."""
        try:
            size = path.stat().st_size
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror}") from None
        if size > (most := self._limits.scan.max_file_bytes):
            raise ModelRefused(f"the file has {size} bytes, more than the {most} allowed")

    def _try(self, request: ReleaseRequest, artifact: Artifact) -> tuple[TrialReport, tuple[File, ...]]:
        def trial(files: tuple[File, ...]) -> TrialReport:
            beside = data_files.beside(request.path, files)
            return run_trial(
                request.path, artifact.sha256, request.golden, request.rtol, request.atol, self._limits, beside
            )

        # Which files it names is found out where its bytes can do no harm.
        files: tuple[File, ...] = ()
        report = trial(files)
        if report.unlisted and not request.files:
            raise ModelRefused(
                f"{report.reason}; with --files (the setting `files`) the files beside it are released too"
            )
        if report.unlisted:
            files = data_files.described(request.path, request.model, report.unlisted)
            report = trial(files)
        if not report.ok:
            raise ModelRefused(report.reason)
        return report, files

    async def _upload(
        self, request: ReleaseRequest, event: ModelReleased, proof: tuple[Golden, bytes] | None, progress: Progress
    ) -> None:
        done, total = 0, sum(artifact.size_bytes for artifact in event.artifacts)

        def sent(count: int) -> None:
            nonlocal done
            done += count
            progress("upload", done, total)

        places = (request.path, *(request.path.parent / file.name for file in event.files))
        for artifact, place in zip(event.artifacts, places, strict=True):
            await asyncio.to_thread(self._store.put, artifact, place, sent)
        if proof is not None:
            golden, data = proof
            await asyncio.to_thread(self._store.put_bytes, golden.object_key, data)

    async def _append(
        self, model: str, make: Callable[[int, Releases], ReleaseEvent], known: Releases | None = None
    ) -> Published:
        state = Releases.initial(self.roots) if known is None else known
        for _ in range(TRIES):
            state, _ = await asyncio.to_thread(read_on, self._reader, state, None)  # 3
            history = state.models.get(model)
            event = make((history.sequence if history else 0) + 1, state)
            appended = await self._writer.append(event)  # 4
            position = appended.record.offset
            state, refused = await asyncio.to_thread(read_on, self._reader, state, position + 1)  # 5
            if state.position != position:
                raise Conflict(f"position {position} is not in the log that acknowledged it: was the topic made again?")
            if refused is None:
                return published(event, appended)
            if refused.refusal not in LOST_RACE:
                raise Conflict(f"the log holds the event at position {position}, refused: {refused}")
        raise Conflict(f"{TRIES} times another release of {model} came first")


def _read_golden(request: ReleaseRequest) -> tuple[Golden, bytes] | None:
    if request.golden is None:
        return None
    try:
        size = request.golden.stat().st_size
        if size > GOLDEN_MAX_BYTES:
            raise BadInput(f"the golden file has {size} bytes, at most {GOLDEN_MAX_BYTES}")
        data = request.golden.read_bytes()
    except OSError as error:
        raise BadInput(f"{request.golden}: {error.strerror}") from None
    digest = hashlib.sha256(data).hexdigest()
    key = names.golden_object_key(request.model, digest)
    return Golden(object_key=key, sha256=digest, rtol=request.rtol, atol=request.atol), data


def _compared(request: ReleaseRequest, event: ModelReleased, state: Releases) -> tuple[Change, ...]:
    """What clients of the version served now can trip over; `SignatureChanged` unless that is allowed."""
    history = state.models.get(request.model)
    if history is None:
        return ()
    on_its_way = history.rollout.wanted if history.rollout is not None and not history.rollout.returned else None
    live = history.stable or on_its_way
    if live is None or live.digest == event.digest:
        return ()
    old = live.released
    found = signature.changes(old.inputs, old.outputs, event.inputs, event.outputs)
    if found and not request.allow_signature_change:
        raise SignatureChanged(request.model, live.version, found)
    return found


def _rollback_target(state: Releases, model: str, to_version: str | None) -> ModelReleased:
    history = state.models.get(model)
    if history is None:
        raise NotFound(f"no model {model} was ever released")
    if to_version is not None:
        found = releases.find_version(state, model, to_version)
        if found is None:
            known = ", ".join(sorted({r.version for r in history.brought.values()}))
            raise NotFound(f"no release of {model} carries the version {to_version!r}; there are {known}")
        return found
    rollout = history.rollout
    now = rollout.wanted if rollout is not None and not rollout.returned else history.stable
    if now is None:
        raise Conflict(f"{model} is retired, so nothing is before what is served: say which version")
    if rollout is not None and now is rollout.wanted and rollout.before is not None:
        return rollout.before.released
    earlier = [r for r in history.brought.values() if r.sequence < now.released.sequence]
    if not earlier:
        raise NotFound(f"{model} has no release before the one that is served")
    return max(earlier, key=lambda r: r.sequence)
