"""Compressed bodies both ways, over a real socket: what is undone is bounded, and what is sent is worth it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.serving.encodings import TooLarge, chosen, decoded, encoded
from inference.oip_binary import raw_of
from inference.oip_json import json_of
from schemas.errors import BadInput
from tests.edge_node_process import rss_bytes
from tests.oip_node import ALL, BODY_BYTES, OipNode, array, identity_name

URL = "/v2/models/identity_fp32/infer"
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}).encode()
PLAIN = {"content-type": "application/json"}
BOMB_BYTES = 192 * 2**20


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OipNode]:
    with OipNode(tmp_path_factory.mktemp("oip")) as running:
        yield running
        assert "Traceback" not in running.log(), running.log()


def compressed(data: bytes, coding: str) -> bytes:
    return gzip.compress(data) if coding.endswith("gzip") else zlib.compress(data)


def bomb() -> bytes:
    deflater, part = zlib.compressobj(9, wbits=31), bytes(2**20)
    return b"".join([*(deflater.compress(part) for _ in range(BOMB_BYTES // 2**20)), deflater.flush()])


def post(node: OipNode, body: bytes, coding: str) -> httpx.Response:
    return node.http.post(URL, content=body, headers=PLAIN | {"content-encoding": coding})


@pytest.mark.parametrize("coding", ["gzip", "GZip", "x-gzip", "deflate", "identity"])
def test_a_coding_is_undone(node: OipNode, coding: str) -> None:
    body = BODY if coding == "identity" else compressed(BODY, coding.lower())
    assert post(node, body, coding).json()["outputs"][0]["data"] == [1, 2]
    plain = node.http.post(URL, content=BODY, headers=PLAIN)
    assert plain.headers["cache-status"].startswith("mlcdn-memory; hit")


@pytest.mark.parametrize(
    ("body", "coding", "status", "said"),
    [
        (gzip.compress(BODY)[:-9], "gzip", 400, "ends too early"),
        (gzip.compress(BODY)[:-1], "gzip", 400, "ends too early"),
        (b"", "gzip", 400, "ends too early"),
        (BODY, "gzip", 400, "is not gzip"),
        (BODY, "deflate", 400, "is not deflate"),
        (gzip.compress(BODY), "deflate", 400, "is not deflate"),
        (gzip.compress(BODY) + b"x", "gzip", 400, "1 bytes follow"),
        (gzip.compress(BODY) + gzip.compress(BODY), "gzip", 400, "follow"),
        (gzip.compress(BODY)[:-8] + bytes(8), "gzip", 400, "is not gzip"),
        (zlib.compress(gzip.compress(BODY)), "gzip, deflate", 415, "gzip, deflate"),
        (BODY, "br", 415, "gzip, deflate"),
        (BODY, "x" * 500, 415, "gzip, deflate"),
        (gzip.compress(BODY.ljust(BODY_BYTES + 1)), "gzip", 413, "decompressed"),
    ],
    ids=range(13),
)
def test_a_body_that_is_not_what_its_coding_says(
    node: OipNode, body: bytes, coding: str, status: int, said: str
) -> None:
    answer = post(node, body, coding)
    assert answer.status_code == status and said in answer.json()["error"], answer.text
    assert (answer.headers.get("accept-encoding") == "gzip, deflate") == (status == 415)
    assert post(node, compressed(BODY.ljust(BODY_BYTES), "gzip"), "gzip").status_code == 200


def test_a_bomb_is_413_before_it_costs_memory(node: OipNode) -> None:
    body = bomb()
    assert len(body) < BODY_BYTES
    pid = node.process.pid
    before = rss_bytes(pid)
    for _ in range(3):
        answer = post(node, body, "gzip")
        assert answer.status_code == 413
    assert rss_bytes(pid) - before < 8 * 2**20


def numbers(rows: int) -> dict[str, Any]:
    data = (np.arange(rows * 2) / 7).tolist()
    return {"inputs": [{"name": "x", "datatype": "FP64", "shape": [rows, 2], "data": data}]}


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("gzip;q=0.5, deflate", "deflate"),
        ("*", "gzip"),
        ("gzip;q=0, *;q=0.1", "deflate"),
        ("br", None),
        ("identity", None),
        ("", None),
        ("gzip;q=0", None),
        ("gzip;q=0.000", None),
        ("gzip;q=0.5, identity", None),
        ("gzip;q=2", None),
        ("gzip;;", None),
    ],
)
def test_the_answer_has_the_coding_that_was_liked_best(node: OipNode, accept: str, coding: str | None) -> None:
    answer = node.http.post("/v2/models/identity_fp64/infer", json=numbers(60), headers={"accept-encoding": accept})
    assert answer.headers.get("content-encoding") == coding and answer.headers["vary"] == "accept-encoding"
    # httpx undoes it.
    assert len(answer.json()["outputs"][0]["data"]) == 120
    if coding:
        assert int(answer.headers["content-length"]) < len(answer.content)


def test_small_answers_and_those_that_would_not_shrink_stay_plain(node: OipNode) -> None:
    like = {"accept-encoding": "gzip"}
    small = node.http.post(URL, content=BODY, headers=PLAIN | like)
    assert "content-encoding" not in small.headers and "vary" not in small.headers
    noise = np.random.default_rng(1).bytes(60 * 16)
    sent = json.dumps(
        {
            "inputs": [
                {"name": "x", "datatype": "FP64", "shape": [60, 2], "parameters": {"binary_data_size": len(noise)}}
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    headers = {"inference-header-content-length": str(len(sent)), "content-type": "application/octet-stream"}
    answer = node.http.post("/v2/models/identity_fp64/infer", content=sent + noise, headers=headers | like)
    assert answer.status_code == 200 and "content-encoding" not in answer.headers
    assert answer.headers["vary"] == "accept-encoding" and answer.content.endswith(noise)


@pytest.mark.parametrize("datatype", [name for name in ALL if name != "BF16"])
def test_one_key_however_a_tensor_travels(node: OipNode, datatype: str) -> None:
    """By either lane, in JSON, binary and compressed: the second and all after it are hits of the first's entry."""
    values = array(datatype, rows=3)
    url, raw = f"/v2/models/{identity_name(datatype)}/infer", raw_of(values)
    sent = {"name": "x", "datatype": datatype, "shape": [3, 2]}
    data = json.loads(json_of("x", datatype, values.reshape(-1)))
    flat = json.dumps({"inputs": [sent | {"data": data}]}).encode()
    nested = json.dumps({"id": "a", "inputs": [sent | {"data": [data[0:2], data[2:4], data[4:6]]}]}, indent=1).encode()
    head = json.dumps({"inputs": [sent | {"parameters": {"binary_data_size": len(raw)}}]}).encode()
    both = json.dumps(
        {"inputs": [sent | {"parameters": {"binary_data_size": len(raw)}}], "parameters": {"binary_data_output": True}}
    ).encode()
    asked: list[tuple[bytes, dict[str, str]]] = [
        (flat, {}),
        (flat, {}),
        (nested, {}),
        (gzip.compress(flat), {"content-encoding": "gzip"}),
        (head + raw, {"inference-header-content-length": str(len(head))}),
        (both + raw, {"inference-header-content-length": str(len(both))}),
        (zlib.compress(both + raw), {"inference-header-content-length": str(len(both)), "content-encoding": "deflate"}),
    ]
    answers = [node.http.post(url, content=body, headers=PLAIN | headers) for body, headers in asked]
    assert [answer.status_code for answer in answers] == [200] * len(asked), answers[0].text
    assert len({answer.headers["mlcdn-cache-key"] for answer in answers}) == 1
    assert all("mlcdn-memory; hit" in answer.headers["cache-status"] for answer in answers[1:])
    assert len({answer.content for answer in answers[:2]}) == 1 and answers[-1].content.endswith(raw)
    # What may change an answer is another key.
    other = json.dumps({"inputs": [sent | {"data": data}], "parameters": {"temperature": 0.5}}).encode()
    changed = node.http.post(url, content=other, headers=PLAIN)
    assert changed.headers["mlcdn-cache-key"] != answers[0].headers["mlcdn-cache-key"]


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]), st.integers(0, 400))
def test_what_is_encoded_is_decoded_within_the_limit(data: bytes, coding: str, limit: int) -> None:
    body = encoded(data, coding) or compressed(data, coding)
    if len(data) > limit:
        with pytest.raises(TooLarge):
            decoded(body, coding, limit)
    else:
        assert decoded(body, coding, limit) == data


@given(st.binary(max_size=100))
def test_any_bytes_are_a_body_or_bad_input(data: bytes) -> None:
    for coding in ("gzip", "deflate"):
        try:
            assert len(decoded(data, coding, 50)) <= 50
        except BadInput:
            pass


@given(st.text(max_size=60))
def test_any_accept_encoding_is_an_answer(accept: str) -> None:
    assert chosen(accept) in (None, "gzip", "deflate")
