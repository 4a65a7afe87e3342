"""A Redis that is refused, hangs, is flushed or holds the wrong type, under a worker whose model is slow enough to ask it:
every request is answered, by either door, and none but the first waits. And many misses on one key are one computation."""

from __future__ import annotations

import asyncio
import itertools
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import pytest
from redis.asyncio import Redis

from schemas.events import CachePolicy
from tests.one_valkey import Valkey
from tests.service.test_fast_lane import doors, infer_body, request, said
from tests.service.test_tier_choice import SLOW, Edge, edges
from tests.service.test_tier_choice import until as until_true
from tests.service.test_worker import Runs, run, runs, until

# Of a request: the time-out of a look-up, which the first may wait for, and the hiccups of a machine with other tests.
TIMEOUT_S, SLACK_S, HEALED_S = 0.045, 0.1, 2.0
LANE_COUNTS = """
import os
from edge_node.serving.lane.connection import LaneProtocol
log = os.open(os.path.join(os.environ["MLCDN_DIR"], "lane"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
original = LaneProtocol._taken
def taken(*rest):
    was = original(*rest)
    os.write(log, b"x" if was else b"")
    return was
LaneProtocol._taken = taken"""
__all__ = ["runs"]
both_doors = pytest.mark.parametrize("fast_lane", [True, False], ids=["lane", "plain"])


class Load:
    """One request after the other, each for an answer that nobody has, until it ends."""

    def __init__(self, edge: Edge, first: int) -> None:
        self._rows = itertools.count(first)
        self.seconds: list[float] = []
        self.statuses: list[int] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._http = httpx.Client(base_url=edge.url, trust_env=False, timeout=10)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join()
        self._http.close()

    def _ask(self) -> None:
        while not self._ending.is_set():
            body = {"features": [float(next(self._rows))] * 32, "model": SLOW}
            began = time.perf_counter()
            self.statuses.append(self._http.post("/predict", json=body).status_code)
            self.seconds.append(time.perf_counter() - began)


def in_lane(edge: Edge) -> int:
    return (edge.directory / "lane").stat().st_size


