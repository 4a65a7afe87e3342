"""What kept releases from being taken over: said once a cause, and when each is tried again.

Laws: a failure is of one board's target, and another target is another matter; pauses grow; the log is told of a cause
once, however often it recurs. It must not know how a take-over is done.
"""

from __future__ import annotations

import time
from typing import Any, Final, Protocol

import msgspec
import structlog

from edge_node.board import BoardFile, BoardModel
from edge_node.serving.model_slot import ModelSlot
from edge_node.serving.preparing import PhaseFailed
from edge_node.serving.reporter import Identity
from schemas.events import Event, SwapFailed
from schemas.metrics import counter
from streams.folds.wanted import Wanted

RETRY_S: Final = (1.0, 2.0, 5.0, 15.0, 30.0)

log = structlog.get_logger()


class Say(Protocol):
    def __call__(self, event: Event, *, causation_id: str | None = None) -> None: ...


class _Failure(msgspec.Struct):
    """What kept a release from being taken over, and when to try again (monotonic seconds)."""

    target: BoardModel
    cause: str
    attempts: int
    retry_at: float


class SwapFailures:
    """By seat. One event loop owns it."""

    def __init__(self, identity: Identity, say: Say) -> None:
        self._identity, self._say = identity, say
        self._failures: dict[str, _Failure] = {}

    def __contains__(self, seat: str) -> bool:
        return seat in self._failures

    def due(self, seat: str) -> bool:
        """Whether it may be tried now."""
        failure = self._failures.get(seat)
        return failure is None or failure.retry_at <= time.monotonic()

    def follow(self, board: BoardFile) -> None:
        """Those of what the board does not say any more are forgotten."""
        self._failures = {seat: f for seat, f in self._failures.items() if board.models.get(seat) == f.target}

    def forget(self, seat: str) -> None:
        self._failures.pop(seat, None)

    def failed(self, seat: str, slot: ModelSlot, target: BoardModel, failed: PhaseFailed) -> None:
        before = self._failures.get(seat)
        again = before is not None and before.target == target
        attempts = before.attempts + 1 if before is not None and again else 1
        pause = RETRY_S[min(attempts, len(RETRY_S)) - 1]
        self._failures[seat] = _Failure(target, failed.cause, attempts, time.monotonic() + pause)
        slot.errors[seat] = f"{failed.phase}: {failed.cause}"
        counter("mlcdn_swaps_total").labels(slot.name, "failed").inc()
        if before is not None and again and before.cause == failed.cause:
            return
        log.error("swap_failed", model=seat, phase=failed.phase, cause=failed.cause)
        self._say(
            SwapFailed(
                **self._identity.fleet(), **release_fields(target.wanted), phase=failed.phase, cause=failed.cause[:500]
            ),
            causation_id=target.wanted.cause,
        )


def release_fields(wanted: Wanted) -> dict[str, Any]:
    """The fields that every report on a release begins with."""
    return {
        "model": wanted.model,
        "version": wanted.version,
        "sequence": wanted.sequence,
        "digest": wanted.digest,
        "position": wanted.position,
    }
