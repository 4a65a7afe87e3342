"""The cell: makes a Faust app, watches it, and makes a new one when facts say that it stands still.

One attempt:
 1. the broker answers and every topic is there (`app.start` succeeds and only logs when a topic is missing), and is the
    topic it was;
 2. what is not yet handled is read to the high watermarks by a plain reader, without a group;
 3. `on_caught_up` is told, if it was not yet;
 4. those positions are committed for the group, so that Faust begins there;
 5. a new app is started, within a deadline: a forbidden group would hang for ever;
 6. the watch, by what the broker says: records that stay unread for `HELP_S` are read by the plain reader (Faust is slow
    to come back after an outage, and stands still for good before a header name that is not UTF-8); a Faust that
    delivers nothing for `STALL_S` ends the attempt, and the next one has a group of its own;
 7. the app is stopped, also after a failed start; the next attempt follows after 0.5 to 10 s.

Laws: a record reaches `on_record` once in the life of this process and in its partition's order; a new process begins
at the start again (or `recent_ms` ago): nothing rests on committed offsets. Kafka may be away at any time, for long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, Final

import structlog

from schemas import metrics
from schemas.errors import MlcdnError, Unreachable
from streams.follow.agents import Intake
from streams.follow.app import FollowSpec, alive, build_app, dispose
from streams.follow.dead_letters import DeadLetters
from streams.follow.group import GroupPositions
from streams.follow.watchdog import Standstill
from streams.log.boot import in_order
from streams.log.record import LogReader, Record
from streams.log.record import TopicPartition as At

log = structlog.get_logger(__name__)

START_S: Final = 30.0
STOP_S: Final = 10.0
# A stop takes 0.2 s, but for ever while the broker is away, and a process that ends has nothing to gain from it.
LAST_STOP_S: Final = 2.0
STALL_S: Final = 10.0
HELP_S: Final = 0.5
CHECK_S: Final = 0.4
IDENTITY_S: Final = 5.0
FIRST_BACKOFF_S: Final = 0.5
LAST_BACKOFF_S: Final = 10.0
# An attempt that finds no broker costs little, and the node is to be back soon after it returns.
AWAY_BACKOFF_S: Final = 1.0
# Handled between two breaths of the event loop: 200 signatures are 28 ms.
_BATCH: Final = 200


class Stalled(Exception):
    """This app is of no more use; a new one is the cure."""


class Follower:
    """Follows the topics of `spec`. `positions` are the next to be handled; `rebuilds` counts apps after the first.

    `on_record` runs in the event loop and must be quick; an `EventRefused` it raises, or anything else, is a dead
    letter. `on_caught_up` is told once everything that stood in the log at the start has been handled. `on_recreated`
    is told a topic that was deleted and made again, or cut short: its records come anew from the start, `caught_up` is
    false until they have, and `on_caught_up` is told again.
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
        self._spec, self._reader = spec, reader
        self._on_caught_up, self._on_recreated = on_caught_up, on_recreated
        self._intake = Intake(reader, on_record, dead_letters)
        self.topic_ids: dict[str, str] = {}
        self.caught_up = False
        self.rebuilds = 0
        self._apps = self._stalls = 0
        self._highs: dict[At, int] = {}

    @property
    def positions(self) -> dict[At, int]:
        return self._intake.positions

    def lag(self) -> dict[str, int]:
        """Records behind the high watermark when it was last asked for, by topic."""
        behind = dict.fromkeys(self._spec.topics, 0)
        for at, high in self._highs.items():
            behind[at[0]] += max(0, high - self.positions.get(at, 0))
        return behind

    async def run(self, stop: asyncio.Event) -> None:
        attempts = asyncio.create_task(self._attempts())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({attempts, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (attempts, stopping):
                task.cancel()
            results = await asyncio.gather(attempts, stopping, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _attempts(self) -> None:
        backoff = FIRST_BACKOFF_S
        while True:
            began = time.monotonic()
            limit = LAST_BACKOFF_S
            try:
                await self._attempt()
            except MlcdnError as error:
                limit = AWAY_BACKOFF_S
                log.warning("follower starts over", group=self._spec.group, error=str(error))
            except (Stalled, TimeoutError) as error:
                self._stalls += 1
                log.warning("follower starts over", group=self._spec.group, error=str(error) or type(error).__name__)
            # Faust and aiokafka raise whatever their depths raise; the cure for all of it is a new app.
            except Exception:
                log.exception("follower starts over", group=self._spec.group)
            backoff = FIRST_BACKOFF_S if time.monotonic() - began > 30 else min(backoff * 2, limit)
            await asyncio.sleep(backoff)

    async def _attempt(self) -> None:
        await self._find_topics()  # 1
        await self._read_on(await self._ask())  # 2
        if not self.caught_up:  # 3
            self.caught_up = True
            self._on_caught_up()
        spec = replace(self._spec, group=self._group())
        await asyncio.to_thread(GroupPositions(spec).commit, dict(self.positions))  # 4
        self._apps += 1
        if self._apps > 1:
            self.rebuilds += 1
            metrics.counter("mlcdn_follower_rebuilds_total").labels(self._spec.group).inc()
        app = build_app(spec, self._intake.deliver)  # 5
        self._intake.delivered = dict(self.positions)
        start = asyncio.ensure_future(app.start())
        try:
            await asyncio.wait_for(asyncio.shield(start), START_S)
            await self._watch(app)  # 6
        finally:
            await self._stop(app, start)  # 7

    async def _find_topics(self) -> None:
        first = not self.topic_ids
        for topic in self._spec.topics:
            found = await asyncio.to_thread(self._reader.topic_id, topic)
            before = self.topic_ids.get(topic, found)
            if before != found or await self._cut_short(topic):
                log.error("topic was made again or cut short", topic=topic, before=before, now=found)
                self._intake.forget(topic)
                self.caught_up = False
                if self._on_recreated is not None:
                    self._on_recreated(topic)
            self.topic_ids[topic] = found
            for partition in range(await asyncio.to_thread(self._reader.partitions, topic)):
                if (topic, partition) not in self.positions:
                    begin = await asyncio.to_thread(self._first, topic, partition)
                    self.positions[(topic, partition)] = begin
        if first:
            self._intake.judged = await asyncio.to_thread(GroupPositions(self._spec).committed)

    async def _cut_short(self, topic: str) -> bool:
        """Whether the topic ends below what was handled; asked twice, since a broker that starts knows its end late."""
        for pause in (0.0, 1.0):
            await asyncio.sleep(pause)
            ours = {at: position for at, position in self.positions.items() if at[0] == topic}
            marks = await self._ask(ours)
            if all(marks[at][1] >= position for at, position in ours.items()):
                return False
        return True

    def _first(self, topic: str, partition: int) -> int:
        low, _ = self._reader.watermarks(topic, partition)
        if self._spec.recent_ms is None:
            return low
        since = time.time_ns() // 1_000_000 - self._spec.recent_ms
        return max(low, self._reader.offset_at(topic, partition, since))

    async def _ask(self, partitions: Mapping[At, int] | None = None) -> dict[At, tuple[int, int]]:
        """Low and high watermarks of the partitions, by default of all."""
        asked = list(self.positions if partitions is None else partitions)
        marks = await asyncio.to_thread(lambda: {at: self._reader.watermarks(*at) for at in asked})
        self._highs |= {at: high for at, (_, high) in marks.items()}
        return marks

    async def _read_on(self, marks: Mapping[At, tuple[int, int]]) -> None:
        """Handles everything below the high watermarks."""
        self._intake.raise_to({at: low for at, (low, _) in marks.items()})
        for topic in self._spec.topics:
            records = in_order(
                [
                    self._reader.read(topic, at[1], self.positions[at], high)
                    for at, (_, high) in marks.items()
                    if at[0] == topic and self.positions[at] < high
                ]
            )
            while batch := await asyncio.to_thread(lambda: list(islice(records, _BATCH))):  # noqa: B023 (awaited here)
                for record in batch:
                    self._intake.take(record)

    async def _watch(self, app: Any) -> None:
        unread, undelivered = Standstill(), Standstill()
        identified = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            if not alive(app):
                raise Stalled("the Faust app stopped by itself")
            before = dict(self.positions)
            try:
                marks = await self._ask()
                if time.monotonic() - identified > IDENTITY_S:
                    await self._identify()
                    identified = time.monotonic()
            except Unreachable:
                # The broker is away: Faust waits for it too, and nothing can be said of lag.
                unread.excuse(time.monotonic())
                undelivered.excuse(time.monotonic())
                continue
            for topic, behind in self.lag().items():
                metrics.gauge("mlcdn_log_lag").labels(topic).set(behind)
            highs = {at: high for at, (_, high) in marks.items()}
            if any(highs[at] < position for at, position in before.items()):
                raise Stalled("a topic ends below what was handled")
            if _longest(unread.look(time.monotonic(), self.positions, highs)) > HELP_S:
                await self._read_on(marks)
            if _longest(undelivered.look(time.monotonic(), self._intake.delivered, highs)) > STALL_S:
                raise Stalled(f"Faust delivered nothing for {STALL_S:g} s")

    async def _identify(self) -> None:
        for topic, known in self.topic_ids.items():
            if await asyncio.to_thread(self._reader.topic_id, topic) != known:
                raise Stalled(f"{topic} was made again")

    def _group(self) -> str:
        """A new group after each stall. The old one holds its dead member for a session, takes no commit meanwhile, and
        gives the member that comes back what it had: the record that Faust cannot get past, or no partition at all."""
        return f"{self._spec.group}.{self._stalls}" if self._stalls else self._spec.group

    async def _stop(self, app: Any, start: asyncio.Future[None]) -> None:
        task = asyncio.current_task()
        ending = task is not None and task.cancelling() > 0
        # A start that is cut short leaves connections open, and takes two seconds at most when a broker answers.
        await asyncio.wait({start}, timeout=LAST_STOP_S)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        try:
            await asyncio.wait_for(app.stop(), LAST_STOP_S if ending else STOP_S)
        # An app that does not stop is left behind: whatever it still delivers stands below the positions.
        except Exception as error:  # noqa: BLE001 (Faust raises anything; the next app is not kept waiting)
            log.error("Faust app did not stop", group=self._spec.group, error=repr(error))
        await dispose(app)


def _longest(still: Mapping[At, float]) -> float:
    return max(still.values(), default=0.0)
