"""The routing table that the router goes by: the last one published, also after a restart without Kafka.

    DIR/table.json   the last table and where it came from; replaced whole

Laws: a table at or below the one held, by (term, number), is refused, so a job that was replaced is not heard; a topic
that was made again begins anew; a table is never thrown away for its age, it only says how old it is. What is on disk
is a copy: one that cannot be read or written costs a log line and a count, never an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import structlog

from schemas import codec
from schemas.errors import EventRefused, MlcdnError
from schemas.events import Health, RoutedNode, RoutesPublished
from schemas.metrics import counter, gauge
from schemas.topics import ROUTES
from streams.log.record import LogReader, Record, TopicPartition

RETRY_S: Final = 1.0
# Without a record for so long the topic is looked at again: it may have been made anew, or the connection hangs.
SILENCE_S: Final = 5.0

log = structlog.get_logger(__name__)


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What is held, and what is on disk. `appended_ms` is the broker's time of the record."""

    format: int = 1
    topic_id: str
    appended_ms: int
    published: RoutesPublished


class Table:
    """Holds the last table; one event loop owns it."""

    def __init__(
        self,
        path: Path,
        *,
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._wall_ms, self._monotonic = path, wall_ms, monotonic
        self._saved: Saved | None = None
        self._held_at, self._age_then_s = 0.0, 0.0
        self.connected = False

    @property
    def published(self) -> RoutesPublished | None:
        return self._saved.published if self._saved else None

    @property
    def nodes(self) -> tuple[RoutedNode, ...]:
        return self._saved.published.nodes if self._saved else ()

    def age_s(self) -> float | None:
        """None before the first table. This clock is compared with the broker's once a table, then only runs on."""
        return None if self._saved is None else self._age_then_s + self._monotonic() - self._held_at

    def load(self) -> None:
        """Takes what an earlier life saved."""
        try:
            saved = msgspec.json.decode(self._path.read_bytes(), type=Saved)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, MlcdnError, ValueError) as error:
            counter("mlcdn_router_tables_refused_total").labels("disk").inc()
            log.warning("saved_table_refused", path=str(self._path), error=str(error))
            return
        if saved.format == Saved.__struct_defaults__[0]:
            self._hold(saved)

    def save(self) -> None:
        if self._saved is None:
            return
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(self._saved))
            temporary.replace(self._path)
        except OSError as error:
            counter("mlcdn_router_tables_refused_total").labels("save").inc()
            log.warning("table_not_saved", path=str(self._path), error=str(error))

    def of_topic(self, topic_id: str) -> None:
        """The topic as it is now. A new one counts its terms anew, so what is held no longer stands above it."""
        held = self._saved
        if held is not None and held.topic_id != topic_id:
            log.warning("routes_topic_was_made_again", before=held.topic_id, now=topic_id)
            reset = msgspec.structs.replace(held.published, term=0, number=0)
            self._saved = msgspec.structs.replace(held, topic_id=topic_id, published=reset)

    def accept(self, record: Record, topic_id: str) -> bool:
        """Takes the table of the record over, unless it is refused."""
        try:
            event = codec.decode(record.topic, record.key, record.value, record.headers).event
        except EventRefused as refused:
            counter("mlcdn_router_tables_refused_total").labels(str(refused.refusal)).inc()
            log.warning("routes_record_refused", offset=record.offset, refusal=str(refused))
            return False
        assert isinstance(event, RoutesPublished), "the topic carries nothing else"
        held = self.published
        if held is not None and (event.term, event.number) <= (held.term, held.number):
            if (event.term, event.number) < (held.term, held.number):
                counter("mlcdn_router_tables_refused_total").labels("lower_term").inc()
            return False
        self._hold(Saved(topic_id=topic_id, appended_ms=record.timestamp_ms, published=event))
        return True

    def show(self) -> None:
        """The table as metrics."""
        age = self.age_s()
        gauge("mlcdn_router_table_age_seconds").set(-1 if age is None else age)
        for health in Health:
            count = sum(node.health is health for node in self.nodes)
            gauge("mlcdn_router_table_nodes").labels(str(health)).set(count)

    def _hold(self, saved: Saved) -> None:
        self._saved = saved
        self._held_at = self._monotonic()
        self._age_then_s = max(0.0, (self._wall_ms() - saved.appended_ms) / 1000)


async def follow(reader: LogReader, table: Table, stop: asyncio.Event) -> None:
    """Keeps the table by the topic until `stop`: what stands there first, then what comes."""
    away = False
    while not stop.is_set():
        try:
            await _follow(reader, table, stop)
            away = False
        except MlcdnError as error:
            if not away:
                log.warning("routes_not_read", error=str(error), table_age_s=table.age_s())
            away = True
            await _sleep(RETRY_S, stop)
        finally:
            table.connected = False


async def _follow(reader: LogReader, table: Table, stop: asyncio.Event) -> None:
    """Until `stop` or a silence."""
    topic_id = await asyncio.to_thread(reader.topic_id, ROUTES.name)
    table.of_topic(topic_id)
    low, high = await asyncio.to_thread(reader.watermarks, ROUTES.name, 0)
    standing = await asyncio.to_thread(lambda: list(reader.read(ROUTES.name, 0, low, high)))
    taken = [table.accept(record, topic_id) for record in standing]
    if any(taken):
        table.save()
    table.connected = True
    starts: dict[TopicPartition, int] = {(ROUTES.name, 0): high}
    records = reader.tail(starts)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(records))
            done, _ = await asyncio.wait({coming, stopped}, timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if coming not in done:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
                return
            if table.accept(coming.result(), topic_id):
                table.save()
    finally:
        stopped.cancel()
        await records.aclose()


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
