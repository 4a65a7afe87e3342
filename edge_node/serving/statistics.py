"""How many requests a worker answered, model by model, and how long they took: the counters behind `/stats`.

They are made of the request rows, whichever door answered; what the engine knows of its runs is in its own histograms.

Laws: numbers only grow; they are this worker's, since it started, up to its last report. A model that nobody serves any
more is forgotten once `MOST` are known. It must not know HTTP, or why a request failed.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
from prometheus_client import REGISTRY

from edge_node.serving.rows import Taken
from schemas.events import TIERS, ModelRef

MOST: Final = 4_096
# The tiers before a model or an origin, in the order of a row's column.
_CACHED: Final = TIERS[: TIERS.index("model")]


class Counts:
    """Of one release. Times are in nanoseconds, from a request's first byte at its door to its answer."""

    __slots__ = ("failed", "failed_ns", "hit_ns", "hits", "last_ms", "missed", "missed_ns")

    def __init__(self) -> None:
        self.failed = self.failed_ns = self.hits = self.hit_ns = 0
        self.missed = self.missed_ns = self.last_ms = 0

    def add(self, what: str, count: int, ns: int) -> None:
        if what == "failed":
            self.failed, self.failed_ns = self.failed + count, self.failed_ns + ns
        elif what == "hit":
            self.hits, self.hit_ns = self.hits + count, self.hit_ns + ns
        else:
            self.missed, self.missed_ns = self.missed + count, self.missed_ns + ns
            if count:
                self.last_ms = time.time_ns() // 1_000_000


class Statistics:
    """One event loop owns it."""

    def __init__(self) -> None:
        self._of: dict[ModelRef, Counts] = {}

    def add(self, taken: Taken) -> None:
        """Rows of answered requests."""
        columns = taken.columns
        ok, hit = columns["status"] < 400, columns["tier"] < len(_CACHED)
        latency_ns = columns["latency_us"].astype(np.int64) * 1_000
        for index, ref in enumerate(taken.models):
            here = columns["model"] == index
            counts = self._of.get(ref) or self._new(ref)
            for what, mask in (("failed", ~ok), ("hit", ok & hit), ("missed", ok & ~hit)):
                counts.add(what, int(np.count_nonzero(here & mask)), int(latency_ns[here & mask].sum()))

    def said(self, model: ModelRef) -> dict[str, Any]:
        """In the words of Triton's statistics extension."""
        counts = self._of.get(model) or Counts()
        name = {"model": model.name}
        runs, run_ns = _histogram("mlcdn_run_seconds", name)
        queued, queue_ns = _histogram("mlcdn_queue_seconds", name)
        rows = int(_sum_of("mlcdn_batch_rows", name))
        return {
            "name": model.name,
            "version": model.version,
            "last_inference": counts.last_ms,
            "inference_count": rows,
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
    return int(_read(f"{metric}_count", labels)), int(_sum_of(metric, labels) * 1e9)


def _sum_of(metric: str, labels: dict[str, str]) -> float:
    return _read(f"{metric}_sum", labels)


def _read(sample: str, labels: dict[str, str]) -> float:
    return sum(
        each.value
        for family in REGISTRY.restricted_registry((sample,)).collect()
        for each in family.samples
        if each.name == sample and labels.items() <= each.labels.items()
    )
