"""Models made for tests, with nothing but onnx.helper: good ones, odd ones, and ones that must be refused."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

FLOAT, INT64, STRING, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BOOL


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def value(name: str, kind: int, shape: Sequence[int | str | None] | None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    return helper.make_node(kind, list(inputs), list(outputs), **attributes)


def model_proto(
    nodes: Iterable[Any],
    inputs: Iterable[Any],
    outputs: Iterable[Any],
    initializers: Iterable[Any] = (),
    *,
    opset: int = 17,
    ir_version: int = 9,
    functions: Iterable[Any] = (),
    domains: Iterable[tuple[str, int]] = (("ai.onnx.ml", 3),),
) -> Any:
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(initializers))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions))


def model_bytes(*args: Any, **kwargs: Any) -> bytes:
    data: bytes = model_proto(*args, **kwargs).SerializeToString()
    return data


def mlp_bytes(seed: int, dims: tuple[int, ...] = (32, 128, 128, 8)) -> bytes:
    """`features` FP32 [N, dims[0]] → `scores` FP32 [N, dims[-1]]; another seed is another model."""
    rng = np.random.default_rng(seed)
    nodes, initializers, x = [], [], "features"
    for i, (rows, columns) in enumerate(itertools.pairwise(dims)):
        last = i == len(dims) - 2
        weights = (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)
        bias = rng.standard_normal(columns).astype(np.float32)
        initializers += [numpy_helper.from_array(weights, f"w{i}"), numpy_helper.from_array(bias, f"b{i}")]
        y = "scores" if last else f"g{i}"
        nodes.append(node("Gemm", [x, f"w{i}", f"b{i}"], [y]))
        if not last:
            nodes.append(node("Relu", [y], [f"h{i}"]))
            x = f"h{i}"
    return model_bytes(
        nodes,
        [value("features", FLOAT, ["N", dims[0]])],
        [value("scores", FLOAT, ["N", dims[-1]])],
        initializers,
    )


def big_model_bytes(size_bytes: int, seed: int) -> bytes:
    """One dense layer of about `size_bytes`, with the signature of the default MLP."""
    rng = np.random.default_rng(seed)
    hidden = max(1, size_bytes // 4 // (32 + 8))
    first = (rng.standard_normal((32, hidden)) / np.sqrt(32)).astype(np.float32)
    second = (rng.standard_normal((hidden, 8)) / np.sqrt(hidden)).astype(np.float32)
    return model_bytes(
        [
            node("MatMul", ["features", "first"], ["h"]),
            node("Relu", ["h"], ["r"]),
            node("MatMul", ["r", "second"], ["scores"]),
        ],
        [value("features", FLOAT, ["N", 32])],
        [value("scores", FLOAT, ["N", 8])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )


def identity_bytes(kind: int = FLOAT, shape: Sequence[int | str | None] | None = ("N", 4)) -> bytes:
    return model_bytes([node("Identity", ["x"], ["y"])], [value("x", kind, shape)], [value("y", kind, shape)])


def external_bytes(location: str, size: int = 16) -> bytes:
    """A model whose only weight is said to be in another file."""
    tensor = TensorProto(name="secret", data_type=FLOAT, dims=[size // 4], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", location), ("offset", "0"), ("length", str(size))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return model_bytes(
        [node("Add", ["x", "secret"], ["y"])],
        [value("x", FLOAT, ["N", size // 4])],
        [value("y", FLOAT, ["N", size // 4])],
        [tensor],
    )


def zipmap_bytes(labels: Sequence[int] | Sequence[str]) -> bytes:
    """`x` FP32 [N, classes] → the label and a ZipMap of `x`, as scikit-learn's converters write it."""
    strings = isinstance(labels[0], str)
    attributes = {"classlabels_strings" if strings else "classlabels_int64s": list(labels)}
    key = STRING if strings else INT64
    maps = helper.make_map_type_proto(key, helper.make_tensor_type_proto(FLOAT, None))
    return model_bytes(
        [node("ZipMap", ["x"], ["probabilities"], domain="ai.onnx.ml", **attributes)],
        [value("x", FLOAT, ["N", len(labels)])],
        [helper.make_value_info("probabilities", helper.make_sequence_type_proto(maps))],
    )


