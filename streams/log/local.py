"""The log in memory: both ports, with real offset semantics. Product code: it passes the contract suite Kafka passes.

For embedding and for tests. One process, one thread; time is an argument.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from zlib import crc32

from schemas.codec import Headers, Message
from schemas.errors import NotFound, Unreachable
from schemas.topics import TOPICS
from streams.log.record import Record, TopicPartition


class LocalLog:
    """`clock_ms` gives the broker's time. `dropped` counts offers refused while `fail_next` was in force."""

    def __init__(self, clock_ms: Callable[[], int], partitions: Mapping[str, int] | None = None) -> None:
        self._clock_ms = clock_ms
        layout = partitions if partitions is not None else {t.name: t.partitions for t in TOPICS.values()}
        self._records: dict[TopicPartition, list[Record]] = {(t, p): [] for t, n in layout.items() for p in range(n)}
        self._ids = {topic: str(uuid.uuid4()) for topic in layout}
        self._appended = asyncio.Event()
        self._failures = 0
        self.dropped = 0

    def fail_next(self, count: int) -> None:
        """The next `count` writes fail as if the broker were away."""
        self._failures = count

    def recreate(self, topic: str) -> None:
        """Deletes the topic and makes it again: another id, no records."""
        for at in [at for at in self._records if at[0] == topic]:
            self._records[at] = []
        self._ids[topic] = str(uuid.uuid4())

    def append_raw(self, topic: str, key: bytes | None, value: bytes | None, headers: Headers = ()) -> Record:
        """Appends whatever it is given, as anybody with access to the broker could."""
        count = self.partitions(topic)
        partition = crc32(key or b"") % count
        records = self._records[(topic, partition)]
        record = Record(
            topic=topic,
            partition=partition,
            offset=len(records),
            timestamp_ms=self._clock_ms(),
            key=key,
            value=value,
            headers=tuple(headers),
        )
        records.append(record)
        self._appended.set()
        self._appended = asyncio.Event()
        return record

    async def append(self, message: Message) -> Record:
        if self._failures:
            self._failures -= 1
            raise Unreachable("the log", "memory", "told to fail")
        return self.append_raw(message.topic, message.key, message.value, message.headers)

    def offer(self, message: Message) -> bool:
        if self._failures:
            self._failures -= 1
            self.dropped += 1
            return False
        self.append_raw(message.topic, message.key, message.value, message.headers)
        return True

    async def close(self) -> None:
        """Nothing is queued."""

    def topic_id(self, topic: str) -> str:
        self.partitions(topic)
        return self._ids[topic]

    def partitions(self, topic: str) -> int:
        count = sum(name == topic for name, _ in self._records)
        if not count:
            raise NotFound(f"no topic {topic}")
        return count

    def watermarks(self, topic: str, partition: int) -> tuple[int, int]:
        return 0, len(self._at(topic, partition))

    def offset_at(self, topic: str, partition: int, timestamp_ms: int) -> int:
        records = self._at(topic, partition)
        return next((r.offset for r in records if r.timestamp_ms >= timestamp_ms), len(records))

    def read(self, topic: str, partition: int, start: int = 0, end: int | None = None) -> Iterator[Record]:
        records = self._at(topic, partition)
        yield from records[start : len(records) if end is None else end]

    async def tail(self, starts: Mapping[TopicPartition, int]) -> AsyncGenerator[Record]:
        following = dict(starts)
        while True:
            appended = self._appended
            for (topic, partition), position in list(following.items()):
                for record in self._at(topic, partition)[position:]:
                    following[(topic, partition)] = record.offset + 1
                    yield record
            if appended is self._appended:
                await appended.wait()

    def _at(self, topic: str, partition: int) -> list[Record]:
        try:
            return self._records[(topic, partition)]
        except KeyError:
            raise NotFound(f"no partition {partition} of topic {topic}") from None
