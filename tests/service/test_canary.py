"""A worker with a candidate beside its stable release: who is answered by which, and what a rollout does to requests."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import numpy as np
import pytest

from edge_node.serving.cohorts import Split, named_cohort
from edge_node.serving.openapi import document
from edge_node.serving.origin_client import OriginClient
from edge_node.serving.preparing import Preparing
from inference.onnx_model import OnnxModel
from schemas.events import Limits, ModelSwapped, RequestBatch, SwapFailed, Tensor
from tests import models
from tests.service.test_worker import ROW, V1, V2, Node, Runs, run, truth, until
from tests.worker_process import WorkerProcess

V3, V4 = models.mlp_bytes(3), models.mlp_bytes(4)
DOCUMENT = document("0")
KEYS = 10_000
HEAD = b"POST /predict HTTP/1.1\r\nHost: edge\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[OnnxModel]:
    """Every session that was loaded."""
    found: list[OnnxModel] = []
    original = OnnxModel.load

    def load(*args: Any) -> OnnxModel:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(OnnxModel, "load", load)
    return found


def row(number: int) -> list[float]:
    return [float(number), *[0.5] * 31]


def bodies(numbers: Sequence[int]) -> list[bytes]:
    # Of one length, as is the head then.
    return [json.dumps({"features": [*row(100_000 + n)]}).encode() for n in numbers]


class Asked:
    """Requests of one row each over many kept connections, as the lane takes them."""

    def __init__(self, worker: WorkerProcess, connections: int = 32) -> None:
        self._sockets = [worker.connect() for _ in range(connections)]

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            each.close()

    def heads_and_bodies(self, asked: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        for at in range(0, len(asked), len(self._sockets)):
            some = asked[at : at + len(self._sockets)]
            for each, body in zip(self._sockets, some, strict=False):
                each.sendall(HEAD % (len(body), body))
            for each, _ in zip(self._sockets, some, strict=False):
                yield _answer(each)

    def versions(self, asked: Sequence[bytes]) -> list[str]:
        """Of the release that answered each."""
        return [_version(head) for head, _ in self.heads_and_bodies(asked)]


def _answer(connection: socket.socket) -> tuple[bytes, bytes]:
    head, _, body = connection.recv(65_536).partition(b"\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65_536)
    return head, body


def _version(head: bytes) -> str:
    assert head.startswith(b"HTTP/1.1 200 "), head
    return head.partition(b"mlcdn-model: digits;")[2].partition(b";")[0].decode()


def wait_for(worker: WorkerProcess, condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    url = f"http://127.0.0.1:{worker.port}/health"
    while not condition(httpx.get(url, trust_env=False).json()["models"]["digits"]):
        assert time.monotonic() < end, worker.log()[-2000:]
        time.sleep(0.02)


def test_a_share_of_ten_thousand_keys_grows_sends_nobody_back_and_survives_a_kill(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path) as worker:
        node, asked = worker.node, bodies(range(KEYS))
        node.release(V2, version="v2", percent=1)
        taken: list[set[int]] = []
        with Asked(worker) as client:
            for percent in (1, 5, 25, 50):
                node.share(percent)
                wait_for(worker, lambda m, p=percent: m.get("candidate", {}).get("percent") == p)
                if percent == 50:
                    answers = list(client.heads_and_bodies(asked))
                    versions = [_version(head) for head, _ in answers]
                    for data, version in ((V1, "v1"), (V2, "v2")):
                        of = [n for n in range(KEYS) if versions[n] == version]
                        said = [json.loads(answers[n][1])["prediction"] for n in of]
                        assert np.allclose(said, truth(data, [row(100_000 + n) for n in of]), rtol=1e-3, atol=1e-2)
                else:
                    versions = client.versions(asked)
                taken.append({n for n, version in enumerate(versions) if version == "v2"})
                assert abs(100 * len(taken[-1]) / KEYS - percent) < 1
        assert all(before < after for before, after in pairwise(taken))
        worker.stop(signal.SIGKILL)
        worker.process.wait()
        with worker, Asked(worker) as client:
            first = client.versions(asked[:1_000])
            assert {n for n, version in enumerate(first) if version == "v2"} == {n for n in taken[-1] if n < 1_000}


class Answered(msgspec.Struct, frozen=True):
    which: int
    version: str
    began: float
    ended: float


class Load:
    """An open loop over a small set of rows: each answer is held against the release that it says it is of."""

    def __init__(self, port: int, releases: dict[str, bytes], rate: float = 200) -> None:
        self._port, self._pause_s = port, 1 / rate
        self._rows = [row(n) for n in range(61)]
        self._truth = {version: truth(data, self._rows) for version, data in releases.items()}
        self.failed: list[str] = []
        self.seen: list[Answered] = []
        self.until = asyncio.Event()

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._port}", trust_env=False, limits=limits) as http:
            asking: set[asyncio.Task[None]] = set()
            due, number = time.perf_counter(), 0
            while not self.until.is_set():
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                asking.add(asyncio.create_task(self._ask(http, number % len(self._rows), number)))
                due, number = due + self._pause_s, number + 1
            await asyncio.gather(*asking)

    async def versions(self, most: int = 40) -> set[str]:
        """Of the next answers to requests that begin after this."""
        began = time.perf_counter()
        await until(lambda: sum(a.began > began for a in self.seen[-10 * most :]) >= most, 20)
        return {a.version for a in self.seen if a.began > began}

    async def _ask(self, http: httpx.AsyncClient, which: int, number: int) -> None:
        # Every other one is computed, whatever caches have.
        headers = {"cache-control": "no-store"} if number % 2 else {}
        began = time.perf_counter()
        try:
            answer = await http.post("/predict", json={"features": self._rows[which]}, headers=headers, timeout=20)
        except httpx.HTTPError as error:
            self.failed.append(repr(error))
            return
        if answer.status_code != 200:
            self.failed.append(answer.text)
            return
        said = answer.json()
        version = said["version"]
        if not np.allclose(said["prediction"], self._truth[version][which], rtol=1e-3, atol=1e-3):
            self.failed.append(f"{version} did not answer that")
        self.seen.append(Answered(which, version, began, time.perf_counter()))

    def moved_back(self, order: Sequence[str]) -> list[Answered]:
        """Answers by an earlier release of `order` to a row that a later one had answered before it was asked again."""
        back = []
        for which in range(len(self._rows)):
            of = [a for a in self.seen if a.which == which and a.version in order]
            for answer in of:
                later = [a for a in of if a.ended < answer.began]
                if any(order.index(a.version) > order.index(answer.version) for a in later):
                    back.append(answer)
        return back


def test_rollouts_under_load_fail_nothing_and_every_answer_is_its_releases(tmp_path: Path) -> None:
    """Up and through, taken back, followed by another, up and through."""

    async def scenario() -> None:
        with WorkerProcess(tmp_path) as worker:
            node = worker.node
            load = Load(worker.port, {"v1": V1, "v2": V2, "v3": V3, "v4": V4})
            loading = asyncio.create_task(load.run())

            async def comes(condition: Any) -> None:
                await asyncio.to_thread(wait_for, worker, condition)

            async def share_of(version: str, percent: float) -> None:
                await comes(
                    lambda m: (c := m.get("candidate", {})) and (c["version"], c["percent"]) == (version, percent)
                )
                await comes(lambda m: m["candidate"]["state"] == "live")

            node.release(V2, version="v2", percent=10)
            await share_of("v2", 10)
            node.share(60)
            await share_of("v2", 60)
            assert await load.versions() == {"v1", "v2"}
            node.promote()
            await comes(lambda m: m["version"] == "v2" and "candidate" not in m)
            assert await load.versions() == {"v2"} and load.moved_back(["v1", "v2"]) == []
            # Taken back: not one more of it, once it is off its seat.
            node.release(V3, version="v3", percent=50)
            await share_of("v3", 50)
            assert await load.versions() == {"v2", "v3"}
            node.retire("digits@candidate")
            await comes(lambda m: "candidate" not in m)
            assert await load.versions() == {"v2"}
            # Followed by another, which comes through.
            node.release(V3, version="v3", percent=50)
            await share_of("v3", 50)
            node.release(V4, version="v4", percent=50)
            await share_of("v4", 50)
            assert await load.versions() == {"v2", "v4"}
            node.promote()
            await comes(lambda m: m["version"] == "v4" and "candidate" not in m)
            load.until.set()
            await loading
            assert load.failed == []
            assert load.moved_back(["v1", "v2", "v4"]) == []
            assert {a.version for a in load.seen} == {"v1", "v2", "v3", "v4"}

    asyncio.run(asyncio.wait_for(scenario(), 60))


def digest_of(data: bytes) -> str:
    return models.sha256(data)


def versions_of(slot: Any) -> tuple[str | None, str | None]:
    return tuple(served.wanted.version if served else None for served in (slot.current, slot.candidate))  # type: ignore[return-value]


def test_a_candidate_is_loaded_once_whatever_becomes_of_it(tmp_path: Path, loaded: list[OnnxModel]) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving():
            slot = node.worker.slots.get("digits")
            stable = slot.current
            node.release(V2, version="v2", percent=0)
            await until(lambda: slot.candidate is not None)
            turns, seen = [slot.turn], [slot.split is None]
            for percent in (5.0, 100.0, 40.0):
                node.share(percent)
                await until(lambda p=percent: slot.percent == p)
                turns.append(slot.turn)
                seen.append(slot.split is None)
            assert seen == [True, False, False, False] and len(set(turns)) == 4, "each is another turn"
            assert len(loaded) == 2 and slot.current is stable
            candidate = slot.candidate
            node.promote()
            await until(lambda: slot.current is not stable and slot.candidate is None)
            assert slot.current.model is candidate.model is loaded[1] and loaded[1].is_open
            assert slot.previous is stable and loaded[0].is_open, "a rollback needs no load"
            assert len(loaded) == 2 and slot.split is None
            said = [(e.version, e.channel, e.previous_digest) for e in node.said(ModelSwapped)]
            assert said == [
                ("v1", "stable", ""),
                ("v2", "candidate", ""),
                ("v2", "stable", digest_of(V1)),
            ]
            # Taken back: gone at once, and its session with it.
            node.release(V3, version="v3", percent=50)
            await until(lambda: slot.candidate is not None)
            node.retire("digits@candidate")
            await until(lambda: slot.candidate is None)
            await until(lambda: not loaded[2].is_open)
            assert loaded[1].is_open and slot.current.model is loaded[1]
            # The stable release's own bytes, as another version: one session, which outlives its candidate.
            node.release(V2, version="v2-again", percent=50)
            await until(lambda: slot.candidate is not None)
            assert len(loaded) == 3
            resident = slot.resident(time.monotonic())
            assert resident.current_bytes == len(V2) and not resident.candidate_bytes, "one session is counted once"
            node.retire("digits@candidate")
            await until(lambda: slot.candidate is None)
            await asyncio.sleep(0.05)
            assert loaded[1].is_open
        assert not any(model.is_open for model in loaded)

    run(scenario())


def test_many_rollouts_leave_two_sessions(tmp_path: Path, loaded: list[OnnxModel]) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            slot = node.worker.slots.get("digits")
            for n in range(24):
                node.release((V2, V3, V1)[n % 3], version=f"r{n}", percent=50)
                await until(lambda: slot.candidate is not None and slot.candidate.wanted.sequence == node.sequence)
                for number in range(4):
                    assert (await http.post("/predict", json={"features": row(number)})).status_code == 200
                if n % 4 == 3:
                    node.retire("digits@candidate")
                else:
                    node.promote()
                    await until(lambda: slot.current.wanted.sequence == node.sequence)
                await until(lambda: slot.candidate is None)
            await until(lambda: sum(model.is_open for model in loaded) <= 2)
            assert slot.current.model.is_open and not slot._leaving and not slot._closing

    run(scenario())


def test_a_first_release_in_waves_answers_everything(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1, percent=100)
        async with node.serving() as http:
            slot = node.worker.slots.get("digits")
            answer = await http.post("/predict", json={"features": ROW})
            assert answer.headers["mlcdn-model"] == "digits;v1;candidate"
            assert (await http.get("/v2/models/digits")).json()["versions"] == ["v1"]
            # Followed before it was stable: it answers until the next one can.
            node.release(V2, version="v2", percent=100)
            while versions_of(slot) != (None, "v2"):
                assert (await http.post("/predict", json={"features": ROW})).status_code == 200
                await asyncio.sleep(0.001)
            node.promote()
            await until(lambda: versions_of(slot) == ("v2", None))
            answer = await http.post("/predict", json={"features": ROW})
            assert answer.headers["mlcdn-model"] == "digits;v2;stable"
            assert answer.headers["mlcdn-digest"] == digest_of(V2)

    run(scenario())


def test_a_candidate_that_does_not_load_leaves_everything_to_the_stable_release(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        node.release(V2, version="v2", percent=100, file=V2[:-9])
        async with node.serving() as http:
            await until(lambda: bool(node.said(SwapFailed)))
            answer = await http.post("/predict", json={"features": ROW})
            assert answer.headers["mlcdn-model"] == "digits;v1;stable"
            health = (await http.get("/health")).json()["models"]["digits"]
            assert (
                health["state"] == "live" and health["candidate"]["state"] == "failed" and health["candidate"]["error"]
            )
            seats = [(m.channel, m.version, m.state, m.digest) for m in node.worker.swaps.standing()]
            assert seats == [("stable", "v1", "live", digest_of(V1)), ("candidate", "v2", "failed", "")]

    run(scenario())


def test_what_is_said_of_a_candidate(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        node.release(V2, version="v2", percent=5)
        async with node.serving() as http:
            seats = [(m.name, m.channel, m.version, m.state, m.digest) for m in node.worker.swaps.standing()]
            assert seats == [
                ("digits", "stable", "v1", "live", digest_of(V1)),
                ("digits", "candidate", "v2", "live", digest_of(V2)),
            ]
            candidate = {"version": "v2", "digest": digest_of(V2), "percent": 5.0}
            metadata = (await http.get("/v2/models/digits")).json()
            for path, name in (
                ("", "ModelMetadata"),
                ("/config", "ModelConfig"),
                ("/versions/v2/config", "ModelConfig"),
            ):
                schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
                said = (await http.get(f"/v2/models/digits{path}")).json()
                jsonschema.Draft202012Validator(schema).validate(said)
            assert metadata["versions"] == ["v1", "v2"] and metadata["parameters"] == {"candidate": candidate}
            configs = [(await http.get(f"/v2/models/digits{v}/config")).json()["mlcdn"] for v in ("", "/versions/v2")]
            assert [(c["channel"], c["candidate"]) for c in configs] == [
                ("stable", candidate),
                ("candidate", candidate),
            ]
            index = (await http.post("/v2/repository/index")).json()
            assert [(e["version"], e["state"], e["reason"]) for e in index] == [
                ("v1", "READY", ""),
                ("v2", "READY", "the candidate, for 5 percent of the requests"),
            ]
            health = (await http.get("/health")).json()["models"]["digits"]
            assert health["candidate"] == {"state": "live", "version": "v2", "error": "", "percent": 5.0}
            assert 'mlcdn_candidate_percent{model="digits"} 5.0' in (await http.get("/metrics")).text
            node.retire("digits@candidate")
            await until(lambda: node.worker.slots.get("digits").candidate is None)
            assert "parameters" not in (await http.get("/v2/models/digits")).json()
            assert 'mlcdn_candidate_percent{model="digits"} 0.0' in (await http.get("/metrics")).text

    run(scenario())


def test_a_cohort_a_version_and_a_batch_are_each_one_release(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        node.release(V2, version="v2", percent=50)
        split = Split("digits", node.sequence, 50)
        async with node.serving() as http:

            async def version(path: str, body: Any, **headers: str) -> str:
                answer = await http.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})
                assert answer.status_code == 200, answer.text
                return answer.headers["mlcdn-model"].split(";")[1]

            tensor = {"name": "features", "datatype": "FP32", "shape": [1, 32]}
            named, unnamed = set(), set()
            for n in range(24):
                cohort, features = f"user-{n}", row(n)
                infer = {"inputs": [tensor | {"data": features}]}
                spelled = {"inputs": [tensor | {"name": "", "data": [n, *[0.5] * 31]}], "id": "x"}
                by_name = {
                    await version("/predict", {"features": features}, mlcdn_cohort=cohort),
                    await version("/predict", {"features": ROW}, mlcdn_cohort=cohort),
                    await version("/v2/models/digits/infer", infer, mlcdn_cohort=cohort),
                    await version("/batch_predict", {"features": [row(n), ROW]}, mlcdn_cohort=cohort),
                }
                assert by_name == {"v2" if split.takes(named_cohort(cohort)) else "v1"}
                by_input = {
                    await version("/predict", {"features": features, "model": "digits"}),
                    await version("/v2/models/digits/infer", infer),
                    await version("/v2/models/digits/infer", spelled),
                    await version("/batch_predict", {"features": [features]}),
                    await version("/v2/models/digits/infer", infer, cache_control="no-store"),
                }
                assert len(by_input) == 1, "one input is one cohort, however it is spelled"
                named |= by_name
                unnamed |= by_input
                assert await version("/v2/models/digits/versions/v1/infer", infer, mlcdn_cohort=cohort) == "v1"
                assert await version("/v2/models/digits/versions/v2/infer", infer, mlcdn_cohort=cohort) == "v2"
            assert named == unnamed == {"v1", "v2"}
            batches = [[row(n), row(n + 1), row(n + 2)] for n in range(20)]
            seen = set()
            for rows in batches:
                answer = await http.post("/batch_predict", json={"features": rows})
                data = {"v1": V1, "v2": V2}[answer.json()["version"]]
                assert np.allclose(answer.json()["predictions"], truth(data, rows), rtol=1e-4)
                seen.add(answer.json()["version"])
            assert seen == {"v1", "v2"}
            for bad in ("", "x" * 257, "a\tb", "a\x85b"):
                answer = await http.post(
                    "/predict", json={"features": ROW}, headers=[(b"mlcdn-cohort", bad.encode("latin-1"))]
                )
                assert answer.status_code == 400 and "mlcdn-cohort" in answer.json()["error"], bad
            assert (await http.post("/predict", json={"features": ROW})).status_code == 200
            node.worker.reporter.flush()
            rows_by = {ref.digest for batch in node.said(RequestBatch) for ref in batch.models}
            assert rows_by == {digest_of(V1), digest_of(V2)}

    run(scenario())


def test_each_release_is_held_to_its_own_signature(tmp_path: Path) -> None:
    """The candidate takes four features where the stable release takes 32."""

    async def scenario() -> None:
        node = Node(tmp_path)
        other = models.mlp_bytes(5, (4, 2))
        node.release(V1)
        shapes: Any = {
            "inputs": (Tensor(name="features", datatype="FP32", shape=(-1, 4)),),
            "outputs": (Tensor(name="scores", datatype="FP32", shape=(-1, 2)),),
        }
        node.release(other, version="v2", percent=50, **shapes)
        answered: set[tuple[str, int]] = set()
        async with node.serving() as http:
            for long, short in ((row(n), row(n)[:4]) for n in range(16)):
                for features, takes in ((long, "v1"), (short, "v2")):
                    tensor = {"name": "features", "datatype": "FP32", "shape": [1, len(features)], "data": features}
                    for path, body in (
                        ("/predict", {"features": features}),
                        ("/batch_predict", {"features": [features]}),
                        ("/v2/models/digits/infer", {"inputs": [tensor]}),
                    ):
                        first = await http.post(path, json=body)
                        again = await http.post(path, json=body)
                        assert first.status_code == again.status_code, "the choice is sticky, a refusal too"
                        if first.status_code == 200:
                            assert first.headers["mlcdn-model"].split(";")[1] == takes
                            answered.add((path, len(features)))
                        else:
                            assert first.status_code == 400 and "error" in first.json()
            assert len(answered) == 6, "the candidate's clients are a cohort too"
            # By name everybody reaches the one that reads it.
            cohorts = [f"u{n}" for n in range(20)]
            split = Split("digits", node.sequence, 50)
            for cohort in cohorts:
                features = row(1)[:4] if split.takes(named_cohort(cohort)) else row(1)
                answer = await http.post("/predict", json={"features": features}, headers={"mlcdn-cohort": cohort})
                assert answer.status_code == 200

    run(scenario())


def test_a_row_is_read_as_the_release_that_answers_it_names_its_input(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        node.release(models.identity_bytes(shape=("n", 32)), version="v2", percent=50)
        async with node.serving() as http:
            seen = set()
            for n in range(16):
                for path, features in (("/predict", row(n)), ("/batch_predict", [row(n), row(n + 50)])):
                    answer = await http.post(path, json={"features": features})
                    assert answer.status_code == 200, answer.text
                    said = answer.json()
                    if said["version"] == "v2":
                        assert (said["prediction"] if path == "/predict" else said["predictions"]) == features
                    seen.add((path, said["version"]))
            assert len(seen) == 4

    run(scenario())


def test_a_candidate_waits_for_what_it_takes_its_share_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart: the stable release is the slower one to load."""
    original = OnnxModel.load

    def load(path: Path, digest: str, *rest: Any) -> OnnxModel:
        if digest == digest_of(V1):
            time.sleep(0.3)
        return original(path, digest, *rest)

    monkeypatch.setattr(OnnxModel, "load", load)
    prepare, beside_requests = Preparing.prepare, []

    async def prepared(self: Preparing, wanted: Any, path: Path, golden: Any, quiet: bool, ms: Any) -> Any:
        beside_requests.append(quiet)
        return await prepare(self, wanted, path, golden, quiet, ms)

    monkeypatch.setattr(Preparing, "prepare", prepared)

    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        node.release(V2, version="v2", percent=5)
        async with node.serving():
            slot = node.worker.slots.get("digits")
            assert versions_of(slot) == ("v1", "v2"), "ready is with both"
            assert [e.channel for e in node.said(ModelSwapped)] == ["stable", "candidate"]
            node.release(V3, version="v3", percent=5)
            await until(lambda: versions_of(slot) == ("v1", "v3"))
        assert beside_requests == [False, False, True], "nothing was asked before both were there"

    run(scenario())


