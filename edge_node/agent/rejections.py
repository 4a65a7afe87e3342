"""Why what is wanted is not served yet: causes, attempts, when to try again; each said once a release and cause.

Laws: a failure is a state, shown on the board, and it goes when the step passes or another release is wanted; the log is
told of a cause once, not of each attempt. It must not know how anything is fetched or tried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

import structlog

from edge_node.agent import reconcile
from edge_node.agent.reconcile import Failure
from schemas.errors import MlcdnError
from schemas.events import ArtifactRejected, Event
from schemas.metrics import counter
from streams.folds.wanted import Seated

CAUSE_MAX: Final = 500

log = structlog.get_logger()


class Say(Protocol):
    def __call__(self, event: Event, *, causation_id: str | None = None) -> None: ...


class Rejections:
    """`failures` is by seat. `fleet` gives the fields that every report begins with; `random` is in [0, 1)."""

    def __init__(
        self, say: Say, fleet: Callable[[], dict[str, Any]], now_ms: Callable[[], int], random: Callable[[], float]
    ) -> None:
        self._say, self._fleet, self._now_ms, self._random = say, fleet, now_ms, random
        self.failures: dict[str, Failure] = {}

    def passed(self, seated: Seated) -> None:
        """A step of it went well."""
        failure = self.failures.get(seated.seat)
        if failure is not None and failure.wanted == seated.wanted:
            del self.failures[seated.seat]

    def forget(self, seat: str) -> None:
        self.failures.pop(seat, None)

    def failed(self, seated: Seated, phase: str, error: MlcdnError) -> None:
        self.record(seated, phase, str(error), retryable=error.retryable)

    def record(self, seated: Seated, phase: str, cause: str, *, retryable: bool) -> None:
        wanted = seated.wanted
        failure, news = reconcile.failed(
            self.failures.get(seated.seat),
            wanted,
            phase,
            cause[:CAUSE_MAX],
            retryable=retryable,
            now_ms=self._now_ms(),
            random=self._random(),
        )
        self.failures[seated.seat] = failure
        counter("mlcdn_artifacts_rejected_total").labels(phase).inc()
        if not news:
            return
        log.error("artifact_rejected", model=wanted.model, phase=phase, cause=cause, retrying=retryable)
        rejected = ArtifactRejected(
            **self._fleet(),
            model=wanted.model,
            version=wanted.version,
            sequence=wanted.sequence,
            digest=wanted.digest,
            position=wanted.position,
            phase=phase,
            cause=cause[:CAUSE_MAX],
            retrying=retryable,
        )
        self._say(rejected, causation_id=wanted.cause)

    def pause_s(self, most_s: float, busy: Collection[str]) -> float:
        """Until the next of them is tried again."""
        retry_ms = reconcile.next_retry_ms(self.failures, busy)
        if retry_ms is None:
            return most_s
        return min(most_s, max(0.0, (retry_ms - self._now_ms()) / 1e3))
