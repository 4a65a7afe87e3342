"""A candidate as a shadow of the stable release, and requests that are recorded: on a worker, its doors and a real Kafka."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_node.serving import shadow
from mlcdn.cli.app import run
from mlcdn.local_stack.running import RunningStack
from schemas import codec, names
from schemas.events import Golden, Recording, RequestRecorded, ShadowCompared, Tensor
from schemas.events.samples import MAX_RECORDED_BYTES
from schemas.metrics import counter
from streams.audit.order import partitions
from streams.log.reader import KafkaReader
from tests import models
from tests.open_loop import OpenLoop, percentile
from tests.service.test_canary import Asked, wait_for
from tests.service.test_worker import V1, Node, infer_body, until
from tests.service.test_worker import run as run_scenario
from tests.worker_process import WorkerProcess

EVERY = 20
COUNT = 400
RATE = 150
# Of its own: other tests record nothing there.
REGION = "reykjavik"
# Nothing is skipped, however busy the machine is that the test runs on.
PATIENT = (
    "from edge_node.serving import recordings, shadow; recordings.MAX_WAITING = shadow.MAX_WAITING = 10**6;"
    " shadow.MAX_WAIT_S = shadow.LATE_S = 60.0; shadow.PAUSE_S = 0.0"
)


def differing_bytes(every: int, by: float = -1_000.0) -> bytes:
    """As `V1`, but its first score is `by` more where the first feature is a multiple of `every`."""
    proto = onnx.load_from_string(V1)
    graph = proto.graph
    (last,) = [node for node in graph.node if "scores" in node.output]
    last.output[0] = "plain"
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array([0], np.int64), "starts"),
            numpy_helper.from_array(np.array([1], np.int64), "ends"),
            numpy_helper.from_array(np.array([1], np.int64), "axes"),
            numpy_helper.from_array(np.array(every, np.float32), "every"),
            numpy_helper.from_array(np.array(0.0, np.float32), "zero"),
            numpy_helper.from_array(np.array([[by] + [0.0] * 7], np.float32), "by"),
        ]
    )
    graph.node.extend(
        [
            models.node("Slice", ["features", "starts", "ends", "axes"], ["first"]),
            models.node("Mod", ["first", "every"], ["rest"], fmod=1),
            models.node("Equal", ["rest", "zero"], ["hit"]),
            models.node("Cast", ["hit"], ["one"], to=models.FLOAT),
            models.node("Mul", ["one", "by"], ["more"]),
            models.node("Add", ["plain", "more"], ["scores"]),
        ]
    )
    data: bytes = proto.SerializeToString()
    return data


class Said:
    """What stands in the log since this was made."""

    def __init__(self, kafka: str) -> None:
        self._reader = KafkaReader(kafka)
        self._starts = {
            at: self._reader.watermarks(*at)[1] for at in partitions(self._reader, ["mlcdn.fleet", "mlcdn.recordings"])
        }

    def of(self, kind: type[Any]) -> list[Any]:
        events = [
            codec.decode(topic, record.key, record.value, record.headers).event
            for (topic, partition), start in self._starts.items()
            for record in self._reader.read(topic, partition, start)
        ]
        return [event for event in events if isinstance(event, kind)]

    def shadows(self) -> dict[str, Any]:
        """All that was said of a shadow, added up."""
        events = self.of(ShadowCompared)
        fields = ("rows", "disagreements", "failed", "skipped", "top1_rows", "top1_agreements")
        total: dict[str, Any] = {name: sum(getattr(e, name) for e in events) for name in fields}
        return total | {"max_difference": max((e.max_difference for e in events), default=0.0), "events": len(events)}


def features(number: int) -> list[float]:
    # Of one length in JSON, so that the lane knows the head of all.
    return [float(1_000 + number), *[0.5] * 31]


def predict_bodies(numbers: Sequence[int]) -> list[bytes]:
    return [json.dumps({"features": features(n)}).encode() for n in numbers]


def wait_until(condition: Callable[[], bool], shown: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, shown()
        time.sleep(0.05)


def test_both_doors_are_shadowed_and_a_candidate_that_differs_in_five_percent_is_found(
    tmp_path: Path, stack: RunningStack
) -> None:
    said = Said(stack.addresses.kafka)
    with WorkerProcess(tmp_path, before=PATIENT, kafka=stack.addresses.kafka) as worker:
        asked = predict_bodies(range(COUNT))
        no_store = {"cache-control": "no-store"}
        url = f"http://127.0.0.1:{worker.port}/v2/models/digits/infer"
        with httpx.Client(trust_env=False, headers=no_store) as http, Asked(worker, 4) as lane:
            before = [body for _, body in lane.heads_and_bodies(asked)]
            plain = [http.post(url, json=infer_body(features(n))).content for n in range(0, COUNT, 10)]
            digest = worker.node.release(differing_bytes(EVERY), version="v2", percent=0, shadow_percent=100)
            wait_for(worker, lambda m: m.get("candidate", {}).get("state") == "live")
            time.sleep(0.1)
            # What caches have is compared too, and once; and what is computed anew, which no cache has.
            after = [body for _, body in lane.heads_and_bodies(asked)]
            wait_until(lambda: said.shadows()["rows"] >= COUNT, said.shadows)
            again = [http.post(url, json=infer_body(features(n))).content for n in range(0, COUNT, 10)]
        wait_until(lambda: said.shadows()["rows"] >= COUNT + COUNT // 10, said.shadows)
        assert [_prediction(b) for b in after] == [_prediction(b) for b in before] and again == plain
        metrics = httpx.get(f"http://127.0.0.1:{worker.port}/metrics", trust_env=False).text
    found = said.shadows()
    differing = COUNT // EVERY + len([n for n in range(0, COUNT, 10) if (1_000 + n) % EVERY == 0])
    assert (found["rows"], found["disagreements"], found["failed"]) == (COUNT + COUNT // 10, differing, 0)
    assert found["skipped"] == 0 and found["max_difference"] == pytest.approx(1_000, rel=1e-3)
    assert found["top1_rows"] == found["rows"] and found["top1_agreements"] == found["rows"] - differing
    assert found["events"] <= 10
    for event in said.of(ShadowCompared):
        assert (event.candidate_digest, event.sequence, event.region) == (digest, 2, "local")
    assert f'mlcdn_shadow_answers_total{{model="digits",outcome="differed"}} {float(differing)}' in metrics


def slow_bytes() -> bytes:
    """Signature of `V1`; a row takes 50 ms of one core, and loading next to nothing."""
    weight = np.full((1_024, 1_024), 1e-3, np.float32)
    return models.model_bytes(
        [
            # Not constant, or it would be worked out once, when the model is loaded.
            models.node("ReduceMax", ["features"], ["top"], keepdims=0),
            models.node("Add", ["w", "top"], ["moved"]),
            models.node("MatMul", ["moved", "w"], ["worked"]),
            models.node("ReduceMax", ["worked"], ["most"], keepdims=0),
            models.node("MatMul", ["features", "narrow"], ["few"]),
            models.node("Add", ["few", "most"], ["scores"]),
        ],
        [models.value("features", models.FLOAT, ["N", 32])],
        [models.value("scores", models.FLOAT, ["N", 8])],
        [numpy_helper.from_array(a, n) for a, n in ((weight, "w"), (np.ones((32, 8), np.float32), "narrow"))],
    )


def test_a_candidate_of_50_ms_adds_nothing_to_the_answers_beside_it(tmp_path: Path, stack: RunningStack) -> None:
    said = Said(stack.addresses.kafka)
    # Without the pauses that a busy machine makes it take: as much of it as there can be.
    unpaused = "from edge_node.serving import shadow; shadow.PAUSE_S = 0.0"
    with WorkerProcess(tmp_path, before=unpaused, kafka=stack.addresses.kafka) as worker:
        without, beside = Ms(worker.port), Ms(worker.port)
        without.load()
        without.ms.clear()
        # In turn, because whatever else the machine does comes and goes.
        for _ in range(3):
            without.load()
            worker.node.release(slow_bytes(), version="v2", percent=0, shadow_percent=100)
            wait_for(worker, lambda m: m.get("candidate", {}).get("state") == "live")
            time.sleep(0.1)
            beside.load()
            worker.node.retire("digits@candidate")
            wait_for(worker, lambda m: "candidate" not in m)
        wait_until(lambda: sum(said.shadows()[name] for name in ASKED) >= beside.sent, said.shadows)
    found = said.shadows()
    print(f"p99 {without} → {beside}, {found}")  # noqa: T201
    # It ran, and had no time for most.
    assert found["rows"] > 0 and found["skipped"] > 5 and found["failed"] == 0
    assert found["rows"] + found["skipped"] == beside.sent and found["disagreements"] == found["rows"]
    assert beside.quietest < without.quietest * 1.3 + 20


ASKED = ("rows", "skipped")


class Ms:
    """Loads of the worker at `port`, second by second."""

    def __init__(self, port: int) -> None:
        self._port, self.ms, self.sent = port, list[list[float]](), 0

    def load(self) -> None:
        with OpenLoop(self._port, {"digits": models.sha256(V1)}, rate=RATE) as one:
            time.sleep(1)
        assert one.wrong == []
        self.ms.append(one.ms)
        self.sent += one.sent

    @property
    def quietest(self) -> float:
        """The p99 of the best of them, in ms."""
        return min(percentile(ms, 0.99) for ms in self.ms)

    def __str__(self) -> str:
        return " ".join(f"{percentile(ms, 0.99):.1f}" for ms in self.ms)


ADD = models.model_bytes(
    [models.node("Add", ["x", "secret"], ["y"])],
    [models.value(name, models.FLOAT, ["N", 4]) for name in ("x", "secret")],
    [models.value("y", models.FLOAT, ["N", 4])],
)
FOUR = (-1, 4)


def tensor(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {"name": name, "datatype": "FP32", "shape": [len(values) // 4, 4], "data": list(values)}


def test_requests_are_recorded_without_what_is_somebodys_and_a_replay_of_them_is_the_same_twice(
    tmp_path: Path, stack: RunningStack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Said(stack.addresses.kafka)
    # The network's own log is away: recordings go elsewhere.
    with WorkerProcess(
        tmp_path, before=PATIENT, recordings_kafka=stack.addresses.kafka, region=REGION, default_model="digits"
    ) as worker:
        node, url = worker.node, f"http://127.0.0.1:{worker.port}/v2/models"
        all_of_it = Recording(fraction=1.0)
        with httpx.Client(trust_env=False) as http, Asked(worker, 4) as lane:
            http.post(f"{url}/digits/infer", json=infer_body(features(-1)))
            node.release(V1, version="recorded", record=all_of_it)
            node.release(
                ADD,
                model="sums",
                record=Recording(fraction=1.0, redacted=("secret",)),
                inputs=[Tensor(name=name, datatype="FP32", shape=FOUR) for name in ("x", "secret")],
                outputs=[Tensor(name="y", datatype="FP32", shape=FOUR)],
            )
            wait_for(worker, lambda m: m["version"] == "recorded")
            until_served(http, f"{url}/sums/ready")
            time.sleep(0.1)
            list(lane.heads_and_bodies(predict_bodies(range(COUNT))))
            # Neither the same again, nor what is somebody's, nor what is not to be kept.
            list(lane.heads_and_bodies(predict_bodies(range(50))))
            for number, header in enumerate(({"authorization": "Bearer t0psecret"}, {"cache-control": "no-store"})):
                told = http.post(f"{url}/digits/infer", json=infer_body(features(5_000 + number)), headers=header)
                assert told.status_code == 200
            body = {"inputs": [tensor("x", [1, 2, 3, 4]), tensor("secret", [9, 9, 9, 9])]}
            assert http.post(f"{url}/sums/infer", json=body).json()["outputs"][0]["data"] == [10, 11, 12, 13]
        wait_until(lambda: len(said.of(RequestRecorded)) >= COUNT + 1, lambda: len(said.of(RequestRecorded)))
    recorded = said.of(RequestRecorded)
    assert len(recorded) == COUNT + 1
    (sum_of,) = [event for event in recorded if event.model == "sums"]
    assert {t.name: (t.redacted, t.data) for t in sum_of.inputs} == {
        "x": (False, np.array([1, 2, 3, 4], "<f4").tobytes()),
        "secret": (True, b""),
    }
    asked = [np.frombuffer(e.inputs[0].data, "<f4")[0] for e in recorded if e.model == "digits"]
    assert sorted(asked) == [1_000 + n for n in range(COUNT)]

    monkeypatch.setenv("MLCDN_KAFKA", stack.addresses.kafka)
    candidate = tmp_path / "candidate.onnx"
    candidate.write_bytes(differing_bytes(EVERY))

    def replay(*more: str) -> tuple[int, str]:
        line = [
            "replay-requests",
            "digits",
            "--file",
            str(candidate),
            "--region",
            REGION,
            "--compare",
            "values",
            "--json",
            *more,
        ]
        return run(line), capsys.readouterr().out

    once, again = replay(), replay()
    assert once == again and once[0] == 1
    report = json.loads(once[1])
    (region,) = report["regions"]
    assert (region["region"], region["recorded"], region["rows"]) == (REGION, COUNT, COUNT)
    assert (region["disagreements"], region["failed"], region["redacted"]) == (COUNT // EVERY, 0, 0)
    assert region["answered_by"] == {models.sha256(V1): COUNT} and report["disagreement"] == 1 / EVERY
    assert sum(r["end"] - r["start"] for r in region["ranges"]) >= COUNT
    code, said_again = replay("--last", "40", "--max-disagreement", "0.5")
    newest = json.loads(said_again)["regions"][0]
    assert code == 0 and newest["recorded"] == 40
    assert newest["ranges"][0]["end"] == region["ranges"][0]["end"]
    # What it cannot answer is no agreement.
    candidate.write_bytes(models.mlp_bytes(2, (16, 8)))
    code, said_again = replay("--last", "10")
    failing = json.loads(said_again)
    assert (code, failing["rows"], failing["regions"][0]["failed"], failing["disagreement"]) == (1, 0, 10, 1.0)
    # Another model: what was redacted cannot be asked again, and nothing compared is nothing passed.
    code = run(["replay-requests", "sums", "--file", str(candidate), "--region", REGION, "--json"])
    nothing = json.loads(capsys.readouterr().out)
    assert code == 1 and nothing["regions"][0]["redacted"] == 1 and nothing["rows"] == 0


def until_served(http: httpx.Client, url: str) -> None:
    wait_until(lambda: http.get(url).status_code == 200, lambda: http.get(url).text)


def _prediction(body: bytes) -> Any:
    return json.loads(body)["prediction"]


async def asked(http: httpx.AsyncClient, numbers: Sequence[int], **headers: str) -> None:
    for number in numbers:
        answer = await http.post("/predict", json={"features": features(number)}, headers=headers)
        assert answer.status_code == 200


async def seated(node: Node) -> None:
    """The candidate, and its shadow beside it."""
    await until(lambda: node.worker.slots.get("digits").candidate is not None)
    await asyncio.sleep(0.05)


def total(node: Node, field: str) -> int:
    return sum(getattr(event, field) for event in node.said(ShadowCompared))


def test_a_share_is_the_same_requests_everywhere_and_what_the_candidate_cannot_answer_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "LATE_S", 60.0)
    monkeypatch.setattr(shadow, "PAUSE_S", 0.0)
    monkeypatch.setattr(shadow, "MAX_WAITING", 1_000)

    async def scenario() -> None:
        counts = []
        for place in ("one", "other"):
            (tmp_path / place).mkdir()
            node = Node(tmp_path / place)
            node.release(V1)
            # It takes what no client of the stable release sends.
            node.release(models.mlp_bytes(2, (16, 8)), version="v2", percent=0, shadow_percent=30)
            async with node.serving() as http:
                await seated(node)
                await asked(http, range(200))
                await asyncio.sleep(1.2)
            assert total(node, "rows") == total(node, "skipped") == 0
            counts.append(total(node, "failed"))
        assert counts[0] == counts[1] and 35 < counts[0] < 85

    run_scenario(scenario())


def test_tolerances_are_those_of_the_candidates_golden_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "LATE_S", 60.0)
    monkeypatch.setattr(shadow, "PAUSE_S", 0.0)

    async def scenario() -> None:
        node = Node(tmp_path)
        node.release(V1)
        key = names.golden_object_key("digits", "0" * 64)
        golden = Golden(object_key=key, sha256="0" * 64, rtol=0.0, atol=2_000.0)
        node.release(differing_bytes(2), version="v2", percent=0, shadow_percent=100, golden=golden)
        async with node.serving() as http:
            await seated(node)
            await asked(http, range(20))
            await until(lambda: total(node, "rows") == 20)
        assert total(node, "disagreements") == 0
        assert max(e.max_difference for e in node.said(ShadowCompared)) == pytest.approx(1_000, rel=1e-3)

    run_scenario(scenario())


def test_recordings_are_bounded_and_what_is_over_a_bound_is_counted(tmp_path: Path) -> None:
    outcomes = ("recorded", "too_large", "over_budget", "dropped")

    def counted() -> dict[str, float]:
        of = counter("mlcdn_recordings_total")
        return {outcome: of.labels("digits", outcome)._value.get() for outcome in outcomes}

    async def scenario() -> None:
        node = Node(tmp_path, recordings_bytes_s=1, gateway_sets_tenant=True)
        node.release(V1, record=Recording(fraction=1.0))
        before = counted()
        async with node.serving() as http:
            await asyncio.sleep(0.05)

            async def infer(rows: int, start: int) -> None:
                values = [v for n in range(rows) for v in features(start + n)]
                tensor = {"name": "features", "datatype": "FP32", "shape": [rows, 32], "data": values}
                assert (await http.post("/v2/models/digits/infer", json={"inputs": [tensor]})).status_code == 200
                await asyncio.sleep(0.05)

            await infer(4_000, 0)
            await infer(1_400, 0)
            await infer(1_400, 5_000)
            await asked(http, [1], **{"mlcdn-tenant": "acme"})
            await asked(http, [2])
            await asyncio.sleep(0.05)
        recorded: list[Any] = [
            codec.decode(r.topic, r.key, r.value, r.headers).event
            for partition in range(6)
            for r in node.log.read("mlcdn.recordings", partition)
        ]
        assert sorted(e.inputs[0].shape[0] for e in recorded) == [1, 1_400]
        assert all(len(e.outputs) + len(e.inputs[0].data) <= MAX_RECORDED_BYTES for e in recorded)
        now = counted()
        assert [now[o] - before[o] for o in outcomes] == [2, 1, 1, 0]

    run_scenario(scenario())
