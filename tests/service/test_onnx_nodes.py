"""Any valid model: a sample of the ONNX backend node tests, and scikit-learn's usual exports, against real nodes.

`python -m bench onnx_nodes` runs all of the node tests.
"""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from mlcdn.identities import ensure_identities
from mlcdn.local_stack.running import RunningStack
from origin.publish import Publisher, ReleaseRequest
from schemas.errors import MlcdnError, ModelRefused
from streams.artifacts import ArtifactStore
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer
from tests import models, onnx_nodes
from tests.edge_node_process import EdgeNode, node_settings, until
from tests.node_client import Arrays, NodeClient, texts
from tests.onnx_nodes import Case, NodesWorker, Verdict, judge

SAMPLE = 300
# Over the whole way: signed, uploaded, said in Kafka, fetched and tried by the agent.
WHOLE_WAY = {
    "test_string_concat": Verdict.PASSED,
    "test_range_bfloat16_type_positive_delta": Verdict.PASSED,
    "test_if": Verdict.PASSED,
    "test_nonzero_example": Verdict.PASSED,
    "test_mish": Verdict.PASSED,
    "test_sequence_insert_at_back": Verdict.REFUSED,
    "test_cast_FLOAT_to_FLOAT8E4M3FN": Verdict.REFUSED,
    "test_adam": Verdict.REFUSED,
}


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return onnx_nodes.node_cases()


def test_models_that_come_as_files_are_answered_as_onnxruntime_answers(tmp_path: Path) -> None:
    chosen = onnx_nodes.model_cases()
    with NodesWorker(tmp_path) as worker:
        outcomes = onnx_nodes.run(chosen, worker)
    said = "\n".join(onnx_nodes.table(outcomes))
    counts = Counter(outcome.verdict for outcome in outcomes)
    assert counts[Verdict.WRONG] == 0 and counts[Verdict.PASSED] >= 0.6 * len(chosen), said


def test_a_sample_of_the_node_tests_is_answered_as_onnxruntime_answers(cases: list[Case], tmp_path: Path) -> None:
    chosen = onnx_nodes.sample(cases, SAMPLE)
    with NodesWorker(tmp_path) as worker:
        outcomes = onnx_nodes.run(chosen, worker)
        assert "Traceback" not in worker.log(), worker.log()
    said = "\n".join(onnx_nodes.table(outcomes))
    counts = Counter(outcome.verdict for outcome in outcomes)
    assert counts[Verdict.WRONG] == 0, said
    # What is refused or fails is known by its reason; that most is served is known by this.
    assert counts[Verdict.PASSED] >= 0.6 * len(chosen) and counts[Verdict.REFUSED] > 0, said
    passed = {outcome.case for outcome in outcomes if outcome.verdict is Verdict.PASSED}
    idle = [k for k, of_kind in onnx_nodes.KINDS.items() if not any(c.name in passed and of_kind(c) for c in chosen)]
    # Sequences and optionals are no tensors, and onnxruntime has no training operators but Dropout, which is random.
    assert set(idle) <= {"no tensor", "optional", "training"}, said


@dataclass(slots=True)
class Whole:
    """A publisher at its desk, and a whole edge node that obeys it."""

    publisher_of: Any
    scratch: Path
    node: EdgeNode
    client: NodeClient

    def publish(self, model: str, data: bytes) -> str:
        """Published by the library, and served by the node."""
        path = self.scratch / f"{model}.onnx"
        path.write_bytes(data)
        request = ReleaseRequest(model=model, path=path, author="test")
        digest: str = asyncio.run(self.publisher_of(request)).digest
        until(lambda: self.node.serves(model, digest), 20)
        return digest


