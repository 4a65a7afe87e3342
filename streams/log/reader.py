"""Reading Kafka: by assignment, never by group, so a read leaves no trace.

Laws: reads are `read_uncommitted`, as aiokafka's are, so two readers of ours never see two logs; every call is bounded
in time; a topic that is not there is `NotFound`, a broker that does not answer `Unreachable`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import closing
from operator import methodcaller
from typing import Any, Final, cast

from confluent_kafka import (
    OFFSET_INVALID,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka import Message as Delivered
from confluent_kafka.admin import (  # type: ignore[attr-defined] # the package's stub forgets to export it
    AdminClient,
    OffsetSpec,
    TopicDescription,
)

from schemas.errors import MlcdnError, NotFound, Unreachable
from streams.log.client import QUIET, admin_client, forward_logs
from streams.log.record import Record
from streams.log.record import TopicPartition as OurPartition

_TIMEOUT_S: Final = 5.0
_LEADER_PAUSE_S: Final = 0.05
_STALL_S: Final = 10.0
_BATCH: Final = 2_000
# Small enough to stay in the processor's cache while it is gone through: 2 us a record, where 2,000 cost 5.
_READ_BATCH: Final = 100
_EARLIEST: Final = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
_LATEST: Final = OffsetSpec.latest()  # type: ignore[no-untyped-call]
# More than one batch, or a full batch would wait for itself.
_TAIL_QUEUE: Final = 2 * _BATCH


class KafkaReader:
    """One per process is enough; its calls may come from any thread. `timeout_s` bounds each of them.

    Questions (ids, watermarks) go through one admin client: 0.8 ms each, where a consumer of its own costs 14 to 30.
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        security: Mapping[str, str] | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self._bootstrap, self._timeout_s = bootstrap, timeout_s
        self._settings: dict[str, Any] = {**QUIET, "bootstrap.servers": bootstrap, **(security or {})}

    def topic_id(self, topic: str) -> str:
        return str(self._describe(topic).topic_id)

    def partitions(self, topic: str) -> int:
        return len(self._describe(topic).partitions)

    def watermarks(self, topic: str, partition: int) -> tuple[int, int]:
        low, high = self._list_offsets(topic, partition, _EARLIEST, _LATEST)
        return low, high

    def offset_at(self, topic: str, partition: int, timestamp_ms: int) -> int:
        since = OffsetSpec.for_timestamp(max(0, timestamp_ms))
        found, high = self._list_offsets(topic, partition, since, _LATEST)
        return found if found >= 0 else high

    def read(self, topic: str, partition: int, start: int = 0, end: int | None = None) -> Iterator[Record]:
        low, high = self.watermarks(topic, partition)
        with closing(self._consumer()) as consumer:
            position = max(start, low)
            stop = high if end is None else min(end, high)
            if position >= stop:
                return
            consumer.assign([TopicPartition(topic, partition, position)])
            waited = 0.0
            while position < stop:
                batch = consumer.consume(min(_READ_BATCH, stop - position), 0.05)
                waited = 0.0 if batch else waited + 0.05
                if waited > _STALL_S:
                    raise Unreachable("Kafka", self._bootstrap, f"{topic} stood still at {position} of {stop}")
                for message in batch:
                    error = message.error()
                    if error is not None:
                        if error.code() == KafkaError._PARTITION_EOF:
                            return
                        if error.fatal() or not error.retriable():
                            self._raise_unless_passing(error, topic)
                        continue
                    offset = message.offset() or 0
                    if offset >= stop:
                        return
                    position = offset + 1
                    # Not _record: a replay makes ten million of them, and topic and partition are known.
                    yield Record(
                        topic=topic,
                        partition=partition,
                        offset=offset,
                        timestamp_ms=message.timestamp()[1],
                        key=message.key(),
                        value=message.value(),
                        headers=_headers(message),
                    )

    async def tail(self, starts: Mapping[OurPartition, int]) -> AsyncGenerator[Record]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[list[Record] | MlcdnError] = asyncio.Queue()
        room = threading.Semaphore(_TAIL_QUEUE)
        closed = threading.Event()
        thread = threading.Thread(
            target=self._pump,
            args=(dict(starts), loop, queue, room, closed),
            name="log-tail",
            daemon=True,
        )
        thread.start()
        try:
            while True:
                batch = await queue.get()
                if isinstance(batch, MlcdnError):
                    raise batch
                for record in batch:
                    yield record
                    room.release()
        finally:
            closed.set()
            room.release()
            await asyncio.to_thread(thread.join, 5.0)

    def _pump(
        self,
        starts: dict[OurPartition, int],
        loop: asyncio.AbstractEventLoop,
        queue: asyncio.Queue[list[Record] | MlcdnError],
        room: threading.Semaphore,
        closed: threading.Event,
    ) -> None:
        def hand_over(item: list[Record] | MlcdnError) -> None:
            if not closed.is_set():
                try:
                    loop.call_soon_threadsafe(queue.put_nowait, item)
                except RuntimeError:
                    # The loop ended without closing the iterator; there is nobody to hand anything to.
                    closed.set()

        with closing(self._consumer()) as consumer:
            consumer.assign([TopicPartition(topic, partition, start) for (topic, partition), start in starts.items()])
            while not closed.is_set():
                # A short wait bounds what `close` costs; new records end it early.
                first = consumer.poll(0.05)
                if first is None:
                    continue
                records = []
                for message in [first, *consumer.consume(_BATCH - 1, 0)]:
                    error = message.error()
                    if error is None:
                        records.append(_record(message))
                    elif error.fatal() or error.code() in _NOT_THERE:
                        hand_over(self._translated(KafkaException(error), message.topic() or "?"))
                        return
                for _ in records:
                    room.acquire()
                    if closed.is_set():
                        return
                if records:
                    hand_over(records)

    def _consumer(self) -> Consumer:
        return Consumer(
            {
                **self._settings,
                "group.id": "mlcdn-unused",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_uncommitted",
                "enable.partition.eof": True,
                "fetch.queue.backoff.ms": 5,
                # What is fetched ahead of a reader; the default of 64 MiB is one of each partition of a merge.
                "queued.max.messages.kbytes": 4_096,
                "fetch.wait.max.ms": 100,
                "reconnect.backoff.ms": 50,
                "reconnect.backoff.max.ms": 1_000,
            },
            logger=forward_logs(),
        )

    def _admin(self) -> AdminClient:
        return admin_client(self._settings)

    def _describe(self, topic: str) -> TopicDescription:
        asked = self._admin().describe_topics(TopicCollection([topic]), request_timeout=self._timeout_s)
        try:
            return cast("TopicDescription", asked[topic].result())
        except KafkaException as error:
            raise self._translated(error, topic) from error

    def _list_offsets(self, topic: str, partition: int, *specs: OffsetSpec) -> list[int]:
        give_up = time.monotonic() + self._timeout_s
        at = TopicPartition(topic, partition)
        while True:
            asked = [
                self._admin().list_offsets(
                    {at: spec},
                    isolation_level=IsolationLevel.READ_UNCOMMITTED,
                    request_timeout=max(0.1, give_up - time.monotonic()),
                )[at]
                for spec in specs
            ]
            try:
                offsets = [int(future.result().offset) for future in asked]
            except KafkaException as error:
                code = error.args[0].code()
                # "No leader found": no such topic, no such partition, or no broker. Asking for the topic tells which.
                if code == KafkaError._NOENT and partition >= self.partitions(topic):
                    raise NotFound(f"no partition {partition} of topic {topic} at {self._bootstrap}") from error
                # A topic that was just made, or a broker that just came back, is led a moment later.
                if code not in _NO_LEADER_YET or time.monotonic() > give_up:
                    raise self._translated(error, topic) from error
                if code in _OLD_LEADER:
                    self._learn_leader(topic, give_up)
            else:
                # What the client gives for a question that was sent and not answered in time, and no error with it.
                # Taken for an offset it would be a log that ends at its start, and a reader that has caught up.
                if OFFSET_INVALID in offsets:
                    raise Unreachable("Kafka", self._bootstrap, f"it does not say where {topic} begins and ends")
                return offsets
            time.sleep(_LEADER_PAUSE_S)

    def _learn_leader(self, topic: str, give_up: float) -> None:
        """A broker that came back has another epoch, and the client asks with the one it knew until it is told."""
        try:
            self._admin().list_topics(topic, timeout=max(0.1, give_up - time.monotonic()))
        except KafkaException as error:
            raise self._translated(error, topic) from error

    def _raise_unless_passing(self, error: KafkaError, topic: str) -> None:
        if error.code() in (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT):
            return
        raise self._translated(KafkaException(error), topic)

    def _translated(self, error: KafkaException, topic: str) -> MlcdnError:
        what: KafkaError = error.args[0]
        if what.code() in _NOT_THERE:
            return NotFound(f"no topic {topic} at {self._bootstrap}; mlcdn topics apply creates it")
        return Unreachable("Kafka", self._bootstrap, what.str())


