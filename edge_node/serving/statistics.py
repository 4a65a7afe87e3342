"""How many requests a worker answered, model by model, and how long they took: the counters behind `/stats`.

`add` is one call an answered request, for every door; what the engine knows of its runs is in its own histograms.

Laws: numbers only grow; they are this worker's, since it started. A model that nobody serves any more is forgotten once
`MOST` are known. It must not know HTTP, or why a request failed.
"""

from __future__ import annotations

import time
from typing import Any, Final

from prometheus_client import REGISTRY

from schemas.events import ModelRef

MOST: Final = 4_096
_CACHED: Final = frozenset({"memory", "redis", "disk"})


class Counts:
    """Of one release. Times are in nanoseconds, from a request's first byte at its door to its answer."""

    __slots__ = ("failed", "failed_ns", "hit_ns", "hits", "last_ms", "missed", "missed_ns", "rows")

    def __init__(self) -> None:
        self.failed = self.failed_ns = self.hits = self.hit_ns = 0
        self.missed = self.missed_ns = self.rows = self.last_ms = 0


class Statistics:
    """One event loop owns it."""

    def __init__(self) -> None:
        self._of: dict[ModelRef, Counts] = {}

    def add(self, model: ModelRef, tier: str, ok: bool, ns: int, rows: int = 1) -> None:
        """A request was answered, by `tier` if it is `ok`; `rows` are those that its answer has."""
        counts = self._of.get(model)
        if counts is None:
            counts = self._new(model)
        if not ok:
            counts.failed += 1
            counts.failed_ns += ns
        elif tier in _CACHED:
            counts.hits += 1
            counts.hit_ns += ns
        else:
            counts.missed += 1
            counts.missed_ns += ns
            counts.rows += rows
            counts.last_ms = time.time_ns() // 1_000_000

    def said(self, model: ModelRef) -> dict[str, Any]:
        """In the words of Triton's statistics extension."""
        counts = self._of.get(model) or Counts()
        name = {"model": model.name}
        runs, run_ns = _histogram("mlcdn_run_seconds", name)
        queued, queue_ns = _histogram("mlcdn_queue_seconds", name)
        return {
            "name": model.name,
            "version": model.version,
            "last_inference": counts.last_ms,
            "inference_count": counts.rows,
            "execution_count": runs,
            "inference_stats": {
                "success": _pair(counts.hits + counts.missed, counts.hit_ns + counts.missed_ns),
                "fail": _pair(counts.failed, counts.failed_ns),
                "queue": _pair(queued, queue_ns),
                "compute_input": _pair(0, 0),
                "compute_infer": _pair(runs, run_ns),
                "compute_output": _pair(0, 0),
                "cache_hit": _pair(counts.hits, counts.hit_ns),
                "cache_miss": _pair(counts.missed, counts.missed_ns),
            },
            "batch_stats": [],
        }

    def _new(self, model: ModelRef) -> Counts:
        while len(self._of) >= MOST:
            del self._of[next(iter(self._of))]
        counts = self._of[model] = Counts()
        return counts


def _pair(count: int, ns: int) -> dict[str, int]:
    return {"count": count, "ns": ns}


def _histogram(metric: str, labels: dict[str, str]) -> tuple[int, int]:
    """Observations of the engine's, and their sum in nanoseconds: all versions of a model share its engine."""
    names = (f"{metric}_count", f"{metric}_sum")
    count, total = 0.0, 0.0
    for family in REGISTRY.restricted_registry(names).collect():
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                count += sample.value if sample.name == names[0] else 0
                total += sample.value if sample.name == names[1] else 0
    return int(count), int(total * 1e9)
