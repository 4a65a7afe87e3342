"""The last recorded requests of a model, region by region: what a candidate is asked before any client meets it.

Laws: the same log gives the same requests in the same order, by (broker timestamp, partition, position); what is held at
once is bounded in number and in bytes; reads leave no trace. Recordings are not signed: whoever may append to their topic
can make one up, and it is read as a stranger's.

It must not know models, sessions or what the requests are for.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

from schemas import codec
from schemas.errors import BadInput, EventRefused
from schemas.events import Range, RequestRecorded
from schemas.topics import RECORDINGS
from streams.audit.order import merged
from streams.log.record import LogReader, Record

MAX_LAST: Final = 100_000
MAX_REGION_BYTES: Final = 256 * 2**20


class Recorded(msgspec.Struct, frozen=True):
    partition: int
    offset: int
    event: RequestRecorded


class RegionSample(msgspec.Struct, frozen=True):
    """`ranges` reach from the first of `requests` to the last, in each partition that has any of them."""

    region: str
    requests: tuple[Recorded, ...]
    ranges: tuple[Range, ...]


class _Kept:
    """The newest requests of one region."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self.requests: deque[tuple[Recorded, int]] = deque()

    def take(self, recorded: Recorded, size: int) -> None:
        self.requests.append((recorded, size))
        self._bytes += size
        while len(self.requests) > self._most or self._bytes > MAX_REGION_BYTES:
            self._bytes -= self.requests.popleft()[1]


def last_recorded(
    reader: LogReader, model: str, last: int, region: str | None = None, *, until_ms: int | None = None
) -> list[RegionSample]:
    """The newest `last` of each region (or of that one) up to a broker time, regions by name; fewer where they are very
    large."""
    if not 0 < last <= MAX_LAST:
        raise BadInput(f"the last {last} requests: it is 1 to {MAX_LAST}")
    kept: dict[str, _Kept] = {}
    key = model.encode()
    for record in merged(reader, RECORDINGS.name, until_ms=until_ms):
        if record.key != key or record.value is None:
            continue
        event = _event(record)
        if event is not None and event.model == model and region in (None, event.region):
            recorded = Recorded(record.partition, record.offset, event)
            kept.setdefault(event.region, _Kept(last)).take(recorded, len(record.value))
    samples = []
    for name, of in sorted(kept.items()):
        requests = tuple(recorded for recorded, _ in of.requests)
        samples.append(RegionSample(name, requests, _ranges(requests)))
    return samples


def _event(record: Record) -> RequestRecorded | None:
    """None for what is no recorded request: anybody may append one, and it must not stop a reader."""
    try:
        event = codec.decode(record.topic, record.key, record.value, record.headers).event
    except EventRefused:
        return None
    return event if isinstance(event, RequestRecorded) else None


def _ranges(requests: tuple[Recorded, ...]) -> tuple[Range, ...]:
    offsets: dict[int, list[int]] = {}
    for recorded in requests:
        offsets.setdefault(recorded.partition, []).append(recorded.offset)
    return tuple(
        Range(topic=RECORDINGS.name, partition=partition, start=min(found), end=max(found) + 1)
        for partition, found in sorted(offsets.items())
    )
