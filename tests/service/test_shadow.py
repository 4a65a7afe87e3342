"""A candidate as a shadow of the stable release, and requests that are recorded: on a worker, its doors and a real Kafka."""

from __future__ import annotations

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

from mlcdn.local_stack.running import RunningStack
from schemas import codec
from schemas.events import ShadowCompared
from streams.audit.order import partitions
from streams.log.reader import KafkaReader
from tests import models
from tests.service.test_canary import Asked, wait_for
from tests.service.test_worker import V1, infer_body
from tests.worker_process import WorkerProcess

EVERY = 20
COUNT = 400
# Nothing is skipped, however busy the machine is that the test runs on.
PATIENT = "from edge_node.serving import shadow; shadow.MAX_WAITING = 10**6; shadow.MAX_WAIT_S = shadow.LATE_S = 60.0"


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


def _prediction(body: bytes) -> Any:
    return json.loads(body)["prediction"]
