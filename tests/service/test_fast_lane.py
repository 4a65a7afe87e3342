"""The two doors of a worker, side by side over real sockets: the same bytes in, the same bytes out."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from edge_node.board import BoardReader
from edge_node.caching.cache import Cache
from edge_node.caching.memory_tier import MemoryTier
from edge_node.serving.lane import self_test
from edge_node.serving.lane.connection import LaneProtocol
from edge_node.serving.lane.heads import admitted, candidate
from edge_node.serving.lane.lane import Lane
from edge_node.serving.lane.repeats import MAX_HEADS
from edge_node.serving.main import Worker
from inference.onnx_model import OnnxModel
from processes.http_connection import GuardedProtocol
from processes.http_limits import Limits
from processes.http_server import Server
from processes.ports import listen
from schemas.events import CachePolicy, RequestBatch
from schemas.events import Limits as ReleaseLimits
from schemas.names import Scope, ScopeKind
from tests import models
from tests.service.test_worker import ROW, V1, V2, Node, truth, until

INFER = "/v2/models/digits/infer"
# What differs between two runs of one request at two moments.
MOMENT = re.compile(rb"(?m)^(?:date: .*|age: \d+)\r$|ttl=-?\d+")


class Doors:
    """Two workers of one node with a cache each: one has the lane in front, the other has not."""

    def __init__(self, node: Node, lane: Worker, plain: Worker, ports: tuple[int, int]) -> None:
        self.node, self.lane, self.plain, self.ports = node, lane, plain, ports

    async def both(self, chunks: Sequence[bytes]) -> tuple[bytes, bytes]:
        lane, plain = await asyncio.gather(*(said(port, chunks) for port in self.ports))
        return MOMENT.sub(b"", lane), MOMENT.sub(b"", plain)


def purge_log(directory: Path) -> Path:
    (found,) = (directory / "board").glob("purges-*.log")
    return found


async def said(port: int, chunks: Sequence[bytes]) -> bytes:
    """All that a server says to these bytes until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(0.002)
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b"reset"
    finally:
        writer.close()


SERVED: list[LaneProtocol] = []


def remember_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """In `SERVED`, those of this test."""
    seen = LaneProtocol.connection_made
    SERVED.clear()

    def remember(self: LaneProtocol, transport: Any) -> None:
        SERVED.append(self)
        seen(self, transport)

    monkeypatch.setattr(LaneProtocol, "connection_made", remember)