def test_a_candidate_that_hangs_holds_up_no_request_of_the_stable_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OnnxModel.run

    def run_slowly(model: OnnxModel, *rest: Any, **named: Any) -> Any:
        if model.sha256 == digest_of(V2):
            time.sleep(0.4)
        return original(model, *rest, **named)

    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        # One by one, so that they take every thread.
        node.release(V2, version="v2", percent=50, limits=Limits(deadline_ms=300), batchable=False)
        async with node.serving() as http:
            monkeypatch.setattr(OnnxModel, "run", run_slowly)
            node.worker.slots.get("digits").candidate.cost.in_loop = False  # type: ignore[union-attr]

            async def ask(version: str, n: int) -> tuple[int, float]:
                tensor = {"name": "features", "datatype": "FP32", "shape": [1, 32], "data": row(n)}
                began = time.monotonic()
                answer = await http.post(f"/v2/models/digits/versions/{version}/infer", json={"inputs": [tensor]})
                return answer.status_code, time.monotonic() - began

            hung = [asyncio.create_task(ask("v2", n)) for n in range(8)]
            await asyncio.sleep(0.05)
            for n in range(10):
                status, seconds = await ask("v1", 100 + n)
                assert status == 200 and seconds < 0.2
            assert {status for status, _ in await asyncio.gather(*hung)} == {504}

    run(scenario())