@pytest.fixture(scope="module")
def whole(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    addresses, scratch = stack.addresses, tmp_path_factory.mktemp("nodes")
    identities = asyncio.run(ensure_identities(scratch / "keys", addresses.kafka, lambda _: None))
    store = ArtifactStore(
        addresses.s3_endpoint, addresses.s3_bucket, addresses.s3_access_key, addresses.s3_secret_key, "us-east-1"
    )

    async def publish(request: ReleaseRequest) -> Any:
        appender = KafkaAppender(addresses.kafka, client_id="test")
        writer = Writer(appender, source="/operators/test", signing_key=load_private(identities.operator))
        try:
            reader = KafkaReader(addresses.kafka)
            return await Publisher(store, writer, reader, load_roots(identities.roots)).publish(request)
        finally:
            await appender.close()

    node = EdgeNode(node_settings(addresses, identities, scratch / "edge", "nodes-1"))
    node.start()
    client = NodeClient(node.port)
    try:
        until(lambda: (answer := node.get("/v2/health/ready")) is not None and answer.status_code == 200, 30)
        yield Whole(publish, scratch, node, client)
        assert "Traceback" not in node.log(), node.log()
    finally:
        client.close()
        node.end()


@pytest.mark.parametrize("name", WHOLE_WAY)
def test_a_node_test_over_the_whole_way(whole: Whole, cases: list[Case], name: str) -> None:
    (case,) = [case for case in cases if case.name == name]
    model: str | MlcdnError = name.lower()
    try:
        whole.publish(name.lower(), case.data)
    except ModelRefused as error:
        model = error
    assert judge(case, model, whole.client).verdict is WHOLE_WAY[name]


def test_an_optional_tensor_may_be_left_out(whole: Whole) -> None:
    optional = helper.make_optional_type_proto(helper.make_tensor_type_proto(models.FLOAT, ["N"]))
    x = helper.make_value_info("x", optional)
    there = models.node("OptionalHasElement", ["x"], ["y"])
    whole.publish("optional", models.model_bytes([there], [x], [models.value("y", models.BOOL, [])], opset=18))
    (said,) = whole.client.described("optional")["inputs"]
    assert said == {"name": "x", "datatype": "FP32", "shape": [-1], "parameters": {"optional": True}}
    for inputs in ({}, {"x": np.ones(2, np.float32)}):
        for answer in (
            whole.client.ask_json("optional", inputs, {"x": "FP32"}),
            whole.client.ask_binary("optional", inputs, {"x": "FP32"}, ["y"]),
        ):
            assert answer["y"].shape == () and answer["y"].item() is bool(inputs)


def classifier(labels: list[int] | list[str]) -> tuple[bytes, Arrays, Any]:
    """Three classes of iris-like rows; the model's bytes, rows to ask for, and the estimator itself."""
    with warnings.catch_warnings(action="ignore"):
        from skl2onnx import to_onnx
        from sklearn.datasets import make_blobs
        from sklearn.ensemble import RandomForestClassifier

    rows, classes = make_blobs(120, n_features=4, centers=3, random_state=3)
    rows = rows.astype(np.float32)
    forest = RandomForestClassifier(8, random_state=1).fit(rows, np.array(labels)[classes])
    with warnings.catch_warnings(action="ignore"):
        model = to_onnx(forest, rows[:1])
    return model.SerializeToString(), {"X": rows[:5]}, forest


@pytest.mark.parametrize("labels", [[7, 20, 300], ["sétosa", "versicolor", "virginica"]], ids=["int", "string"])
def test_a_classifier_answers_probabilities_as_a_tensor_with_its_labels(whole: Whole, labels: list[Any]) -> None:
    data, inputs, forest = classifier(labels)
    name = f"forest_{type(labels[0]).__name__}"
    whole.publish(name, data)
    label, probabilities = whole.client.described(name)["outputs"]
    assert label["datatype"] == ("INT64" if isinstance(labels[0], int) else "BYTES")
    assert probabilities | {"name": ""} == {
        "name": "",
        "datatype": "FP32",
        "shape": [-1, 3],
        "parameters": {"labels": labels},
    }
    wanted = forest.predict_proba(inputs["X"])
    for answer in (
        whole.client.ask_json(name, inputs, {"X": "FP32"}),
        whole.client.ask_binary(name, inputs, {"X": "FP32"}, [label["name"], probabilities["name"]]),
    ):
        np.testing.assert_allclose(answer[probabilities["name"]], wanted, atol=1e-6)
        assert answer[label["name"]].tolist() == forest.predict(inputs["X"]).tolist()


def test_a_pipeline_takes_columns_of_several_types(whole: Whole) -> None:
    with warnings.catch_warnings(action="ignore"):
        from skl2onnx import to_onnx
        from skl2onnx.common.data_types import FloatTensorType, StringTensorType
        from sklearn.compose import ColumnTransformer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder, StandardScaler
    rows = np.empty((32, 3), object)
    rows[:, 0] = ["Tōkyō", "London", "Paris", "London"] * 8
    rows[:, 1], rows[:, 2] = np.arange(32.0), np.arange(32.0) % 5
    bought = (rows[:, 1] + 9 * (rows[:, 0] == "London") > 20).astype(np.int64)
    columns = ColumnTransformer(
        [("city", OneHotEncoder(handle_unknown="ignore"), [0]), ("rest", StandardScaler(), [1, 2])]
    )
    pipeline = make_pipeline(columns, LogisticRegression()).fit(rows, bought)
    types = [("city", StringTensorType([None, 1])), ("age_and_visits", FloatTensorType([None, 2]))]
    with warnings.catch_warnings(action="ignore"):
        model = to_onnx(pipeline, initial_types=types)
    whole.publish("pipeline", model.SerializeToString())
    inputs, outputs = whole.client.signature("pipeline")
    assert inputs == {"city": "BYTES", "age_and_visits": "FP32"}
    asked = rows[:6].copy()
    asked[2, 0] = "a city that was never seen"
    arrays: Arrays = {"city": texts(asked[:, 0].tolist(), [6, 1]), "age_and_visits": asked[:, 1:].astype(np.float32)}
    for answer in (
        whole.client.ask_json("pipeline", arrays, inputs),
        whole.client.ask_binary("pipeline", arrays, inputs, list(outputs)),
    ):
        label, probabilities = answer.values()
        assert label.tolist() == pipeline.predict(asked).tolist()
        np.testing.assert_allclose(probabilities, pipeline.predict_proba(asked), atol=1e-5)
