"""Binary tensors: the same arrays as in JSON, byte for byte; sizes are judged before anything is copied."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_node.caching.keys import prediction_key
from inference import protocol as oip
from inference.datatypes import DATATYPES, TensorSpec
from inference.oip_answers import binary_answer, outputs_in
from inference.oip_binary import checked_array, raw_of
from inference.oip_json import json_of
from inference.packed import outputs_json, pack_outputs, unpack
from schemas.errors import BadInput, BadTensor

Array = np.ndarray[Any, Any]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=4).map(str.encode)


@st.composite
def tensors(draw: st.DrawFn, json_too: bool = False) -> tuple[str, Array]:
    kind = draw(st.sampled_from([d for d in DATATYPES if not json_too or d.name != "BF16"]))
    shape = draw(SHAPES)
    if kind.name == "BYTES":
        flat = np.empty(int(np.prod(shape)), object)
        flat[:] = draw(st.lists(TEXT if json_too else st.binary(max_size=4), min_size=flat.size, max_size=flat.size))
        return kind.name, flat.reshape(shape)
    dtype = np.dtype(kind.dtype)
    # JSON has one NaN: one of another payload is another key, and has no spelling there.
    elements = hnp.from_dtype(dtype, allow_nan=False) if json_too and dtype.kind == "f" else None
    return kind.name, draw(hnp.arrays(dtype, shape, elements=elements))


def request(
    datatype: str, array: Array, *, binary: bool, parameters: dict[str, Any] | None = None
) -> tuple[bytes, str]:
    """Body and the length of its JSON."""
    raw = raw_of(array) if binary else b""
    head = b'{"inputs":[{"name":"x","datatype":"%b","shape":%b,%b}],"parameters":%b}' % (
        datatype.encode(),
        json.dumps(array.shape).encode(),
        b'"parameters":{"binary_data_size":%d}' % len(raw) if binary else b'"data":' + json_of("x", datatype, array),
        json.dumps(parameters or {}).encode(),
    )
    return head + raw, str(len(head))


def key(body: bytes, json_length: str | None) -> bytes:
    asked, binary = oip.parse_infer(body, json_length)
    return prediction_key("m", "d", oip.tensors_of(asked, binary), asked.output_names, asked.meaning)


@given(tensors(json_too=True), st.sampled_from([{}, {"binary_data_output": True}, {"binary_data_output": False}]))
def test_the_key_does_not_know_how_a_tensor_travelled(tensor: tuple[str, Array], transport: dict[str, bool]) -> None:
    datatype, array = tensor
    if array.ndim == 0:
        array = array.reshape(1)
    plain, _ = request(datatype, array, binary=False)
    assert key(*request(datatype, array, binary=True, parameters=transport)) == key(plain, None)
    other = request(datatype, array, binary=True, parameters=transport | {"temperature": 0.5})
    assert key(*other) != key(plain, None)


def test_how_each_output_travels_is_not_in_the_key_either() -> None:
    def asked(outputs: list[dict[str, Any]]) -> bytes:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
        return key(json.dumps({"inputs": [tensor], "outputs": outputs}).encode(), None)

    assert asked([{"name": "y", "parameters": {"binary_data": True}}]) == asked([{"name": "y"}])
    assert asked([{"name": "y"}]) != asked([{"name": "z"}])


@given(tensors())
def test_what_is_sent_in_binary_is_the_array_that_was_meant(tensor: tuple[str, Array]) -> None:
    datatype, array = tensor
    if datatype == "BYTES":
        assert oip.tensors_of(*oip.parse_infer(*request(datatype, array, binary=True)))["x"].tolist() == array.tolist()
        return
    back = oip.tensors_of(*oip.parse_infer(*request(datatype, array, binary=True)))["x"]
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert back.flags.aligned


@given(tensors())
def test_packed_outputs_lose_nothing_and_neither_does_an_answer_of_the_origin(tensor: tuple[str, Array]) -> None:
    datatype, array = tensor
    specs = [TensorSpec("y", datatype, array.shape)]
    packed = pack_outputs({"y": array}, specs)
    (output,) = unpack(packed)
    assert (output.name, output.datatype, output.shape) == ("y", datatype, array.shape)
    assert output.array.tolist() == array.tolist() if datatype == "BYTES" else output.array.tobytes() == array.tobytes()
    assert outputs_in(*binary_answer("m", "v", None, packed, None)) == packed


def test_binary_and_json_outputs_stand_side_by_side() -> None:
    specs = [TensorSpec("n", "INT64", (-1,)), TensorSpec("bf", "BF16", (-1,)), TensorSpec("s", "BYTES", (-1,))]
    arrays = {"n": np.array([1, 2]), "bf": np.array([0x3F80], np.uint16), "s": np.array([b"a", b"bc"], object)}
    body, length = binary_answer("m", "v", "id", pack_outputs(arrays, specs), frozenset(["bf", "s"]))
    said = json.loads(body[:length])
    assert said["outputs"] == [
        {"name": "n", "datatype": "INT64", "shape": [2], "data": [1, 2]},
        {"name": "bf", "datatype": "BF16", "shape": [1], "parameters": {"binary_data_size": 2}},
        {"name": "s", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 11}},
    ]
    assert body[length:] == b"\x80\x3f" + b"\x01\0\0\0a\x02\0\0\0bc"


def test_what_json_cannot_hold_is_refused_in_json() -> None:
    for datatype, array in (("BF16", np.array([1], np.uint16)), ("BYTES", np.array([b"\xff"], object))):
        with pytest.raises(BadInput, match="binary_data"):
            outputs_json(pack_outputs({"y": array}, [TensorSpec("y", datatype, (1,))]))
    asked, _ = oip.parse_infer(b'{"inputs":[]}', None)
    with pytest.raises(BadInput, match="BF16"):
        oip.binary_outputs(asked, [TensorSpec("y", "BF16", (1,))])


def head(size: object, datatype: str = "FP32", shape: str = "[2]", more: str = "") -> bytes:
    parameters = json.dumps({"binary_data_size": size})
    return f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"parameters":{parameters}{more}}}]}}'.encode()


@pytest.mark.parametrize(
    ("json_part", "tail", "said"),
    [
        (head(7), bytes(7), "has 7 bytes, FP32 of shape [2] needs 8"),
        (head(8), bytes(7), "binary_data_size is 8, 7 bytes are left"),
        (head(8), bytes(9), "1 bytes of binary data belong to no input"),
        (head(0), b"", "has 0 bytes"),
        (head(-8), bytes(8), "not a number of bytes"),
        (head(True), bytes(8), "not a number of bytes"),
        (head("8"), bytes(8), "not a number of bytes"),
        (head(8.0), bytes(8), "not a number of bytes"),
        (head(8, more=',"data":[1,2]'), bytes(8), "both data and binary_data_size"),
        (head(8, shape="[2147483647,2147483647,2147483647]"), bytes(8), "has 8 bytes, FP32"),
        (head(8, shape="[-2]"), bytes(8), "is not a shape"),
        (head(8, datatype="FP8"), bytes(8), "unknown datatype"),
        (head(2, datatype="BOOL"), b"\x01\x02", "element 1: 2 is not a value of BOOL"),
        (head(5, datatype="BYTES"), b"\x01\0\0\0a", "has 5 bytes, BYTES of shape [2]"),
        (head(9, datatype="BYTES"), b"\x01\0\0\0a\xff\xff\xff\xff", "element 1: it ends beyond"),
        (head(9, datatype="BYTES"), b"\x05\0\0\0abcde", "element 1: it ends beyond"),
        (head(9, datatype="BYTES", shape="[1]"), b"\x01\0\0\0abcde", "4 bytes too many"),
        (head(8, datatype="BYTES", shape="[1073741824]"), bytes(8), "has 8 bytes, BYTES"),
    ],
)
def test_binary_data_that_is_not_what_was_said_is_refused(json_part: bytes, tail: bytes, said: str) -> None:
    with pytest.raises(BadTensor if "belong" not in said else BadInput) as caught:
        oip.tensors_of(*oip.parse_infer(json_part + tail, str(len(json_part))))
    assert said in str(caught.value)


@pytest.mark.parametrize("length", ["", "-1", "+5", "1e3", " 5", "9" * 20, "x", "٣"])
def test_a_json_length_that_is_no_number_is_refused(length: str) -> None:
    with pytest.raises(BadInput, match="not a number"):
        oip.parse_infer(b"{}", length)


def test_a_json_length_beyond_the_body_is_refused() -> None:
    with pytest.raises(BadInput, match="the body has 2 bytes"):
        oip.parse_infer(b"{}", "3")


def test_bf16_and_uint16_are_not_taken_for_each_other() -> None:
    specs = [TensorSpec("x", "BF16", (-1,))]
    asked, _ = oip.parse_infer(b'{"inputs":[{"name":"x","datatype":"UINT16","shape":[1],"data":[1]}]}', None)
    with pytest.raises(BadTensor, match="is UINT16, the model takes BF16"):
        oip.check_datatypes(asked, specs)


@pytest.mark.parametrize("before", range(17))
def test_values_lie_alike_whatever_came_before_them(before: int) -> None:
    """Or the model's answer to the same tensor would differ in its last bit with the length of the request's id."""
    raw = np.arange(4, dtype=np.float32).tobytes()
    taken = checked_array("x", "FP32", (4,), memoryview(b" " * before + raw)[before:])
    assert taken.tolist() == [0, 1, 2, 3] and taken.ctypes.data % 16 == 0