_OLD_LEADER: Final = (KafkaError.FENCED_LEADER_EPOCH, KafkaError.UNKNOWN_LEADER_EPOCH)
_NO_LEADER_YET: Final = (
    *_OLD_LEADER,
    KafkaError._NOENT,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.OFFSET_NOT_AVAILABLE,
)
_NOT_THERE: Final = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)


def _record(message: Delivered) -> Record:
    return Record(
        topic=message.topic() or "",
        partition=message.partition() or 0,
        offset=message.offset() or 0,
        timestamp_ms=message.timestamp()[1],
        key=message.key(),
        value=message.value(),
        headers=_headers(message),
    )


# confluent-kafka 2.16 returns from headers() with the decoding error still pending. The interpreter's fast path for
# method calls does not look, and the error comes out of some later line; a call through methodcaller is checked.
_read_headers: Final = methodcaller("headers")


def _headers(message: Delivered) -> tuple[tuple[str, bytes | None], ...]:
    """As a consumer gives them: a list of pairs, or nothing."""
    try:
        raw = _read_headers(message)
    # A header name that is not UTF-8. Anybody may append one, so it must not stop a reader: the record stands without
    # its headers, unsigned and without an id, and acts nowhere.
    except (SystemError, UnicodeDecodeError):
        return ()
    return tuple(raw) if isinstance(raw, list) else ()
