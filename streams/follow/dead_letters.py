"""Dead letters: what did not act is written down with its bytes and its reason, at a bounded rate.

A poison flood must not become a second flood: above the rate a rejection is counted and no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from schemas import metrics
from schemas.errors import EventRefused, MlcdnError
from schemas.events import EventRejected, Header
from streams.log.record import Record
from streams.log.writer import Writer

log = structlog.get_logger(__name__)

_KEY_MAX, _VALUE_MAX, _HEADERS_MAX, _DETAIL_MAX = 1_024, 1_048_576, 64, 512


class DeadLetters:
    """`suppressed` counts rejections above `per_second` (with a `burst`): they are in the metrics only."""

    def __init__(
        self,
        writer: Writer,
        *,
        node: str,
        region: str,
        per_second: float = 10.0,
        burst: int = 50,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writer, self._node, self._region = writer, node, region
        self._per_second, self._burst, self._monotonic = per_second, float(burst), monotonic
        self._room, self._at = float(burst), monotonic()
        self.suppressed = 0

    def reject(self, record: Record, refused: EventRefused, *, again: bool = False) -> bool:
        """True when it was written down. `again`: an earlier life of this process has done so; counting is enough."""
        metrics.counter("mlcdn_dead_letters_total").labels(record.topic, str(refused.refusal)).inc()
        if again:
            return False
        now = self._monotonic()
        self._room = min(self._burst, self._room + (now - self._at) * self._per_second)
        self._at = now
        if self._room < 1:
            self.suppressed += 1
            metrics.counter("mlcdn_dead_letters_suppressed_total").inc()
            return False
        self._room -= 1
        log.warning(
            "event rejected",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            refusal=str(refused.refusal),
            detail=refused.detail[:_DETAIL_MAX],
        )
        try:
            return self._writer.offer(self._letter(record, refused))
        except MlcdnError as error:
            # The rejection itself stands: the record did not act. Only its copy is lost, and the log line says so.
            log.error("dead letter not written", offset=record.offset, error=str(error))
            return False

    def _letter(self, record: Record, refused: EventRefused) -> EventRejected:
        return EventRejected(
            node=self._node,
            region=self._region,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            timestamp_ms=record.timestamp_ms,
            record_key=None if record.key is None else record.key[:_KEY_MAX],
            value=None if record.value is None else record.value[:_VALUE_MAX],
            size_bytes=len(record.value or b""),
            headers=tuple(
                Header(name=name[:_KEY_MAX], value=None if value is None else value[:_KEY_MAX])
                for name, value in record.headers[:_HEADERS_MAX]
            ),
            refusal=str(refused.refusal),
            detail=refused.detail[:_DETAIL_MAX],
        )
