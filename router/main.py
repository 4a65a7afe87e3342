"""The router's process: the composition root."""

from __future__ import annotations

import asyncio
import time

import structlog
import uvicorn

from processes import logs
from processes.http_server import serve_until
from processes.ports import listen
from processes.signals import stop_on_signals
from router.choose import Weights
from router.geo import Networks, Place
from router.http import Router
from router.probe import Probes
from router.table import Table
from schemas import codec, settings
from schemas.errors import EventRefused, MlcdnError
from schemas.events import RoutesPublished
from schemas.topics import ROUTES
from streams.log.reader import KafkaReader
from streams.log.record import Record

log = structlog.get_logger(__name__)


def take(table: Table, record: Record) -> None:
    """Offers what a record of ``mlcdn.routes`` says to the table; what cannot be read is passed over and said."""
    if record.value is None:
        return
    try:
        event = codec.decode(record.topic, record.key, record.value, record.headers).event
    except EventRefused as refused:
        log.warning("routes record refused", offset=record.offset, refusal=str(refused))
        return
    if isinstance(event, RoutesPublished):
        table.offer(event, time.monotonic())


async def follow(reader: KafkaReader, table: Table, stop: asyncio.Event) -> None:
    """Keeps the table true; begins again, from the last record, whenever the log was away."""
    while not stop.is_set():
        try:
            _, high = await asyncio.to_thread(reader.watermarks, ROUTES.name, 0)
            # The last record may be a transaction marker or compacted away; a few before it cost nothing.
            records = reader.tail({(ROUTES.name, 0): max(0, high - 5)})
            try:
                async for record in records:
                    take(table, record)
            finally:
                await records.aclose()
        except MlcdnError as error:
            log.warning("routes cannot be read, the last table serves on", error=str(error))
            try:
                await asyncio.wait_for(stop.wait(), 1.0)
            except TimeoutError:
                continue


async def main() -> None:
    given = settings.load()
    logs.configure(given.log_level)
    table = Table(given.dir / "routes.msgpack")
    probes = Probes(lambda: table.nodes, given.probe_s)
    lines = given.router_locations.read_text().splitlines() if given.router_locations else []
    default = Place(given.router_default_lat, given.router_default_lon, "default")
    router = Router(table, probes, Networks(lines), default, Weights(margin=given.router_margin))
    socket = listen(given.host, given.port)
    config = uvicorn.Config(
        router.app(),
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=int(given.drain_s),
        server_header=False,
    )
    async with stop_on_signals() as stop:
        log.info("router listens", host=given.host, port=socket.getsockname()[1])
        tasks = [
            asyncio.create_task(probes.run(stop)),
            asyncio.create_task(follow(KafkaReader(given.kafka), table, stop)),
        ]
        await serve_until(config, [socket], stop)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