def misses(edge: Edge, reason: str) -> float:
    """Look-ups that Redis did not answer, for this reason."""
    label = f'reason="{reason}",tier="redis"'
    lines = [li for li in edge.http.get("/metrics").text.splitlines() if li.startswith("mlcdn_cache_misses_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if label in line)


def tenth(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=10)[0]


async def known(edge: Edge, state: str) -> float:
    """Seconds until the worker says so of Redis."""
    began = time.monotonic()
    while True:
        answer = await asyncio.to_thread(edge.http.get, "/health")
        if answer.json()["dependencies"]["redis"] == state:
            return time.monotonic() - began
        assert time.monotonic() - began < 10
        await asyncio.sleep(0.01)


async def hurt(fault: str, server: Valkey, redis: Redis) -> None:
    if fault == "refused":
        await server.stop()
    elif fault == "hung":
        server.pause()
    elif fault == "flushed":
        await redis.flushall()
        await redis.script_flush()
    else:
        for key in await redis.keys("mlcdn:*"):
            await redis.delete(key)
            await redis.rpush(key, b"not an entry")


@both_doors
@pytest.mark.parametrize("fault", ["refused", "hung", "flushed", "wrong type"])
def test_row_5_every_request_is_answered_and_none_but_the_first_waits(
    tmp_path: Path, fault: str, fast_lane: bool
) -> None:
    async def scenario() -> None:
        async with edges(tmp_path, 2, before=LANE_COUNTS, fast_lane=fast_lane) as (server, redis, (first, second)):
            with Load(first, 0) as usual:
                await asyncio.sleep(1)
            assert first.tiers(SLOW)["redis"]["asked"] is True
            # The second node has none of these in its memory, and Redis has them.
            assert second.trail(SLOW, 0).startswith("mlcdn-redis; hit")
            away = fault in ("refused", "hung")
            asked_in_lane = in_lane(second)
            with Load(second, 1) as load:
                await asyncio.sleep(0.1)
                before = len(load.seconds)
                await hurt(fault, server, redis)
                try:
                    if away:
                        await known(second, "degraded")
                    opened = len(load.seconds) + 1
                    await asyncio.sleep(1)
                finally:
                    if fault == "refused":
                        await server.start()
                    elif fault == "hung":
                        server.resume()
                back = len(load.seconds)
                healed = await known(second, "ok")
                await asyncio.sleep(0.3)
            assert set(usual.statuses) | set(load.statuses) == {200}
            assert (in_lane(second) - asked_in_lane > 0.9 * len(load.statuses)) == fast_lane
            baseline = statistics.median(usual.seconds)
            while_open = load.seconds[opened:back]
            assert len(while_open) > 20
            assert max(load.seconds[before : opened + 1]) < baseline + TIMEOUT_S + SLACK_S
            # The quickest tenth, which other tests on the machine do not slow down.
            assert tenth(while_open) < tenth(usual.seconds) * 1.5 + 0.002, "an open breaker costs nothing"
            # A request's, and a probe's that went with it.
            assert misses(second, "timeout") + misses(second, "unreachable") <= 2, "not one a turn"
            assert (misses(second, "breaker") > 20) == away
            assert healed < HEALED_S
            # It is asked and filled again.
            await until_true(partial(shares_again, first, second))

    asyncio.run(scenario())


NEW = itertools.count(10**6)


def shares_again(first: Edge, second: Edge) -> bool:
    """Whether what one node computes now is a hit for the other, a moment later."""
    row = next(NEW)
    first.ask(SLOW, row)
    time.sleep(0.02)
    return second.trail(SLOW, row).startswith("mlcdn-redis; hit")


@both_doors
def test_a_hung_redis_costs_all_that_wait_one_time_out_together(tmp_path: Path, fast_lane: bool) -> None:
    async def scenario() -> None:
        async with edges(tmp_path, 1, before=LANE_COUNTS, fast_lane=fast_lane) as (server, _, (edge,)):
            for row in range(5):
                assert "mlcdn-redis; fwd=uri-miss" in edge.trail(SLOW, row)
            loads = [Load(edge, first) for first in range(1_000, 9_000, 1_000)]
            # What was computed is written by then.
            await asyncio.sleep(0.2)
            server.pause()
            try:
                for load in loads:
                    load.__enter__()
                await asyncio.sleep(1.5)
                for load in loads:
                    load.__exit__(None, None, None)
            finally:
                server.resume()
            assert {status for load in loads for status in load.statuses} == {200}
            # Those that asked at once, and a probe.
            assert 1 <= misses(edge, "timeout") <= len(loads) + 1
            assert misses(edge, "breaker") > 20
            # Eight rows of the model among it, and eight clients that share an interpreter.
            assert all(load.seconds[0] < TIMEOUT_S + 4 * SLACK_S for load in loads)

    asyncio.run(scenario())


def computed_rows(edge: Edge) -> float:
    text = edge.http.get("/metrics").text
    lines = [li for li in text.splitlines() if li.startswith("mlcdn_batch_rows_sum") and f'model="{SLOW}"' in li]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def together(sockets: Sequence[socket.socket], row: int) -> list[bytes]:
    """The answers to one request, sent over each of them before any is read."""
    asked = request(infer_body([float(row)] * 32), f"/v2/models/{SLOW}/infer")
    for one in sockets:
        one.sendall(asked)
    answers = []
    for one in sockets:
        answer = b""
        while not answer.endswith(b"}"):
            answer += one.recv(65_536)
        answers.append(answer)
    return answers


@both_doors
def test_row_24_many_misses_on_one_key_are_one_computation(tmp_path: Path, fast_lane: bool) -> None:
    async def scenario() -> None:
        async with edges(tmp_path, 1, before=LANE_COUNTS, fast_lane=fast_lane) as (_, _, (edge,)):
            with ExitStack() as stack:
                sockets = [stack.enter_context(edge.connect()) for _ in range(50)]
                # Heads that the lane knows.
                together(sockets, -1)
                taken = in_lane(edge)
                for row in range(5):
                    before = computed_rows(edge)
                    answers = together(sockets, row)
                    assert computed_rows(edge) == before + 1
                    assert all(answer.startswith(b"HTTP/1.1 200 OK") for answer in answers)
                    assert len({answer.rpartition(b"\r\n\r\n")[2] for answer in answers}) == 1
                    joined = sum(b"; collapsed" in answer for answer in answers)
                    late = sum(b"mlcdn-memory; hit" in answer for answer in answers)
                    assert joined + late == 49 and joined > 10
                assert (in_lane(edge) - taken > 240) if fast_lane else (in_lane(edge) == 0)

    asyncio.run(scenario())


CACHE_STATUS = b"cache-status: "


@pytest.mark.parametrize("door", ["lane", "plain"])
def test_stale_answers_while_it_is_refilled_and_where_the_model_fails(tmp_path: Path, runs: Runs, door: str) -> None:
    async def scenario() -> None:
        async with doors(
            tmp_path, cache=CachePolicy(ttl_s=0.3, stale_while_revalidate_s=0.5, stale_if_error_s=60.0)
        ) as both:
            worker = both.lane if door == "lane" else both.plain
            port = both.ports[0] if door == "lane" else both.ports[1]

            async def ask(*row: float) -> tuple[int, str]:
                body = infer_body([*row, *([0.5] * 31)])
                answer = await said(port, [request(body, "/v2/models/digits/infer", "Connection: keep-alive"), LAST])
                status = [li for li in answer.split(b"\r\n") if li.startswith(CACHE_STATUS)]
                return int(answer.split()[1]), status[0].decode() if status else ""

            await ask(1.0)
            assert "mlcdn-memory; hit; ttl=0" in (await ask(1.0))[1]
            await asyncio.sleep(0.35)
            runs.reset()
            status, trail = await ask(1.0)
            assert status == 200 and "mlcdn-memory; hit; ttl=-" in trail
            await until(lambda: runs.count == 1 and worker.predictor.in_flight == 0)
            assert "hit; ttl=0" in (await ask(1.0))[1] and runs.count == 1
            # Past both windows the model is asked; where it fails, what there was stands in.
            await asyncio.sleep(0.95)
            runs.fail = True
            status, trail = await ask(1.0)
            assert status == 200 and "mlcdn-memory; hit; ttl=-" in trail, trail
            assert (await ask(2.0))[0] == 500
            runs.fail = False
            assert (await ask(1.0))[1].endswith("stored") and "hit; ttl=0" in (await ask(1.0))[1]
            assert len(worker.lane.heads) == (1 if door == "lane" else 0)

    run(scenario())


LAST = b"GET /v2/health/live HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n"
