"""The checkpoint job: reads both signed topics, checks every signature, and signs what it saw.

    python -m streams.jobs.checkpoints

Laws:
- A checkpoint is due when a record has waited `checkpoint_s` for one, when `MAX_RECORDS` wait, when the last one has
  used up a third of its life, and when there is none yet; it speaks of the end of the log.
- It signs nothing over a log that a checkpoint disputes, and nothing that its key may not say.
- Two jobs do no harm: each reads the other's checkpoints and finds that none is due; what both append in one moment
  says the same, and the second counts for nothing.
- Nothing is kept: it reads from the first record when it starts, and whenever a topic ends below what it has read.

It must not know what readers do with a checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from processes import logs
from processes.signals import stop_on_signals
from schemas import signing
from schemas.errors import MlcdnError, Refusal, SettingsInvalid
from schemas.events import LogCheckpoint
from schemas.events.trust import MAX_BAD_SIGNATURES
from schemas.settings import Settings, load
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds import invalidations, releases
from streams.folds.checkpoints import Alarm, ChainWatch
from streams.folds.invalidations import Invalidations
from streams.folds.releases import Releases
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.record import LogReader, Record
from streams.log.writer import Writer, wall_clock_ms

TICK_S: Final = 1.0
APPEND_S: Final = 5.0
MAX_RECORDS: Final = 10_000
# Records folded between two breaths of the loop: 2,000 signatures are a quarter of a second.
_CHUNK: Final = 2_000

log = structlog.get_logger()


class Notary:
    """One topic as this job has read it. `since` and `bad` are what the next checkpoint says of signatures."""

    def __init__(self, topic: str, roots: tuple[bytes, ...], keyid: str) -> None:
        self.topic, self._keyid = topic, keyid
        self.watch = ChainWatch(topic)
        self._state: Releases | Invalidations = (
            Releases.initial(roots) if topic == RELEASES.name else Invalidations.initial(roots)
        )
        self._since = -1
        self._bad: list[int] = []
        self._waits_at, self._waits_since_ms = -1, 0
        # The alarms that stand in this process's log already.
        self.said: frozenset[Alarm] = frozenset()

    def take(self, record: Record, now_ms: int) -> None:
        step = (
            releases.fold(self._state, record)
            if isinstance(self._state, Releases)
            else invalidations.fold(self._state, record)
        )
        self._state = step.state
        event = step.envelope.event if step.envelope else None
        if step.refused is not None and step.refused.refusal is Refusal.BAD_SIGNATURE:
            self._note_bad(record.offset)
        if self.watch.take(record, event) and isinstance(event, LogCheckpoint):
            self._counted(event)
        if not isinstance(event, LogCheckpoint):
            if self._waits_at <= self._vouched:
                self._waits_since_ms = now_ms
            self._waits_at = record.offset

    def due(self, now_ms: int, every_ms: int, life_ms: int) -> bool:
        """Whether to append a checkpoint now that all that stands in the log has been taken."""
        if self.watch.position < 0 or self.watch.holds(at_end=True) or not self._may_sign():
            return False
        last = self.watch.last
        if last is None or now_ms > last.expires_at_ms - life_ms * 2 // 3:
            return True
        if self._waits_at <= last.position:
            return False
        return self.watch.position - last.position >= MAX_RECORDS or now_ms - self._waits_since_ms >= every_ms

    def checkpoint(self, now_ms: int, life_ms: int) -> LogCheckpoint:
        return LogCheckpoint(
            position=self.watch.position,
            chain_sha256=self.watch.chain.hex(),
            since=self._since,
            bad_signatures=tuple(self._bad),
            expires_at_ms=now_ms + life_ms,
        )

    @property
    def _vouched(self) -> int:
        return self.watch.last.position if self.watch.last is not None else -1

    def _may_sign(self) -> bool:
        grant = self._state.trust.keys.get(self._keyid)
        return grant is not None and grant.revoked_at is None and LogCheckpoint.__name__ in grant.kinds

    def _note_bad(self, position: int) -> None:
        self._bad.append(position)
        if len(self._bad) > MAX_BAD_SIGNATURES:
            # The list must be whole above `since`: who reads the records below checks their signatures anew.
            self._since = self._bad.pop(0)

    def _counted(self, event: LogCheckpoint) -> None:
        """The chain of lists goes on from a checkpoint whose own list joins what was vouched for before it."""
        if event.since <= self._since:
            self._since = max(self._since, event.position)
            self._bad = [bad for bad in self._bad if bad > self._since]


class CheckpointJob:
    """`run` reads and appends until it is told to stop; `tick` does it once."""

    def __init__(
        self,
        reader: LogReader,
        writer: Writer,
        roots: tuple[bytes, ...],
        key: Ed25519PrivateKey,
        *,
        every_s: float,
        expires_s: float,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._reader, self._writer, self._roots, self._now_ms = reader, writer, roots, now_ms
        self._keyid = signing.key_id(key.public_key().public_bytes_raw())
        self._every_ms, self._life_ms = int(every_s * 1000), int(expires_s * 1000)
        self._notaries: dict[str, tuple[str, Notary]] = {}

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                await self.tick()
            except MlcdnError as error:
                log.warning("checkpoint_not_written", error=str(error))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), TICK_S)

    async def tick(self) -> list[str]:
        """Reads both topics to their ends and appends what is due; the topics it appended to."""
        return [topic for topic in (RELEASES.name, INVALIDATIONS.name) if await self._attend(topic)]

    async def _attend(self, topic: str) -> bool:
        notary = await self._notary(topic)
        await self._read_on(notary)
        now_ms = self._now_ms()
        if not notary.due(now_ms, self._every_ms, self._life_ms):
            alarms = notary.watch.alarms(now_ms, at_end=True)
            for alarm in alarms.keys() - notary.said:
                log.error("log_alarm", topic=topic, reason=str(alarm), what=alarms[alarm])
            notary.said = frozenset(alarms)
            return False
        event = notary.checkpoint(now_ms, self._life_ms)
        await self._writer.append(event, topic=topic)
        # Its own checkpoint counts when it is read back, as anybody's does.
        await self._read_on(notary)
        log.info("checkpoint", topic=topic, position=event.position, bad_signatures=len(event.bad_signatures))
        return True

    async def _notary(self, topic: str) -> Notary:
        """The topic's own, or a new one where the topic was made again or ends below what was read."""
        found = await asyncio.to_thread(self._reader.topic_id, topic)
        known = self._notaries.get(topic)
        if known is not None and known[0] == found:
            _, high = await asyncio.to_thread(self._reader.watermarks, topic, 0)
            if high > known[1].watch.position:
                return known[1]
            log.error("log_alarm", topic=topic, reason="truncated", what=f"ends at {high - 1}")
        self._notaries[topic] = (found, Notary(topic, self._roots, self._keyid))
        return self._notaries[topic][1]

    async def _read_on(self, notary: Notary) -> None:
        _, high = await asyncio.to_thread(self._reader.watermarks, notary.topic, 0)
        while (start := notary.watch.position + 1) < high:
            end = min(high, start + _CHUNK)
            records = await asyncio.to_thread(lambda: list(self._reader.read(notary.topic, 0, start, end)))  # noqa: B023
            if not records:
                return
            for record in records:
                notary.take(record, self._now_ms())


async def run(settings: Settings) -> None:
    if settings.signing_key is None:
        raise SettingsInvalid("setting signing_key: checkpoints are signed, so this job needs a private key file")
    key, roots = load_private(settings.signing_key), load_roots(settings.root_keys)
    writer = Writer(
        KafkaAppender(settings.kafka, client_id="mlcdn-checkpoints", timeout_s=APPEND_S),
        source=f"/streams/{settings.node}",
        signing_key=key,
    )
    job = CheckpointJob(
        KafkaReader(settings.kafka),
        writer,
        roots,
        key,
        every_s=settings.checkpoint_s,
        expires_s=settings.checkpoint_expires_s,
    )
    async with stop_on_signals() as stop:
        try:
            await job.run(stop)
        finally:
            await writer.close()


def main() -> None:
    try:
        settings = load()
        logs.configure(settings.log_level)
        asyncio.run(run(settings))
    except SettingsInvalid as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
