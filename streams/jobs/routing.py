"""The routing job: folds ``fleet`` and ``requests``, derives the routing table, publishes it on ``routes``.

    python -m streams.jobs.routing

Laws:
- It publishes when routers would rank otherwise, and at least every `routes_s`: an old table means a lost job.
- Its term is one above the last on the topic, so routers refuse what a job before it still sends.
- Nothing is published before the log was read to its end: half a fold would call half the nodes dead.
- At most one table is on its way, so after an outage of the broker no backlog of old ones arrives.

It must not know who reads the table.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from processes import logs
from processes.signals import stop_on_signals
from schemas import codec
from schemas.errors import EventRefused, MlcdnError, SettingsInvalid
from schemas.events import RoutedNode, RoutesPublished
from schemas.settings import Settings, load
from schemas.topics import FLEET, REQUESTS, ROUTES
from streams.folds import fleet, routes, traffic
from streams.folds.fleet import Fleet
from streams.folds.routes import Doubt, Policy
from streams.folds.traffic import Traffic
from streams.follow import DeadLetters, Follower, FollowSpec
from streams.jobs.broker_clock import BrokerClock
from streams.log.boot import read_to_watermark
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.record import LogReader, Record
from streams.log.writer import Writer

TICK_S: Final = 0.2
RETRY_S: Final = 1.0
APPEND_S: Final = 5.0
# Beats of every worker in the last two minutes: 120,000 for a thousand workers, read in some seconds. A node that is
# silent for longer is carried over from the last table.
RECENT_MS: Final = 120_000

log = structlog.get_logger(__name__)


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class RoutingJob:
    """`on_record`, `on_caught_up` and `on_recreated` are the follower's; `run` publishes until it is told to stop."""

    def __init__(
        self,
        reader: LogReader,
        writer: Writer,
        policy: Policy,
        routes_s: float,
        *,
        monotonic_ms: Callable[[], int] = _monotonic_ms,
    ) -> None:
        self._reader, self._writer, self._policy = reader, writer, policy
        self._every_ms, self._monotonic_ms = int(routes_s * 1000), monotonic_ms
        self._fleet, self._traffic, self._clock = Fleet(), Traffic(), BrokerClock()
        self._doubts: dict[str, Doubt] = {}
        self._caught_up = asyncio.Event()
        self._term, self._number, self._offset = 0, 0, -1
        self._published: tuple[RoutedNode, ...] | None = None
        self._published_at = 0
        # Nodes of the last table that this job has not heard of, until they are forgotten.
        self._inherited: tuple[RoutedNode, ...] = ()
        self._inherited_until = 0

    def on_record(self, record: Record) -> None:
        self._clock.hear(record.timestamp_ms, self._monotonic_ms())
        if record.topic == FLEET.name:
            beaten = fleet.fold(self._fleet, record)
            self._fleet, refused = beaten.state, beaten.refused
        else:
            counted = traffic.fold(self._traffic, record)
            self._traffic, refused = counted.state, counted.refused
        if refused is not None:
            raise refused

    def on_caught_up(self) -> None:
        self._caught_up.set()

    def on_recreated(self, topic: str) -> None:
        # What comes is read from its start: until that is done, the nodes stand as they were published.
        self._caught_up.clear()
        if topic == FLEET.name:
            self._inherit(self._published or self._inherited)
            self._fleet = Fleet()
        else:
            self._traffic = Traffic()

    async def run(self, stop: asyncio.Event) -> None:
        if not await _first(self._caught_up, stop) or not await self._take_over(stop):
            return
        while await _first(self._caught_up, stop):
            try:
                await self.tick()
            except MlcdnError as error:
                # Routers keep their last table and say how old it is; the next tick tries again with a newer one.
                log.warning("routes_not_published", term=self._term, number=self._number, error=str(error))
            await _sleep(TICK_S, stop)

    async def tick(self) -> bool:
        """Derives; publishes where it must. Whether it did."""
        monotonic = self._monotonic_ms()
        now = self._clock.now_ms(monotonic)
        if now is None:
            # Not one record of any node: a table would say that there are none, which nobody knows.
            return False
        nodes = routes.derive(self._fleet, self._traffic, now, self._policy)
        if monotonic < self._inherited_until:
            nodes = routes.kept_from(self._inherited, nodes)
        nodes, self._doubts = routes.settled(nodes, self._doubts, now, self._policy)
        before = self._published
        due = monotonic - self._published_at >= self._every_ms
        if before is not None and not due and not routes.changed_materially(before, nodes):
            return False
        self._number += 1
        table = RoutesPublished(term=self._term, number=self._number, derived_at_ms=now, nodes=nodes)
        record = (await self._writer.append(table)).record
        if self._offset >= 0 and record.offset != self._offset + 1:
            log.warning("someone_else_publishes_routes", offset=record.offset, expected=self._offset + 1)
        self._offset, self._published, self._published_at = record.offset, nodes, monotonic
        # Nodes may all be silent; our own acknowledgement still tells the broker's time.
        self._clock.hear(record.timestamp_ms, self._monotonic_ms())
        return True

    async def _take_over(self, stop: asyncio.Event) -> bool:
        while not stop.is_set():
            try:
                last = await asyncio.to_thread(last_table, self._reader)
            except MlcdnError as error:
                log.warning("last_routes_not_read", error=str(error))
                await _sleep(RETRY_S, stop)
                continue
            self._term = last.term + 1 if last else 1
            self._inherit(last.nodes if last else ())
            log.info("routing_job_took_over", term=self._term, nodes=len(self._inherited))
            return True
        return False

    def _inherit(self, nodes: tuple[RoutedNode, ...]) -> None:
        self._inherited, self._inherited_until = nodes, self._monotonic_ms() + self._policy.forget_dead_ms


