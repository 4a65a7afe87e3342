"""Two nodes over one Valkey: a model slower than a look-up asks it, a quicker one never does, and a release may say."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from onnx import numpy_helper
from redis.asyncio import Redis

from edge_node.caching.cache import PROBE_EVERY_S
from edge_node.caching.tier_choice import FIRST_LOOKUPS
from processes.ports import LOOPBACK
from schemas.events import CachePolicy, TierUse
from tests import models
from tests.one_valkey import Valkey, one_valkey
from tests.worker_process import WorkerProcess

FAST, SLOW = "digits", "slow"
FAST_ALWAYS, SLOW_NEVER = "fast-always", "slow-never"
ROWS = 10


def slow_bytes(layers: int = 400, width: int = 512) -> bytes:
    """The signature of the default MLP, and some milliseconds a row: one matrix multiplied with again and again."""
    rng = np.random.default_rng(7)
    first, middle, last = (
        (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        for shape in ((32, width), (width, width), (width, 8))
    )
    names = [f"h{n}" for n in range(layers + 1)]
    return models.model_bytes(
        [
            models.node("MatMul", ["features", "first"], ["h0"]),
            *(models.node("MatMul", [one, "middle"], [next_]) for one, next_ in itertools.pairwise(names)),
            models.node("MatMul", [names[-1], "last"], ["scores"]),
        ],
        [models.value("features", models.FLOAT, ["N", 32])],
        [models.value("scores", models.FLOAT, ["N", 8])],
        [numpy_helper.from_array(w, n) for w, n in ((first, "first"), (middle, "middle"), (last, "last"))],
    )


SLOW_BYTES = slow_bytes()


class Edge(WorkerProcess):
    """A worker that serves each of the models, with Redis for its only tier beside memory."""

    def __init__(self, directory: Path, redis_url: str, *, before: str = "", **settings: object) -> None:
        super().__init__(directory, before=before, redis_url=redis_url, disk_cache_bytes=0, **settings)
        self.node.release(SLOW_BYTES, model=SLOW)
        self.node.release(SLOW_BYTES, model=SLOW_NEVER, cache=CachePolicy(tiers=TierUse.NEVER))
        self.node.release(models.mlp_bytes(2), model=FAST_ALWAYS, cache=CachePolicy(tiers=TierUse.ALWAYS))
        self.url = f"http://{LOOPBACK}:{self.port}"
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=10)

    def __exit__(self, *error: object) -> None:
        self.http.close()
        super().__exit__(*error)  # type: ignore[arg-type]

    def ask(self, model: str, number: int) -> httpx.Response:
        answer = self.http.post("/predict", json={"features": [float(number)] * 32, "model": model})
        assert answer.status_code == 200, answer.text
        return answer

    def trail(self, model: str, number: int) -> str:
        return str(self.ask(model, number).headers["cache-status"])

    def tiers(self, model: str) -> dict[str, dict[str, object]]:
        said = self.http.get(f"/v2/models/{model}/config").json()["mlcdn"]["cache"]["tiers"]
        return {tier: choice for tier, choice in said.items() if tier != "wanted"}

    def consulted(self, model: str) -> float:
        text = self.http.get("/metrics").text
        (line,) = [li for li in text.splitlines() if li.startswith(f'mlcdn_tier_consulted{{model="{model}"')]
        return float(line.rpartition(" ")[2])

    def measured(self) -> bool:
        """Whether it has probed Redis often enough to know what that costs."""
        return self.http.get("/health").json()["lookup_ms"]["redis"] != 0.5


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < end, "it did not come to that in time"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def edges(
    directory: Path, count: int, *, before: str = "", **settings: object
) -> AsyncIterator[tuple[Valkey, Redis, list[Edge]]]:
    async with one_valkey(directory) as server, Redis.from_url(server.url) as redis:
        with ExitStack() as stack:
            started = []
            for number in range(count):
                home = directory / f"edge-{number}"
                home.mkdir()
                started.append(
                    await asyncio.to_thread(stack.enter_context, Edge(home, server.url, before=before, **settings))
                )
            for edge in started:
                await until(edge.measured)
            yield server, redis, started


async def looked_up(redis: Redis) -> int:
    """Keys that were read, those of probes among them."""
    return int((await redis.info("commandstats")).get("cmdstat_getrange", {"calls": 0})["calls"])


@pytest.mark.parametrize("fast_lane", [True, False])
def test_who_asks_redis_and_who_does_not(tmp_path: Path, fast_lane: bool) -> None:
    async def scenario() -> None:
        async with edges(tmp_path, 2, fast_lane=fast_lane) as (_, redis, (first, second)):

            async def shared(model: str) -> list[str]:
                """What the second node's answers say once the first node has computed the same."""
                before = await redis.dbsize()
                for row in range(ROWS):
                    assert "mlcdn-redis; fwd=uri-miss" in first.trail(model, row)
                while await redis.dbsize() < before + ROWS:  # noqa: ASYNC110 (another process writes)
                    await asyncio.sleep(0.005)
                return [second.trail(model, row) for row in range(ROWS)]

            for model in (FAST_ALWAYS, SLOW):
                async with asyncio.timeout(10):
                    trails = await shared(model)
                assert all(t.startswith("mlcdn-redis; hit; ttl=") for t in trails), trails
                assert "mlcdn-memory; hit" in second.trail(model, 0)
                assert first.tiers(model)["redis"]["asked"] is True and first.consulted(model) == 1

            held = await redis.dbsize()
            for model in (FAST, SLOW_NEVER):
                began, before = time.monotonic(), await looked_up(redis)
                for row in range(50):
                    for edge in (first, second):
                        assert edge.trail(model, row) == "mlcdn-memory; fwd=uri-miss; stored"
                probes = 2 * (FIRST_LOOKUPS + (time.monotonic() - began) / PROBE_EVERY_S + 1)
                assert await looked_up(redis) - before <= probes < 50
                assert first.tiers(model)["redis"]["asked"] is False and first.consulted(model) == 0
            assert await redis.dbsize() == held
            assert "a look-up takes" in str(first.tiers(FAST)["redis"]["reason"])
            assert first.tiers(SLOW_NEVER)["redis"]["reason"] == "the release says never"

    asyncio.run(scenario())
