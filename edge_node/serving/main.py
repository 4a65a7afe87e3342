"""One worker, composed: ``python -m edge_node.serving.main``, started by the node's parent.

    MLCDN_LISTEN_FD  the listening socket, made by the parent and shared by its workers; without it the worker makes one
    MLCDN_WORKER     its number on the node

    start   board → slots → HTTP at once; models are loaded beside it, and readiness says when
    stop    SIGTERM → readiness off and `Connection: close` · finish what is in flight · NodeLeft

Laws: nothing here waits for Kafka, Redis, the object store, the origin or the agent; settings are read here, and
adapters named here, and nowhere else in the worker.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Final, cast

import structlog
import uvicorn
import uvloop

from edge_node.board import INCARNATION, BoardReader
from edge_node.caching.cache import Cache
from edge_node.caching.disk_tier import DiskTier
from edge_node.caching.memory_tier import MemoryTier
from edge_node.caching.redis_tier import RedisTier
from edge_node.peer_proof import key_of
from edge_node.serving.board_view import BoardView
from edge_node.serving.chunks import ChunkDoor
from edge_node.serving.health import Health
from edge_node.serving.lane import self_test
from edge_node.serving.lane.connection import LaneProtocol
from edge_node.serving.lane.lane import Lane
from edge_node.serving.model_slot import Slots
from edge_node.serving.origin_client import OriginClient
from edge_node.serving.predict import Predictor
from edge_node.serving.recordings import Recordings
from edge_node.serving.reporter import Identity, Reporter, Standing
from edge_node.serving.routes import Doors, Limits, build_app
from edge_node.serving.sampling import Sampling
from edge_node.serving.statistics import Statistics
from edge_node.serving.swaps import Swaps
from inference.onnx_model import SessionSettings
from processes import logs
from processes.http_connection import GuardedProtocol
from processes.http_limits import limits_of
from processes.http_server import Server
from processes.ports import listen
from processes.signals import stop_on_signals
from processes.tls import certificate_of
from processes.worker_ready import say_ready
from schemas import metrics
from schemas import settings as catalogue
from schemas.events import Location
from schemas.settings import Settings
from streams.log.producer import KafkaAppender
from streams.log.record import Appender
from streams.log.writer import Writer

LOOK_S: Final = 0.02
# Of the memory tier's size: for answers that are kept as they go out.
LANE_SHARE: Final = 4
FIRST_LOADS_S: Final = 10.0
DRAIN_NOTICE_S: Final = 0.3
# An outage of this length loses no row: the queue holds 16 MiB, and what stays in it longer is dropped and counted.
DELIVERY_TIMEOUT_S: Final = 600.0
RECORDINGS_KBYTES: Final = 4_096

log = structlog.get_logger()


class Worker:
    """The parts of a worker and what runs beside its requests. Made in the running loop that serves it."""

    def __init__(
        self,
        settings: Settings,
        number: int,
        url: str,
        reader: BoardReader,
        cache: Cache,
        appender: Appender,
        recordings_log: Callable[[], Appender] | None = None,
    ) -> None:
        """`recordings_log` makes what recorded requests are offered to; None: `appender`."""
        self._settings, self._reader, self.cache = settings, reader, cache
        self.identity = Identity(
            node=settings.node,
            region=settings.region,
            worker=number,
            incarnation=lambda: reader.fence[INCARNATION],
            url=url,
            location=Location(lat=settings.lat, lon=settings.lon),
            capacity=settings.capacity,
        )
        self.writer = Writer(appender, source=f"/regions/{settings.region}/nodes/{settings.node}")
        self.view = BoardView(reader)
        self.slots = Slots(settings.default_model, settings.run_threads)
        statistics = Statistics()
        self.reporter = Reporter(self.identity, self.writer, self._standing, statistics)
        self.origin = OriginClient(settings.origin_url) if settings.origin_url else None
        self.predictor = Predictor(self.view, cache, self.origin)
        self.swaps = Swaps(
            self.slots,
            settings.dir,
            SessionSettings(settings.intra_op_threads, settings.inter_op_threads, settings.providers),
            self.identity,
            self.reporter.say,
            self.predictor,
            settings.model_memory_bytes,
        )
        recordings = Recordings(self.identity, recordings_log or (lambda: appender), settings.recordings_bytes_s)
        self.sampling = Sampling(self.slots, self.identity, self.reporter.say, recordings)
        self.health = Health(self.view, self.swaps, cache, self.origin, self.reporter, self.identity)
        doors = Doors(
            self.health,
            self.slots,
            self.predictor,
            self.identity,
            Limits(settings.max_body_bytes, settings.max_batch_rows, settings.gateway_sets_tenant),
            statistics,
            ChunkDoor(
                settings.dir,
                lambda: self.view.board,
                key_of(settings.shared_peer_secret),
                url,
                -(-settings.peer_bytes_s // settings.workers),
            ),
        )
        self.app = build_app(doors, self.health, self.reporter.rows, self.identity)
        self.lane = Lane(
            self.slots,
            self.predictor,
            self.reporter.rows,
            reader.fence,
            self.identity,
            settings.max_batch_rows,
            settings.memory_cache_bytes // LANE_SHARE,
            settings.max_body_bytes,
        )
        self._followed: object = None

    def look(self) -> None:
        """Obeys the board, and starts the swaps that are due."""
        self.view.catch_up()
        self.cache.tend()
        board = self.view.board
        if board is not None and board is not self._followed:
            self._followed = board
            self.swaps.follow(board)
        else:
            self.swaps.tend()
        self.sampling.tend()

    async def run(self) -> None:
        """What runs beside requests, until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_on())
            group.create_task(self.reporter.run(self._settings.flush_s, self._settings.beat_s))

    def drain(self) -> None:
        """Not ready from here on; every answer closes its connection."""
        self.health.draining = True
        self.reporter.beat()

    async def close(self, cause: str) -> None:
        self.sampling.stop()
        await self.swaps.close()
        await self.predictor.close()
        self.reporter.leave(cause)
        for slot in self.slots:
            await slot.close()
        await self.cache.close()
        if self.origin is not None:
            await self.origin.close()
        await asyncio.gather(self.writer.close(), self.sampling.close())

    async def _look_on(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def _standing(self) -> Standing:
        return Standing(
            in_flight=sum(slot.in_flight for slot in self.slots),
            queue=sum(slot.queued for slot in self.slots),
            positions=self.view.positions,
            models=self.swaps.standing(),
            desired_digest=self.view.desired_digest,
            draining=self.health.draining,
        )


async def serve(settings: Settings) -> None:
    listener = _listener(settings)
    host, port = listener.getsockname()[:2]
    number = int(os.environ.get("MLCDN_WORKER", "0"))
    reloads = metrics.counter("mlcdn_tls_reloads_total")
    certificate = certificate_of(settings.tls_cert, settings.tls_key, lambda outcome: reloads.labels(outcome).inc())
    worker = Worker(
        settings,
        number,
        settings.url or f"{'https' if certificate else 'http'}://{host}:{port}",
        BoardReader(settings.dir),
        open_cache(settings, number),
        KafkaAppender(settings.kafka, client_id=f"{settings.node}-worker", timeout_s=DELIVERY_TIMEOUT_S),
        # What waits for a log that is away is not worth much memory, nor a place among the rows.
        lambda: KafkaAppender(
            settings.recordings_kafka or settings.kafka,
            client_id=f"{settings.node}-recordings",
            queue_kbytes=RECORDINGS_KBYTES,
        ),
    )
    await _settle(worker)
    cut = metrics.counter("mlcdn_connections_cut_total")
    server = Server(
        uvicorn.Config(
            worker.app,
            http=cast(type[asyncio.Protocol], partial(LaneProtocol, worker.lane))
            if settings.fast_lane
            else GuardedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(max(1, settings.drain_s)),
        ),
        limits_of(settings),
        lambda reason: cut.labels(reason).inc(),
        certificate,
        lambda: say_ready(settings.dir, number),
    )
    # A full collection over what a start leaves behind took 13 ms.
    gc.collect()
    gc.freeze()
    async with stop_on_signals() as stop:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        beside = asyncio.create_task(worker.run())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, beside, stopped}, return_when=asyncio.FIRST_COMPLETED)
        worker.drain()
        server.drain()
        hurried = asyncio.create_task(server.end_at(stop.again))
        await asyncio.sleep(DRAIN_NOTICE_S)
        server.should_exit = True
        await serving
        hurried.cancel()
        stopped.cancel()
        beside.cancel()
        outcome = (await asyncio.gather(beside, return_exceptions=True))[0]
        await worker.close("stopped" if stop.is_set() else "failed")
    if isinstance(outcome, Exception):
        # The parent sees the exit and starts another worker.
        raise outcome


