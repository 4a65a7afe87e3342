"""The boot read: a whole topic, in the one order, up to the high watermark."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator

from streams.log.record import LogReader, Record, TopicPartition


def in_order(partitions: Iterable[Iterator[Record]]) -> Iterator[Record]:
    """One topic's partitions as one sequence, by (broker timestamp, partition, offset): the order of every replay."""
    return heapq.merge(*partitions, key=lambda r: (r.timestamp_ms, r.partition, r.offset))


def read_to_watermark(
    reader: LogReader,
    topic: str,
    fold_one: Callable[[Record], None],
    starts: dict[TopicPartition, int] | None = None,
) -> dict[TopicPartition, int]:
    """Hands every record over, in order, and returns the next position of each partition.

    `starts` are positions to begin at; by default each partition's first record.
    """
    following = {}
    streams = []
    for partition in range(reader.partitions(topic)):
        start = (starts or {}).get((topic, partition), 0)
        _, high = reader.watermarks(topic, partition)
        following[(topic, partition)] = max(start, high)
        streams.append(reader.read(topic, partition, start, high))
    for record in in_order(streams):
        fold_one(record)
    return following
