"""What a worker says of itself and its models: every document is true of the real routes and fits its own schema."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from edge_node.serving.openapi import document
from edge_node.serving.routes import Doors, paths
from tests.oip_node import OipNode

DOCUMENT = document("0")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OipNode]:
    with OipNode(tmp_path_factory.mktemp("oip")) as running:
        yield running
        assert "Traceback" not in running.log(), running.log()


def test_the_document_is_openapi() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_every_route_is_documented_and_nothing_else() -> None:
    doors: Any = object.__new__(Doors)
    served = {(method.lower(), path) for method, path, _ in paths(doors)}
    said = {(m, path) for path, item in DOCUMENT["paths"].items() for m in item if m in ("get", "post")}
    assert said == served
    names = [item[m]["operationId"] for item in DOCUMENT["paths"].values() for m in item if m in ("get", "post")]
    assert len(names) == len(set(names))


def test_every_answer_fits_its_schema(node: OipNode) -> None:
    row = [float(i % 7) for i in range(32)]
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 32], "data": row}
    bodies: dict[str, Any] = {
        "/predict": {"model": "flowers", "features": [0.1, 0.2, 0.7]},
        "/batch_predict": {"model": "digits", "features": [row, row]},
        "/v2/repository/index": {},
        "infer": {"inputs": [tensor], "id": "a", "parameters": {"binary_data_output": False}},
    }
    asked = 0
    for path, item in DOCUMENT["paths"].items():
        for method in ("get", "post"):
            if method not in item:
                continue
            where = path.format(model="digits", version="v1", digest="0" * 64)
            body = bodies.get(path, bodies["infer"] if path.endswith("/infer") else None)
            answer = node.http.request(method, where, json=body)
            responses = item[method]["responses"]
            assert str(answer.status_code) in responses, (path, answer.status_code, answer.text)
            response = responses[str(answer.status_code)]
            content = _resolved(response)["content"]
            kind = answer.headers["content-type"].partition(";")[0]
            assert kind in content, (path, kind)
            if kind == "application/json":
                schema = content[kind]["schema"] | {"components": DOCUMENT["components"]}
                jsonschema.Draft202012Validator(schema).validate(answer.json())
                asked += 1
            for name in _resolved(response).get("headers", ()):
                assert name in answer.headers, (path, name)
    assert asked >= 20


def test_requests_that_are_documented_are_what_is_taken(node: OipNode) -> None:
    """The required properties of each request are those whose absence is refused."""
    whole = {"name": "features", "datatype": "FP32", "shape": [1, 32], "data": [0.0] * 32}
    for name in DOCUMENT["components"]["schemas"]["InputTensor"]["required"]:
        answer = node.infer("digits", [{k: v for k, v in whole.items() if k != name}])
        assert answer.status_code == 400 and name in answer.json()["error"]


def test_the_page_needs_nothing_else_and_names_every_path(node: OipNode) -> None:
    answer = node.http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    for path in DOCUMENT["paths"]:
        assert f"<code>{path}</code>" in answer.text
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Tags().feed(answer.text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    targets = {str(attributes["href"]) for tag, attributes in tags if tag == "a"}
    ids = {str(attributes["id"]) for _, attributes in tags if "id" in attributes}
    assert "/openapi.json" in targets and {t[1:] for t in targets if t.startswith("#")} <= ids
    assert not re.search(r"https?://", answer.text)


def test_metadata_names_labels_and_what_may_be_left_out(node: OipNode) -> None:
    said = node.http.get("/v2/models/several").json()
    assert [(i["name"], i.get("parameters")) for i in said["inputs"]] == [
        ("a", None),
        ("b", None),
        ("word", None),
        ("bias", {"optional": True}),
    ]
    said = node.http.get("/v2/models/flowers").json()
    assert said["outputs"][1]["parameters"]["labels"] == ["setosa", "versicolor", "virginica"]
    answer = node.http.post("/predict", json={"model": "flowers", "features": [0.25, 0.5, 0.25]}).json()
    assert answer["outputs"] == {"label": 1, "probabilities": [0.25, 0.5, 0.25]} and answer["prediction"] == 1


def test_config_says_why_rows_do_not_run_together(node: OipNode) -> None:
    reasons = {
        model: node.http.get(f"/v2/models/{model}/config").json()["mlcdn"]["batching"]["reason"]
        for model in ("identity_fp32", "scalar", "fixed", "cube")
    }
    assert reasons == {
        "identity_fp32": "",
        "scalar": "'x' does not lead with a free dimension",
        "fixed": "'x' does not lead with a free dimension",
        "cube": "its trial did not show that rows come out alike alone and among others",
    }


@pytest.mark.parametrize("body", [b"", b"  ", b"{}", b'{"ready":false}', b'{"ready":true}'])
def test_the_index_takes_an_empty_body_and_a_filter(node: OipNode, body: bytes) -> None:
    answer = node.http.post("/v2/repository/index", content=body)
    assert (
        answer.status_code == 200
        and {"name": "scalar", "version": "v1", "state": "READY", "reason": ""} in answer.json()
    )


@pytest.mark.parametrize("body", [b"[]", b'{"ready":1}', b"{", b"null"])
def test_an_index_that_is_not_asked_rightly_is_400(node: OipNode, body: bytes) -> None:
    answer = node.http.post("/v2/repository/index", content=body)
    assert answer.status_code == 400 and answer.json()["error"]


def _resolved(item: dict[str, Any]) -> dict[str, Any]:
    found: Any = item
    if "$ref" in item:
        found = DOCUMENT
        for part in item["$ref"].removeprefix("#/").split("/"):
            found = found[part]
    named: dict[str, Any] = found
    return named


def test_how_long_it_took_is_told_to_who_asks(node: OipNode) -> None:
    body, asks = {"model": "digits", "features": [0.125] * 32}, {"mlcdn-server-timing": "1"}
    told = [node.http.post("/predict", json=body, headers=asks) for _ in range(2)]
    tiers = []
    for answer in told:
        match = re.fullmatch(r'edge;desc="([a-z]+)";dur=([0-9]+\.[0-9]{3})', answer.headers["server-timing"])
        assert match is not None and 0 < float(match.group(2)) <= answer.elapsed.total_seconds() * 1e3
        tiers.append(match.group(1))
    assert tiers == ["model", "memory"]
    assert 'desc="none"' in node.http.get("/health", headers=asks).headers["server-timing"]
    # By the fast lane, and beside it.
    for unasked in ({}, {"cache-control": "max-age=60"}):
        assert "server-timing" not in node.http.post("/predict", json=body, headers=unasked).headers
