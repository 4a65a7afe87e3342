"""The one order that records of several partitions and topics have: by (broker timestamp, topic, partition, offset).

Laws: the same records always come in the same order, also where a broker's clock went back; whatever is merged, one
record a partition is held beside what the reader has fetched.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from operator import attrgetter

from streams.log.record import LogReader, Record

in_order = attrgetter("timestamp_ms", "topic", "partition", "offset")


def partitions(reader: LogReader, topics: Sequence[str]) -> list[tuple[str, int]]:
    return [(topic, partition) for topic in topics for partition in range(reader.partitions(topic))]


def end_at(reader: LogReader, topic: str, partition: int, until_ms: int | None) -> int:
    """The position after the last record that was there at a broker time, or is there now."""
    return (
        reader.watermarks(topic, partition)[1] if until_ms is None else reader.offset_at(topic, partition, until_ms + 1)
    )


def merged(reader: LogReader, topic: str, *, until_ms: int | None = None) -> Iterator[Record]:
    """All records of a topic, up to and with a broker time."""
    ends = {at: end_at(reader, *at, until_ms) for at in partitions(reader, [topic])}
    return heapq.merge(*(reader.read(topic, p, 0, end) for (topic, p), end in ends.items()), key=in_order)
