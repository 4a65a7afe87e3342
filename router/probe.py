"""The router's own look at every node: ``GET /health`` within a second, again and again.

Laws: the second observer beside the beats: it must not know what they say; a probe is bounded in time, in bytes and in
how many run at once; a redirect is not followed, since a node's URL comes from the log and may lead nowhere else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

import httpx

from router.choose import Probed, usable_url
from schemas.events import Health, RoutedNode
from schemas.metrics import counter

TIMEOUT_S: Final = 1.0
AT_ONCE: Final = 64


class Prober:
    """`outcomes` by node, of the nodes that the table has now."""

    def __init__(self, nodes: Callable[[], Iterable[RoutedNode]], http: httpx.AsyncClient) -> None:
        self._nodes, self._http = nodes, http
        self._room = asyncio.Semaphore(AT_ONCE)
        self.outcomes: dict[str, Probed] = {}

    async def run(self, every_s: float, stop: asyncio.Event) -> None:
        while not stop.is_set():
            began = time.monotonic()
            await self.round()
            try:
                await asyncio.wait_for(stop.wait(), max(0.05, every_s - (time.monotonic() - began)))
            except TimeoutError:
                continue

    async def round(self) -> None:
        """Probes every node once."""
        targets = [n for n in self._nodes() if n.health is not Health.LEFT and usable_url(n.url)]
        await asyncio.gather(*(self._probe(node) for node in targets))
        known = {node.node for node in targets}
        for gone in self.outcomes.keys() - known:
            del self.outcomes[gone]

    async def _probe(self, node: RoutedNode) -> None:
        async with self._room:
            outcome = await probe(self._http, node.url)
        self.outcomes[node.node] = outcome
        counter("mlcdn_router_probes_total").labels("ok" if outcome.ok else "failed").inc()


async def probe(http: httpx.AsyncClient, url: str) -> Probed:
    """One probe. The body is not read: the status says it, and a body has no end that one could rely on."""
    began = time.monotonic()
    try:
        # httpx's own timeouts are for each step; a node that sends one byte a second would pass them all.
        async with asyncio.timeout(TIMEOUT_S):
            async with http.stream("GET", f"{url.rstrip('/')}/health", follow_redirects=False) as answer:
                status = answer.status_code
    except TimeoutError:
        return Probed(False, f"no answer in {TIMEOUT_S:g} s", TIMEOUT_S * 1e3)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Probed(False, type(error).__name__, (time.monotonic() - began) * 1e3)
    ms = (time.monotonic() - began) * 1e3
    return Probed(True, "200", ms) if status == 200 else Probed(False, f"HTTP {status}", ms)
