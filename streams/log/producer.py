"""Appending to Kafka: idempotent, bounded, with its own poll thread.

Laws: `append` waits for every in-sync replica; `offer` never blocks and never raises for a full queue (a produce call
costs 10 us while the broker is down), what it drops is counted exactly; nothing is retried beyond `timeout_s`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Final

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka import Message as Delivered

from schemas.codec import Message
from schemas.errors import BadInput, MlcdnError, NotFound, Unreachable
from streams.log.client import QUIET, forward_logs
from streams.log.record import Record

_POLL_S: Final = 0.1
_CLOSE_S: Final = 5.0


class KafkaAppender:
    """`dropped` counts messages that will never stand in the log: refused by a full queue, or undelivered in time."""

    def __init__(
        self,
        bootstrap: str,
        *,
        client_id: str,
        queue_messages: int = 10_000,
        queue_kbytes: int = 16_384,
        timeout_s: float = 30.0,
        linger_ms: int = 0,
        security: Mapping[str, str] | None = None,
    ) -> None:
        self._bootstrap = bootstrap
        self._producer = Producer(
            {
                **QUIET,
                "bootstrap.servers": bootstrap,
                "client.id": client_id,
                "enable.idempotence": True,
                "acks": "all",
                "compression.type": "none",
                # librdkafka's default of 5 ms is what a control event would wait for company.
                "linger.ms": linger_ms,
                "queue.buffering.max.messages": queue_messages,
                "queue.buffering.max.kbytes": queue_kbytes,
                "delivery.timeout.ms": int(timeout_s * 1000),
                # For how long a topic that is not there may be one that is being made; the default is 30 s.
                "topic.metadata.propagation.max.ms": 5_000,
                "reconnect.backoff.ms": 50,
                "reconnect.backoff.max.ms": 1_000,
                **(security or {}),
            },
            logger=forward_logs(),
        )
        self.dropped = 0
        self._counting = threading.Lock()
        self._closing = threading.Event()
        self._poller = threading.Thread(target=self._poll, name=f"{client_id}-poll", daemon=True)
        self._poller.start()

    async def append(self, message: Message) -> Record:
        loop = asyncio.get_running_loop()
        acknowledged: asyncio.Future[Record] = loop.create_future()

        def delivered(error: KafkaError | None, record: Delivered) -> None:
            outcome = _refused(error, message.topic, self._bootstrap) if error else _record(message, record)
            if error is not None:
                self._count_drop()
            try:
                loop.call_soon_threadsafe(_settle, acknowledged, outcome)
            except RuntimeError:
                # The loop that asked has ended; nobody waits for the answer any more.
                return

        try:
            self._produce(message, delivered)
        except BufferError:
            self._count_drop()
            raise Unreachable("Kafka", self._bootstrap, "the queue of unsent messages is full") from None
        except KafkaException as error:
            self._count_drop()
            raise _refused(error.args[0], message.topic, self._bootstrap) from error
        return await acknowledged

    def offer(self, message: Message) -> bool:
        try:
            self._produce(message, self._offered)
        except (BufferError, KafkaException):
            self._count_drop()
            return False
        return True

    async def close(self) -> None:
        """Delivers what is queued within 5 s; what is left then is dropped and counted."""
        left = await asyncio.to_thread(self._producer.flush, _CLOSE_S)
        self._closing.set()
        await asyncio.to_thread(self._poller.join, 2.0)
        if left:
            self._producer.purge()
            # Settles whoever still waits for what was purged.
            await asyncio.to_thread(self._producer.flush, 1.0)

    def _produce(self, message: Message, callback: Callable[[KafkaError | None, Delivered], None]) -> None:
        self._producer.produce(
            message.topic,
            key=message.key,
            value=message.value,
            headers=list(message.headers),
            on_delivery=callback,
        )

    def _offered(self, error: KafkaError | None, _: Delivered) -> None:
        if error is not None:
            self._count_drop()

    def _count_drop(self) -> None:
        # From the poll thread and from callers: an addition alone is not atomic.
        with self._counting:
            self.dropped += 1

    def _poll(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(_POLL_S)


def _settle(acknowledged: asyncio.Future[Record], outcome: Record | MlcdnError) -> None:
    if acknowledged.done():
        return
    if isinstance(outcome, Record):
        acknowledged.set_result(outcome)
    else:
        acknowledged.set_exception(outcome)


def _record(message: Message, delivered: Delivered) -> Record:
    return Record(
        topic=message.topic,
        partition=delivered.partition() or 0,
        offset=delivered.offset() or 0,
        timestamp_ms=delivered.timestamp()[1],
        key=message.key,
        value=message.value,
        headers=message.headers,
    )


def _refused(error: KafkaError, topic: str, bootstrap: str) -> MlcdnError:
    match error.code():
        case KafkaError.MSG_SIZE_TOO_LARGE | KafkaError.INVALID_MSG | KafkaError._INVALID_ARG:
            return BadInput(f"Kafka refuses the record: {error.str()}")
        case KafkaError.UNKNOWN_TOPIC_OR_PART | KafkaError._UNKNOWN_TOPIC | KafkaError._UNKNOWN_PARTITION:
            return NotFound(f"no topic {topic} at {bootstrap}; mlcdn topics apply creates it")
    return Unreachable("Kafka", bootstrap, error.str())
