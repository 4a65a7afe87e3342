"""Who else is in the region, from the beats of ``mlcdn.fleet``: read at its end, without a trace, for as long as it lives.

Laws: a beat that is old is no neighbour, a draining one neither; one beat a node and second is decoded, however many
there are; while the log is away nobody is known, and everybody asks the store. It must not know artifacts.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from edge_node.agent.peers import Neighbour
from schemas import codec
from schemas.errors import EventRefused, MlcdnError
from schemas.events import NodeBeat, NodeLeft
from schemas.topics import FLEET
from streams.log.record import LogReader, Record

RETRY_S: Final = 2.0
# Beats missed until a node counts as gone.
BEATS: Final = 5
LOOK_BACK_MS: Final = 5_000
KEPT: Final = 1_024

log = structlog.get_logger()


class Neighbours:
    """`known` may be called from any thread. `looked` is set once the last beats of all were heard."""

    def __init__(self, reader: LogReader, node: str, region: str, beat_s: float, now_ms: Callable[[], int]) -> None:
        self._reader, self._node, self._region, self._now_ms = reader, node, region, now_ms
        self._beat_s = beat_s
        self.looked = threading.Event()
        self._heard: dict[str, tuple[float, Neighbour]] = {}
        self._decoded_at: dict[bytes, float] = {}

    def known(self) -> tuple[Neighbour, ...]:
        since = time.monotonic() - BEATS * max(1.0, self._beat_s)
        return tuple(neighbour for heard, neighbour in tuple(self._heard.values()) if heard >= since)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                starts = await asyncio.to_thread(self._look)
                self.looked.set()
                async for record in self._reader.tail(starts):
                    self._hear(record)
            except MlcdnError as error:
                log.info("neighbours_unknown", cause=str(error))
            await asyncio.sleep(RETRY_S)

    def _look(self) -> dict[tuple[str, int], int]:
        """Hears the last beats of all, and says where to go on."""
        since, ends = self._now_ms() - LOOK_BACK_MS, {}
        for partition in range(self._reader.partitions(FLEET.name)):
            start = self._reader.offset_at(FLEET.name, partition, since)
            _, ends[FLEET.name, partition] = self._reader.watermarks(FLEET.name, partition)
            for record in self._reader.read(FLEET.name, partition, start, ends[FLEET.name, partition]):
                self._hear(record)
        return ends

    def _hear(self, record: Record) -> None:
        now = time.monotonic()
        if record.key is None or record.key == self._node.encode():
            return
        # Other reports have the same key: a beat may be missed for one, and the next one is a second away.
        if now - self._decoded_at.get(record.key, -1e9) < self._beat_s / 2:
            return
        try:
            event = codec.decode(record.topic, record.key, record.value, record.headers).event
        except EventRefused:
            return
        if not isinstance(event, NodeBeat | NodeLeft) or event.region != self._region:
            return
        if isinstance(event, NodeLeft) or event.draining:
            self._heard.pop(event.node, None)
            return
        self._decoded_at[record.key] = now
        live = frozenset(model.digest for model in event.models if model.state == "live")
        self._heard[event.node] = (now, Neighbour(node=event.node, url=event.url, live=live))
        if len(self._heard) > KEPT:
            del self._heard[next(iter(self._heard))]
        if len(self._decoded_at) > 2 * KEPT:
            self._decoded_at.clear()
