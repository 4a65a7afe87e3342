"""A worker with a real board, real ONNX models and the log in memory, driven over ASGI and, once, over a socket."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
from msgspec.structs import replace

from edge_node.board import CAUGHT_UP, INCARNATION, BoardModel, BoardReader, BoardWriter, LogIdentity
from edge_node.caching.cache import Cache
from edge_node.caching.disk_tier import DiskTier
from edge_node.caching.memory_tier import MemoryTier
from edge_node.serving.main import Worker
from edge_node.serving.origin_client import OriginClient
from inference.onnx_model import OnnxModel, RunFailed
from inference.protocol import parse_infer, tensors_of
from processes.ports import free_port, listen
from schemas import codec
from schemas.events import (
    Artifact,
    Batching,
    CachePolicy,
    Event,
    Limits,
    ModelReleased,
    ModelSwapped,
    NodeBeat,
    RequestBatch,
    SwapFailed,
    Tensor,
    TierUse,
)
from schemas.names import Scope, ScopeKind, model_object_key
from schemas.settings import Settings
from streams.folds.invalidations import Purge
from streams.folds.releases import desired_digest
from streams.folds.wanted import Channel, Seated, Wanted
from streams.log.local import LocalLog
from tests import models

ROW = [float(i % 7) for i in range(32)]


class Node:
    """A node's directory as its agent would write it, and one worker on it."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.settings = Settings(dir=directory, node="tokyo-1", region="tokyo", **settings)
        self.directory = directory
        self.writer = BoardWriter(directory)
        self.writer.fence.raise_to(INCARNATION, 1)
        self.writer.fence.raise_to(CAUGHT_UP, 1)
        self.writer.begin("tokyo-1", LogIdentity(releases_id="r", invalidations_id="i", catalogue="c"))
        self.log = LocalLog(lambda: time.time_ns() // 1_000_000)
        self.sequence = 0
        self.purged = -1
        self.worker: Worker

    def release(
        self,
        data: bytes,
        *,
        model: str = "digits",
        version: str = "v1",
        file: bytes | None = None,
        forwarded: bool = False,
        cache: CachePolicy | None = None,
        limits: Limits | None = None,
        batchable: bool = True,
        inputs: Sequence[Tensor] = (),
        outputs: Sequence[Tensor] = (),
        percent: float | None = None,
        **more: Any,
    ) -> str:
        """What the agent does once the artifact is on disk: the board names it. `file` is what is on disk instead.

        With a `percent` it is a candidate, beside what is stable; `more` is more of the release.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self.directory / "models" / f"{digest}.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data if file is None else file)
        self.sequence += 1
        released = ModelReleased(
            model=model,
            version=version,
            sequence=self.sequence,
            artifact=Artifact(
                sha256=digest,
                size_bytes=len(data),
                object_key=model_object_key(model, digest),
                chunk_size_bytes=2**26,
                chunk_sha256=(bytes.fromhex(digest),),
            ),
            inputs=tuple(inputs) or (Tensor(name="features", datatype="FP32", shape=(-1, 32)),),
            outputs=tuple(outputs) or (Tensor(name="scores", datatype="FP32", shape=(-1, 8)),),
            cache=cache or CachePolicy(),
            limits=limits or Limits(),
            batching=Batching(batchable=batchable),
            created_at_ms=0,
            author="tests",
            **more,
        )
        wanted = Wanted(
            model=model,
            version=version,
            sequence=self.sequence,
            position=self.sequence,
            cause=f"cause-{self.sequence}",
            released=released,
        )
        file_before = self.writer.file
        assert file_before is not None
        taken = {name: m.slot for name, m in file_before.models.items()}
        channel = Channel.STABLE if percent is None else Channel.CANDIDATE
        seated = Seated(wanted=wanted, channel=channel, percent=100.0 if percent is None else percent)
        entry = BoardModel(
            wanted=wanted,
            channel=channel,
            percent=seated.percent,
            path=None if forwarded else str(path.relative_to(self.directory)),
            slot=taken.get(seated.seat) or self.writer.free_slot(taken.values()),
            ms={"download": 1.0},
            forwarded=forwarded,
        )
        self.writer.publish(
            replace(
                file_before,
                models=file_before.models | {seated.seat: entry},
                desired=file_before.desired | {seated.seat: seated},
                positions={"mlcdn.releases": self.sequence, "mlcdn.invalidations": self.purged},
            )
        )
        return digest

    def share(self, percent: float, model: str = "digits") -> None:
        """Another wave: the same candidate, for another part of the requests."""
        name = f"{model}@candidate"
        self._seat(lambda seats: seats | {name: replace(seats[name], percent=percent)})

    def promote(self, model: str = "digits") -> None:
        """The candidate has come through: it is the stable release, in one write."""
        new = f"{model}@candidate"
        self._seat(
            lambda seats: (
                {n: m for n, m in seats.items() if n != new}
                | {model: replace(seats[new], channel=Channel.STABLE, percent=100.0)}
            )
        )

    def retire(self, seat: str) -> None:
        self._seat(lambda seats: {n: m for n, m in seats.items() if n != seat})

    def _seat(self, change: Callable[[dict[str, BoardModel]], dict[str, BoardModel]]) -> None:
        file = self.writer.file
        assert file is not None
        seats = change(file.models)
        desired = {n: Seated(wanted=m.wanted, channel=m.channel, percent=m.percent) for n, m in seats.items()}
        self.writer.publish(replace(file, models=seats, desired=desired))

    def purge(self, *scopes: Scope, soft: bool = False) -> None:
        self.purged += 1
        self.writer.append_purges([Purge(position=self.purged, scopes=scopes, soft=soft, cause="p")])

    def said(self, kind: type[Event]) -> list[Any]:
        events = [
            codec.decode(topic, record.key, record.value, record.headers).event
            for topic in ("mlcdn.fleet", "mlcdn.requests")
            for partition in range(self.log.partitions(topic))
            for record in self.log.read(topic, partition)
        ]
        return [event for event in events if isinstance(event, kind)]

    @asynccontextmanager
    async def serving(self, *, disk: bool = False) -> AsyncIterator[httpx.AsyncClient]:
        """The worker over ASGI, with all that runs beside its requests; ready when it says so."""
        on_disk = DiskTier(self.directory / "cache", 2**24) if disk else None
        cache = Cache(MemoryTier(self.settings.memory_cache_bytes), None, on_disk)
        self.worker = Worker(self.settings, 0, "http://127.0.0.1:1", BoardReader(self.directory), cache, self.log)
        self.worker.look()
        beside = asyncio.create_task(self.worker.run())
        transport = httpx.ASGITransport(self.worker.app)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
                await until(lambda: self.worker.health.ready)
                yield client
        finally:
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
            await self.worker.close("stopped")


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        await asyncio.sleep(0.005)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 20))


def truth(data: bytes, rows: Sequence[Sequence[float]]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"features": np.array(rows, np.float32)})[0])


class Runs:
    """Counts and delays every run of every model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.delay_s, self.fail = 0, 0.0, False
        self.rows: list[int] = []
        original, lock = OnnxModel.run, threading.Lock()

        def counted(model: OnnxModel, inputs: Any, *rest: Any, **named: Any) -> Any:
            with lock:
                self.count += 1
                self.rows.append(len(next(iter(inputs.values()))))
            time.sleep(self.delay_s)
            if self.fail:
                raise RunFailed("told to fail")
            return original(model, inputs, *rest, **named)

        monkeypatch.setattr(OnnxModel, "run", counted)

    def reset(self, delay_s: float = 0.0) -> None:
        self.count, self.delay_s = 0, delay_s
        self.rows.clear()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def loop_bytes() -> bytes:
    """A Loop of as many turns as the largest value of `x` says: the caller decides whether it ends."""
    body = models.helper.make_graph(
        [models.node("Identity", ["go_in"], ["go_out"]), models.node("Identity", ["a_in"], ["a_out"])],
        "body",
        [
            models.value("i", models.INT64, []),
            models.value("go_in", models.BOOL, []),
            models.value("a_in", models.FLOAT, ["N", 4]),
        ],
        [models.value("go_out", models.BOOL, []), models.value("a_out", models.FLOAT, ["N", 4])],
    )
    return models.model_bytes(
        [
            models.node("ReduceMax", ["x"], ["largest"], keepdims=0),
            models.node("Cast", ["largest"], ["turns"], to=models.INT64),
            models.node("Loop", ["turns", "go", "x"], ["y"], body=body),
        ],
        [models.value("x", models.FLOAT, ["N", 4])],
        [models.value("y", models.FLOAT, ["N", 4])],
        [models.helper.make_tensor("go", models.BOOL, [], [True])],
    )


V1, V2 = models.mlp_bytes(1), models.mlp_bytes(2)
MODEL_SCOPE = Scope(ScopeKind.MODEL, "digits")


def infer_body(row: Sequence[float] = ROW, **more: Any) -> dict[str, Any]:
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 32], "data": list(row)}
    return {"inputs": [tensor]} | more


