"""Writer: an event becomes a message, signed where the topic is signed, and is appended or offered.

It must not know whether the log is Kafka. Ids are UUIDv7, so they sort by the time they were made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import uuid_utils
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from schemas import codec, signing
from schemas.codec import Message
from schemas.errors import SettingsInvalid
from schemas.events import Event
from schemas.topics import TOPICS
from streams.log.record import Appender, Record


@dataclass(frozen=True, slots=True)
class Appended:
    """`id` is the event's CloudEvents id; `record` stands at its position."""

    id: str
    record: Record


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Writer:
    """`source` is ``/regions/<r>/nodes/<n>`` or ``/operators/<who>``. `signing_key`: for signed topics only."""

    def __init__(
        self,
        appender: Appender,
        *,
        source: str,
        signing_key: Ed25519PrivateKey | None = None,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._appender, self._source, self._key, self._now_ms = appender, source, signing_key, now_ms

    async def append(self, event: Event, *, causation_id: str | None = None, topic: str | None = None) -> Appended:
        """Appends and waits for the acknowledgement. `topic` is needed where a kind may stand in several."""
        event_id = str(uuid_utils.uuid7())
        return Appended(event_id, await self._appender.append(self._message(event, event_id, causation_id, topic)))

    def offer(self, event: Event, *, causation_id: str | None = None) -> bool:
        """Hands the event over without waiting; False when it was dropped, and the appender has counted it."""
        return self._appender.offer(self._message(event, str(uuid_utils.uuid7()), causation_id, None))

    async def close(self) -> None:
        """Closes the appender: delivers what is queued, within its bounded time."""
        await self._appender.close()

    def _message(self, event: Event, event_id: str, causation_id: str | None, topic: str | None) -> Message:
        topic = topic or _topic_of(event)
        message = codec.encode(
            event,
            topic=topic,
            id=event_id,
            source=self._source,
            now_ms=self._now_ms(),
            causation_id=causation_id,
        )
        if not TOPICS[topic].signed:
            return message
        if self._key is None:
            raise SettingsInvalid(f"{topic} is signed: a signing key is needed to append {event.kind}")
        return signing.sign(message, self._key)


def _topic_of(event: Event) -> str:
    found = [t.name for t in TOPICS.values() if event.kind in t.kinds]
    if len(found) != 1:
        raise ValueError(f"{event.kind} may stand in {' and '.join(found)}: say which")
    return found[0]