def test_a_candidate_knows_the_answers_that_are_asked_most(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            slot = node.worker.slots.get("digits")
            for _ in range(2):
                for n in range(3):
                    await http.post("/predict", json={"features": row(n)})
            node.release(V2, version="v2", percent=100)
            await until(lambda: slot.candidate is not None)
            runs.reset()
            answers = [(await http.post("/predict", json={"features": row(n)})).json() for n in range(3)]
            assert [(a["tier"], a["version"]) for a in answers] == [("memory", "v2")] * 3 and not runs.count
            # And what was asked of the stable release most while it was beside it, once it is that itself.
            node.share(1)
            await until(lambda: slot.percent == 1)
            for _ in range(2):
                for n in range(10, 13):
                    await http.post("/predict", json={"features": row(n)})
            node.promote()
            await until(lambda: versions_of(slot) == ("v2", None))
            runs.reset()
            answers = [(await http.post("/predict", json={"features": row(n)})).json() for n in range(10, 13)]
            assert [(a["tier"], a["version"]) for a in answers] == [("memory", "v2")] * 3 and not runs.count
            for n, answer in zip(range(10, 13), answers, strict=True):
                assert np.allclose(answer["prediction"], truth(V2, [row(n)])[0], rtol=1e-4)
            # A candidate that was taken back has not taken along what the next one should know.
            for _ in range(2):
                for n in range(10, 13):
                    await http.post("/predict", json={"features": row(n)})
            for data in (V3, V4):
                node.release(data, version=digest_of(data)[:4], percent=100)
                await until(lambda: slot.candidate is not None)
                if data is V4:
                    answers = [(await http.post("/predict", json={"features": row(n)})).json() for n in range(10, 13)]
                    assert [(a["tier"], a["digest"]) for a in answers] == [("memory", digest_of(V4))] * 3
                node.retire("digits@candidate")
                await until(lambda: slot.candidate is None)

    run(scenario())


def test_a_candidate_taken_back_while_it_loads_is_never_seated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[OnnxModel]
) -> None:
    remembered = OnnxModel.load

    def slow(*args: Any) -> OnnxModel:
        time.sleep(0.15)
        return remembered(*args)

    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving():
            slot = node.worker.slots.get("digits")
            monkeypatch.setattr(OnnxModel, "load", slow)
            node.release(V2, version="v2", percent=100)
            await until(lambda: bool(slot.loading))
            node.retire("digits@candidate")
            await until(lambda: len(loaded) == 2 and not slot.loading)
            await until(lambda: not loaded[1].is_open)
            assert versions_of(slot) == ("v1", None)
            assert [e.version for e in node.said(ModelSwapped)] == ["v1"]

    run(scenario())


