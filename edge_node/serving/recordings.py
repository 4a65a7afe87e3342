"""Requests that are recorded: a sample of what clients asked and what the stable release answered, for replays.

    an answer that was given → one of the share, and nobody's secret? → within the budget? → a short queue → offered to the log

Laws:
- Nothing is recorded unless the release asks for it, and then by a request's key: the same one always is, or never.
- What is not ours to keep is not kept: a request with Authorization, of a tenant or with `no-store` is not recorded, nor
  the values of an input that the release redacts. Headers, clients and cohorts are nowhere in a record.
- Recording never delays an answer, and is bounded: in a record's size, in bytes a second, and in what waits. What is over
  a bound is not recorded, and counted. The log is only offered to, through a producer of its own, so that no row or beat
  is dropped for a recording.
- A request that is asked again and again is recorded once in a while, not once each time.

It must not know doors, caches, or who reads the records.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from edge_node.serving.batches import Ask
from edge_node.serving.reporter import Identity
from edge_node.serving.served import Served
from inference.oip_binary import raw_of, raw_size
from schemas.errors import BadInput
from schemas.events import RecordedTensor, RequestRecorded
from schemas.events.samples import MAX_RECORDED_BYTES
from schemas.metrics import counter
from streams.log.record import Appender
from streams.log.writer import Writer

MAX_WAITING: Final = 256
# Of one look: an event of 256 KiB takes the loop as long as a large answer does.
OFFERED_AT_ONCE: Final = 8
AGAIN_S: Final = 60.0
_MAX_SEEN: Final = 65_536
_SHARE: Final = 2**32


class Recordings:
    """One event loop owns it. `open_log` makes the producer when a release first asks to be recorded."""

    def __init__(self, identity: Identity, open_log: Callable[[], Appender], bytes_s: int) -> None:
        self._identity, self._open_log, self._bytes_s = identity, open_log, bytes_s
        self._writer: Writer | None = None
        self._waiting: deque[tuple[Ask, bytes, int]] = deque()
        self._seen: set[bytes] = set()
        self._forget_at = time.monotonic() + AGAIN_S
        # One record of the largest size must fit into an allowance, whatever it grows by.
        self._most = max(bytes_s, MAX_RECORDED_BYTES) if bytes_s else 0
        self._allowed, self._allowed_at = float(self._most), time.monotonic()

    def witness(self, served: Served) -> Callable[[Ask, bytes], None] | None:
        """What is to be told of the answers of `served`; None where it asks for no recording."""
        record = served.wanted.released.record
        if record.fraction <= 0 or not self._bytes_s:
            return None
        below = int(record.fraction * _SHARE)

        def offer(ask: Ask, body: bytes) -> None:
            if int.from_bytes(ask.key[12:16], "big") >= below or ask.key in self._seen:
                return
            # A tenant is one that a gateway names, or a caller's credentials.
            if ask.controls.tenant or ask.controls.no_store:
                return
            self._take(ask, body)

        return offer

    def tend(self) -> None:
        """Every few ms: a few of those that wait are offered."""
        now = time.monotonic()
        self._allowed = min(self._most, self._allowed + (now - self._allowed_at) * self._bytes_s)
        self._allowed_at = now
        if now >= self._forget_at:
            self._seen.clear()
            self._forget_at = now + AGAIN_S
        for _ in range(min(OFFERED_AT_ONCE, len(self._waiting))):
            ask, body, at_ms = self._waiting.popleft()
            self._offer(ask, body, at_ms)

    async def close(self) -> None:
        while self._waiting:
            self._offer(*self._waiting.popleft())
        if self._writer is not None:
            await self._writer.close()

    def _take(self, ask: Ask, body: bytes) -> None:
        redacted = ask.served.wanted.released.record.redacted
        size = sum(raw_size(array) for name, array in ask.inputs.items() if name not in redacted) + len(body)
        if size > MAX_RECORDED_BYTES:
            self._count(ask, "too_large")
        elif size > self._allowed or len(self._waiting) >= MAX_WAITING:
            self._count(ask, "over_budget")
        else:
            self._allowed -= size
            if len(self._seen) < _MAX_SEEN:
                self._seen.add(ask.key)
            self._waiting.append((ask, body, time.time_ns() // 1_000_000))

    def _offer(self, ask: Ask, body: bytes, at_ms: int) -> None:
        if self._writer is None:
            source = f"/regions/{self._identity.region}/nodes/{self._identity.node}"
            self._writer = Writer(self._open_log(), source=source)
        try:
            offered = self._writer.offer(self._event(ask, body, at_ms))
        except BadInput:
            # Over the topic's size all the same: many small inputs with long names.
            self._count(ask, "too_large")
            return
        self._count(ask, "recorded" if offered else "dropped")

    def _event(self, ask: Ask, body: bytes, at_ms: int) -> RequestRecorded:
        served = ask.served
        redacted = served.wanted.released.record.redacted
        datatypes = {spec.name: spec.datatype for spec in served.inputs}
        return RequestRecorded(
            **self._identity.fleet(),
            model=served.name,
            sequence=served.wanted.sequence,
            digest=served.digest,
            recorded_at_ms=at_ms,
            inputs=tuple(
                RecordedTensor(
                    name=name,
                    datatype=datatypes[name],
                    shape=array.shape,
                    data=b"" if name in redacted else raw_of(array),
                    redacted=name in redacted,
                )
                for name, array in ask.inputs.items()
            ),
            outputs=body,
        )

    def _count(self, ask: Ask, outcome: str) -> None:
        counter("mlcdn_recordings_total").labels(ask.served.name, outcome).inc()
