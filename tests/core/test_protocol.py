"""Tensors in JSON: nothing is changed in silence, and what is refused is named."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference import protocol as oip
from inference.datatypes import TensorSpec
from inference.oip_answers import binary_answer, infer_answer, infer_body, outputs_in
from inference.packed import outputs_json, pack_outputs, prediction_of
from schemas.errors import BadInput, BadTensor

INFER = msgspec.json.Decoder(oip.InferRequest)
HALF_MAX = 65504.0


def request(
    data: str, datatype: str = "FP32", shape: str = "[1]", name: str = '"x"'
) -> dict[str, np.ndarray[Any, Any]]:
    body = f'{{"inputs":[{{"name":{name},"datatype":"{datatype}","shape":{shape},"data":{data}}}]}}'
    return oip.tensors_of(oip.parse(body.encode(), INFER))


def refused(data: str, datatype: str = "FP32", shape: str = "[1]") -> str:
    with pytest.raises(BadInput) as caught:
        request(data, datatype, shape)
    return str(caught.value)


@pytest.mark.parametrize("datatype", ["UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"])
def test_integers_are_taken_to_their_very_limits_and_never_wrapped(datatype: str) -> None:
    info = np.iinfo(datatype.lower())
    low, high = int(info.min), int(info.max)
    assert request(f"[{low},{high}]", datatype, "[2]")["x"].tolist() == [low, high]
    for beyond in (low - 1, high + 1):
        assert refused(f"[{low},{beyond}]", datatype, "[2]") == (
            f"input 'x', element 1: {beyond} is not a value of {datatype}"
        )


@pytest.mark.parametrize("value", ["1.5", "1.0", "1e3", "true", '"1"', "null", "[1]", "{}"])
def test_an_integer_is_nothing_else(value: str) -> None:
    assert "'x'" in refused(f"[{value}]", "INT32")


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("FP32", "1e39"),
        ("FP32", "-3.5e38"),
        ("FP16", "65520"),
        ("FP64", "1e400"),
        ("FP64", "-1E999"),
        ("FP32", "9" * 400),
    ],
)
def test_a_finite_float_never_becomes_infinite(datatype: str, value: str) -> None:
    assert "'x'" in refused(f"[{value}]", datatype)


def test_a_refused_value_is_named_by_tensor_index_and_value() -> None:
    assert refused("[0.5, 1e39]", "FP32", "[2]") == "input 'x', element 1: 1e+39 is not a value of FP32"
    assert refused('[1, "2"]', "FP32", "[2]") == "input 'x', element 1: \"2\" is not a value of FP32"
    assert refused("[[1, 2], [3, true]]", "FP32", "[2,2]") == "input 'x', element 3: true is not a value of FP32"


@given(st.floats(allow_nan=False, allow_infinity=False, width=64))
def test_fp16_and_fp32_are_rounded_as_ieee_says(value: float) -> None:
    for datatype, dtype in (("FP16", np.float16), ("FP32", np.float32)):
        with np.errstate(over="ignore"):
            wanted = dtype(value)
        if np.isinf(wanted):
            assert "'x'" in refused(f"[{value!r}]", datatype)
        else:
            assert request(f"[{value!r}]", datatype)["x"][0] == wanted


def test_null_is_nan_and_1e999_is_infinity_in_and_out() -> None:
    array = request("[null, 1e999, -1e999, -0.0]", "FP32", "[4]")["x"]
    assert math.isnan(array[0]) and array[1:3].tolist() == [math.inf, -math.inf] and math.copysign(1, array[3]) == -1
    out = outputs_json(pack_outputs({"y": array}, [TensorSpec("y", "FP32", (-1,))]))
    assert b'"data":[null,1e999,-1e999,-0.0]' in out
    assert json.loads(out, parse_constant=pytest.fail)[0]["data"][1] == math.inf


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_bare_constants_are_not_json(constant: str) -> None:
    assert "JSON" in refused(f"[{constant}]", "FP64")


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        ("[[1,2],[3]]", "[2,2]"),
        ("[[1,2],3]", "[2,2]"),
        ("[1,2,3]", "[2,2]"),
        ("[[[1],[2]]]", "[1,2]"),
        ("[]", "[1]"),
        ("1", "[1]"),
        ('{"0":1}', "[1]"),
        ("[1]", "[-1]"),
        ("[1]", f"[{2**31}]"),
        ("[1]", "[" + ",".join("1" * 17) + "]"),
    ],
)
def test_data_and_shape_agree_or_are_refused(data: str, shape: str) -> None:
    assert "'x'" in refused(data, "FP32", shape)


def test_nested_and_flat_data_are_the_same_tensor() -> None:
    flat, nested = request("[1,2,3,4]", "INT64", "[2,2]")["x"], request("[[1,2],[3,4]]", "INT64", "[2,2]")["x"]
    assert flat.tolist() == nested.tolist() == [[1, 2], [3, 4]]
    assert request("[]", "FP32", "[0,64]")["x"].shape == (0, 64)
    assert request("[7]", "FP32", "[]")["x"].shape == ()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xef\xbb\xbf{}",
        b"{} x",
        b"[]",
        b"null",
        b'{"inputs":{}}',
        b'{"inputs":[{"name":"x"}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[' + b"9" * 5_000 + b"]}]}",
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\\ud800"]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"BF16","data":[1]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP8","data":[1]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32"}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1],"parameters":{"binary_data_size":4}}]}',
        b'{"id":7,"inputs":[]}',
        b'{"inputs":[{"name":"\xff","shape":[1],"datatype":"FP32","data":[1]}]}',
    ],
)
def test_what_is_not_a_request_is_bad_input(body: bytes) -> None:
    with pytest.raises(BadInput):
        oip.tensors_of(oip.parse(body, INFER))


def test_a_tensor_given_twice_is_refused() -> None:
    one = b'{"name":"x","shape":[1],"datatype":"FP32","data":[1]}'
    with pytest.raises(BadTensor, match="twice"):
        oip.tensors_of(oip.parse(b'{"inputs":[' + one + b"," + one + b"]}", INFER))


def test_strings_are_kept_byte_for_byte() -> None:
    array = request('["a\\u0000b", "é", ""]', "BYTES", "[3]")["x"]
    assert array.tolist() == [b"a\x00b", "é".encode(), b""]
    out = outputs_json(pack_outputs({"y": array}, [TensorSpec("y", "BYTES", (-1,))]))
    assert json.loads(out)[0]["data"] == ["a\x00b", "é", ""]


@pytest.mark.parametrize(
    ("shape", "features", "wanted"),
    [
        ((-1, 3), "[1,2,3]", (1, 3)),
        ((-1, 2, 2), "[1,2,3,4]", (1, 2, 2)),
        ((-1, 2, 2), "[[1,2],[3,4]]", (1, 2, 2)),
        ((-1, -1), "[1,2]", (1, 2)),
        ((-1, -1, 2), "[[1,2],[3,4],[5,6]]", (1, 3, 2)),
        ((-1,), "[1]", (1,)),
        ((4,), "[1,2,3,4]", (4,)),
        ((1, 2), "[1,2]", (1, 2)),
    ],
)
def test_features_become_one_row(shape: tuple[int, ...], features: str, wanted: tuple[int, ...]) -> None:
    row = oip.row_of(TensorSpec("x", "FP32", shape), msgspec.Raw(features.encode()))
    assert row.shape == wanted and row.ravel().tolist() == [float(i) for i in range(1, row.size + 1)]


@pytest.mark.parametrize("features", ["[1,2]", "[1,2,3,4]", "[[1,2,3]]", "7", '"abc"', "[]", '["1","2","3"]', "null"])
def test_features_that_are_no_row_are_refused(features: str) -> None:
    with pytest.raises(BadTensor, match="'x'"):
        oip.row_of(TensorSpec("x", "FP32", (-1, 3)), msgspec.Raw(features.encode()))


def test_a_prediction_is_the_first_output_without_its_row() -> None:
    label, probabilities = np.array([7], np.int64), np.array([[0.25, math.inf]], np.float32)
    specs = [TensorSpec("label", "INT64", (-1,)), TensorSpec("probabilities", "FP32", (-1, 2))]
    body = pack_outputs({"label": label, "probabilities": probabilities}, specs)
    assert prediction_of(body) == (b"7", b'{"label":7,"probabilities":[0.25,1e999]}')
    only = pack_outputs({"probabilities": probabilities}, specs)
    assert prediction_of(only) == (b"[0.25,1e999]", None)
    cube = pack_outputs({"c": np.arange(8).reshape(1, 2, 2, 2)}, [TensorSpec("c", "INT64", (-1, 2, 2, 2))])
    assert prediction_of(cube) == (b"[[[0,1],[2,3]],[[4,5],[6,7]]]", None)


def test_an_answer_echoes_the_id_and_splices_the_outputs() -> None:
    answer = json.loads(infer_answer("digits", "v1", "a-7", b"[]"))
    assert answer == {"model_name": "digits", "model_version": "v1", "id": "a-7", "outputs": []}
    assert "id" not in json.loads(infer_answer("digits", "v1", None, b"[]"))


@given(st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_what_goes_to_the_origin_comes_back_the_same(values: list[float]) -> None:
    spec = TensorSpec("x", "FP32", (-1,))
    array = np.array(values, np.float32)
    body, json_length = infer_body({"x": array}, [spec], None)
    asked, binary = oip.parse_infer(body, str(json_length))
    back = oip.tensors_of(asked, binary)["x"]
    assert back.tobytes() == array.tobytes() and asked.meaning == {}
    packed = pack_outputs({"x": array}, [spec])
    assert outputs_in(*binary_answer("m", "v", None, packed, oip.binary_outputs(asked, [spec]))) == packed
