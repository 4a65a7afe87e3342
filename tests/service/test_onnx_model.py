"""A model in memory: digest, signature, what it refuses, deadlines; and golden files, which need its arrays."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

import inference
from inference.datatypes import TensorSpec
from inference.deadlines import Deadline, Watchdog
from inference.golden import Difference, GoldenLimits, GoldenRefused, check_names, compare, read_golden, write_golden
from inference.onnx_model import OnnxModel, RunFailed
from schemas.errors import BadTensor, DeadlineExceeded, ModelRefused
from tests import models
from tests.models import BOOL, FLOAT, INT64, STRING, node, value


def made(data: bytes) -> OnnxModel:
    return OnnxModel.from_bytes(data, models.sha256(data))


def test_load_checks_the_digest_of_what_it_loads(tmp_path: Path) -> None:
    data = models.mlp_bytes(1)
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    model = OnnxModel.load(path, models.sha256(data).upper())
    assert model.inputs == (TensorSpec("features", "FP32", (-1, 32)),)
    assert model.outputs == (TensorSpec("scores", "FP32", (-1, 8)),)
    assert (model.sha256, model.size_bytes) == (models.sha256(data), len(data))
    path.write_bytes(models.mlp_bytes(2))
    with pytest.raises(ModelRefused, match="SHA-256"):
        OnnxModel.load(path, models.sha256(data))
    with pytest.raises(ModelRefused, match="cannot be read") as refused:
        OnnxModel.load(tmp_path / "none.onnx", models.sha256(data))
    assert str(tmp_path) not in refused.value.reason


def test_the_runtime_phones_nobody(tmp_path: Path) -> None:
    """Its telemetry would show as a thread and as a database under the home folder."""
    look = "import inference.runtime, os; print(len(os.listdir('/proc/self/task')))"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(inference.__file__).parent.parent),
    }
    done = subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == b"1"
    assert list(tmp_path.iterdir()) == []


def test_run_gives_what_numpy_gives() -> None:
    data = models.model_bytes(
        [node("MatMul", ["x", "w"], ["y"]), node("ReduceSum", ["y"], ["s"], keepdims=0)],
        [value("x", FLOAT, ["N", 2])],
        [value("y", FLOAT, ["N", 2]), value("s", FLOAT, [])],
        [helper.make_tensor("w", FLOAT, [2, 2], [1, 2, 3, 4])],
    )
    model = made(data)
    x = np.array([[1, 1], [2, 0]], np.float32)
    got = model.run({"x": x})
    assert got["y"].tolist() == [[4, 6], [2, 4]]
    assert got["s"] == 16
    assert list(model.run({"x": x}, ["s"])) == ["s"]
    with pytest.raises(BadTensor, match="'nope'"):
        model.run({"x": x}, ["nope"])
    model.close()
    with pytest.raises(RunFailed, match="closed"):
        model.run({"x": x})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "'features' is missing"),
        ({"features": np.zeros((1, 32), np.float32), "more": np.zeros(1)}, "unknown input 'more'"),
        ({"features": np.zeros((1, 32))}, "float64"),
        ({"features": np.zeros((1, 32), np.int32)}, "int32"),
        ({"features": np.zeros(32, np.float32)}, "1 dimensions"),
        ({"features": np.float32(0).reshape(())}, "0 dimensions"),
        ({"features": np.zeros((1, 31), np.float32)}, "31 in dimension 1"),
    ],
)
def test_wrong_tensors_are_named(inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(BadTensor, match=words):
        made(models.mlp_bytes(0)).validate_inputs(inputs)


def test_zero_rows() -> None:
    model = made(models.mlp_bytes(0))
    empty = {"features": np.zeros((0, 32), np.float32)}
    model.validate_inputs(empty)
    assert model.run(empty)["scores"].shape == (0, 8)


def test_the_models_own_refusal_is_the_callers_fault_and_has_no_path() -> None:
    gather = models.model_bytes(
        [node("Gather", ["table", "i"], ["y"])],
        [value("i", INT64, ["N"])],
        [value("y", FLOAT, ["N"])],
        [helper.make_tensor("table", FLOAT, [2], [1, 2])],
    )
    with pytest.raises(BadTensor, match="idx=7") as bad:
        made(gather).run({"i": np.array([7])})
    assert "/" not in str(bad.value)
    # What breaks inside for another reason is not theirs.
    reshape = models.model_bytes(
        [node("Reshape", ["x", "to"], ["y"])],
        [value("x", FLOAT, ["N"])],
        [value("y", FLOAT, [2, 3])],
        [helper.make_tensor("to", INT64, [2], [2, 3])],
    )
    with pytest.raises(RunFailed, match="cannot be reshaped") as failed:
        made(reshape).run({"x": np.zeros(5, np.float32)})
    assert "onnxruntime" not in str(failed.value)
    assert ".h" not in str(failed.value)


@pytest.mark.parametrize("labels", [["cat", "ape"], [7, -1, 3]])
def test_a_zipmap_is_served_as_a_tensor(labels: list[Any]) -> None:
    model = made(models.zipmap_bytes(labels))
    assert model.outputs == (TensorSpec("probabilities", "FP32", (-1, len(labels)), labels=tuple(labels)),)
    x = np.arange(2 * len(labels), dtype=np.float32).reshape(2, -1)
    got = model.run({"x": x})["probabilities"]
    # The columns keep the order of the labels, though onnxruntime hands out sorted dictionaries.
    assert got.dtype == np.float32
    assert np.array_equal(got, x)
    assert model.run({"x": x[:0]})["probabilities"].shape == (0, len(labels))


def test_strings_keep_their_bytes() -> None:
    model = made(models.identity_bytes(STRING, ["N"]))
    words = np.array([b"a\0b", "é".encode(), b"", "str"], object)
    assert model.run({"x": words})["y"].tolist() == [b"a\0b", "é".encode(), b"", b"str"]
    assert model.run({"x": words[:0]})["y"].shape == (0,)
    for bad, where in ((b"\xff", "element 1: not UTF-8"), (3, "element 1: int"), ("\ud800", "element 1: a lone")):
        with pytest.raises(BadTensor, match=where):
            model.run({"x": np.array([b"ok", bad], object)})


def test_bfloat16_goes_in_and_out_as_its_bits() -> None:
    bf16 = 16
    data = models.model_bytes(
        [node("Cast", ["x"], ["f"], to=FLOAT), node("Cast", ["f"], ["y"], to=bf16)],
        [value("x", bf16, ["N"])],
        [value("y", bf16, ["N"]), value("f", FLOAT, ["N"])],
    )
    model = made(data)
    assert model.inputs[0].datatype == "BF16"
    got = model.run({"x": np.array([0x3F80, 0xC000], np.uint16)})
    assert got["f"].tolist() == [1.0, -2.0]
    assert got["y"].tolist() == [0x3F80, 0xC000]


def test_a_reason_names_no_place_in_the_library() -> None:
    normalizer = node("StringNormalizer", ["x"], ["y"], locale="none_NONE", case_change_action="LOWER")
    data = models.model_bytes([normalizer], [value("x", STRING, ["N"])], [value("y", STRING, ["N"])])
    with pytest.raises(ModelRefused, match=r"cannot load it: [\w ]+: Failed to construct locale") as refused:
        made(data)
    assert "::<" not in refused.value.reason and ".cc" not in refused.value.reason


def test_a_scalar_beside_or_in_bfloat16_stays_a_scalar() -> None:
    bf16 = 16
    data = models.model_bytes(
        [node("Identity", ["x"], ["y"]), node("Identity", ["f"], ["g"])],
        [value("x", bf16, []), value("f", FLOAT, [])],
        [value("y", bf16, []), value("g", FLOAT, [])],
    )
    got = made(data).run({"x": np.array(0x3F80, np.uint16), "f": np.array(2, np.float32)})
    assert (got["y"].shape, got["y"].item(), got["g"].shape, got["g"].item()) == ((), 0x3F80, (), 2.0)


def test_optional_inputs() -> None:
    data = models.model_bytes(
        [node("Mul", ["x", "scale"], ["y"])],
        [value("x", FLOAT, ["N"]), value("scale", FLOAT, [1])],
        [value("y", FLOAT, ["N"])],
        [helper.make_tensor("scale", FLOAT, [1], [3.0])],
    )
    model = made(data)
    assert [(s.name, s.optional) for s in model.inputs] == [("x", False), ("scale", True)]
    x = {"x": np.ones(1, np.float32)}
    model.validate_inputs(x)
    assert model.run(x)["y"] == 3
    assert model.run(x | {"scale": np.full(1, 5, np.float32)})["y"] == 5


def test_any_rank_where_the_model_names_none() -> None:
    model = made(models.identity_bytes(BOOL, None))
    assert model.inputs[0] == TensorSpec("x", "BOOL", (-1,), ranked=False)
    x = {"x": np.ones((2, 1, 2), bool)}
    model.validate_inputs(x)
    assert model.run(x)["y"].shape == (2, 1, 2)
    scalar = made(models.identity_bytes(FLOAT, []))
    assert scalar.inputs[0].shape == ()
    with pytest.raises(BadTensor, match="1 dimensions"):
        scalar.validate_inputs({"x": np.zeros(1, np.float32)})


def test_sequences_cannot_be_served() -> None:
    sequence = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    data = models.model_bytes([node("SequenceConstruct", ["x"], ["y"])], [value("x", FLOAT, ["N"])], [sequence])
    with pytest.raises(ModelRefused, match="'y' is a seq"):
        made(data)


def test_a_deadline_ends_a_run_and_only_that_run() -> None:
    loop, mlp = made(models.endless_loop_bytes()), made(models.mlp_bytes(0))
    x = np.ones((1, 4), np.float32)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        loop.run({"x": x}, None, Deadline.after(0.2))
    assert 0.2 <= time.monotonic() - started < 1.5
    with pytest.raises(DeadlineExceeded, match="before"):
        loop.run({"x": x}, None, Deadline.after(-1))
    # A later, nearer deadline does not wait for the one the watchdog sleeps on.
    ended: list[float] = []

    def run_loop(seconds: float) -> None:
        with pytest.raises(DeadlineExceeded):
            loop.run({"x": x}, None, Deadline.after(seconds))
        ended.append(seconds)

    threads = [threading.Thread(target=run_loop, args=(s,)) for s in (0.8, 0.3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    assert mlp.run(mlp.zeros(3), None, Deadline.after(5))["scores"].shape == (3, 8)
    for thread in threads:
        thread.join(5)
    assert ended == [0.3, 0.8]
    assert [t.name for t in threading.enumerate()].count("run-deadlines") == 1


def test_finished_runs_do_not_wait_in_memory_for_their_deadlines() -> None:
    """10,000 runs a second under a deadline of a minute were 300 MB of runs that had ended."""
    dog = Watchdog()
    options = []
    with dog.watch(Deadline.after(60)) as running:
        for _ in range(5000):
            with dog.watch(Deadline.after(60)) as watch:
                options.append(weakref.ref(watch.options))
        assert sum(ref() is not None for ref in options) <= 200
        # Those that still run keep their place.
        with dog.watch(Deadline.after(0.05)) as near:
            ends = time.monotonic() + 5
            while not near.fired and time.monotonic() < ends:
                time.sleep(0.005)
            assert near.fired
        assert not running.fired


def test_warm_forgives_zeros_but_not_golden_inputs() -> None:
    gather = made(
        models.model_bytes(
            [node("Gather", ["table", "i"], ["y"])],
            [value("i", INT64, ["N"])],
            [value("y", FLOAT, ["N"])],
            [helper.make_tensor("table", FLOAT, [0], [])],
        )
    )
    gather.warm()
    with pytest.raises(BadTensor):
        gather.warm({"i": np.array([7])})


# --- golden files


def golden_file(**members: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    np.savez(buffer, **members)
    buffer.seek(0)
    return buffer


def test_golden_files_come_back_as_written(tmp_path: Path) -> None:
    inputs = {"x/a:0": np.arange(6, dtype=np.float32).reshape(2, 3), "s": np.array([b"ab", b""], object)}
    outputs = {"y": np.array([True, False]), "h": np.array([1.5], np.float16)}
    write_golden(tmp_path / "g.npz", inputs, outputs)
    golden = read_golden(tmp_path / "g.npz")
    assert compare(inputs, golden.inputs) is None
    assert compare(outputs, golden.outputs) is None
    assert golden.inputs["s"].tolist() == [b"ab", b""]
    again = tmp_path / "again.npz"
    write_golden(again, inputs, outputs)
    assert again.read_bytes() == (tmp_path / "g.npz").read_bytes()
    # What numpy itself writes is read too: strings, Fortran order, the other byte order.
    big_endian, fortran = np.arange(3, dtype=">i4"), np.asfortranarray(np.arange(4.0).reshape(2, 2))
    theirs = read_golden(golden_file(**{"input.u": np.array(["é"]), "input.f": fortran, "output.b": big_endian}))
    assert theirs.inputs["u"].tolist() == ["é".encode()]
    assert theirs.inputs["f"].tolist() == [[0, 1], [2, 3]]
    assert theirs.outputs["b"].dtype == np.dtype("=i4")


def bomb() -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("output.y.npy", b"\0" * 2_000_000)
    buffer.seek(0)
    return buffer


def lying_header() -> io.BytesIO:
    array, buffer = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"shape": (2**40,), "fortran_order": False, "descr": "<f4"})
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("output.y.npy", array.getvalue())
    buffer.seek(0)
    return buffer


def tight_bomb() -> io.BytesIO:
    """A few bytes that declare 4 kB and unpack to 40 MiB: bzip2 is unpacked without regard to what was asked."""
    header, buffer = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": (1000,), "fortran_order": False, "descr": "<f4"})
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive,
        archive.open("output.y.npy", "w") as member,
    ):
        member.write(header.getvalue())
        for _ in range(40):
            member.write(bytes(2**20))
    fixed = len(header.getvalue())
    true, false = ((fixed + n).to_bytes(4, "little") for n in (40 * 2**20, 4000))
    return io.BytesIO(buffer.getvalue().replace(true, false))


def crowded() -> io.BytesIO:
    """A table of contents that zipfile makes objects of before anyone can count them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(2000):
            archive.writestr(f"output.y{i}.npy", b"")
    buffer.seek(0)
    return buffer


