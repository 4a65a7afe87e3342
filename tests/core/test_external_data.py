"""Weights in files of their own: what a model may say of them, and that only the bytes that were listed are loaded."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from inference.external_data import Beside, DataFile, DataNotListed
from inference.onnx_model import OnnxModel
from inference.onnx_scan import scan
from inference.trial_report import SLOWEST_BYTES_S, TrialLimits
from schemas.errors import ModelRefused
from tests import models

WHOLE = models.mlp_bytes(3)
ONNX, FILES = models.split(WHOLE, ("first.data", "second.data"))
SIZES = {name: len(content) for name, content in FILES.items()}
ROW = {"features": np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 32)}


def laid(folder: Path, files: dict[str, bytes] = FILES, **other: Any) -> tuple[DataFile, ...]:
    """The files in `folder`, under other names than the model's, and what is listed of them."""
    listed = []
    for number, (name, content) in enumerate(sorted(files.items())):
        path = folder / str(number)
        path.write_bytes(content)
        listed.append(DataFile(name, str(path), other.get("sha256", models.sha256(content)), len(content)))
    return tuple(listed)


def load(folder: Path, listed: tuple[DataFile, ...], data: bytes = ONNX) -> OnnxModel:
    path = folder / "model.onnx"
    path.write_bytes(data)
    return OnnxModel.load(path, models.sha256(data), files=listed)


def refusal(model: Any, sizes: dict[str, int] = SIZES) -> str:
    with pytest.raises(ModelRefused) as refused:
        scan(model.SerializeToString(), files=sizes)
    return refused.value.reason


def weight(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.name == "w1")


def say(tensor: Any, key: str, value: str) -> None:
    found = [entry for entry in tensor.external_data if entry.key == key] or [tensor.external_data.add(key=key)]
    found[0].value = value


def test_it_answers_as_the_single_file_does(tmp_path: Path) -> None:
    many, one = load(tmp_path, laid(tmp_path)), OnnxModel.from_bytes(WHOLE, models.sha256(WHOLE))
    assert many.run(ROW)["scores"].tobytes() == one.run(ROW)["scores"].tobytes()
    assert many.size_bytes == len(ONNX) + sum(SIZES.values())
    assert many.summary.initializer_bytes == one.summary.initializer_bytes


def test_what_happens_to_the_files_after_the_load_is_nothing_to_it(tmp_path: Path) -> None:
    listed = laid(tmp_path)
    model = load(tmp_path, listed)
    before = model.run(ROW)["scores"]
    for file in listed:
        Path(file.path).write_bytes(bytes(file.size_bytes))
        Path(file.path).unlink()
    assert (model.run(ROW)["scores"] == before).all()


def test_a_session_is_given_to_the_same_files_only(tmp_path: Path) -> None:
    model = load(tmp_path, laid(tmp_path))
    others = {name: bytes(len(content)) for name, content in FILES.items()}
    model.close()
    with pytest.raises(ValueError, match="another model"):
        model.reopen(load(tmp_path, laid(tmp_path, others)))
    model.reopen(load(tmp_path, laid(tmp_path)))
    assert model.is_open


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]), "SHA-256"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, not"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes, not"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: (path.rename(f"{path}.real"), path.symlink_to(f"{path}.real")), "cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
    ids=["a bit", "short", "long", "gone", "a link", "a folder"],
)
def test_a_file_that_is_not_what_was_listed(
    tmp_path: Path, which: int, spoil: Callable[[Path], Any], words: str
) -> None:
    listed = laid(tmp_path)
    spoil(Path(listed[which].path))
    with pytest.raises(ModelRefused, match=words) as refused:
        load(tmp_path, listed)
    assert listed[which].name in refused.value.reason
    assert str(tmp_path) not in refused.value.reason