def test_an_answer_is_the_models_and_says_where_it_came_from(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        digest = node.release(V1)
        async with node.serving() as http:
            first = await http.post("/v2/models/digits/infer", json=infer_body(id="a-7"))
            again = await http.post("/predict", json={"features": ROW})
        assert first.status_code == again.status_code == 200, (first.text, again.text)
        body = first.json()
        assert (body["id"], body["model_name"], body["model_version"]) == ("a-7", "digits", "v1")
        assert np.allclose(body["outputs"][0]["data"], truth(V1, [ROW])[0], atol=1e-5)
        assert (first.headers["mlcdn-digest"], first.headers["mlcdn-model"]) == (digest, "digits;v1;stable")
        assert (first.headers["mlcdn-region"], first.headers["mlcdn-node"]) == ("tokyo", "tokyo-1")
        assert first.headers["mlcdn-position"] == "1/-1" and first.headers["age"] == "0"
        assert "hit" not in first.headers["cache-status"]
        # The other door, the same entry.
        assert "mlcdn-memory; hit" in again.headers["cache-status"]
        assert again.headers["mlcdn-cache-key"] == first.headers["mlcdn-cache-key"]
        said = again.json()
        assert (said["cached"], said["edge_region"], said["model"], said["version"]) == (True, "tokyo", "digits", "v1")
        assert said["prediction"] == body["outputs"][0]["data"] and "outputs" not in said

    run(scenario())


def test_spelling_and_id_do_not_change_the_key_but_values_do(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            runs.reset()
            plain = json.dumps(infer_body())
            spaced = json.dumps(infer_body(id="other"), indent=2).replace("3.0", "3e0")
            json_type = {"content-type": "application/json"}
            one = await http.post("/v2/models/digits/infer", content=plain, headers=json_type)
            two = await http.post("/v2/models/digits/infer", content=spaced, headers=json_type)
            assert one.headers["mlcdn-cache-key"] == two.headers["mlcdn-cache-key"] and runs.count == 1
            other = await http.post("/v2/models/digits/infer", json=infer_body([*ROW[:-1], 0.5]))
            assert other.headers["mlcdn-cache-key"] != one.headers["mlcdn-cache-key"] and runs.count == 2

    run(scenario())


def test_a_batch_looks_rows_up_one_by_one_and_runs_the_rest_together(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        rows = [[float(i)] * 32 for i in range(6)]
        async with node.serving() as http:
            await http.post("/predict", json={"features": rows[2]})
            runs.reset()
            answer = await http.post("/batch_predict", json={"features": [*rows, rows[0]]})
            said = answer.json()
            assert said["cached"] == [False, False, True, False, False, False, False] and said["count"] == 7
            assert runs.rows == [5]
            assert np.allclose(said["predictions"], truth(V1, [*rows, rows[0]]), atol=1e-4)
            again = (await http.post("/batch_predict", json={"features": rows})).json()
            assert again["cached"] == [True] * 6 and runs.rows == [5]
            assert (await http.post("/batch_predict", json={"features": []})).status_code == 400
            ragged = await http.post("/batch_predict", json={"features": [rows[0], [1.0]]})
            assert ragged.status_code == 400 and "row 1" in ragged.json()["error"]

    run(scenario())


def test_a_model_that_mixes_its_rows_is_run_row_by_row(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        signature = {"inputs": [Tensor(name="x", datatype="FP32", shape=(-1, 4))]}
        node.release(models.mean_over_rows_bytes(), batchable=False, **signature)
        async with node.serving() as http:
            runs.reset()
            answer = await http.post("/batch_predict", json={"features": [[1, 2, 3, 4], [5, 6, 7, 8]]})
            assert answer.json()["predictions"] == [[0, 0, 0, 0], [0, 0, 0, 0]] and runs.rows == [1, 1]

    run(scenario())


def test_fifty_identical_requests_at_once_are_one_run(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            runs.reset(delay_s=0.05)
            answers = await asyncio.gather(*(http.post("/predict", json={"features": ROW}) for _ in range(50)))
            assert [a.status_code for a in answers] == [200] * 50 and runs.count == 1
            assert len({a.json()["prediction"][0] for a in answers}) == 1
            assert sum("collapsed" in a.headers["cache-status"] for a in answers) == 49

    run(scenario())


def test_followers_of_a_failed_leader_get_its_error_and_no_stampede(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        signature = {"inputs": [Tensor(name="x", datatype="FP32", shape=(-1, 4))]}
        node.release(loop_bytes(), model="hangs", limits=Limits(deadline_ms=300), **signature)
        node.release(V1)
        async with node.serving() as http:
            runs.reset()
            began = time.monotonic()
            hung = [http.post("/predict", json={"model": "hangs", "features": [1e18, 2, 3, 4]}) for _ in range(20)]
            asked = asyncio.gather(*hung)
            other = await http.post("/predict", json={"model": "digits", "features": ROW})
            assert other.status_code == 200 and time.monotonic() - began < 0.25
            assert {a.status_code for a in await asked} == {504}
            assert runs.count == 2 and time.monotonic() - began < 2

    run(scenario())


def test_the_very_next_answer_obeys_a_purge(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            key = (await http.post("/predict", json={"features": ROW})).headers["mlcdn-cache-key"]
            scopes = [
                MODEL_SCOPE,
                Scope(ScopeKind.ALL),
                Scope(ScopeKind.KEY, f"prediction:digits:{key}"),
                Scope(ScopeKind.PREFIX, "prediction:dig"),
                Scope(ScopeKind.PATTERN, "prediction:*:*"),
            ]
            for index, scope in enumerate(scopes):
                hit = await http.post("/predict", json={"features": ROW})
                assert hit.json()["cached"], scope
                node.purge(scope)
                missed = await http.post("/predict", json={"features": ROW})
                assert not missed.json()["cached"] and missed.headers["mlcdn-position"] == f"1/{index}", scope
            node.purge(Scope(ScopeKind.MODEL, "another"))
            assert (await http.post("/predict", json={"features": ROW})).json()["cached"]

    run(scenario())


def test_another_log_forgets_every_entry_and_no_model(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        node.purge(Scope(ScopeKind.MODEL, "another"))
        async with node.serving() as http:
            await http.post("/predict", json={"features": ROW})
            assert (await http.post("/predict", json={"features": ROW})).json()["cached"]
            node.writer.begin("tokyo-1", LogIdentity(releases_id="r2", invalidations_id="i2", catalogue="c"))
            node.purged = -1
            assert not (await http.post("/predict", json={"features": ROW})).json()["cached"]
            assert (await http.post("/predict", json={"features": ROW})).json()["cached"]
            # Its positions start again, and are obeyed although the other log's were higher.
            node.purge(MODEL_SCOPE)
            assert not (await http.post("/predict", json={"features": ROW})).json()["cached"]

    run(scenario())


def test_tags_purge_what_was_asked_under_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)

        async def cached(tags: str) -> bool:
            answer = await http.post("/predict", json={"features": ROW}, headers={"mlcdn-tags": tags})
            return bool(answer.json()["cached"])

        async with node.serving() as http:
            assert [await cached("user:1"), await cached("user:1")] == [False, True]
            # An entry that does not carry a tag could not be purged by it.
            assert [await cached("user:2"), await cached("user:2"), await cached("user:1")] == [False, True, True]
            node.purge(Scope(ScopeKind.TAG, "user:3"))
            assert await cached("user:1")
            node.purge(Scope(ScopeKind.TAG, "user:1"))
            assert not await cached("user:2")

    run(scenario())


def test_a_fill_that_raced_a_purge_is_never_served(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            runs.reset(delay_s=0.2)
            racing = asyncio.create_task(http.post("/predict", json={"features": ROW}))
            await until(lambda: runs.count == 1)
            node.purge(MODEL_SCOPE)
            # Not a follower of what was begun before the purge either.
            late = await http.post("/predict", json={"features": ROW})
            assert "collapsed" not in late.headers["cache-status"] and runs.count == 2
            assert (await racing).status_code == 200
            runs.reset()
            after = await http.post("/predict", json={"features": ROW})
            assert after.json()["cached"] and runs.count == 0
            node.purge(MODEL_SCOPE)
            runs.reset(delay_s=0.2)
            racing = asyncio.create_task(http.post("/predict", json={"features": ROW}))
            await until(lambda: runs.count == 1)
            node.purge(MODEL_SCOPE)
            await racing
            assert not (await http.post("/predict", json={"features": ROW})).json()["cached"]

    run(scenario())


def test_disk_entries_survive_the_worker_and_count_only_once_the_agent_has_caught_up(
    tmp_path: Path, runs: Runs
) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1, cache=CachePolicy(tiers=TierUse.ALWAYS))

        async def ask(http: httpx.AsyncClient) -> str:
            return str((await http.post("/predict", json={"features": ROW})).headers["cache-status"])

        async with node.serving(disk=True) as http:
            assert await ask(http) == "mlcdn-disk; fwd=uri-miss; stored, mlcdn-memory; fwd=uri-miss; stored"
        runs.reset()
        async with node.serving(disk=True) as http:
            assert (await ask(http)).startswith("mlcdn-disk; hit; ttl=") and (await ask(http)).startswith(
                "mlcdn-memory; hit"
            )
        node.purge(MODEL_SCOPE)
        async with node.serving(disk=True) as http:
            assert "fwd" in await ask(http)
        # Another start of the node: a purge may be unknown until its agent has caught up.
        node.writer.fence.raise_to(INCARNATION, 2)
        runs.reset()
        async with node.serving(disk=True) as http:
            assert await ask(http) == "mlcdn-memory; fwd=uri-miss; stored"
            assert (await http.get("/health")).json()["degraded"] == ["agent", "caught_up"]
        node.writer.fence.raise_to(CAUGHT_UP, 2)
        async with node.serving(disk=True) as http:
            assert "mlcdn-disk; hit" in await ask(http)

    run(scenario())


def test_cache_controls(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            runs.reset()

            async def ask(control: str, features: Sequence[float] = ROW) -> httpx.Response:
                return await http.post("/predict", json={"features": features}, headers={"cache-control": control})

            assert (await ask("only-if-cached")).status_code == 504 and runs.count == 0
            assert not (await ask("no-store")).json()["cached"] and not (await ask("no-store")).json()["cached"]
            assert runs.count == 2
            assert not (await ask("no-cache")).json()["cached"] and runs.count == 3
            assert (await ask("only-if-cached")).json()["cached"] and (await ask("max-age=60")).json()["cached"]
            assert not (await ask("no-cache")).json()["cached"] and not (await ask("max-age=0")).json()["cached"]
            # One caller's answers are not another's.
            mine = await http.post("/predict", json={"features": ROW}, headers={"authorization": "Bearer a"})
            assert not mine.json()["cached"]

    run(scenario())


def test_a_tenant_is_who_the_gateway_says_and_nobody_else(tmp_path: Path) -> None:
    async def scenario(gateway: bool) -> None:
        node = Node(tmp_path / str(gateway), gateway_sets_tenant=gateway)
        node.release(V1)
        async with node.serving() as http:

            async def tier(**headers: str) -> str:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return str((await http.post("/predict", json={"features": ROW}, headers=named)).json()["tier"])

            assert await tier(mlcdn_tenant="a") == "model"
            assert await tier(mlcdn_tenant="b") == ("model" if gateway else "memory")
            assert await tier(mlcdn_tenant="a", authorization="Bearer 1") == ("memory" if gateway else "model")
            assert await tier(authorization="Bearer 2") == "model"
            assert await tier() == ("model" if gateway else "memory")

    for gateway in (True, False):
        (tmp_path / str(gateway)).mkdir()
        run(scenario(gateway))


def test_a_release_without_caching_is_run_every_time(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1, cache=CachePolicy(enabled=False))
        async with node.serving() as http:
            runs.reset()
            answers = [await http.post("/predict", json={"features": ROW}) for _ in range(3)]
            assert [a.json()["cached"] for a in answers] == [False] * 3 and runs.count == 3

    run(scenario())


def test_a_swap_under_load_fails_nothing_and_mixes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        digests = {node.release(V1, version="v1"): V1}
        rng = np.random.default_rng(7)
        rows = rng.standard_normal((400, 32)).astype(np.float32).tolist()
        expected = {V1: truth(V1, rows), V2: truth(V2, rows)}
        async with node.serving() as http:
            seen: list[str] = []
            enough = asyncio.Event()

            async def load(start: int) -> None:
                for index in itertools.takewhile(lambda _: not enough.is_set(), itertools.cycle(range(start, 400, 4))):
                    answer = await http.post("/predict", json={"features": rows[index]})
                    assert answer.status_code == 200, answer.text
                    digest = answer.headers["mlcdn-digest"]
                    seen.append(digest)
                    assert np.allclose(answer.json()["prediction"], expected[digests[digest]][index], atol=1e-4)

            clients = [asyncio.create_task(load(start)) for start in range(4)]
            await until(lambda: len(seen) > 40)
            digests[node.release(V2, version="v2")] = V2
            # A load at the lowest priority beside a busy core may take its ten seconds.
            await until(lambda: seen[-1] == list(digests)[1], 15)
            after = len(seen)
            await until(lambda: len(seen) > after + 40)
            enough.set()
            await asyncio.gather(*clients)
            # Once for all: the old release answers only what had begun before.
            assert set(seen) == set(digests) and set(seen[after + 4 :]) == {list(digests)[1]}
            # A rollback: the session is still in memory, the file is not needed.
            (tmp_path / "models" / f"{next(iter(digests))}.onnx").unlink()
            rolled = node.worker.slots.get("digits").loaded(next(iter(digests)))
            assert rolled is not None
        swapped = node.said(ModelSwapped)
        assert [(e.version, e.previous_digest) for e in swapped] == [("v1", ""), ("v2", swapped[0].digest)]
        assert {"download", "load", "warm", "swap"} <= set(swapped[1].ms)

    run(scenario())


@pytest.mark.parametrize("file", [b"", V1[:-7], V1[:500] + b"\x00" + V1[501:], V2, b"PK\x03\x04"])
def test_a_corrupted_file_is_not_served_and_the_old_release_is(tmp_path: Path, file: bytes) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        old = node.release(V1)
        new_bytes = models.mlp_bytes(3)
        async with node.serving() as http:
            new = node.release(new_bytes, version="v2", file=file)
            await until(lambda: bool(node.said(SwapFailed)))
            failed = node.said(SwapFailed)
            assert [(e.digest, e.phase) for e in failed] == [(new, "load")] and "/" not in failed[0].cause
            answer = await http.post("/predict", json={"features": ROW})
            assert answer.status_code == 200 and answer.headers["mlcdn-digest"] == old
            node.worker.reporter.beat()
            await until(lambda: any(m.state == "failed" for b in node.said(NodeBeat) for m in b.models))
            shown = node.said(NodeBeat)[-1].models[0]
            assert (shown.digest, shown.version) == (old, "v1") and "load" in shown.error
            # Level, not edge: once the file is whole, it is taken over without another event.
            (tmp_path / "models" / f"{new}.onnx").write_bytes(new_bytes)
            await until(lambda: bool(node.said(ModelSwapped)[1:]))
            assert (await http.post("/predict", json={"features": ROW})).headers["mlcdn-digest"] == new
            assert len(node.said(SwapFailed)) == 1

    run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/predict", b"", 400, "JSON"),
        ("/predict", b"{", 400, "JSON"),
        ("/predict", b'{"features":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "deep"),
        ("/predict", b'{"features":[NaN]}', 400, "JSON"),
        ("/predict", b'{"features":[1e40' + b",1" * 31 + b"]}", 400, "element 0"),
        ("/predict", b'{"features":["1"' + b",1" * 31 + b"]}", 400, "element 0"),
        ("/predict", b'{"features":[1,2]}', 400, "32"),
        ("/predict", b'{"features":[1],"model":"nobody"}', 404, "digits"),
        ("/predict", b'{"features":[1],"model":"../etc"}', 404, "digits"),
        ("/v2/models/nobody/infer", b"{}", 404, "digits"),
        ("/v2/models/digits/versions/v9/infer", b"{}", 404, "v1"),
        ("/v2/models/digits/infer", b'{"inputs":[]}', 400, "features"),
        ("/v2/models/digits/infer", b'{"inputs":[{"name":"y","shape":[1],"datatype":"FP32","data":[1]}]}', 400, "'y'"),
        (
            "/v2/models/digits/infer",
            b'{"inputs":[{"name":"features","shape":[1,32],"datatype":"FP64","data":[' + b"1," * 31 + b"1]}]}",
            400,
            "FP32",
        ),
        (
            "/v2/models/digits/infer",
            b'{"inputs":[{"name":"features","shape":[32],"datatype":"FP32","data":[' + b"1," * 31 + b"1]}]}",
            400,
            "dimensions",
        ),
    ],
)
def test_bad_input_is_refused_by_name_and_the_next_is_served(
    tmp_path: Path, path: str, body: bytes, status: int, word: str
) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            answer = await http.post(path, content=body, headers={"content-type": "application/json"})
            assert (answer.status_code, word in answer.json()["error"]) == (status, True), answer.text
            assert list(answer.json()) == ["error"] and str(tmp_path) not in answer.text
            assert (await http.post("/predict", json={"features": ROW})).status_code == 200

    run(scenario())


def test_requests_that_no_route_should_see_are_refused_at_the_gate(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, max_body_bytes=2_048)
        node.release(V1)
        async with node.serving() as http:
            for path in (
                "/v2//health/live",
                "/v2/models/%2e%2e/ready",
                "/v2/models/a%2fb/ready",
                "/v2/models/a%00/ready",
            ):
                assert (await http.get(path)).status_code == 400, path
            assert (await http.get("/" + "a" * 2_000)).status_code == 414
            assert (await http.get("/v2", headers={f"x-{i}": "1" for i in range(200)})).status_code == 431
            assert (await http.get("/v2", headers={"x": "y" * 40_000})).status_code == 431
            assert (await http.get("/v2", headers={"host": "a b"})).status_code == 400
            assert (await http.request("TRACE", "/v2")).status_code == 405
            assert (await http.get("/predict")).json() == {"error": "Method Not Allowed"}
            assert (await http.get("/predict/")).status_code == 404
            large = await http.post("/predict", content=b"x" * 2_049, headers={"content-type": "application/json"})
            assert large.status_code == 413 and large.headers["connection"] == "close"
            for headers in ({"content-type": "text/html"}, {"content-encoding": "br"}):
                assert (await http.post("/predict", content=b"{}", headers=headers)).status_code == 415
            late = await http.post("/predict", json={"features": ROW}, headers={"mlcdn-deadline-ms": "soon"})
            assert late.status_code == 400 and "mlcdn-deadline-ms" in late.json()["error"]

    run(scenario())


def test_protocol_metadata_health_and_metrics(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        digest = node.release(V1)
        async with node.serving() as http:
            described = (await http.get("/v2/models/digits")).json()
            assert described["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 32]}]
            assert described["versions"] == ["v1"] and described["platform"] == "onnxruntime_onnx"
            ready = await http.get("/v2/models/digits/versions/v1/ready")
            assert ready.json() == {"name": "digits", "ready": True} and ready.headers["mlcdn-digest"] == digest
            assert (await http.get("/v2/models/digits/versions/v2/ready")).status_code == 404
            assert (await http.get("/v2/health/live")).json() == {"live": True}
            assert (await http.get("/v2/health/ready")).json() == {"ready": True}
            assert (await http.get("/v2")).json()["name"] == "mlcdn"
            # No agent beats in this test: named, and no reason not to serve.
            health = await http.get("/health")
            assert health.status_code == 200 and health.json()["degraded"] == ["agent"] and health.json()["serving"]
            await http.post("/predict", json={"features": ROW})
            node.worker.reporter.flush()
            text = (await http.get("/metrics")).text
            assert 'cdn_requests_total{region="tokyo",status="200"}' in text
            assert 'cdn_request_latency_seconds_count{cache_level="model",region="tokyo"}' in text
            node.worker.drain()
            gone = await http.get("/v2/health/ready")
            assert gone.status_code == 503 and gone.headers["connection"] == "close"
            # What is asked while it drains is still answered.
            assert (await http.post("/predict", json={"features": ROW})).status_code == 200

    run(scenario())


def test_which_model_predict_means(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, default_model="")
        node.release(V1)
        async with node.serving() as http:
            assert (await http.post("/predict", json={"features": ROW})).json()["model"] == "digits"
            node.release(V2, model="other")
            await until(lambda: len(node.said(ModelSwapped)) == 2)
            unnamed = await http.post("/predict", json={"features": ROW})
            assert unnamed.status_code == 400 and "['digits', 'other']" in unnamed.json()["error"]
            named = await http.post("/predict", json={"features": ROW, "model": "other"})
            assert named.json()["model"] == "other"
            node.retire("other")
            await until(lambda: len(node.worker.slots) == 1)
            assert (await http.post("/v2/models/other/infer", json=infer_body())).status_code == 404
            assert (await http.post("/predict", json={"features": ROW})).json()["model"] == "digits"

    run(scenario())


def test_overload_is_refused_at_once_and_counted_and_a_deadline_is_kept(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1, limits=Limits(deadline_ms=5_000, max_queue=3), batchable=False)
        # Slow when it is warmed, so it runs in its two threads.
        runs.reset(delay_s=0.1)
        async with node.serving() as http:
            asked = [http.post("/predict", json={"features": [float(i)] * 32}) for i in range(8)]
            statuses = [a.status_code for a in await asyncio.gather(*asked)]
            assert sorted(statuses) == [200] * 5 + [429] * 3
            refused = [http.post("/predict", json={"features": [50.0 + i] * 32}) for i in range(6)]
            (over,) = [a for a in await asyncio.gather(*refused) if a.status_code == 429]
            assert over.headers["retry-after"] == "1"
            runs.reset(delay_s=0.3)
            began = time.monotonic()
            late = await http.post("/predict", json={"features": [99.0] * 32}, headers={"mlcdn-deadline-ms": "40"})
            assert late.status_code == 504 and time.monotonic() - began < 0.25

    run(scenario())


def test_a_request_of_many_rows_is_one_in_the_queue(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1, limits=Limits(max_queue=3))
        # Slow when it is warmed, so it runs in its two threads.
        runs.reset(delay_s=0.02)
        rows = [[float(n)] * 32 for n in range(1_000)]
        async with node.serving() as http:
            for control in ({}, {"cache-control": "no-store"}):
                answer = await http.post("/batch_predict", json={"features": rows}, headers=control)
                assert answer.status_code == 200, answer.text
                assert np.allclose(answer.json()["predictions"], truth(V1, rows), rtol=1e-5)

    run(scenario())


def test_rows_are_reported_and_what_is_dropped_is_counted_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, flush_s=10, beat_s=10)
        digest = node.release(V1)
        async with node.serving() as http:
            reporter = node.worker.reporter
            for _ in range(3):
                await http.post("/predict", json={"features": ROW})
            await http.post("/predict", json={"features": [1]})
            await http.get("/health")
            reporter.flush()
            (batch,) = node.said(RequestBatch)
            assert (batch.rows, batch.dropped, batch.models[0].digest) == (4, 0, digest)
            assert np.frombuffer(batch.status, "<u2").tolist() == [200, 200, 200, 400]
            assert list(batch.tier) == [3, 0, 0, 5]
            hashes = np.frombuffer(batch.key_hash, "<u8").tolist()
            assert hashes[0] == hashes[1] == hashes[2] != 0 == hashes[3]
            node.log.fail_next(2)
            for _ in range(2):
                await http.post("/predict", json={"features": ROW})
                reporter.flush()
            assert reporter.rows_dropped == 2 and len(node.said(RequestBatch)) == 1
            await http.post("/predict", json={"features": ROW})
            reporter.flush()
            assert [(b.rows, b.dropped) for b in node.said(RequestBatch)] == [(4, 0), (1, 2)]
            reporter.beat()
            await until(lambda: node.said(NodeBeat)[-1].requests == 7)
            beat = node.said(NodeBeat)[-1]
            assert beat.hits == {"memory": 5, "model": 1, "none": 1} and beat.errors == 0
            assert beat.positions == {"mlcdn.releases": 1, "mlcdn.invalidations": -1}
            assert [(m.name, m.state, m.digest) for m in beat.models] == [("digits", "live", digest)]
            assert beat.desired_digest == desired_digest(node.writer.file.desired)

    run(scenario())


def test_a_model_at_the_origin_is_forwarded_cached_and_its_errors_translated(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, origin_url="http://origin")
        digest = node.release(V1, forwarded=True)
        asked: list[np.ndarray[Any, Any]] = []
        answers: list[tuple[int, dict[str, Any], str]] = []
        scores = np.arange(8, dtype=np.float32).tobytes()

        def origin(request: httpx.Request) -> httpx.Response:
            infer, binary = parse_infer(request.content, request.headers["inference-header-content-length"])
            asked.append(tensors_of(infer, binary)["features"])
            status, body, said = answers[0] if len(answers) == 1 else answers.pop(0)
            head = json.dumps(body).encode()
            headers = {"mlcdn-digest": said, "inference-header-content-length": str(len(head))}
            return httpx.Response(status, content=head + (scores if status == 200 else b""), headers=headers)

        async with node.serving() as http:
            node.worker.predictor.forwarding.origin = OriginClient(
                "http://origin", transport=httpx.MockTransport(origin)
            )
            said_scores = {
                "name": "scores",
                "datatype": "FP32",
                "shape": [1, 8],
                "parameters": {"binary_data_size": 32},
            }
            for status, body, said, wanted in [
                (500, {}, digest, 503),
                (429, {}, digest, 429),
                (400, {"error": "no"}, digest, 400),
                (200, {"outputs": [said_scores]}, "0" * 64, 503),
                (200, {"outputs": 7}, digest, 503),
            ]:
                answers[:] = [(status, body, said)]
                assert (await http.post("/predict", json={"features": ROW})).status_code == wanted, (status, said)
            answers[:] = [(200, {"outputs": [said_scores]}, digest)]
            first = await http.post("/predict", json={"features": ROW})
            assert first.json()["prediction"] == list(range(8)) and first.json()["tier"] == "origin"
            assert np.array_equal(asked[-1], np.array([ROW], np.float32))
            count = len(asked)
            assert (await http.post("/predict", json={"features": ROW})).json()["cached"] and len(asked) == count

    run(scenario())


def test_a_stale_entry_is_served_while_it_is_refilled_and_where_the_model_fails(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        policy = CachePolicy(ttl_s=0.2, stale_while_revalidate_s=30, stale_if_error_s=60)
        node.release(V1, cache=policy)
        async with node.serving() as http:
            await http.post("/predict", json={"features": ROW})
            await asyncio.sleep(0.25)
            runs.reset()
            stale = await http.post("/predict", json={"features": ROW})
            assert stale.json()["cached"]
            await until(lambda: runs.count == 1)
            await until(lambda: node.worker.predictor.in_flight == 0)
            assert (await http.post("/predict", json={"features": ROW})).json()["cached"] and runs.count == 1
            node.release(V1, cache=CachePolicy(ttl_s=0, stale_while_revalidate_s=0, stale_if_error_s=60))
            await until(lambda: len(node.said(ModelSwapped)) == 2)
            other = [1.0] * 32
            assert not (await http.post("/predict", json={"features": other})).json()["cached"]
            runs.fail = True
            stood_in = await http.post("/predict", json={"features": other})
            assert stood_in.status_code == 200 and stood_in.json()["cached"]
            assert (await http.post("/predict", json={"features": [2.0] * 32})).status_code == 500

    run(scenario())


def test_a_worker_serves_over_a_socket_and_leaves_in_order(tmp_path: Path) -> None:
    """The process itself, with nothing else there: no Kafka, no Redis, no agent; SIGTERM ends it cleanly."""
    node = Node(tmp_path)
    node.release(V1)
    node.writer.close()
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    env = os.environ | {
        "MLCDN_LISTEN_FD": str(listener.fileno()),
        "MLCDN_DIR": str(tmp_path),
        "MLCDN_NODE": "tokyo-1",
        "MLCDN_KAFKA": f"127.0.0.1:{free_port()}",
    }
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_node.serving.main"], env=env, pass_fds=[listener.fileno()], stderr=subprocess.PIPE
    )
    listener.close()
    try:
        with httpx.Client(base_url=url, trust_env=False, timeout=10) as http:
            while http.get("/v2/health/ready").status_code != 200:
                assert time.monotonic() - began < 10
                time.sleep(0.05)
            answer = http.post("/predict", json={"features": ROW})
            assert answer.status_code == 200 and answer.headers["mlcdn-node"] == "tokyo-1"
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            last = http.post("/predict", json={"features": ROW})
            assert last.status_code == 200 and last.headers["connection"] == "close"
        assert process.wait(12) == 0
    finally:
        process.kill()
        _, errors = process.communicate()
    assert b"Traceback" not in errors, errors.decode()
