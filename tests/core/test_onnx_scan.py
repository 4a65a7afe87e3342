"""What the static scan refuses, and that it passes what it should."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from inference.onnx_scan import INTERNAL_DOMAINS, MAX_IR_VERSION, MAX_OPSETS, ScanLimits, scan
from schemas.errors import ModelRefused
from tests import models
from tests.models import FLOAT, node, value


def refusal(data: bytes, limits: ScanLimits | None = None) -> str:
    with pytest.raises(ModelRefused) as refused:
        scan(data, limits or ScanLimits())
    return refused.value.reason


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.onnx", models.mlp_bytes(0))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (zipped(), "zip"),
        (pickle.dumps({"weights": [1.0]}), "pickle"),
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b'{"error": "not found"}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"\x08\x09\x00\x00ORTM" + b"\x00" * 64, "own format"),
        (b"\x00" * 100, "not a whole ONNX model"),
        (b"\xff" * 100, "not a whole ONNX model"),
    ],
    ids=str.split("empty zip pickle html json lfs ort zeros ones"),
)
def test_other_formats_are_named(data: bytes, words: str) -> None:
    assert words in refusal(data)


def test_every_truncation_is_refused() -> None:
    data = models.mlp_bytes(0, (4, 3, 2))
    for length in range(len(data) - len(models.model_proto([], [], []).opset_import[1].SerializeToString()) - 2):
        refusal(data[:length])


def test_a_flipped_bit_never_escapes_as_another_error() -> None:
    data = models.mlp_bytes(0, (4, 3, 2))
    for bit in range(0, len(data) * 8, 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            scan(bytes(flipped))
        except ModelRefused as refused:
            assert refused.reason


def external(name: str = "hidden") -> Any:
    tensor = TensorProto(name=name, data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    return tensor


def in_initializer(model: Any) -> None:
    model.graph.initializer.append(external())


def in_sparse_initializer(model: Any) -> None:
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=external(), dims=[1]))


def in_attribute(model: Any) -> None:
    model.graph.node.append(node("Constant", [], ["c"], value=external()))


def in_attribute_list(model: Any) -> None:
    attribute = onnx.AttributeProto(name="many", type=onnx.AttributeProto.TENSORS, tensors=[external()])
    model.graph.node[0].attribute.append(attribute)


def in_attribute_of_another_type(model: Any) -> None:
    model.graph.node[0].attribute.append(onnx.AttributeProto(name="odd", type=onnx.AttributeProto.INT, t=external()))


def in_sparse_attribute(model: Any) -> None:
    sparse = onnx.SparseTensorProto(indices=external(), dims=[1])
    model.graph.node.append(node("Constant", [], ["c"], sparse_value=sparse))


def in_subgraph(model: Any) -> None:
    branch = helper.make_graph(
        [node("Identity", ["hidden"], ["o"])], "branch", [], [value("o", FLOAT, [1])], [external()]
    )
    inner = helper.make_graph(
        [node("If", ["b"], ["o"], then_branch=branch, else_branch=branch)], "outer", [], [value("o", FLOAT, [1])]
    )
    model.graph.node.append(node("If", ["b"], ["z"], then_branch=inner, else_branch=inner))


def in_function(model: Any) -> None:
    constant = node("Constant", [], ["o"], value=external())
    opset = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "F", [], ["o"], [constant], opset))


def in_training_info(model: Any) -> None:
    graph = helper.make_graph([], "init", [], [value("o", FLOAT, [1])], [external()])
    model.training_info.append(onnx.TrainingInfoProto(initialization=graph))


def by_location_only(model: Any) -> None:
    """`data_location` left at its default, the entries set all the same."""
    tensor = external()
    tensor.ClearField("data_location")
    model.graph.initializer.append(tensor)


def by_memory_address(model: Any) -> None:
    tensor = external()
    tensor.external_data[0].value = "*/_ORT_MEM_ADDR_/*"
    model.graph.initializer.append(tensor)


@pytest.mark.parametrize(
    "hide",
    [
        in_initializer,
        in_sparse_initializer,
        in_attribute,
        in_attribute_list,
        in_attribute_of_another_type,
        in_sparse_attribute,
        in_subgraph,
        in_function,
        in_training_info,
        by_location_only,
        by_memory_address,
    ],
)
def test_external_data_is_found_wherever_it_hides(hide: Callable[[Any], None]) -> None:
    model = onnx.ModelProto.FromString(models.mlp_bytes(0, (4, 2)))
    hide(model)
    reason = refusal(model.SerializeToString())
    assert "external data" in reason
    assert "'hidden'" in reason
    assert "passwd" not in reason
    assert "MEM_ADDR" not in reason


@pytest.mark.parametrize("location", ["../weights", "/etc/passwd", "weights.bin", "link", "hard"])
def test_the_place_that_external_data_names_does_not_matter(location: str) -> None:
    assert refusal(models.external_bytes(location)) == "external data is not allowed: tensor 'secret' in graph 'graph'"


def test_fields_unknown_to_the_schema_are_refused() -> None:
    # Field 1000 of the model itself, then of a tensor: what cannot be read cannot be vouched for.
    assert "unknown fields in the model" in refusal(models.mlp_bytes(0) + b"\xc2\x3e\x01x")
    model = onnx.ModelProto.FromString(models.mlp_bytes(0))
    model.graph.initializer[1].MergeFromString(b"\xc2\x3e\x01x")
    assert "unknown fields in tensor 'b0'" in refusal(model.SerializeToString())


def test_names_that_are_no_text_are_refused_like_others() -> None:
    data = models.identity_bytes()
    assert "unknown domain" in refusal(
        models.model_bytes([node("Op", ["x"], ["y"], domain="evilevil")], [], [value("y", FLOAT, ["N"])]).replace(
            b"evilevil", b"\xff" * 8
        )
    )
    assert scan(data.replace(b"ai.onnx.ml", b"\xff" * 10)).opsets[1][1] == 3


def test_custom_operators_are_refused_and_local_functions_are_not() -> None:
    x, y = value("x", FLOAT, ["N"]), value("y", FLOAT, ["N"])
    custom = node("Steal", ["x"], ["y"], domain="evil.corp", name="thief")
    reason = refusal(models.model_bytes([custom], [x], [y], domains=[("evil.corp", 1)]))
    assert "'evil.corp.Steal'" in reason
    assert "'thief'" in reason
    body = helper.make_function(
        "pkg", "Twice", ["a"], ["b"], [node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    call = node("Twice", ["x"], ["y"], domain="pkg")
    summary = scan(models.model_bytes([call], [x], [y], domains=[("pkg", 1)], functions=[body]))
    assert summary.node_count == 2
    context = node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="/etc/passwd")
    assert "outside the model" in refusal(models.model_bytes([context], [x], [y], domains=[("com.microsoft", 1)]))


def with_function(domain: str, operator: str) -> bytes:
    """A model that calls `domain.operator` and brings a harmless body under that name."""
    body = helper.make_function(
        domain, operator, ["a"], ["b"], [node("Neg", ["a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    return models.model_bytes(
        [node(operator, ["x"], ["y"], domain=domain)],
        [value("x", FLOAT, ["N", 4])],
        [value("y", FLOAT, ["N", 4])],
        domains=[(domain, 1)],
        functions=[body],
    )


def test_a_function_cannot_lend_its_name_to_an_operator_of_the_runtime() -> None:
    """onnxruntime runs its own operator and leaves the body, that was scanned, alone."""
    assert "outside the model" in refusal(with_function("com.microsoft", "EPContext"))
    assert "'com.microsoft.nchwc.ReorderOutput'" in refusal(with_function("com.microsoft.nchwc", "ReorderOutput"))
    assert "'org.pytorch.aten.ATen'" in refusal(with_function("org.pytorch.aten", "ATen"))
    assert scan(with_function("com.microsoft", "Gelu")).node_count == 2


def test_the_operators_of_the_installed_runtime_are_in_known_domains() -> None:
    from inference.runtime import onnxruntime

    schemas = onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema()
    domains = {schema.domain or "ai.onnx" for schema in schemas}
    assert domains - set(dict(MAX_OPSETS)) <= INTERNAL_DOMAINS
    # Why that matters: a body that negates, under the name of an operator that onnxruntime has.
    session = onnxruntime.InferenceSession(with_function("com.microsoft", "Gelu"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": np.ones((1, 4), np.float32)})
    assert got[0, 0] == pytest.approx(0.8413, abs=1e-3)


def test_versions_above_the_runtime_are_refused() -> None:
    x, y = value("x", FLOAT, ["N"]), value("y", FLOAT, ["N"])
    copy = [node("Identity", ["x"], ["y"])]
    assert "'ai.onnx' 999" in refusal(models.model_bytes(copy, [x], [y], opset=999))
    assert "'ai.onnx.ml' 9" in refusal(models.model_bytes(copy, [x], [y], domains=[("ai.onnx.ml", 9)]))
    assert "IR version" in refusal(models.model_bytes(copy, [x], [y], ir_version=MAX_IR_VERSION + 1))


def test_the_versions_here_are_those_of_the_installed_runtime() -> None:
    from inference.runtime import onnxruntime

    x, y = value("x", FLOAT, ["N", 2]), value("y", FLOAT, ["N", 2])
    plain, scaled = node("Identity", ["x"], ["y"]), node("Normalizer", ["x"], ["y"], domain="ai.onnx.ml", norm="L2")
    newest = dict(MAX_OPSETS)

    def loads(data: bytes) -> bool:
        try:
            onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
            return False
        return True

    assert loads(models.model_bytes([plain], [x], [y], opset=newest["ai.onnx"]))
    assert loads(models.model_bytes([scaled], [x], [y], domains=[("ai.onnx.ml", newest["ai.onnx.ml"])]))
    assert loads(models.model_bytes([plain], [x], [y], ir_version=MAX_IR_VERSION))


def test_sizes_are_limited() -> None:
    data = models.mlp_bytes(0)
    assert "bytes, more than" in refusal(data, ScanLimits(max_file_bytes=len(data) - 1))
    assert "nodes" in refusal(data, ScanLimits(max_nodes=4))
    assert "tensors hold" in refusal(data, ScanLimits(max_initializer_bytes=1000))
    scan(data, ScanLimits(max_file_bytes=len(data), max_nodes=5, max_initializer_bytes=len(data)))
    huge = TensorProto(name="huge", data_type=FLOAT, dims=[2**40])
    liar = models.model_bytes(
        [node("Identity", ["x"], ["y"])], [value("x", FLOAT, [1])], [value("y", FLOAT, [1])], [huge]
    )
    assert "tensors hold" in refusal(liar)


def test_the_summary() -> None:
    summary = scan(models.mlp_bytes(0))
    assert (summary.ir_version, summary.node_count, summary.has_control_flow) == (9, 5, False)
    assert summary.opsets == (("ai.onnx", 17), ("ai.onnx.ml", 3))
    assert summary.initializer_bytes == 4 * (32 * 128 + 128 + 128 * 128 + 128 + 128 * 8 + 8)
    assert scan(models.endless_loop_bytes()).has_control_flow
    assert scan(models.zipmap_bytes(["b", "a"])).zipmaps == (("probabilities", ("b", "a")),)
    assert scan(models.zipmap_bytes([2, 1])).zipmaps == (("probabilities", (2, 1)),)
