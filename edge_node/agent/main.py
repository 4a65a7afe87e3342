"""The agent, composed: ``python -m edge_node.agent.main``, started by the node's parent. Only here are adapters named.

    Follower (Faust, group mlcdn-agent-NODE) → Control → Installer → BoardWriter
    beside it: heartbeat every 200 ms · incarnation, once Kafka answers · neighbours, by their beats · sweep
               · alarms of the log every second, and what the next life is to know of it

Laws: it starts and waits while Kafka, the object store or Redis are away, and the board it found is served meanwhile; a
second agent on the board is refused; when any part of it breaks the process ends, and the parent starts another.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Final

import structlog

from edge_node.agent import incarnation
from edge_node.agent.control import TOPICS, Control
from edge_node.agent.download import Downloader, Store
from edge_node.agent.install import Installer, Surroundings
from edge_node.agent.model_files import ModelFiles
from edge_node.agent.neighbours import Neighbours
from edge_node.agent.peer_fetch import PeerFetches
from edge_node.agent.proving import Trials
from edge_node.agent.reconcile import needs
from edge_node.agent.sweep import sweep
from edge_node.board import HEARTBEAT, INCARNATION, BoardWriter
from edge_node.board.log_memory import LogMemoryFile
from edge_node.peer_proof import key_of
from inference.trial import TrialRunner
from processes import logs
from processes.signals import stop_on_signals
from schemas import settings as catalogue
from schemas.errors import Conflict, MlcdnError, SettingsInvalid
from schemas.events import AGENT, Event
from schemas.metrics import counter
from schemas.settings import Settings
from streams.artifacts import ArtifactStore, FetchOptions
from streams.follow import DeadLetters, Follower, FollowSpec
from streams.log.keys import load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.record import LogReader
from streams.log.writer import Writer, wall_clock_ms
from streams.parts.pace import Pace

HEARTBEAT_S: Final = 0.2
SWEEP_S: Final = 60.0
RETRY_S: Final = 2.0
LOOK_S: Final = 1.0

log = structlog.get_logger()


class NotTheLog(Exception):
    """What was read is not what an earlier life checked: the next life reads it all, and checks every signature."""


class Agent:
    """The parts of an agent and what runs beside its follower. Made in the running loop."""

    def __init__(
        self,
        settings: Settings,
        board: BoardWriter,
        reader: LogReader,
        writer: Writer,
        store: Store,
        trials: Trials,
        topic_ids: Callable[[], dict[str, str]],
    ) -> None:
        self._settings, self._board, self._reader, self._writer = settings, board, reader, writer
        self._memory = LogMemoryFile(settings.dir)
        files = ModelFiles(settings.dir)
        key = key_of(settings.shared_peer_secret)
        self._neighbours = Neighbours(reader, settings.node, settings.region, settings.beat_s, wall_clock_ms)
        self.downloader = Downloader(
            store,
            files,
            FetchOptions(
                deadline_s=settings.fetch_deadline_s,
                chunks_at_once=settings.fetch_chunks,
                pace=Pace(settings.fetch_bytes_s, time.monotonic),
            ),
            PeerFetches(settings.node, key, settings.peer_patience_s, self._neighbours) if key else None,
        )
        self.installer = Installer(
            board,
            files,
            self.downloader,
            trials,
            self._say,
            Surroundings(
                runtime=f"onnxruntime {version('onnxruntime')}",
                fetch_concurrency=settings.fetch_concurrency,
                disk_bytes=settings.model_disk_bytes,
                fleet=self._fleet,
                now_ms=wall_clock_ms,
                random=random.random,
            ),
        )
        self.control = Control(
            board,
            settings.node,
            load_roots(settings.root_keys),
            self._say,
            fleet=self._fleet,
            topic_ids=topic_ids,
            now_ms=wall_clock_ms,
            on_desired=self.installer.desire,
            memory=self._memory.read(),
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, or until a part breaks, which is raised."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.installer.run(stop))
            beside = [
                group.create_task(self._beat()),
                group.create_task(self._settle_incarnation()),
                group.create_task(self._sweep()),
                group.create_task(self._look()),
            ]
            if self._settings.shared_peer_secret:
                beside.append(group.create_task(self._neighbours.run()))
            await stop.wait()
            for task in beside:
                task.cancel()

    async def _beat(self) -> None:
        while True:
            self._board.fence.raise_to(HEARTBEAT, wall_clock_ms())
            self.control.flush()
            await asyncio.sleep(HEARTBEAT_S)

    async def _look(self) -> None:
        kept = None
        while True:
            await asyncio.sleep(LOOK_S)
            self.control.look()
            kept = self.control.to_remember() or kept
            if kept is not None:
                try:
                    await asyncio.to_thread(self._memory.write, kept)
                    kept = None
                except OSError as error:
                    log.error("log_memory_not_written", error=error.strerror)
            if self.control.doubted and kept is None:
                raise NotTheLog

    async def _settle_incarnation(self) -> None:
        fence = self._board.fence
        while True:
            try:
                heard = await asyncio.to_thread(incarnation.last_heard, self._reader, self._settings.node)
            except MlcdnError:
                await asyncio.sleep(RETRY_S)
                continue
            current = fence[INCARNATION]
            wanted = incarnation.corrected(current, heard)
            if wanted > current:
                log.warning("incarnation_raised", before=current, now=wanted, heard=heard)
                fence.raise_to(INCARNATION, wanted)
                self.control.flush()
            return

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            async with self.installer.writing:
                if self.control.compact():
                    log.info("purge_log_compacted")
            file = self._board.file
            if file is not None:
                wanted = {digest for desired in file.desired.values() for digest in needs(desired.wanted)}
                freed = await asyncio.to_thread(sweep, self._settings.dir, file.purges, time.time(), wanted)
                if freed:
                    log.info("swept", bytes=freed)

    def _fleet(self) -> dict[str, Any]:
        return {
            "node": self._settings.node,
            "region": self._settings.region,
            "worker": AGENT,
            "incarnation": self._board.fence[INCARNATION],
        }

    def _say(self, event: Event, *, causation_id: str | None = None) -> None:
        if not self._writer.offer(event, causation_id=causation_id):
            counter("mlcdn_events_dropped_total").labels(event.kind).inc()


async def serve(settings: Settings) -> None:
    board = BoardWriter(settings.dir)
    reader = KafkaReader(settings.kafka)
    writer = Writer(
        KafkaAppender(settings.kafka, client_id=f"{settings.node}-agent"),
        source=f"/regions/{settings.region}/nodes/{settings.node}",
    )
    trials = TrialRunner(settings.fetch_concurrency)
    store = ArtifactStore(
        settings.s3_endpoint,
        settings.s3_bucket,
        settings.s3_access_key,
        settings.s3_secret_key.get_secret_value(),
        settings.s3_region,
    )
    topic_ids: dict[str, str] = {}
    agent = Agent(settings, board, reader, writer, store, trials, lambda: topic_ids)
    follower = Follower(
        FollowSpec(
            topics=TOPICS,
            group=f"mlcdn-agent-{settings.node}",
            instance=settings.node,
            bootstrap=settings.kafka,
            datadir=settings.dir,
        ),
        reader,
        agent.control.on_record,
        agent.control.on_caught_up,
        DeadLetters(writer, node=settings.node, region=settings.region),
        agent.control.on_recreated,
    )
    topic_ids = follower.topic_ids
    async with stop_on_signals() as stop:  # around the closing too: a second SIGTERM cuts nothing short
        try:
            async with asyncio.TaskGroup() as group:
                following = group.create_task(follower.run(stop))
                running = group.create_task(agent.run(stop))
                await asyncio.wait({following, running}, return_when=asyncio.FIRST_COMPLETED)
                stop.set()
        finally:
            await trials.close()
            await writer.close()
            board.close()


def main() -> int:
    try:
        settings = catalogue.load()
        logs.configure(settings.log_level)
        asyncio.run(serve(settings))
    except (Conflict, SettingsInvalid) as error:
        sys.stderr.write(f"agent: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
