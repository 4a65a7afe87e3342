"""The cell: makes a Faust app, watches it, and makes a new one when facts say that it stands still.

One attempt, until `stop`:
 1. the broker answers and every topic is there (`app.start` succeeds and only logs when a topic is missing);
 2. the positions not yet handled are read to the high watermark by a plain reader, without a group;
 3. those positions are committed for the group, so that Faust begins there;
 4. `on_caught_up` is told, once;
 5. a new app is started, within a deadline: a forbidden group would hang for ever;
 6. live records: below the position is dropped, above it the gap is read first, at it is handled;
 7. a lag without progress (asked of the broker, not of Faust, whose silent stalls are known) ends the attempt;
 8. the app is stopped, also after a failed start; the next attempt follows after 0.5 to 10 s.

Laws: a record reaches `on_record` at least once and in order, and after a crash of this process again from the start or
from wherever its fold says; nothing rests on committed offsets; an exception in a handler is a dead letter, never a
stopped stream (Faust stops a topic for good after the fifth, and says nothing).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import structlog
from confluent_kafka import Consumer, KafkaException, TopicPartition

from schemas import metrics
from schemas.errors import EventRefused, MlcdnError, Refusal
from streams.follow.app import FollowSpec, build_app
from streams.follow.dead_letters import DeadLetters
from streams.log.client import QUIET, forward_logs
from streams.log.record import LogReader, Record
from streams.log.record import TopicPartition as At

log = structlog.get_logger(__name__)

START_S: Final = 30.0
STOP_S: Final = 10.0
STALL_S: Final = 8.0
CHECK_S: Final = 1.0
FIRST_BACKOFF_S: Final = 0.5
LAST_BACKOFF_S: Final = 10.0


class Stalled(Exception):
    """The app runs, the log moves on, and nothing arrives."""


class Follower:
    """Follows the topics of `spec`. `positions` are the next to be handled; `rebuilds` counts apps after the first.

    `on_record` runs in the event loop and must be quick; an `EventRefused` it raises, or anything else, is a dead letter.
    `on_recreated` is told a topic that was deleted and made again, before its records come anew from the start.
    """

    def __init__(
        self,
        spec: FollowSpec,
        reader: LogReader,
        on_record: Callable[[Record], None],
        on_caught_up: Callable[[], None],
        dead_letters: DeadLetters,
        on_recreated: Callable[[str], None] | None = None,
    ) -> None:
        self._spec, self._reader, self._dead_letters = spec, reader, dead_letters
        self._on_record, self._on_caught_up, self._on_recreated = on_record, on_caught_up, on_recreated
        self.positions: dict[At, int] = {}
        self.topic_ids: dict[str, str] = {}
        self.caught_up = False
        self.rebuilds = -1
        self._highs: dict[At, int] = {}
        self._progress_at = time.monotonic()
        self._gate = asyncio.Lock()

    def lag(self) -> dict[str, int]:
        """Records behind the high watermark when it was last asked for, by topic."""
        behind = dict.fromkeys(self._spec.topics, 0)
        for (topic, partition), high in self._highs.items():
            behind[topic] += max(0, high - self.positions.get((topic, partition), 0))
        return behind

    async def run(self, stop: asyncio.Event) -> None:
        backoff = FIRST_BACKOFF_S
        while not stop.is_set():
            began = time.monotonic()
            try:
                await self._attempt(stop)
            except (MlcdnError, Stalled, TimeoutError, KafkaException) as error:
                log.warning("follower starts over", group=self._spec.group, error=str(error) or type(error).__name__)
            # Faust and aiokafka raise whatever their depths raise; the cure for all of it is a new app.
            except Exception:
                log.exception("follower starts over", group=self._spec.group)
            backoff = FIRST_BACKOFF_S if time.monotonic() - began > 30 else min(backoff * 2, LAST_BACKOFF_S)
            if not self.caught_up:
                backoff = min(backoff, 1.0)
            if not stop.is_set():
                await _wait(stop, backoff)

    async def _attempt(self, stop: asyncio.Event) -> None:
        await self._find_topics()  # 1
        if not await self._catch_up(stop):  # 2
            return
        await asyncio.to_thread(self._commit)  # 3
        if not self.caught_up:  # 4
            self.caught_up = True
            self._on_caught_up()
        self.rebuilds += 1
        if self.rebuilds:
            metrics.counter("mlcdn_follower_rebuilds_total").labels(self._spec.group).inc()
        app = build_app(self._spec, self._live)  # 5
        try:
            await asyncio.wait_for(app.start(), START_S)
            await self._watch(app, stop)  # 7
        finally:
            await asyncio.wait_for(app.stop(), STOP_S)  # 8

    async def _find_topics(self) -> None:
        for topic in self._spec.topics:
            found = await asyncio.to_thread(self._reader.topic_id, topic)
            before = self.topic_ids.get(topic)
            if before is not None and before != found:
                log.error("topic was made again", topic=topic, before=before, now=found)
                for at in [at for at in self.positions if at[0] == topic]:
                    del self.positions[at]
                if self._on_recreated is not None:
                    self._on_recreated(topic)
            self.topic_ids[topic] = found
            for partition in range(await asyncio.to_thread(self._reader.partitions, topic)):
                at = (topic, partition)
                if at not in self.positions:
                    self.positions[at] = await asyncio.to_thread(self._first, topic, partition)

    def _first(self, topic: str, partition: int) -> int:
        low, _ = self._reader.watermarks(topic, partition)
        if self._spec.recent_ms is None:
            return low
        since = time.time_ns() // 1_000_000 - self._spec.recent_ms
        return max(low, self._reader.offset_at(topic, partition, since))

    async def _catch_up(self, stop: asyncio.Event) -> bool:
        """Reads to the high watermarks of now; False when `stop` came first."""
        highs = await asyncio.to_thread(self._ask_highs)
        behind = {at for at, high in highs.items() if self.positions[at] < high}
        if behind:
            records = self._reader.tail({at: self.positions[at] for at in behind})
            try:
                while behind and not stop.is_set():
                    record = await asyncio.wait_for(anext(records), START_S)
                    at = (record.topic, record.partition)
                    self._handle(record)
                    if self.positions[at] >= highs[at]:
                        behind.discard(at)
            finally:
                await records.aclose()
        return not stop.is_set()

    def _ask_highs(self) -> dict[At, int]:
        self._highs = {at: self._reader.watermarks(*at)[1] for at in self.positions}
        return self._highs

    def _commit(self) -> None:
        consumer = Consumer(
            {
                **QUIET,
                "bootstrap.servers": self._spec.bootstrap,
                "group.id": self._spec.group,
                "enable.auto.commit": False,
                **self._spec.security,
            },
            logger=forward_logs(),
        )
        try:
            offsets = [TopicPartition(topic, p, position) for (topic, p), position in self.positions.items()]
            consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            # A member of an earlier life still holds the group: Faust begins lower, and what is known is dropped.
            log.info("positions not committed", group=self._spec.group, error=str(error))
        finally:
            consumer.close()

    async def _live(self, record: Record) -> None:
        """What Faust hands over. Never raises."""
        async with self._gate:
            at = (record.topic, record.partition)
            position = self.positions.get(at, 0)
            if record.offset < position:
                return
            if record.offset > position and not await self._fill_gap(at, record.offset):
                return
            # Still above after the gap was read: what lies between was removed, there is nothing to read.
            if record.offset >= self.positions.get(at, 0):
                self._handle(record)

    async def _fill_gap(self, at: At, end: int) -> bool:
        """False when the log could not be read: the position stays, and the next record or the watchdog tries again."""
        topic, partition = at
        start = self.positions.get(at, 0)
        log.info("reading a gap", topic=topic, partition=partition, start=start, end=end)
        try:
            missed = await asyncio.to_thread(lambda: list(self._reader.read(topic, partition, start, end)))
        except MlcdnError as error:
            log.warning("gap not read", topic=topic, partition=partition, error=str(error))
            return False
        for record in missed:
            self._handle(record)
        return True

    def _handle(self, record: Record) -> None:
        try:
            self._on_record(record)
        except EventRefused as refused:
            self._dead_letters.reject(record, refused)
        # Whatever a handler's bug may be, the next record must be handled.
        except Exception as error:
            log.exception("handler failed", topic=record.topic, offset=record.offset)
            self._dead_letters.reject(record, EventRefused(Refusal.HANDLER_FAILED, type(error).__name__))
        self.positions[(record.topic, record.partition)] = record.offset + 1
        self._progress_at = time.monotonic()

    async def _watch(self, app: Any, stop: asyncio.Event) -> None:
        while not await _wait(stop, CHECK_S):
            if app.should_stop or app.crashed:
                raise Stalled("the Faust app stopped by itself")
            try:
                highs = await asyncio.to_thread(self._ask_highs)
            except MlcdnError:
                # The broker is away: Faust waits for it too, and nothing can be said of lag.
                self._progress_at = time.monotonic()
                continue
            for topic, behind in self.lag().items():
                metrics.gauge("mlcdn_log_lag").labels(topic).set(behind)
            lagging = [at for at, high in highs.items() if self.positions[at] < high]
            if not lagging:
                self._progress_at = time.monotonic()
            elif time.monotonic() - self._progress_at > STALL_S:
                raise Stalled(f"no record for {STALL_S:g} s, behind on {lagging}")
            if any([self.topic_ids[t] != await asyncio.to_thread(self._reader.topic_id, t) for t in self._spec.topics]):
                raise Stalled("a topic was made again")


async def _wait(stop: asyncio.Event, seconds: float) -> bool:
    """True when `stop` came within the time."""
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return False
    return True
