"""A record of the log, and the two ports through which everything else meets the log. PURE.

Words: a *position* is a record's offset in its topic and partition; the *high watermark* is the position after the
last record; a record is *appended* when the log has acknowledged it, *offered* when it may be dropped (and counted).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Protocol

import msgspec

from schemas.codec import Message

TopicPartition = tuple[str, int]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What stands at one position. `timestamp_ms` is the broker's, Unix milliseconds."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


class Appender(Protocol):
    """The writing port."""

    async def append(self, message: Message) -> Record:
        """Appends and waits for the acknowledgement; `Unreachable` when it does not come in time."""

    def offer(self, message: Message) -> bool:
        """Hands the message to a bounded queue and returns at once; False when the queue is full and it was dropped."""

    async def close(self) -> None:
        """Delivers what is queued, within a bounded time."""


class LogReader(Protocol):
    """The reading port. Reads leave no trace: no consumer group, no commit."""

    def topic_id(self, topic: str) -> str:
        """The topic's own id: a topic that was deleted and made again has another. `NotFound` when there is none."""

    def partitions(self, topic: str) -> int: ...

    def watermarks(self, topic: str, partition: int) -> tuple[int, int]:
        """Low and high watermark."""

    def offset_at(self, topic: str, partition: int, timestamp_ms: int) -> int:
        """The first position at or after the broker time; the high watermark when there is none."""

    def read(self, topic: str, partition: int, start: int = 0, end: int | None = None) -> Iterator[Record]:
        """Records from `start` (or the low watermark) up to, not including, `end` (default: the high watermark now)."""

    def tail(self, starts: Mapping[TopicPartition, int]) -> AsyncGenerator[Record]:
        """Records from the given positions on, as they come, until the iterator is closed."""
