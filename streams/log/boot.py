"""The boot read: a whole topic, in the one order, up to the high watermark."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from streams.log.record import LogReader, Record, TopicPartition


def read_to_watermark(
    reader: LogReader,
    topic: str,
    fold_one: Callable[[Record], None],
    starts: dict[TopicPartition, int] | None = None,
) -> dict[TopicPartition, int]:
    """Hands every record over and returns the next position of each partition.

    Partitions merge by (broker timestamp, partition, offset), so a replay has one order. `starts` are positions to
    begin at; by default each partition's first record.
    """
    following = {}
    streams = []
    for partition in range(reader.partitions(topic)):
        start = (starts or {}).get((topic, partition), 0)
        _, high = reader.watermarks(topic, partition)
        following[(topic, partition)] = max(start, high)
        streams.append(reader.read(topic, partition, start, high))
    for record in heapq.merge(*streams, key=lambda r: (r.timestamp_ms, r.partition, r.offset)):
        fold_one(record)
    return following