def second_end() -> io.BytesIO:
    """An ordinary end, before it the pointer to a 64-bit one, which zipfile would follow."""
    data = golden_file(**{"output.y": np.zeros(1)}).getvalue()
    return io.BytesIO(data[:-22] + b"PK\x06\x07".ljust(20, b"\0") + data[-22:])


def damaged() -> io.BytesIO:
    data = bytearray(golden_file(**{"output.y": np.arange(1000)}).getvalue())
    data[200] ^= 0xFF
    return io.BytesIO(bytes(data))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (golden_file(**{"output.y": np.array([{}], object)}), "object"),
        (golden_file(**{"output.y": np.zeros(1, [("a", "f4")])}), "not read"),
        (golden_file(**{"output.y": np.zeros(1, np.complex64)}), "not read"),
        (golden_file(weights=np.zeros(1)), "unknown member"),
        (golden_file(**{"input.x": np.zeros(1)}), "no output"),
        (golden_file(**{"output.y": np.zeros(300_000, np.float32)}), "bytes when unpacked"),
        (golden_file(**{f"output.y{i}": np.zeros(1) for i in range(9)}), "more than 8 arrays"),
        (bomb(), "bytes when unpacked"),
        (tight_bomb(), "stored or deflated"),
        (crowded(), "table of contents has"),
        (second_end(), "for a larger one"),
        (lying_header(), "declares"),
        (damaged(), "not a usable"),
        (io.BytesIO(b""), "not a usable"),
        (io.BytesIO(b"\x80\x04K\x01."), "not a usable"),
    ],
    ids=str.split(
        "object struct complex unknown no-output large many bomb tight crowded second-end header damaged empty pickle"
    ),
)
def test_hostile_golden_files(source: io.BytesIO, words: str) -> None:
    with pytest.raises(GoldenRefused, match=words):
        read_golden(source, GoldenLimits(max_members=8, max_bytes=1_000_000))


