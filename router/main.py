"""The router process: reads ``routes``, probes the nodes, answers which edge.

    python -m router.main

It answers from its saved table before Kafka does, and on when Kafka goes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket

import httpx
import structlog
import uvicorn
from starlette.types import ASGIApp

from processes import logs
from processes.http_connection import GuardedProtocol
from processes.http_limits import Limits, limits_of
from processes.http_server import Server, serve_until
from processes.ports import listen
from processes.signals import stop_on_signals
from router.choose import ChoicePolicy
from router.geo import Locations, Place, parse_locations
from router.http import Doors, build
from router.probe import AT_ONCE, TIMEOUT_S, Prober
from router.table import Table, follow
from schemas import metrics
from schemas.errors import SettingsInvalid
from schemas.settings import Settings, load
from streams.log.reader import KafkaReader
from streams.log.record import LogReader

log = structlog.get_logger(__name__)


def locations_of(settings: Settings) -> Locations:
    default = Place(lat=settings.router_default_lat, lon=settings.router_default_lon, source="default")
    if settings.router_locations is None:
        return Locations(default, {})
    try:
        return parse_locations(settings.router_locations.read_text("utf-8"), default)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"location file {settings.router_locations}: {error}") from None


async def serve(
    app: ASGIApp, listener: socket.socket, drain_s: float, stop: asyncio.Event, limits: Limits | None = None
) -> None:
    """Until `stop`, and then until what is in flight is answered."""
    config = uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=max(1, int(drain_s)),
    )
    cut = metrics.counter("mlcdn_connections_cut_total")
    await serve_until(Server(config, limits, lambda reason: cut.labels(reason).inc()), [listener], stop)


async def run(settings: Settings, reader: LogReader, stop: asyncio.Event) -> None:
    settings.dir.mkdir(parents=True, exist_ok=True)
    table = Table(settings.dir / "table.json")
    table.load()
    locations = locations_of(settings)
    limits = httpx.Limits(max_connections=2 * AT_ONCE, max_keepalive_connections=2 * AT_ONCE)
    listener = listen(settings.host, settings.port)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False) as http:
        prober = Prober(lambda: table.nodes, http)
        doors = Doors(table, prober, locations, ChoicePolicy(margin=settings.router_margin), random.Random().randrange)
        log.info("router_listens", host=settings.host, port=listener.getsockname()[1])
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(follow(reader, table, stop), name="follow")
            tasks.create_task(prober.run(settings.probe_s, stop), name="probe")
            await serve(build(doors), listener, settings.drain_s, stop, limits_of(settings))
            # The server also ends by itself, on an error of its own: the others must not outlive it.
            stop.set()


async def _main(settings: Settings) -> None:
    async with stop_on_signals() as stop:
        await run(settings, KafkaReader(settings.kafka), stop)


def main() -> None:
    try:
        settings = load()
        logs.configure(settings.log_level)
        # It says a line for each request at INFO: for a router, one for each node and second.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        asyncio.run(_main(settings))
    except SettingsInvalid as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
