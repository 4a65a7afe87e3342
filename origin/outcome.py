"""A release and what came of it, said the same by the command line and the admin API.

Law: who was there is looked at before the append, so that nobody who leaves because of it is left out. It must not know
who asks.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from inference.trial_report import TrialReport
from origin.publish import Published
from origin.receipts import FleetWatch, NodeOutcome, wait_live
from origin.rollouts import Ended, Judgement, wait_over

_FIGURES: Final = ("load_ms", "run_ms", "peak_rss_bytes", "model_rss_bytes", "batchable", "batchable_reason", "golden")


@dataclass(frozen=True, slots=True)
class Outcome:
    """`nodes` is empty where nobody waited, and where `rollout` says what its waves came to."""

    published: Published
    nodes: tuple[NodeOutcome, ...]
    wall_ms: float
    rollout: Ended | None = None

    def not_live(self, *, allow_missing: bool = False) -> list[NodeOutcome]:
        return [n for n in self.nodes if n.outcome != "live" and not (allow_missing and n.outcome == "missing")]

    def document(self) -> dict[str, Any]:
        published = self.published
        said: dict[str, Any] = {
            "model": published.model,
            "version": published.version,
            "sequence": published.sequence,
            "digest": published.digest,
            "position": published.position,
            "event_id": published.event_id,
        }
        if published.trial is not None:
            said["trial"] = _figures(published.trial)
            said["signature_changes"] = msgspec.to_builtins(published.changes)
        if self.rollout is not None:
            said["rollout"] = msgspec.to_builtins(self.rollout)
        return said | {"nodes": msgspec.to_builtins(self.nodes), "wall_ms": self.wall_ms}


async def outcome(
    act: Callable[[], Awaitable[Published]],
    watch: FleetWatch | None,
    roots: tuple[bytes, ...],
    timeout_s: float,
    progress: Callable[[NodeOutcome], None] = lambda _: None,
    judged: Callable[[Judgement], None] = lambda _: None,
) -> Outcome:
    """Acts, and with a `watch` waits up to `timeout_s`: for every node with a fresh beat, or for the end of its waves."""
    began = time.monotonic()
    if watch is not None:
        await watch.look()
    published = await act()
    nodes: list[NodeOutcome] = []
    rollout: Ended | None = None
    if watch is not None and published.waves:
        rollout = await wait_over(
            watch.reader, roots, published.model, published.position, timeout_s=timeout_s, progress=judged
        )
    elif watch is not None:
        await watch.look()
        model, sequence, appended_ms = published.model, published.sequence, published.appended_ms
        nodes = await wait_live(watch, model, sequence, appended_ms, timeout_s=timeout_s, progress=progress)
    return Outcome(published, tuple(nodes), (time.monotonic() - began) * 1000, rollout)


def _figures(trial: TrialReport) -> dict[str, Any]:
    """Milliseconds of the load and of one row; bytes of the trial's child at its peak, and of the model in it."""
    return {name: getattr(trial, name) for name in _FIGURES}