def mean_over_rows_bytes() -> bytes:
    """Each row less the mean of all rows: one answer depends on the neighbours."""
    return model_bytes(
        [node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1), node("Sub", ["x", "m"], ["y"])],
        [value("x", FLOAT, ["N", 4])],
        [value("y", FLOAT, ["N", 4])],
    )


def endless_loop_bytes() -> bytes:
    """A Loop of 2^62 turns."""
    body = helper.make_graph(
        [node("Identity", ["go_in"], ["go_out"]), node("Add", ["a_in", "one"], ["a_out"])],
        "body",
        [value("i", INT64, []), value("go_in", BOOL, []), value("a_in", FLOAT, ["N", 4])],
        [value("go_out", BOOL, []), value("a_out", FLOAT, ["N", 4])],
    )
    return model_bytes(
        [node("Loop", ["turns", "go", "x"], ["y"], body=body)],
        [value("x", FLOAT, ["N", 4])],
        [value("y", FLOAT, ["N", 4])],
        [
            helper.make_tensor("turns", INT64, [], [2**62]),
            helper.make_tensor("go", BOOL, [], [True]),
            helper.make_tensor("one", FLOAT, [1], [1.0]),
        ],
    )


def expand_bytes(elements: int = 3 * 2**30) -> bytes:
    """A few bytes that ask for 4 × `elements` of memory when run."""
    return model_bytes(
        [node("Expand", ["x", "shape"], ["wide"]), node("ReduceSum", ["wide"], ["y"], keepdims=1)],
        [value("x", FLOAT, ["N", 1])],
        [value("y", FLOAT, [None, None])],
        [helper.make_tensor("shape", INT64, [2], [1, elements])],
    )


def nan_bytes() -> bytes:
    """Answers NaN to everything, and is a valid model."""
    return model_bytes(
        [node("Sub", ["x", "x"], ["zero"]), node("Div", ["zero", "zero"], ["y"])],
        [value("x", FLOAT, ["N", 4])],
        [value("y", FLOAT, ["N", 4])],
    )


def moody_bytes(seed: int, rows: int = 8, columns: int = 32) -> bytes:
    """As `mlp_bytes` takes and gives, but its run fails where a row's first feature is 8 or more: an index into eight."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((columns, rows)).astype(np.float32)
    nodes = [
        node("Gemm", ["features", "w"], ["plain"]),
        node("Gather", ["features", "first"], ["column"], axis=1),
        node("Cast", ["column"], ["index"], to=INT64),
        node("Gather", ["zeros", "index"], ["nothing"]),
        node("Add", ["plain", "nothing"], ["scores"]),
    ]
    initializers = [
        numpy_helper.from_array(weights, "w"),
        numpy_helper.from_array(np.array([0], np.int64), "first"),
        numpy_helper.from_array(np.zeros(8, np.float32), "zeros"),
    ]
    inputs, outputs = [value("features", FLOAT, ["n", columns])], [value("scores", FLOAT, ["n", rows])]
    return model_bytes(nodes, inputs, outputs, initializers)


def split(data: bytes, names: Sequence[str]) -> tuple[bytes, dict[str, bytes]]:
    """The model with its weights in files of those names, in turn; as `onnx.save_model` would write them."""
    proto = ModelProto.FromString(data)
    files = {name: bytearray() for name in names}
    for tensor, name in zip(proto.graph.initializer, itertools.cycle(names), strict=False):
        said = {"location": name, "offset": str(len(files[name])), "length": str(len(tensor.raw_data))}
        files[name] += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in said.items():
            tensor.external_data.add(key=key, value=text)
    return proto.SerializeToString(), {name: bytes(content) for name, content in files.items()}