REFERENCES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a file that is not listed": (lambda t: say(t, "location", "third.data"), "'third.data', which is not listed"),
    "a folder": (lambda t: say(t, "location", "in/first.data"), "which is not listed"),
    "above": (lambda t: say(t, "location", "../first.data"), "which is not listed"),
    "an absolute path": (lambda t: say(t, "location", "/etc/passwd"), "which is not listed"),
    "a memory address": (lambda t: say(t, "location", "*/_ORT_MEM_ADDR_/*"), "which is not listed"),
    "no file": (lambda t: say(t, "location", ""), "which is not listed"),
    "behind the end": (lambda t: say(t, "offset", str(10**9)), "ends behind"),
    "one byte behind the end": (lambda t: say(t, "offset", str(SIZES["first.data"] - 65_535)), "ends behind"),
    "before the beginning": (lambda t: say(t, "offset", "-4"), "is not the 65536 bytes"),
    "no number": (lambda t: say(t, "offset", "0x10"), "is not the 65536 bytes"),
    "a number beyond all": (lambda t: say(t, "offset", "9" * 40), "is not the 65536 bytes"),
    "less than its shape": (lambda t: say(t, "length", "65532"), "is not the 65536 bytes"),
    "more than its shape": (lambda t: say(t, "length", "65540"), "is not the 65536 bytes"),
    "packed weights": (lambda t: say(t, "prepacked_0", "x|0|4|abc"), "not one that is served here"),
    "two files": (lambda t: t.external_data.add(key="location", value="first.data"), "not one that is served here"),
    "no location": (lambda t: t.ClearField("data_location"), "not one that is served here"),
    "its own bytes too": (lambda t: setattr(t, "raw_data", b"1234"), "holds data and refers"),
    "its own numbers too": (lambda t: t.float_data.append(1.0), "holds data and refers"),
    "a larger shape": (lambda t: t.dims.__setitem__(0, 2**40), "is not the"),
    "text": (lambda t: setattr(t, "data_type", TensorProto.STRING), "is not the"),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_a_reference_that_is_refused(case: str) -> None:
    change, words = REFERENCES[case]
    model = onnx.ModelProto.FromString(ONNX)
    change(weight(model))
    reason = refusal(model)
    assert words in reason
    assert "'w1'" in reason
    assert "passwd" not in reason and "MEM_ADDR" not in reason and "in/" not in reason


def test_only_weights_of_the_main_graph_may_lie_outside() -> None:
    outside = weight(onnx.ModelProto.FromString(ONNX))
    inside = numpy_helper.from_array(np.zeros(1, np.float32), "z")
    outer = onnx.ModelProto.FromString(ONNX)
    branch = helper.make_graph(
        [models.node("Identity", ["w1"], ["o"])], "b", [], [models.value("o", 1, [1])], [outside]
    )
    outer.graph.node.append(models.node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))
    constant = onnx.ModelProto.FromString(ONNX)
    constant.graph.node.append(models.node("Constant", [], ["k"], value=outside))
    sparse = onnx.ModelProto.FromString(ONNX)
    sparse.graph.sparse_initializer.append(onnx.SparseTensorProto(values=outside, indices=inside, dims=[1]))
    training = onnx.ModelProto.FromString(ONNX)
    training.training_info.append(onnx.TrainingInfoProto(initialization=helper.make_graph([], "i", [], [], [outside])))
    for model in (outer, constant, sparse, training):
        assert "external data is not allowed" in refusal(model)


def test_a_small_file_is_not_read_as_many_large_tensors() -> None:
    model = onnx.ModelProto.FromString(ONNX)
    for number in range(3):
        copy = model.graph.initializer.add()
        copy.CopyFrom(weight(model))
        copy.name = f"again{number}"
    assert "files that have" in refusal(model)


def test_every_listed_file_is_named() -> None:
    assert refusal(onnx.ModelProto.FromString(ONNX), SIZES | {"third.data": 9}) == (
        "the file third.data is listed, and no tensor names it"
    )


def test_without_a_list_the_names_are_said_where_they_are_plain() -> None:
    with pytest.raises(DataNotListed) as refused:
        scan(ONNX)
    assert refused.value.names == ("first.data", "second.data")
    for location in ("../w", "/etc/passwd", "a/b", ".hidden", "", "a\nb", "*/_ORT_MEM_ADDR_/*"):
        with pytest.raises(DataNotListed) as refused:
            scan(models.external_bytes(location))
        assert refused.value.names == ()


