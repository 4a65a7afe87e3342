"""A worker through many releases: what it knows before it serves them, what it forgets, and what it has room for."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_node.serving import residency
from edge_node.serving.hottest import MAX_INPUT_BYTES, MOST
from edge_node.serving.residency import IDLE_S, Resident, to_let_go
from inference.onnx_model import OnnxModel
from schemas.events import CachePolicy, Limits
from schemas.names import Scope, ScopeKind
from tests import models
from tests.service.test_worker import ROW, V1, V2, Node, Runs, run, truth, until

ROWS = [[float(n)] * 32 for n in range(5)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


async def swapped(node: Node, model: str = "digits") -> None:
    def live() -> bool:
        slot = node.worker.slots.find(model)
        return slot is not None and slot.current is not None and slot.current.wanted.sequence == node.sequence

    await until(live)


def test_a_new_release_knows_the_answers_that_are_asked_most(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            for row in ROWS:
                await http.post("/predict", json={"features": row})
            for row in ROWS[:3]:
                await http.post("/predict", json={"features": row})
            await http.post("/predict", json={"features": ROWS[3]}, headers={"authorization": "Bearer a"})
            await http.post("/predict", json={"features": ROWS[3]}, headers={"authorization": "Bearer a"})
            node.release(V2)
            await swapped(node)
            runs.reset()
            answers = [(await http.post("/predict", json={"features": row})).json() for row in ROWS]
            assert [a["tier"] for a in answers] == ["memory"] * 3 + ["model"] * 2, "once is not again"
            assert runs.count == 2
            for row, answer in zip(ROWS, answers, strict=True):
                assert np.allclose(answer["prediction"], truth(V2, [row])[0], rtol=1e-5)
            other = await http.post("/predict", json={"features": ROWS[3]}, headers={"authorization": "Bearer a"})
            assert other.json()["tier"] == "model", "answers do not move between tenants"
            assert len(node.worker.cache.memory) == 6 + 3 + 3, "nor under a key that nobody asks for"

    run(scenario())


def test_what_was_purged_since_it_was_asked_is_not_known_again(tmp_path: Path, runs: Runs) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            for _ in range(2):
                await http.post("/predict", json={"features": ROW})
                await http.post("/predict", json={"features": ROWS[1]}, headers={"mlcdn-tags": "user:1"})
            node.purge(Scope(ScopeKind.TAG, "user:1"))
            node.release(V2)
            await swapped(node)
            assert (await http.post("/predict", json={"features": ROW})).json()["tier"] == "memory"
            asked = await http.post("/predict", json={"features": ROWS[1]}, headers={"mlcdn-tags": "user:1"})
            assert asked.json()["tier"] == "model"

    run(scenario())


def test_another_signature_and_a_release_without_a_cache_are_not_prefilled(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        async with node.serving() as http:
            for _ in range(2):
                await http.post("/predict", json={"features": ROW})
            node.release(models.mlp_bytes(3, (4, 2)))
            await swapped(node)
            assert len(node.worker.cache.memory) == 1
            answer = (await http.post("/predict", json={"features": [1, 2, 3, 4]})).json()
            assert answer["tier"] == "model" and len(answer["prediction"]) == 2
            await http.post("/predict", json={"features": [1, 2, 3, 4]})
            held = len(node.worker.cache.memory)
            node.release(models.mlp_bytes(4, (4, 2)), cache=CachePolicy(enabled=False))
            await swapped(node)
            assert len(node.worker.cache.memory) == held

    run(scenario())


def test_what_is_remembered_of_requests_is_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(models.identity_bytes(shape=("n", None)), batchable=False)
        async with node.serving() as http:

            async def twice(values: list[float]) -> None:
                tensor = {"name": "x", "shape": [1, len(values)], "datatype": "FP32", "data": values}
                for _ in range(2):
                    answer = await http.post("/v2/models/digits/infer", json={"inputs": [tensor]})
                    assert answer.status_code == 200, answer.text

            await twice([1.0] * (MAX_INPUT_BYTES // 4 + 1))
            for n in range(MOST + 20):
                await twice([float(n)] * 3)
            hottest = node.worker.predictor.hottest.take("digits")
            assert [ask.inputs["x"][0, 0] for ask in hottest] == [float(n) for n in reversed(range(20, MOST + 20))]
            assert node.worker.predictor.hottest.take("digits") == []
            await twice([1.0] * 3)
            node.retire("digits")
            await until(lambda: node.worker.slots.find("digits") is None)
            assert node.worker.predictor.hottest.take("digits") == [], "a retired model leaves nothing"

    run(scenario())


def test_an_idle_session_is_let_go_and_loaded_again_for_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "IDLE_S", 0.2)

    async def scenario() -> None:
        node = Node(tmp_path, model_memory_bytes=2 * len(V1) + 1_000)
        node.release(V1, model="digits")
        node.release(V2, model="faces")
        async with node.serving() as http:
            served = {name: node.worker.slots.get(name).serving for name in ("digits", "faces")}
            node.release(models.mlp_bytes(7), model="third")
            await swapped(node, "third")

            async def ask(name: str, row: list[float]) -> Any:
                return await http.post("/predict", json={"model": name, "features": row})

            until_s = time.monotonic() + 5
            number = 0.0
            while not served["digits"].asleep and not served["faces"].asleep:
                assert time.monotonic() < until_s
                number += 1
                # Only this one is in use.
                assert (await ask("third", [number] * 32)).status_code == 200
                await asyncio.sleep(0.02)
            asleep = "digits" if served["digits"].asleep else "faces"
            data = V1 if asleep == "digits" else V2
            assert node.worker.health.ready, "it can still answer"
            answers = await asyncio.gather(*(ask(asleep, [float(n)] * 32) for n in range(8)))
            for n, answer in enumerate(answers):
                assert answer.status_code == 200
                assert np.allclose(answer.json()["prediction"], truth(data, [[float(n)] * 32])[0], rtol=1e-5)
            assert not served[asleep].asleep

    run(scenario())


def test_a_session_that_does_not_come_back_is_an_error_and_not_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        node = Node(tmp_path)
        digest = node.release(V1)
        async with node.serving() as http:
            assert (await http.post("/predict", json={"features": ROW})).status_code == 200
            slot = node.worker.slots.get("digits")
            slot.let_go("current")
            assert slot.serving.asleep
            assert (await http.post("/predict", json={"features": ROW})).json()["tier"] == "memory", (
                "a cache still has it"
            )
            file = tmp_path / "models" / f"{digest}.onnx"
            file.rename(file.with_suffix(".gone"))
            began = time.monotonic()
            gone = await http.post("/predict", json={"features": ROWS[1]})
            assert gone.status_code == 503 and time.monotonic() - began < 2
            file.with_suffix(".gone").rename(file)
            assert (await http.post("/predict", json={"features": ROWS[1]})).json()["tier"] == "model"

    run(scenario())


def test_who_waits_for_a_session_waits_no_longer_than_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OnnxModel.load

    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1, limits=Limits(deadline_ms=100))
        async with node.serving() as http:

            def slow(*args: Any) -> OnnxModel:
                time.sleep(0.5)
                return original(*args)

            monkeypatch.setattr(OnnxModel, "load", slow)
            node.worker.slots.get("digits").let_go("current")
            began = time.monotonic()
            assert (await http.post("/predict", json={"features": ROW})).status_code == 504
            assert time.monotonic() - began < 0.4
            await until(lambda: not node.worker.slots.get("digits").serving.asleep)
            assert (await http.post("/predict", json={"features": ROW})).status_code == 200

    run(scenario())


def resident(model: str, current: int, previous: int, idle_s: float) -> Resident:
    return Resident(model=model, current_bytes=current, previous_bytes=previous, idle_s=idle_s)


def test_who_goes_when_there_is_no_room() -> None:
    busy, idle, idler = resident("busy", 50, 40, 1), resident("idle", 30, 20, IDLE_S + 1), resident("idler", 10, 5, 500)
    everyone = [busy, idle, idler]
    assert to_let_go(everyone, 155) == []
    assert to_let_go(everyone, 154) == [("idler", "previous")]
    assert to_let_go(everyone, 149) == [("idler", "previous"), ("idle", "previous")]
    assert to_let_go(everyone, 100) == [("idler", "previous"), ("idle", "previous"), ("busy", "previous")]
    assert to_let_go(everyone, 80)[3:] == [("idler", "current")]
    assert to_let_go(everyone, 0)[3:] == [("idler", "current"), ("idle", "current")], "what is in use stays"


def test_a_candidate_is_idle_with_its_stable_release_and_the_less_asked_of_the_two_goes_first() -> None:
    def pair(model: str, percent: float, idle_s: float) -> Resident:
        return Resident(
            model=model, current_bytes=30, previous_bytes=5, candidate_bytes=20, percent=percent, idle_s=idle_s
        )

    assert to_let_go([pair("m", 5, IDLE_S - 1)], 0) == [("m", "previous")], "what is in use stays, at any share"
    assert to_let_go([pair("m", 5, 99)], 0) == [("m", "previous"), ("m", "candidate"), ("m", "current")]
    assert to_let_go([pair("m", 50, 99)], 0) == [("m", "previous"), ("m", "current"), ("m", "candidate")]
    assert to_let_go([pair("m", 5, 99)], 50) == [("m", "previous")]
    assert to_let_go([pair("m", 5, 99), resident("n", 40, 0, 100)], 80)[:2] == [("m", "previous"), ("n", "current")]