class FarAway:
    """An origin that serves what it is told to: each release answers with a number of its own."""

    def __init__(self) -> None:
        self.serves: dict[str, float] = {}
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        digest = request.headers["mlcdn-digest"]
        if digest not in self.serves:
            return httpx.Response(404, json={"error": "not here"})
        if request.method == "GET":
            return httpx.Response(200, json={}, headers={"mlcdn-digest": digest})
        self.asked.append(digest)
        scores = np.full(8, self.serves[digest], np.float32).tobytes()
        said = {"name": "scores", "datatype": "FP32", "shape": [1, 8], "parameters": {"binary_data_size": 32}}
        head = json.dumps({"outputs": [said]}).encode()
        headers = {"mlcdn-digest": digest, "inference-header-content-length": str(len(head))}
        return httpx.Response(200, content=head + scores, headers=headers)


def test_a_candidate_at_the_origin_is_asked_once_the_origin_has_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, origin_url="http://origin")
        digests = [node.release(V1, forwarded=True)]
        far = FarAway()
        far.serves[digests[0]] = 1.0
        async with node.serving() as http:
            slot = node.worker.slots.get("digits")
            node.worker.predictor.forwarding.origin = OriginClient("http://origin", transport=httpx.MockTransport(far))

            async def ask(n: int) -> tuple[str, float]:
                answer = await http.post("/predict", json={"features": row(n)})
                assert answer.status_code == 200, answer.text
                return answer.json()["version"], answer.json()["prediction"][0]

            digests.append(node.release(V2, version="v2", percent=50, forwarded=True))
            for n in range(30):
                assert await ask(n) == ("v1", 1.0)
                await asyncio.sleep(0.01)
            assert slot.candidate is None and slot.loading == {"digits@candidate"} and not node.said(SwapFailed)
            far.serves[digests[1]] = 2.0
            await until(lambda: slot.candidate is not None)
            answers = {await ask(n) for n in range(100, 140)}
            assert answers == {("v1", 1.0), ("v2", 2.0)}
            node.promote()
            await until(lambda: versions_of(slot) == ("v2", None))
            assert {await ask(n) for n in range(100, 140)} == {("v2", 2.0)}
            # One that never gets there is waited for until it is taken back.
            node.release(V3, version="v3", percent=50, forwarded=True)
            await until(lambda: bool(slot.loading))
            node.retire("digits@candidate")
            await until(lambda: not slot.loading)
            assert versions_of(slot) == ("v2", None)

    run(scenario())