def last_table(reader: LogReader) -> RoutesPublished | None:
    """The table of the highest (term, number) on the topic."""
    best: list[RoutesPublished] = []

    def look(record: Record) -> None:
        try:
            event = codec.decode(record.topic, record.key, record.value, record.headers).event
        except EventRefused as refused:
            log.warning("routes_record_refused", offset=record.offset, refusal=str(refused))
            return
        if isinstance(event, RoutesPublished) and (
            not best or (event.term, event.number) > (best[0].term, best[0].number)
        ):
            best[:] = [event]

    read_to_watermark(reader, ROUTES.name, look)
    return best[0] if best else None


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return


async def _first(event: asyncio.Event, stop: asyncio.Event) -> bool:
    """Waits for either; True when `event` is set and `stop` is not."""
    waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(stop.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return event.is_set() and not stop.is_set()


async def run(settings: Settings) -> None:
    settings.dir.mkdir(parents=True, exist_ok=True)
    reader = KafkaReader(settings.kafka)
    writer = Writer(
        KafkaAppender(settings.kafka, client_id="mlcdn-routing", timeout_s=APPEND_S),
        source=f"/streams/{settings.node}",
    )
    policy = Policy(phi_suspect=settings.phi_suspect, phi_dead=settings.phi_dead)
    job = RoutingJob(reader, writer, policy, settings.routes_s)
    spec = FollowSpec(
        topics=(FLEET.name, REQUESTS.name),
        group="mlcdn-routing",
        instance="routing",
        bootstrap=settings.kafka,
        datadir=settings.dir,
        recent_ms=RECENT_MS,
    )
    dead_letters = DeadLetters(writer, node=settings.node, region=settings.region)
    follower = Follower(spec, reader, job.on_record, job.on_caught_up, dead_letters, job.on_recreated)
    async with stop_on_signals() as stop:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(follower.run(stop), name="follow")
                tasks.create_task(job.run(stop), name="publish")
        finally:
            await writer.close()


def main() -> None:
    try:
        settings = load()
    except SettingsInvalid as error:
        raise SystemExit(str(error)) from None
    logs.configure(settings.log_level)
    asyncio.run(run(settings))


if __name__ == "__main__":
    main()