def test_the_first_difference_is_named() -> None:
    nan = np.array([[1.0, np.nan], [3.0, 4.0]], np.float32)
    assert compare({"y": nan}, {"y": nan.copy()}) is None
    near = nan * np.float32(1.0005)
    assert compare({"y": nan}, {"y": near}) is None
    assert compare({"y": nan}, {"y": near}, rtol=1e-5) == Difference("y", (0, 0), "1.0", repr(float(near[0, 0])))
    moved = nan.copy()
    moved[1, 0] = 5
    assert str(compare({"y": nan}, {"y": moved})) == "output y[1, 0]: wanted 3.0, got 5.0"
    assert str(compare({"y": nan}, {"y": nan[:1]})) == "output y: wanted shape (2, 2), got shape (1, 2)"
    assert (
        str(compare({"y": nan}, {"y": np.zeros((2, 2), np.int64)})) == "output y: wanted type float32, got type int64"
    )
    assert str(compare({"y": nan}, {})) == "output y: wanted missing present, got missing absent"
    words = np.array([b"a", b"b"], object)
    assert compare({"w": words}, {"w": words.copy()}) is None
    assert str(compare({"w": words}, {"w": words[::-1]})) == "output w[0]: wanted b'a', got b'b'"
    assert compare({"i": np.array([2**53])}, {"i": np.array([2**53 + 1])}) is not None


def test_golden_names_are_those_of_the_model(tmp_path: Path) -> None:
    model = made(models.mlp_bytes(0))
    x, y = np.zeros((1, 32), np.float32), np.zeros((1, 8), np.float32)

    def check(inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        write_golden(tmp_path / "g.npz", inputs, outputs)
        check_names(read_golden(tmp_path / "g.npz"), model.inputs, model.outputs)

    check({"features": x}, {"scores": y})
    with pytest.raises(GoldenRefused, match="input 'other'"):
        check({"other": x}, {"scores": y})
    with pytest.raises(GoldenRefused, match="output 'other'"):
        check({"features": x}, {"other": y})
    with pytest.raises(GoldenRefused, match="has shape"):
        check({"features": x}, {"scores": y[:, :3]})