def test_a_model_at_the_origin_may_be_asked_without_its_optional_inputs(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path, origin_url="http://origin")
        inputs = [
            Tensor(name="features", datatype="FP32", shape=(-1, 32)),
            Tensor(name="scale", datatype="FP32", shape=(-1,), optional=True, ranked=False),
        ]
        far = FarAway()
        far.serves[node.release(V1, forwarded=True, inputs=inputs)] = 1.0
        async with node.serving() as http:
            node.worker.predictor.forwarding.origin = OriginClient("http://origin", transport=httpx.MockTransport(far))
            metadata = (await http.get("/v2/models/digits")).json()
            assert metadata["inputs"][1]["parameters"] == {"optional": True, "any_rank": True}
            features = {"name": "features", "datatype": "FP32", "shape": [1, 32], "data": ROW}
            scale = {"name": "scale", "datatype": "FP32", "shape": [1], "data": [2]}
            for tensors, status in (
                ([features], 200),
                ([features, scale], 200),
                ([scale], 400),
                ([features, scale | {"name": "other"}], 400),
            ):
                answer = await http.post("/v2/models/digits/infer", json={"inputs": tensors})
                assert answer.status_code == status, answer.text
            assert (await http.post("/predict", json={"features": ROW})).status_code == 200

    run(scenario())