@asynccontextmanager
async def doors(directory: Path, node: Node | None = None, **release: Any) -> AsyncIterator[Doors]:
    if node is None:
        node = Node(directory)
        node.release(V1, **release)
    workers: list[Worker] = []
    running: list[asyncio.Task[Any]] = []
    servers: list[Server] = []
    ports = []
    for lane in (True, False):
        cache = Cache(MemoryTier(node.settings.memory_cache_bytes), None, None)
        worker = Worker(node.settings, 0, "http://127.0.0.1:1", BoardReader(directory), cache, node.log)
        worker.look()
        listener = listen("127.0.0.1", 0)
        config = uvicorn.Config(
            worker.app,
            http=partial(LaneProtocol, worker.lane) if lane else GuardedProtocol,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        server = Server(config, Limits())
        workers.append(worker)
        servers.append(server)
        ports.append(listener.getsockname()[1])
        running += [asyncio.create_task(worker.run()), asyncio.create_task(server.serve([listener]))]
    try:
        await until(lambda: all(w.health.ready for w in workers) and all(s.started for s in servers))
        yield Doors(node, workers[0], workers[1], (ports[0], ports[1]))
    finally:
        for server in servers:
            server.should_exit = True
        await asyncio.gather(running[1], running[3])
        running[0].cancel()
        running[2].cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for worker in workers:
            await worker.close("stopped")


def run(scenario: Coroutine[Any, Any, None], seconds: float = 60) -> None:
    asyncio.run(asyncio.wait_for(scenario, seconds))


def request(body: bytes, path: str = INFER, *headers: str, length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: edge:8000", "Content-Type: application/json", *headers]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def infer_body(values: Sequence[float] = ROW, **changes: Any) -> bytes:
    tensor = {"name": "features", "shape": [1, 32], "datatype": "FP32", "data": list(values)}
    top = {key: changes.pop(key) for key in ("id", "outputs", "parameters") if key in changes}
    return json.dumps({"inputs": [tensor | changes], **top}).encode()


def binary_request(
    values: Sequence[float] = ROW,
    *,
    shape: Sequence[int] = (1, 32),
    size: int | None = None,
    more: bytes = b"",
    **top: Any,
) -> bytes:
    raw = np.array(values, "<f4").tobytes()
    parameters = {"binary_data_size": len(raw) if size is None else size}
    tensor = {"name": "features", "shape": list(shape), "datatype": "FP32", "parameters": parameters}
    head = json.dumps({"inputs": [tensor], **top}).encode()
    return request(head + raw + more, INFER, f"Inference-Header-Content-Length: {len(head)}").replace(
        b"application/json", b"application/octet-stream"
    )


LAST = b"GET /v2/health/live HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n\r\n"


def test_an_answer_is_the_same_on_either_door_a_miss_a_hit_and_a_repeat(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with doors(tmp_path) as both:
            for ask in (
                request(infer_body()),
                request(infer_body(id="a-1")),
                request(b'{"features": [0.5, %b]}' % b",".join([b"1"] * 31), "/predict"),
            ):
                answers = await both.both([ask, ask, ask, ask, LAST])
                assert answers[0] == answers[1]
                assert answers[0].count(b"HTTP/1.1 200 OK") == 5
                assert b"mlcdn-memory; hit" in answers[0]
            assert len(both.lane.lane.heads) == 3 and not both.plain.lane.heads
            assert sum(len(head.repeats) for head in both.lane.lane.heads.values()) == 2, "one with an id is no repeat"

    run(scenario())


VALUES = st.sampled_from(
    [ROW, [0.0] * 32, [-0.0] * 32, [1e-40] * 32, [3.4e38] * 32, [1e39] * 32, [True] * 32, ROW[:31]]
    # Enough that some are a candidate's.
    + [[float(n)] * 32 for n in range(8)]
)
BODIES = st.one_of(
    st.builds(infer_body, VALUES),
    st.builds(infer_body, VALUES, id=st.sampled_from(["1", "", None, 'quoted"\u2028'])),
    st.builds(infer_body, shape=st.sampled_from([[32], [1, 32, 1], [0, 32], [2, 16], [-1, 32], [1.0, 32]])),
    st.builds(infer_body, datatype=st.sampled_from(["FP64", "INT64", "fp32", "BF16"])),
    st.builds(infer_body, name=st.sampled_from(["", "other"])),
    st.builds(infer_body, data=st.sampled_from([[ROW], [None] * 32, ["1"] * 32, 7, []])),
    st.builds(infer_body, outputs=st.sampled_from([[{"name": "scores"}], [{"name": "nope"}], []])),
    st.builds(infer_body, parameters=st.sampled_from([{}, {"a": 1}])),
    st.builds(lambda v: json.dumps({"features": v}).encode(), VALUES),
    st.builds(
        lambda m: json.dumps({"features": ROW, "model": m}).encode(), st.sampled_from(["digits", "nope", None, 7])
    ),
    st.sampled_from(
        [
            b"",
            b"{",
            b"[]",
            b'{"inputs": []}',
            b"\xff\xfe",
            infer_body() + b" ",
            b" " + infer_body(),
            infer_body() + b"x",
        ]
    ),
)
PATHS = st.sampled_from(
    [
        INFER,
        "/v2/models/digits/versions/v1/infer",
        "/v2/models/digits/versions/v2/infer",
        "/v2/models/digits/versions/v9/infer",
        "/v2/models/nope/infer",
        "/predict",
        "/batch_predict",
        "/predict?a=b",
        "/nope",
    ]
)
HEADERS = st.lists(
    st.sampled_from(
        [
            "Cache-Control: no-cache",
            "Cache-Control: no-store",
            "mlcdn-tags: a b",
            "Connection: keep-alive",
            "Accept-Encoding: gzip",
            "Authorization: Bearer x",
            "Accept: */*",
            "X-Other: 1",
            "mlcdn-deadline-ms: x",
            "mlcdn-cohort: a",
            "mlcdn-cohort: d",
        ]
    ),
    max_size=2,
    unique=True,
)
REQUESTS = st.one_of(
    st.builds(lambda body, path, headers: request(body, path, *headers), BODIES, PATHS, HEADERS),
    st.builds(lambda v: request(infer_body(v)), VALUES),
    st.builds(
        binary_request,
        st.sampled_from([ROW, [0.0] * 32, [float("nan")] * 32, [float("inf")] * 32, ROW[:31], ROW * 2]),
        shape=st.sampled_from([(1, 32), (2, 32), (32,), (0, 32), (-1, 32)]),
        size=st.sampled_from([None, 4, 0, -1, 2**40]),
        more=st.sampled_from([b"", b"x", b"    "]),
        parameters=st.sampled_from([{}, {"binary_data_output": True}, {"binary_data_output": 1}, {"other": 1}]),
        id=st.sampled_from([None, "a"]),
    ),
    st.builds(
        binary_request, st.sampled_from([ROW, [float("nan")] * 32]), parameters=st.just({"binary_data_output": True})
    ),
    st.sampled_from(
        [
            request(infer_body(), length=10),
            request(infer_body()).replace(b"HTTP/1.1", b"HTTP/1.0"),
            request(infer_body()).replace(b"Host: edge:8000\r\n", b""),
            request(infer_body()).replace(b"\r\n", b"\n", 2),
            request(infer_body()).replace(b"Content-Type", b" Content-Type"),
            request(infer_body(), INFER, "Transfer-Encoding: chunked"),
            b"\r\n" + request(infer_body()),
            b"\x00\x01garbage\r\n\r\n",
            b"GET /health/nope HTTP/1.1\r\nHost: edge\r\n\r\n",
        ]
    ),
)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """What a client may send, cut anywhere; or one request after the other, which is what the lane is for."""
    if draw(st.booleans()):
        some = draw(st.lists(REQUESTS, min_size=1, max_size=3))
        return [*(ask for ask in some for _ in range(3)), LAST]
    whole = b"".join(draw(st.lists(REQUESTS, min_size=1, max_size=5))) + LAST
    at = draw(st.lists(st.integers(0, len(whole)), max_size=4, unique=True).map(sorted))
    return [part for part in (whole[i:j] for i, j in zip([0, *at], [*at, len(whole)], strict=True)) if part]


@pytest.mark.parametrize(("percent", "examples"), [(None, 100), (0, 20), (30, 50), (100, 20)])
def test_any_stream_of_bytes_is_answered_alike_however_it_is_cut(
    tmp_path: Path, percent: float | None, examples: int
) -> None:
    """With no candidate, and with one for any part of the requests."""

    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        if percent is not None:
            node.release(V2, version="v2", percent=percent)
        async with doors(tmp_path, node) as both:
            # Known heads are what makes the lane dangerous: each request alone comes first.
            loop = asyncio.get_running_loop()

            @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
            @given(streams(), st.booleans())
            def check(chunks: list[bytes], each_alone: bool) -> None:
                async def compare() -> None:
                    if each_alone:
                        await both.both([*(c for c in chunks), LAST])
                    lane, plain = await both.both(chunks)
                    assert lane == plain

                asyncio.run_coroutine_threadsafe(compare(), loop).result(30)

            await asyncio.to_thread(check)
            for n in range(10):
                lane, plain = await both.both([*[request(infer_body([float(n)] * 32))] * 3, LAST])
                assert lane == plain
            asked = [request(infer_body([float(n)] * 32)) for n in range(10)]
            for chunks in ([b"".join(asked) + LAST], [asked[0], b"".join(asked[1:]) + LAST]):
                lane, plain = await both.both(chunks)
                assert lane == plain and lane.count(b"200 OK") == 11
            # What took the lane.
            bound = {served.wanted.version for served in both.lane.lane._bounds}
            assert bound == {None: {"v1"}, 0: {"v1"}, 30: {"v1", "v2"}, 100: {"v1", "v2"}}[percent]

    run(scenario(), 180)


def test_a_repeat_ends_with_what_chose_its_release(tmp_path: Path) -> None:
    """The board moves no slot here: what the worker does by itself must end it too."""

    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        node.release(V2, version="v2", percent=0)
        async with doors(tmp_path, node) as both:
            slot, ask = both.lane.slots.get("digits"), request(infer_body())

            async def channels() -> list[bytes]:
                answers = await said(both.ports[0], [ask, ask, ask, LAST])
                assert answers.count(b"200 OK") == 4
                return re.findall(rb"mlcdn-model: digits;\w+;(\w+)", answers)

            for percent, channel in ((0, b"stable"), (100, b"candidate"), (50, None), (0, b"stable")):
                slot.share(percent)
                found = set(await channels())
                assert len(found) == 1 and channel in (*found, None)
                assert [r.turn for h in both.lane.lane.heads.values() for r in h.repeats.values()] == [slot.turn]
            slot.share(100)
            assert set(await channels()) == {b"candidate"}
            slot.drop_candidate()
            assert set(await channels()) == {b"stable"}

    run(scenario())


def test_what_comes_behind_a_request_in_the_lane_waits_for_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow model: the second request is read while the first is in a thread."""
    original = OnnxModel.run

    def slow(model: OnnxModel, *rest: Any, **named: Any) -> Any:
        time.sleep(0.02)
        return original(model, *rest, **named)

    monkeypatch.setattr(OnnxModel, "run", slow)

    async def scenario() -> None:
        async with doors(tmp_path) as both:
            await both.both([request(infer_body()), LAST])
            asked = [request(infer_body([float(n)] * 32)) for n in range(6)]
            one_by_one = await both.both([*asked, LAST])
            assert one_by_one[0] == one_by_one[1] and one_by_one[0].count(b"200 OK") == 7
            for worker in (both.lane, both.plain):
                worker.slots.get("digits").serving.cost.in_loop = False
            quick_behind_slow = await both.both([request(infer_body([50.0] * 32)), LAST])
            assert quick_behind_slow[0] == quick_behind_slow[1]
            assert quick_behind_slow[0].index(b"model_name") < quick_behind_slow[0].index(b"live")
            asked = [request(infer_body([float(n)] * 32)) for n in range(20, 26)]
            at_once = await both.both([asked[0], b"".join(asked[1:]) + LAST])
            assert at_once[0] == at_once[1] and at_once[0].count(b"200 OK") == 7

    run(scenario())


def test_a_body_ends_where_its_head_says_and_nowhere_else(tmp_path: Path) -> None:
    """The lane knows the head, and the bytes that are there would do for a body."""

    async def scenario() -> None:
        async with doors(tmp_path) as both:
            body = infer_body()
            padded = body + b" " * 5
            await both.both([request(body), LAST])
            await both.both([request(padded), LAST])
            lane, plain = await both.both([request(body) + b" ", LAST])
            assert lane == plain and lane.count(b"HTTP/1.1 ") == 2
            lane, plain = await both.both([request(padded)[:-5], b" " * 5, LAST])
            assert lane == plain and lane.count(b"200 OK") == 2

    run(scenario())


def test_a_body_in_a_second_piece_takes_the_lane_and_one_that_does_not_come_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    original = Lane.ask

    def ask(lane: Lane, known: Any, body: bytes, *rest: Any) -> Any:
        asked.append(body)
        return original(lane, known, body, *rest)

    monkeypatch.setattr(Lane, "ask", ask)

    async def scenario() -> None:
        async with doors(tmp_path) as both:
            body = infer_body()
            whole = request(body)
            head = whole[: -len(body)]
            await both.both([whole, LAST])
            assert not asked
            for chunks in ([head, body], [whole[:-7], whole[-7:]]):
                lane, plain = await both.both([*chunks, *chunks, LAST])
                assert lane == plain and lane.count(b"200 OK") == 3
            assert len(asked) == 1 and len(both.lane.lane.heads) == 1, "the others were repeats"
            lane, plain = await both.both([head, body[:9], body[9:], LAST])
            assert lane == plain and lane.count(b"200 OK") == 2 and len(asked) == 1
            # The sweep hands what waits to the parser, which has the clocks.
            reader, writer = await asyncio.open_connection("127.0.0.1", both.ports[0])
            writer.write(head + body[:9])
            (connection,) = [c for c in SERVED if c._half] or await some_half()
            connection.tend(asyncio.get_running_loop().time())
            assert connection.mid_message and not connection._half
            writer.write(body[9:] + LAST)
            assert (await asyncio.wait_for(reader.read(), 5)).count(b"200 OK") == 2
            writer.close()

    async def some_half() -> list[LaneProtocol]:
        await until(lambda: any(c._half for c in SERVED))
        return [c for c in SERVED if c._half]

    remember_connections(monkeypatch)
    run(scenario())


def test_a_repeat_obeys_a_purge_a_swap_and_its_ttl_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = OnnxModel.load

    def slow(*args: Any) -> OnnxModel:
        time.sleep(0.1)
        return original(*args)

    monkeypatch.setattr(OnnxModel, "load", slow)

    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1, cache=CachePolicy(ttl_s=1.5, stale_while_revalidate_s=0.0))
        async with doors(tmp_path, node) as both:
            ask, port = request(infer_body()), both.ports[0]

            async def tier() -> tuple[str, list[float], int]:
                answer = await said(port, [ask, LAST])
                found = re.search(rb"cache-status: mlcdn-memory; (\w+)", answer)
                age = re.search(rb"age: (\d+)", answer)
                assert found and age
                body = answer.split(b"\r\n\r\n")[1].split(b"HTTP/1.1")[0]
                return found[1].decode(), json.loads(body)["outputs"][0]["data"], int(age[1])

            assert [(await tier())[0] for _ in range(3)] == ["fwd", "hit", "hit"]
            assert sum(len(h.repeats) for h in both.lane.lane.heads.values()) == 1
            node.purge(Scope(ScopeKind.MODEL, "digits"))
            assert [(await tier())[0] for _ in range(2)] == ["fwd", "hit"]
            node.release(V2)
            # Its repeats are made anew while the next release is still being loaded.
            while both.lane.slots.get("digits").serving.wanted.sequence == 1:
                await tier()
            found, scores, _ = await tier()
            assert found == "hit" and np.allclose(scores, truth(V2, [ROW])[0], rtol=1e-5), "prefilled"
            node.release(V1, version="v3", cache=CachePolicy(ttl_s=1.5, stale_while_revalidate_s=0.0))
            await until(lambda: both.lane.slots.get("digits").serving.wanted.sequence == 3)
            await tier()
            node.purge(Scope(ScopeKind.ALL, ""))
            ages = []
            until_s = time.monotonic() + 2.2
            while time.monotonic() < until_s:
                found, _, age = await tier()
                ages.append((found, age))
                await asyncio.sleep(0.02)
            assert ("hit", 0) in ages and ("hit", 1) in ages, "an answer says how old it is"
            assert [found for found, _ in ages].count("fwd") == 2, "the first, and one after its ttl"

    run(scenario())


def test_a_repeat_ends_with_the_entry_it_was_made_of(tmp_path: Path) -> None:
    """Somebody had the answer computed anew: who asks next is told its age, not the old one's."""

    async def scenario() -> None:
        async with doors(tmp_path) as both:
            ask = request(infer_body())
            anew = request(infer_body(), INFER, "Cache-Control: no-cache")

            async def age() -> int:
                answer = await said(both.ports[0], [ask, LAST])
                found = re.search(rb"age: (\d+)", answer)
                assert found and b"mlcdn-memory; hit" in answer
                return int(found[1])

            await said(both.ports[0], [ask, LAST])
            assert await age() == 0
            await asyncio.sleep(1.05)
            assert await age() == 1
            await said(both.ports[0], [anew, LAST])
            assert await age() == 0
            both.lane.cache.memory.clear()
            assert b"mlcdn-memory; fwd" in await said(both.ports[0], [ask, LAST])

    run(scenario())


def test_purges_that_cannot_be_read_end_every_repeat(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with doors(tmp_path) as both:
            ask = [request(infer_body()), LAST]
            for _ in range(3):
                await said(both.ports[0], ask)
            log = purge_log(tmp_path)
            both.node.purge(Scope(ScopeKind.MODEL, "other"))
            hidden = log.rename(log.with_name("hidden"))
            log.mkdir()
            try:
                answer = await said(both.ports[0], ask)
                assert b"mlcdn-memory; fwd" in answer and b" 200 OK" in answer
            finally:
                log.rmdir()
                hidden.rename(log)
            await said(both.ports[0], ask)
            assert b"mlcdn-memory; hit" in await said(both.ports[0], ask)

    run(scenario())


def test_every_answer_of_the_lane_is_a_row(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with doors(tmp_path) as both:
            ask = request(infer_body())
            await said(both.ports[0], [ask] * 5 + [LAST])
            broken = request(infer_body([2.0] * 32))
            await said(both.ports[0], [broken, LAST])
            both.lane.reporter.flush()
            batches = both.node.said(RequestBatch)
            tiers = [tier for batch in batches for tier in batch.tier]
            assert sorted(tiers) == [0, 0, 0, 0, 3, 3]
            sizes = {int(n) for b in batches for n in np.frombuffer(b.request_bytes, "<u4")}
            assert sizes == {len(infer_body()), len(infer_body([2.0] * 32))}
            assert all(batch.models[0].version == "v1" for batch in batches)

    run(scenario())


def test_an_error_in_the_lane_is_said_as_on_the_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = OnnxModel.run

    def slow(model: OnnxModel, inputs: Any, *rest: Any, **named: Any) -> Any:
        if next(iter(inputs.values())).max() > 1_000:
            time.sleep(0.3)
        return original(model, inputs, *rest, **named)

    monkeypatch.setattr(OnnxModel, "run", slow)

    async def scenario() -> None:
        async with doors(tmp_path, limits=ReleaseLimits(deadline_ms=100)) as both:
            for worker in (both.lane, both.plain):
                worker.slots.get("digits").serving.cost.in_loop = False
            await both.both([request(infer_body()), LAST])
            lane, plain = await both.both([request(infer_body([2_000.0] * 32)), LAST])
            assert lane == plain and b"HTTP/1.1 504" in lane
            lane, plain = await both.both([request(infer_body()), LAST])
            assert lane == plain and lane.count(b"200 OK") == 2

    run(scenario())


def test_binary_tensors_take_the_lane_under_the_key_of_json(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with doors(tmp_path) as both:
            plain_answer = await both.both([request(infer_body()), LAST])
            for ask in (
                binary_request(parameters={"binary_data_output": True}),
                binary_request(),
                binary_request(id="7"),
            ):
                lane, plain = await both.both([ask, ask, ask, LAST])
                assert lane == plain and lane.count(b"200 OK") == 4 and b"mlcdn-memory; hit" in lane
            key = re.compile(rb"mlcdn-cache-key: \w+")
            assert set(key.findall(lane)) == set(key.findall(plain_answer[0])), "transport is not in the key"
            assert sum(len(head.repeats) for head in both.lane.lane.heads.values()) == 2
            for wrong in (
                binary_request(size=4),
                binary_request(size=127),
                binary_request(ROW[:31]),
                binary_request(ROW * 2),
                binary_request(more=b"    "),
                binary_request(shape=(2, 16)),
                binary_request(parameters={"binary_data_output": 1}),
            ):
                # Its head is known from the first time on.
                lane, plain = await both.both([wrong, wrong, wrong, LAST])
                assert lane == plain and lane.count(b"HTTP/1.1 400") == 3

    run(scenario())


def test_a_drain_answers_what_is_in_the_lane_and_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = OnnxModel.run

    def slow(model: OnnxModel, *rest: Any, **named: Any) -> Any:
        time.sleep(0.1)
        return original(model, *rest, **named)

    async def scenario() -> None:
        async with doors(tmp_path) as both:
            await said(both.ports[0], [request(infer_body()), LAST])
            both.lane.slots.get("digits").serving.cost.in_loop = False
            monkeypatch.setattr(OnnxModel, "run", slow)
            reader, writer = await asyncio.open_connection("127.0.0.1", both.ports[0])
            writer.write(request(infer_body([5.0] * 32)))
            await until(lambda: both.lane.predictor.in_flight == 1)
            (connection,) = [c for c in SERVED if c.busy()]
            connection.shared.drains_since = asyncio.get_running_loop().time()
            answer = await asyncio.wait_for(reader.read(), 5)
            assert answer.startswith(b"HTTP/1.1 200 OK") and b"\r\nconnection: close\r\n\r\n{" in answer
            writer.close()

    remember_connections(monkeypatch)
    run(scenario())


def test_heads_and_repeats_are_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, memory_cache_bytes=2**20)
        node.release(V1)
        async with doors(tmp_path, node) as both:
            lane = both.lane.lane
            reader, writer = await asyncio.open_connection("127.0.0.1", both.ports[0])

            async def ask(raw: bytes) -> None:
                writer.write(raw)
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))

            for n in range(MAX_HEADS + 50):
                for _ in range(3):
                    await ask(request(infer_body(), INFER, f"User-Agent: {n}"))
            assert len(lane.heads) == MAX_HEADS
            assert len(lane.repeats._order) < 3 * MAX_HEADS
            for n in range(400):
                for _ in range(3):
                    await ask(request(infer_body([float(n)] * 32)))
            held = sum(r.size for head in lane.heads.values() for r in head.repeats.values())
            assert lane.repeats.bytes == held <= lane.repeats.max_bytes == 2**18
            writer.close()

    run(scenario())


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /predict HTTP/1.1\nHost: a\r\nContent-Length: 2\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a b\r\nContent-Length: 2\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: +2\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nCookie: x\r\nContent-Length: 2\r\n\r\n",
        b"POST /v2/models/a%2e/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nUser-Agent: a\r\n b\r\nContent-Length: 2\r\n\r\n",
    ],
)
def test_a_head_that_could_be_read_in_two_ways_is_not_admitted(raw: bytes) -> None:
    lines = re.split(rb"\r?\n(?! )", raw.strip())
    headers = [(n.lower(), v.strip()) for n, _, v in (line.partition(b":") for line in lines[1:])]
    assert candidate(raw + b"{}") == raw
    assert admitted(raw, lines[0].split()[1], headers) is None
    good = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n"
    assert admitted(good, b"/predict", [(b"host", b"a"), (b"content-length", b"2")]) is not None
    for other in (b"\r\n" + good, b"GET " + good[5:], good[:-2]):
        assert candidate(other) is None


def test_the_self_test_turns_the_lane_off_where_the_server_below_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_test.why_not() is None
    with monkeypatch.context() as patch:
        patch.setattr(HttpToolsProtocol, "on_headers_complete", lambda self: None)
        assert self_test.why_not() is not None
    with monkeypatch.context() as patch:
        patch.delattr(HttpToolsProtocol, "on_message_complete")
        assert self_test.why_not() is not None
    assert self_test.why_not() is None


def test_two_models_are_meant_by_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        node.release(models.mlp_bytes(9, (4, 3)), model="small")
        async with doors(tmp_path, node) as both:
            for _ in range(3):
                for body in (b'{"features":[1,2,3,4],"model":"small"}', b'{"features":[1,2,3,4]}'):
                    lane, plain = await both.both([request(body, "/predict"), LAST])
                    assert lane == plain
            assert b" 200 OK" in (
                await said(both.ports[0], [request(b'{"features":[1,2,3,4],"model":"small"}', "/predict"), LAST])
            )

    run(scenario())
