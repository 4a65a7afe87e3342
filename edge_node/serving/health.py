"""What of the world around a worker answers, and what it does without it: never a reason not to serve.

Laws: an answer comes within a second, whatever hangs; the origin is asked at most once a second, however often anybody
asks us; what is not configured is not named.

It must not know how an answer is made.
"""

from __future__ import annotations

import os
import time
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from edge_node.caching.cache import Cache
from edge_node.serving.board_view import HEARTBEAT_LATE_S, BoardView
from edge_node.serving.exposition import OfModels
from edge_node.serving.origin_client import OriginClient
from edge_node.serving.reporter import Identity, Reporter
from edge_node.serving.swaps import Swaps
from schemas.metrics import gauge
from streams.folds.wanted import Channel

LOG_SILENT_S: Final = 3.0
ORIGIN_TIMEOUT_S: Final = 0.4
ORIGIN_REMEMBERED_S: Final = 1.0


class Health:
    """Also what `/metrics` says: this process, or all workers of the node where they share a directory."""

    def __init__(
        self,
        view: BoardView,
        swaps: Swaps,
        cache: Cache,
        origin: OriginClient | None,
        reporter: Reporter,
        identity: Identity,
    ) -> None:
        self._view, self._swaps, self._cache, self._origin = view, swaps, cache, origin
        self._reporter, self._identity = reporter, identity
        self._origin_at, self._origin_answers = 0.0, True
        self._was_ready = False
        self.draining = False

    @property
    def ready(self) -> bool:
        """Once it serves what it can it stays ready: a later release must not take a serving worker off the route."""
        self._was_ready = self._was_ready or (self._view.board is not None and self._swaps.settled)
        return self._was_ready and not self.draining

    async def health(self) -> dict[str, Any]:
        parts = {
            "kafka": self._reporter.log_silent_s < LOG_SILENT_S,
            "agent": (age := self._view.heartbeat_age_s) is not None and age < HEARTBEAT_LATE_S,
            "board": self._view.board is not None and self._view.purges_known,
            "caught_up": self._view.shared_tiers_count,
            **self._cache.standing(),
        }
        if self._origin is not None:
            parts["origin"] = await self._origin_up(self._origin)
        alarms = self._view.log_alarms
        if alarms:
            parts["log"] = False
        degraded = sorted(name for name, answers in parts.items() if not answers)
        return {
            "status": "degraded" if degraded else "ok",
            "serving": self.ready,
            "degraded": degraded,
            "dependencies": {name: "ok" if answers else "degraded" for name, answers in parts.items()},
            "models": self._models(),
            "lookup_ms": {tier: round(seconds * 1e3, 3) for tier, seconds in self._cache.lookup_s().items()},
            "positions": self._view.positions,
            "log_alarms": alarms,
            "node": self._identity.node,
            "region": self._identity.region,
            "worker": self._identity.worker,
        }

    def metrics(self) -> tuple[bytes, str]:
        gauge("mlcdn_control_plane_age_seconds").set(self._view.heartbeat_age_s or 0.0)
        for topic, position in self._view.positions.items():
            gauge("mlcdn_log_position").labels(topic).set(position)
        source: Collector = REGISTRY
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            source = MultiProcessCollector(CollectorRegistry())  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        registry.register(OfModels(source, {m.name for m in self._swaps.standing()}))
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def _models(self) -> dict[str, Any]:
        """By name; a model's candidate is said with it."""
        said: dict[str, Any] = {}
        for m in self._swaps.standing():
            one: dict[str, Any] = {"state": m.state, "version": m.version, "error": m.error}
            if m.channel == Channel.CANDIDATE:
                one["percent"] = self._swaps.percent(m.name)
                # A first release has nothing beside it.
                said.setdefault(m.name, {"state": m.state, "version": m.version, "error": m.error})["candidate"] = one
            else:
                said[m.name] = one
        return said

    async def _origin_up(self, origin: OriginClient) -> bool:
        if time.monotonic() - self._origin_at > ORIGIN_REMEMBERED_S:
            self._origin_at = time.monotonic()
            self._origin_answers = await origin.check(ORIGIN_TIMEOUT_S)
        return self._origin_answers
