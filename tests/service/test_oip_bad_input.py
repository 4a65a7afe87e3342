"""Wrong JSON and wrong tensors over HTTP, on one worker: each has its status and its message, and the next good request is
served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from inference.oip_binary import raw_of
from tests.oip_node import BATCH_ROWS, BODY_BYTES, OipNode

PLAIN = {"content-type": "application/json"}
ROW = [float(i % 7) for i in range(32)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OipNode]:
    with OipNode(tmp_path_factory.mktemp("oip")) as running:
        yield running
        assert "Traceback" not in running.log() and running.lives(), running.log()


@pytest.fixture(autouse=True)
def unhurt(node: OipNode) -> Iterator[None]:
    yield
    assert node.infer("digits", [tensor(name="features", shape=[1, 32], data=ROW)]).status_code == 200
    assert node.http.post("/predict", json={"model": "digits", "features": ROW}).status_code == 200


def tensor(name: str = "x", datatype: str = "FP32", shape: Any = (1, 2), data: Any = (1, 2)) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data}


def infer(data: str, datatype: str = "FP32", shape: str = "[1,2]") -> str:
    return f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{data}}}]}}'


NO_JSON = [
    ("", "is not JSON"),
    ("{", "is not JSON"),
    ("\ufeff" + infer("[1,2]"), "is not JSON"),
    (infer("[1,2]") + " x", "is not JSON"),
    (infer("[1,2]") + infer("[1,2]"), "is not JSON"),
    ("null", "Expected `object`"),
    ("[]", "Expected `object`"),
    ("7", "Expected `object`"),
    ("{}", "missing required field `inputs`"),
    ('{"inputs":null}', "$.inputs"),
    ('{"inputs":{}}', "$.inputs"),
    ('{"inputs":[7]}', "$.inputs[0]"),
    ('{"inputs":[{"name":"x","shape":[1,2],"data":[1,2]}]}', "`datatype`"),
    ('{"inputs":[{"name":7,"datatype":"FP32","shape":[1,2],"data":[1,2]}]}', "$.inputs[0].name"),
    ('{"inputs":[{"name":"x","datatype":"FP32","shape":"1,2","data":[1,2]}]}', "$.inputs[0].shape"),
    ('{"inputs":[{"name":"x","datatype":"FP32","shape":[1.5,2],"data":[1,2]}]}', "$.inputs[0].shape[0]"),
    ('{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2]}]}', "input 'x' has no data"),
    ('{"inputs":[],"id":7}', "$.id"),
    ('{"inputs":[],"parameters":{"a":[]}}', "$.parameters"),
    ('{"inputs":[]}', "input 'x' is missing"),
    (infer("[" * 100_000 + "]" * 100_000), "nested too deeply"),
    ("[" * 100_000 + "]" * 100_000, ""),
    ('{"id":' + "[" * 100_000 + "]" * 100_000 + ',"inputs":[]}', ""),
    (infer("[NaN,1]"), "JSON"),
    (infer("[Infinity,1]"), "JSON"),
    (infer("[-Infinity,1]"), "JSON"),
    (infer("[1,1e400]"), "too large for a double"),
    (infer("[1,01]"), "JSON"),
    (infer("[1,+1]"), "JSON"),
    (infer("[1,2,]"), "JSON"),
    (infer(f"[1,{'9' * 5_000}]"), "5000 digits"),
    (infer(f"[1,{'9' * 400}]", "INT64"), "is not a value of INT64"),
    (infer('["\\ud800","a"]', "BYTES"), "the body is not JSON"),
    (infer("[1,2]").replace('"x"', '"\\ud800"'), ""),
    (infer("[1,2]").replace('"x"', '"x\\u0000"'), "unknown input"),
]


@pytest.mark.parametrize(("body", "said"), NO_JSON, ids=range(len(NO_JSON)))
def test_json_that_is_no_request_is_400_and_says_where(node: OipNode, body: str, said: str) -> None:
    answer = node.http.post("/v2/models/identity_fp32/infer", content=body.encode(), headers=PLAIN)
    assert answer.status_code == 400 and said in answer.json()["error"], answer.text[:300]
    assert list(answer.json()) == ["error"] and len(answer.content) < 1_000


def test_bytes_that_are_no_unicode_are_400(node: OipNode) -> None:
    for body in (b"\xff\xfe", b'{"inputs":[{"name":"\xff","datatype":"FP32","shape":[1,2],"data":[1,2]}]}', bytes(64)):
        answer = node.http.post("/v2/models/identity_fp32/infer", content=body, headers=PLAIN)
        assert answer.status_code == 400 and answer.json()["error"]


def test_of_a_key_that_is_there_twice_the_last_counts(node: OipNode) -> None:
    body = infer("[1,2]").replace('"data":[1,2]', '"data":[1,2],"data":[3,4]')
    answer = node.http.post("/v2/models/identity_fp32/infer", content=body, headers=PLAIN)
    assert answer.json()["outputs"][0]["data"] == [3, 4]


def test_null_and_1e999_are_nan_and_infinity(node: OipNode) -> None:
    body = infer("[null,1e999,-1e999,0]", "FP32", "[2,2]")
    answer = node.http.post("/v2/models/identity_fp32/infer", content=body, headers=PLAIN)
    assert answer.status_code == 200 and '"data":[null,1e999,-1e999,0.0]' in answer.text
    answer = node.infer("not_a_number", [tensor(shape=[1, 4], data=[1, 2, 3, 4])])
    assert answer.json()["outputs"][0]["data"] == [None] * 4


WRONG_TENSORS = [
    ("identity_fp32", tensor(shape=[2], data=[1, 2]), "has 1 dimensions, the model takes 2"),
    ("identity_fp32", tensor(shape=[1, 2, 1]), "has 3 dimensions, the model takes 2"),
    ("identity_fp32", tensor(shape=[], data=[1]), "has 0 dimensions, the model takes 2"),
    ("scalar", tensor(shape=[1], data=[1]), "has 1 dimensions, the model takes 0"),
    ("identity_fp32", tensor(shape=[2, 3], data=[1] * 6), "has 3 in dimension 1, the model takes 2"),
    ("fixed", tensor(shape=[4], data=[1] * 4), "has 4 in dimension 0, the model takes 3"),
    ("identity_fp32", tensor(datatype="FP64"), "is float64, the model takes FP32"),
    ("identity_fp32", tensor(datatype="INT64"), "is int64, the model takes FP32"),
    ("identity_fp32", tensor(datatype="fp32"), "unknown datatype 'fp32'"),
    ("identity_fp32", tensor(datatype="STRING"), "unknown datatype"),
    ("identity_fp32", tensor(name="z"), "unknown input 'z'; the model has ['x']"),
    ("identity_fp32", tensor(name="z" * 5_000), "unknown input"),
    ("identity_fp32", tensor(data=[1, 2, 3]), "has 3 values, its shape [1, 2] needs 2"),
    ("identity_fp32", tensor(data=[]), "has 0 values"),
    ("identity_fp32", tensor(data=[[1], [2]]), "is ragged: 2 values in part 0 of dimension 0"),
    ("identity_fp32", tensor(shape=[2, 2], data=[[1, 2], [3]]), "is ragged: 1 values in part 1 of dimension 1"),
    ("identity_fp32", tensor(shape=[2, 2], data=[[1, 2], 3]), "is ragged: 3 where dimension 1 should be"),
    ("identity_fp32", tensor(data=[[[1], [2]]]), "nested deeper"),
    ("identity_fp32", tensor(data=["1", "2"]), "element 0: \"1\" is not a value of FP32"),
    ("identity_fp32", tensor(data=[1, True]), "element 1: true is not a value of FP32"),
    ("identity_fp32", tensor(data=[1, 3.5e38]), "element 1: 3.5e+38 is not a value of FP32"),
    ("identity_fp32", tensor(data=[{}, 1]), "element 0: {} is not a value of FP32"),
    ("identity_fp32", tensor(data="12"), "data must be an array"),
    ("identity_fp32", tensor(shape=[-1, 2]), "is not a shape"),
    ("identity_fp32", tensor(shape=[2**31, 2]), "is not a shape"),
    ("identity_fp32", tensor(shape=[1] * 17), "is not a shape"),
    ("identity_fp16", tensor(datatype="FP16", data=[1, 65520]), "element 1: 65520.0 is not a value of FP16"),
    ("identity_int8", tensor(datatype="INT8", data=[127, 128]), "element 1: 128 is not a value of INT8"),
    ("identity_uint64", tensor(datatype="UINT64", data=[0, -1]), "element 1: -1 is not a value of UINT64"),
    ("identity_int32", tensor(datatype="INT32", data=[1, 2.0]), "element 1: 2.0 is not a value of INT32"),
    ("identity_bool", tensor(datatype="BOOL", data=[True, 1]), "element 1: 1 is not a value of BOOL"),
    ("identity_bool", tensor(datatype="BOOL", data=[None, True]), "element 0: null is not a value of BOOL"),
    ("identity_bytes", tensor(datatype="BYTES", data=["a", 7]), "element 1: 7 is not a value of BYTES"),
    ("identity_bf16", tensor(datatype="BF16"), "BF16 has no JSON form; send it as binary data"),
    ("identity_bf16", tensor(datatype="UINT16"), "is UINT16, the model takes BF16"),
    ("identity_uint16", tensor(datatype="BF16"), "is BF16, the model takes UINT16"),
    ("identity_fp32", tensor(shape=[BATCH_ROWS + 1, 2], data=[0] * 2 * (BATCH_ROWS + 1)), f"at most {BATCH_ROWS} rows"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "sent", "said"), WRONG_TENSORS, ids=range(len(WRONG_TENSORS)))
def test_a_wrong_tensor_is_400_and_is_named(node: OipNode, model: str, sent: dict[str, Any], said: str) -> None:
    answer = node.infer(model, [sent])
    assert answer.status_code == 400 and said in answer.json()["error"], answer.text[:300]
    assert len(answer.content) < 1_000


def test_what_could_not_be_worded_is_refused_before_it_is_run(node: OipNode) -> None:
    raw = raw_of(np.array([[1, 2]], np.uint16))
    sent = tensor(datatype="BF16") | {"parameters": {"binary_data_size": len(raw)}}
    del sent["data"]
    head = json.dumps({"inputs": [sent]}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    answer = node.http.post("/v2/models/identity_bf16/infer", content=head + raw, headers=headers)
    assert answer.status_code == 400 and "ask for it with binary_data" in answer.json()["error"]
    (said,) = node.http.get("/v2/models/identity_bf16/stats").json()["model_stats"]
    assert said["execution_count"] == 0


def test_an_empty_batch_is_a_batch(node: OipNode) -> None:
    answer = node.infer("identity_fp32", [tensor(shape=[0, 2], data=[])])
    assert answer.status_code == 200 and answer.json()["outputs"][0]["shape"] == [0, 2]


def test_a_row_at_the_cap_is_served(node: OipNode) -> None:
    assert node.infer("identity_fp32", [tensor(shape=[BATCH_ROWS, 2], data=[0] * 2 * BATCH_ROWS)]).status_code == 200


def test_the_cap_of_rows_is_none_for_what_has_no_rows(node: OipNode) -> None:
    """`cube` may not be batched, so its leading dimension is a size like the others."""
    many = tensor(shape=[BATCH_ROWS + 1, 1, 2], datatype="INT64", data=[0] * 2 * (BATCH_ROWS + 1))
    assert node.infer("cube", [many]).status_code == 200


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"outputs": [{"name": "nothing"}]}, "unknown output 'nothing'; model identity_fp32 has ['y']"),
        ({"outputs": [{}]}, "`name`"),
        ({"outputs": [{"name": "y"}] * 257}, "more than 256 tensors"),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({"parameters": {"binary_data_output": "yes"}}, "true or false"),
        ({"parameters": {"sequence_id": 1}}, "sequences are not served"),
        ({"outputs": [{"name": "y", "parameters": {"classification": 2}}]}, "classification is not served"),
        ({"outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]}, "shared memory is not served"),
    ],
)
def test_what_is_asked_for_and_not_there_is_400(node: OipNode, more: dict[str, Any], said: str) -> None:
    answer = node.infer("identity_fp32", [tensor()], **more)
    assert answer.status_code == 400 and said in answer.json()["error"], answer.text[:300]


def test_tensors_that_are_there_twice_or_too_many_are_400(node: OipNode) -> None:
    assert "twice" in node.infer("identity_fp32", [tensor(), tensor()]).json()["error"]
    many = node.infer("identity_fp32", [tensor(name=f"x{i}") for i in range(257)])
    assert many.status_code == 400 and "more than 256 tensors" in many.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "`features`"),
        ({"model": "digits", "features": None}, 400, "features must be an array"),
        ({"features": ROW}, 400, "say which model"),
        ({"model": 7, "features": ROW}, 400, "$.model"),
        ({"model": "nothing", "features": ROW}, 404, "no model 'nothing'; served here"),
        ({"model": "../x", "features": ROW}, 404, "no model '../x'"),
        ({"model": "", "features": ROW}, 404, "no model ''"),
        ({"model": "digits", "features": ROW[1:]}, 400, "has 31 values"),
        ({"model": "digits", "features": [ROW]}, 400, "'features'"),
        ({"model": "digits", "features": [*ROW[1:], "a"]}, 400, 'element 31: "a" is not a value of FP32'),
        ({"model": "digits", "features": [*ROW[1:], 1e39]}, 400, "element 31: 1e+39 is not a value of FP32"),
        ({"model": "digits", "features": {"0": 1}}, 400, "features must be an array"),
        ({"model": "several", "features": ROW}, 400, "has inputs ['a', 'b', 'word', 'bias']: name them"),
        ({"model": "identity_bf16", "features": [1, 2]}, 400, "BF16, which has no JSON form"),
    ],
)  # fmt: skip
def test_the_plain_door_refuses_alike(node: OipNode, body: dict[str, Any], status: int, said: str) -> None:
    answer = node.http.post("/predict", json=body)
    assert answer.status_code == status and said in answer.json()["error"], answer.text[:300]


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ([], f"a batch has 1 to {BATCH_ROWS}"),
        ([ROW] * (BATCH_ROWS + 1), f"a batch has 1 to {BATCH_ROWS}"),
        ([ROW, ROW[1:]], "row 1: input 'features' has 31 values"),
        ([ROW, 7], "row 1: features must be an array"),
        ("rows", "$.features"),
    ],
)
def test_a_wrong_row_is_named_by_its_number(node: OipNode, features: Any, said: str) -> None:
    answer = node.http.post("/batch_predict", json={"model": "digits", "features": features})
    assert answer.status_code == 400 and said in answer.json()["error"], answer.text[:300]


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/v2/models/nothing", 404, "no model 'nothing'"),
        ("GET", "/v2/models/nothing/ready", 404, "no model 'nothing'"),
        ("GET", "/v2/models/digits/versions/v9", 404, "no version 'v9' of model digits; served here: v1"),
        ("GET", "/v2/models/digits/versions/v9/config", 404, "served here: v1"),
        ("POST", "/v2/models/nothing/infer", 404, "no model 'nothing'"),
        ("POST", "/v2/models/digits/versions/9/infer", 404, "served here: v1"),
        ("POST", "/v2/repository/models/digits/load", 409, "the log decides"),
        ("POST", "/v2/repository/models/digits/unload", 409, "the log decides"),
        ("GET", "/v2/systemsharedmemory/status", 404, "no such path"),
        ("POST", "/v2/models/digits/generate", 404, "no such path"),
        ("GET", "/predict", 405, "Method Not Allowed"),
        ("DELETE", "/v2/models/digits", 405, "Method Not Allowed"),
        ("GET", "/", 404, "no such path"),
    ],
)
def test_what_is_not_there_is_said_so(node: OipNode, method: str, path: str, status: int, said: str) -> None:
    body = {"inputs": [tensor()]} if path.endswith("infer") else None
    answer = node.http.request(method, path, json=body)
    assert answer.status_code == status and said in answer.json()["error"]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("text/html", 415),
        ("application/octet-stream", 415),
        ("application/x-www-form-urlencoded", 415),
        ("application/json; charset=utf-8", 200),
        ("application/vnd.x+json", 200),
    ],
)
def test_a_body_has_a_kind(node: OipNode, kind: str, status: int) -> None:
    body = json.dumps({"inputs": [tensor()]})
    answer = node.http.post("/v2/models/identity_fp32/infer", content=body, headers={"content-type": kind})
    assert answer.status_code == status


@pytest.mark.parametrize("length", ["x", "-1", "", "1e3", "999999", "10"])
def test_a_wrong_json_length_is_400(node: OipNode, length: str) -> None:
    values = np.ones((1, 2), np.float32)
    parameters = {"binary_data_size": values.nbytes}
    sent = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": parameters}]}
    ).encode()
    headers = {"inference-header-content-length": length, "content-type": "application/octet-stream"}
    answer = node.http.post("/v2/models/identity_fp32/infer", content=sent + raw_of(values), headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]
    headers["inference-header-content-length"] = str(len(sent))
    answer = node.http.post("/v2/models/identity_fp32/infer", content=sent + raw_of(values), headers=headers)
    assert answer.status_code == 200


def test_a_body_over_the_limit_is_413_and_one_at_it_is_read(node: OipNode) -> None:
    body = json.dumps({"inputs": [tensor()]}).encode()
    url = "/v2/models/identity_fp32/infer"
    assert node.http.post(url, content=body.ljust(BODY_BYTES), headers=PLAIN).status_code == 200
    assert node.http.post(url, content=body.ljust(BODY_BYTES + 1), headers=PLAIN).status_code == 413


def test_strings_a_model_cannot_have_are_400(node: OipNode) -> None:
    values = np.array([[b"\xff", b"a"]], object)
    raw = raw_of(values)
    parameters = {"binary_data_size": len(raw)}
    head = json.dumps(
        {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1, 2], "parameters": parameters}]}
    ).encode()
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    answer = node.http.post("/v2/models/identity_bytes/infer", content=head + raw, headers=headers)
    assert answer.status_code == 400 and "element 0: not UTF-8" in answer.json()["error"]
