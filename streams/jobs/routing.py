"""The routing job: folds ``fleet`` and ``requests``, derives the routing table, publishes it on ``mlcdn.routes``.

Laws: one active job; another that takes over begins a higher term, and routers refuse a lower (term, number). The table is
published when a router would choose otherwise, and else every `routes_s` seconds. `now` is the broker's clock as last seen
plus what has passed since on this process's monotonic one: no wall clock judges a beat, and when no record comes at all,
every node grows suspect alike and routers fall back on all of them.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from processes import logs
from processes.signals import stop_on_signals
from schemas import codec, settings
from schemas.errors import EventRefused, MlcdnError
from schemas.events import RequestBatch, RoutedNode, RoutesPublished
from schemas.topics import FLEET, REQUESTS, ROUTES
from streams.folds import fleet, routes
from streams.folds.fleet import Fleet
from streams.folds.routes import HealthPolicy
from streams.folds.traffic import WINDOW_S, Traffic
from streams.follow import DeadLetters, Follower, FollowSpec
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.record import LogReader, Record
from streams.log.writer import Writer

log = structlog.get_logger(__name__)

LOOK_S = 0.2
RECENT_MS = 60_000


class RoutingJob:
    """The folds and what was last published. `monotonic` seconds are those of `time.monotonic`."""

    def __init__(self, policy: HealthPolicy, routes_s: float) -> None:
        self._policy, self._routes_s = policy, routes_s
        self._fleet, self._traffic = Fleet(), Traffic()
        self._broker_ms, self._seen_at = 0, 0.0
        self._published: tuple[RoutedNode, ...] = ()
        self._published_at = -1e9
        self.term, self.number = 0, 0

    def on_record(self, record: Record) -> None:
        """Folds one record; what cannot be decoded is refused."""
        if record.timestamp_ms > self._broker_ms:
            self._broker_ms, self._seen_at = record.timestamp_ms, time.monotonic()
        if record.topic == FLEET.name:
            step = fleet.fold(self._fleet, record)
            self._fleet = step.state
            if step.refused is not None:
                raise step.refused
            return
        envelope = codec.decode(record.topic, record.key, record.value, record.headers)
        if isinstance(envelope.event, RequestBatch):
            self._traffic.fold(
                envelope.event,
                partition=record.partition,
                offset=record.offset,
                received_ms=record.timestamp_ms,
            )

    def due(self, monotonic: float) -> RoutesPublished | None:
        """The table to publish now, if one is due."""
        if not self._broker_ms:
            return None
        now_ms = self._broker_ms + int((monotonic - self._seen_at) * 1000)
        nodes = routes.derive(self._fleet, self._traffic, now_ms, self._policy)
        if monotonic - self._published_at < self._routes_s and not routes.differs(self._published, nodes):
            return None
        self._published, self._published_at = nodes, monotonic
        self.number += 1
        return RoutesPublished(term=self.term, number=self.number, derived_at_ms=now_ms, nodes=nodes)


def last_term(reader: LogReader) -> int:
    """The highest term on the topic; 0 when nothing was published."""
    term = 0
    for record in reader.read(ROUTES.name, 0):
        try:
            event = codec.decode(record.topic, record.key, record.value, record.headers).event
        except EventRefused as refused:
            log.warning("a routing table cannot be read", offset=record.offset, refusal=str(refused))
            continue
        if isinstance(event, RoutesPublished):
            term = max(term, event.term)
    return term


async def run(job: RoutingJob, follower: Follower, writer: Writer, reader: LogReader, stop: asyncio.Event) -> None:
    """Follows, and publishes what is due, until `stop`."""
    following = asyncio.create_task(follower.run(stop))
    while not stop.is_set():
        if follower.caught_up:
            try:
                if not job.term:
                    job.term = await asyncio.to_thread(last_term, reader) + 1
                table = job.due(time.monotonic())
                if table is not None:
                    await writer.append(table)
            except MlcdnError as error:
                log.warning("the routing table was not published", error=str(error))
        try:
            await asyncio.wait_for(stop.wait(), LOOK_S)
        except TimeoutError:
            continue
    await following


async def main() -> None:
    """The composition root."""
    given = settings.load()
    logs.configure(given.log_level)
    reader = KafkaReader(given.kafka)
    appender = KafkaAppender(given.kafka, client_id="mlcdn-routing", timeout_s=10)
    writer = Writer(appender, source="/jobs/routing")
    job = RoutingJob(HealthPolicy(suspect=given.phi_suspect, dead=given.phi_dead), given.routes_s)
    spec = FollowSpec(
        topics=(FLEET.name, REQUESTS.name),
        group="mlcdn-routing",
        instance="mlcdn-routing-0",
        bootstrap=given.kafka,
        datadir=given.dir,
        recent_ms=max(RECENT_MS, WINDOW_S * 1000),
    )
    letters = DeadLetters(writer, node=given.node, region=given.region)
    follower = Follower(spec, reader, job.on_record, lambda: log.info("routing job caught up"), letters)
    async with stop_on_signals() as stop:
        await run(job, follower, writer, reader, stop)
    await writer.close()


if __name__ == "__main__":
    asyncio.run(main())
