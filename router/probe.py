"""Probes: this router's own look at every node, independent of the beats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import httpx
import structlog

from schemas.events import Health, RoutedNode

log = structlog.get_logger(__name__)

TIMEOUT_S: Final = 1.0


class Probes:
    """`answered` by node: 200 from ``/v2/health/ready`` within 1 s, at the last probe."""

    def __init__(self, nodes: Callable[[], Sequence[RoutedNode]], every_s: float) -> None:
        self._nodes, self._every_s = nodes, every_s
        self.answered: dict[str, bool] = {}

    async def run(self, stop: asyncio.Event) -> None:
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False, limits=limits) as http:
            while not stop.is_set():
                nodes = [n for n in self._nodes() if n.health is not Health.LEFT]
                answers = await asyncio.gather(*(self._probe(http, n) for n in nodes))
                now = dict(zip((n.node for n in nodes), answers, strict=True))
                for node, answered in now.items():
                    if self.answered.get(node, True) != answered:
                        log.info("probe changed", node=node, answered=answered)
                self.answered = now
                try:
                    await asyncio.wait_for(stop.wait(), self._every_s)
                except TimeoutError:
                    continue

    async def _probe(self, http: httpx.AsyncClient, node: RoutedNode) -> bool:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await http.get(f"{node.url}/v2/health/ready")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
            return False
        return answer.status_code == 200
