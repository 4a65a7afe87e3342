"""A worker process that serves a model of every datatype and shape the protocol knows, and the words to ask it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
from onnx import TensorProto, helper

from inference.datatypes import DATATYPES
from processes.ports import LOOPBACK
from tests import models
from tests.worker_process import WorkerProcess

BODY_BYTES, BATCH_ROWS = 256 * 1024, 64
ALL = tuple(d.name for d in DATATYPES)
NUMBERS = tuple(name for name in ALL if name not in ("BOOL", "BYTES", "BF16"))
VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False, True, True],
    "BYTES": [b"a\x00b", "é".encode(), b"", b"x" * 300],
    "BF16": [0x3F80, 0xC000, 0x0001, 0x7F80],
}


def identity_name(datatype: str) -> str:
    return f"identity_{datatype.lower()}"


def array(datatype: str, rows: int = 2) -> np.ndarray[Any, Any]:
    """[rows, 2], with the type's limits in it."""
    kind = next(d for d in DATATYPES if d.name == datatype)
    dtype = np.dtype(kind.dtype)
    values = VALUES.get(datatype)
    if values is None:
        limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
        values = [limits.min, limits.max, 0, 1]
    return np.resize(np.array(values, dtype), (rows, 2))


def sum_and_text_bytes() -> bytes:
    """Two inputs and one that may be left out → `total` = a + b + bias, and `echo`, the text of `word`."""
    return models.model_bytes(
        [
            models.node("Add", ["a", "b"], ["ab"]),
            models.node("Add", ["ab", "bias"], ["total"]),
            models.node("Identity", ["word"], ["echo"]),
        ],
        [
            models.value("a", models.FLOAT, ["N", 2]),
            models.value("b", models.FLOAT, ["N", 2]),
            models.value("word", models.STRING, ["N"]),
            models.value("bias", models.FLOAT, [2]),
        ],
        [models.value("total", models.FLOAT, ["N", 2]), models.value("echo", models.STRING, ["N"])],
        [helper.make_tensor("bias", TensorProto.FLOAT, [2], [0.0, 0.0])],
    )


def label_and_probabilities_bytes(labels: list[str]) -> bytes:
    """As scikit-learn's converter writes a classifier: a label, and a ZipMap of probabilities."""
    maps = helper.make_map_type_proto(models.STRING, helper.make_tensor_type_proto(models.FLOAT, None))
    return models.model_bytes(
        [
            models.node("ZipMap", ["x"], ["probabilities"], domain="ai.onnx.ml", classlabels_strings=labels),
            models.node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
        ],
        [models.value("x", models.FLOAT, ["N", len(labels)])],
        [
            models.value("label", models.INT64, ["N"]),
            helper.make_value_info("probabilities", helper.make_sequence_type_proto(maps)),
        ],
    )


MODELS: dict[str, bytes] = {
    **{identity_name(d.name): models.identity_bytes(d.onnx, ["N", 2]) for d in DATATYPES},
    "scalar": models.identity_bytes(models.FLOAT, []),
    "fixed": models.identity_bytes(models.FLOAT, [3]),
    "cube": models.identity_bytes(models.INT64, ["N", None, 2]),
    "constant": models.model_bytes(
        [models.node("Constant", [], ["y"], value=helper.make_tensor("v", TensorProto.FLOAT, [2], [1.0, 2.0]))],
        [],
        [models.value("y", models.FLOAT, [2])],
    ),
    "any_rank": models.identity_bytes(models.FLOAT, None),
    "odd_names": models.model_bytes(
        [models.node("Identity", ['a b/é"'], ["ü"])],
        [models.value('a b/é"', models.FLOAT, ["N", 2])],
        [models.value("ü", models.FLOAT, ["N", 2])],
    ),
    "counted": models.identity_bytes(models.INT64, ["N", None, 2]),  # only by the test that counts
    "several": sum_and_text_bytes(),
    "flowers": label_and_probabilities_bytes(["setosa", "versicolor", "virginica"]),
    "not_a_number": models.nan_bytes(),
}


class OipNode(WorkerProcess):
    """Serves MODELS, and `digits` in version v1."""

    def __init__(self, directory: Path, **settings: object) -> None:
        limits = {"max_body_bytes": BODY_BYTES, "max_batch_rows": BATCH_ROWS}
        super().__init__(directory, **(limits | settings))
        for name, data in MODELS.items():
            self.node.release(data, model=name, batchable=name.startswith("identity"))
        self.address = f"{LOOPBACK}:{self.port}"
        self.http = httpx.Client(base_url=f"http://{self.address}", trust_env=False, timeout=10)

    def release_digits_again(self) -> None:
        self.node.release(models.mlp_bytes(2), model="digits", version="v2")

    def infer(self, model: str, inputs: list[dict[str, Any]], **more: Any) -> httpx.Response:
        return self.http.post(f"/v2/models/{model}/infer", json={"inputs": inputs, **more})