async def _settle(worker: Worker) -> None:
    """Loads what the board names before anything is accepted: connections wait in the port that the parent holds open,
    where an answer of 503 would be a failed request. A model that takes longer than `FIRST_LOADS_S` does not hold up the
    others.
    """
    until = time.monotonic() + FIRST_LOADS_S
    worker.look()
    while not worker.swaps.settled and time.monotonic() < until:
        await asyncio.sleep(LOOK_S / 4)
        worker.look()


def open_cache(settings: Settings, number: int) -> Cache:
    """The tiers that the settings ask for. A node's disk tier is shared out to its workers: each has one of its own."""
    disk = None
    if settings.disk_cache_bytes:
        directory = settings.dir / "cache" / f"worker-{number}"
        try:
            disk = DiskTier(directory, settings.disk_cache_bytes // settings.workers)
        except OSError as error:
            # A full or read-only disk must not keep models from being served.
            log.error("no_disk_tier", cause=error.strerror)
    redis = RedisTier(settings.redis_url) if settings.redis_url else None
    return Cache(MemoryTier(settings.memory_cache_bytes), redis, disk)


def _listener(settings: Settings) -> socket.socket:
    inherited = os.environ.get("MLCDN_LISTEN_FD")
    if inherited is None:
        return listen(settings.host, settings.port)
    listener = socket.socket(fileno=int(inherited))
    listener.setblocking(False)
    return listener


def main() -> None:
    settings = catalogue.load()
    logs.configure(settings.log_level)
    if settings.fast_lane and (cause := self_test.why_not()) is not None:
        log.error("fast_lane_off", cause=cause)
        settings = settings.model_copy(update={"fast_lane": False})
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