def test_types_that_share_a_byte_need_half_of_one() -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.INT4, dims=[3], data_location=TensorProto.EXTERNAL)
    say(tensor, "location", "a.data")
    say(tensor, "length", "2")
    nodes, y = [models.node("DequantizeLinear", ["w", "s"], ["y"])], models.value("y", 1, [3])
    scale = numpy_helper.from_array(np.array(2.0, np.float32), "s")
    data = models.model_bytes(nodes, [], [y], [tensor, scale], opset=21, ir_version=10)
    content = bytearray(b"\x21\x03")
    assert scan(data, files={"a.data": 2}).initializer_bytes == 2 + 4
    beside = [Beside("a.data", models.sha256(content), content)]
    assert OnnxModel.from_bytes(data, models.sha256(data), None, beside).run({})["y"].tolist() == [2.0, 4.0, 6.0]


TYPES: tuple[tuple[Any, int], ...] = (
    (np.float32, TensorProto.FLOAT),
    (np.float16, TensorProto.FLOAT16),
    (np.float64, TensorProto.DOUBLE),
    (np.int64, TensorProto.INT64),
    (np.uint8, TensorProto.UINT8),
    (np.bool_, TensorProto.BOOL),
    (ml_dtypes.bfloat16, TensorProto.BFLOAT16),
)


def table(kind: Any, onnx_type: int, offset: int) -> tuple[bytes, bytearray, np.ndarray[Any, Any]]:
    """Rows of a weight in `a.data`, by number: the model, the file, and the weight."""
    weight = np.arange(12).reshape(3, 4).astype(kind)
    tensor = TensorProto(name="w", data_type=onnx_type, dims=[3, 4], data_location=TensorProto.EXTERNAL)
    for key, text in (("location", "a.data"), ("offset", str(offset)), ("length", str(weight.nbytes))):
        say(tensor, key, text)
    nodes = [models.node("Gather", ["w", "i"], ["g"]), models.node("Cast", ["g"], ["y"], to=TensorProto.FLOAT)]
    i, y = models.value("i", TensorProto.INT64, ["N"]), models.value("y", TensorProto.FLOAT, ["N", 4])
    return models.model_bytes(nodes, [i], [y], [tensor]), bytearray(offset) + bytearray(weight.tobytes()), weight


@pytest.mark.parametrize("offset", [0, 1, 64])
@pytest.mark.parametrize(("kind", "onnx_type"), TYPES)
def test_a_weight_of_two_gigabytes_is_handed_over_by_itself(
    kind: Any, onnx_type: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.external_data.LARGE_BYTES", 1)
    data, content, weight = table(kind, onnx_type, offset)
    assert [large.tensor for large in scan(data, files={"a.data": len(content)}).large] == ["w"]
    beside = [Beside("a.data", models.sha256(content), content)]
    model = OnnxModel.from_bytes(data, models.sha256(data), None, beside)
    del beside, content
    gc.collect()
    _ = [bytearray(b"\xff" * 4096) for _ in range(1000)]
    answer = model.run({"i": np.array([2, 0], np.int64)})["y"]
    assert (answer == weight[[2, 0]].astype(np.float32)).all()


def test_a_large_weight_has_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.external_data.LARGE_BYTES", 1)
    data, content, weight = table(np.float32, TensorProto.FLOAT, 0)
    model = onnx.ModelProto.FromString(data)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    assert refusal(model, {"a.data": len(content)}) == "two weights of the model have one name"


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_spoilt_reference_escapes_as_another_error(data: st.DataObject) -> None:
    model = onnx.ModelProto.FromString(ONNX)
    for _ in range(data.draw(st.integers(1, 3))):
        tensor = data.draw(st.sampled_from(list(model.graph.initializer)))
        key = data.draw(st.sampled_from(["location", "offset", "length", "checksum", "basepath"]))
        say(tensor, key, data.draw(st.text(max_size=30) | st.integers(-(2**65), 2**65).map(str)))
    try:
        scan(model.SerializeToString(), files=SIZES)
    except ModelRefused as refused:
        assert refused.reason


def test_a_trial_has_more_time_and_descriptors_for_them() -> None:
    files = tuple(DataFile(str(n), "p", "0" * 64, SLOWEST_BYTES_S) for n in range(3))
    plain, more = TrialLimits(), TrialLimits().beside(files)
    assert (more.cpu_s, more.wall_s, more.open_files) == (plain.cpu_s + 3, plain.wall_s + 6, plain.open_files + 3)
    assert plain.beside(()) == plain
