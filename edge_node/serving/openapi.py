"""The worker's HTTP as OpenAPI 3.1, written as data: what `/openapi.json` says and `/docs` shows. PURE.

Law: a path is here if and only if it is in routes.py, and the answers of a real worker fit its schemas; tests hold
both. It must not know how anything is served.
"""

from __future__ import annotations

from typing import Any, Final

from edge_node.serving.openapi_schemas import SCHEMAS, TEXT, WHOLE, Schema, ref

JSON: Final = "application/json"
BINARY: Final = "application/octet-stream"

_ERRORS: Final = {
    400: "The request is wrong; the message names tensor, index and value.",
    403: "Only for nodes of the same network.",
    404: "No such model, version or path; the message says what there is.",
    408: "The body did not arrive in time.",
    409: "The log decides this, not a request.",
    413: "The body is too large, as sent or decompressed.",
    415: "Not a kind or coding of body that is taken.",
    416: "Not a range of bytes within one chunk.",
    429: "The model's queue is full, or too many ask; Retry-After says when to come again.",
    500: "The model, or this worker, broke.",
    503: "Not ready, or what it takes does not answer.",
    504: "No answer before the deadline, or none cached where only that was asked for.",
}
_PREDICTING: Final = (400, 404, 408, 413, 415, 429, 500, 503, 504)
_ASKING: Final = (404, 503)

_CONTROLS: Final = {
    "cache-control": "no-cache, no-store, only-if-cached and max-age=N, as RFC 9111 has them.",
    "mlcdn-tags": "Tags of the answer, by which it can be invalidated.",
    "mlcdn-cohort": "Whose requests are answered by one release while a candidate answers a share of them.",
    "mlcdn-deadline-ms": "When the caller stops waiting.",
    "traceparent": "Passed on.",
}
_SAID: Final = {
    "cache-status": "Every tier that was asked, as RFC 9211 has it.",
    "age": "Seconds since it was computed.",
    "mlcdn-model": "name;version;channel",
    "mlcdn-digest": "SHA-256 of the model.",
    "mlcdn-position": "Positions of the log that the answer obeys: releases/invalidations.",
    "mlcdn-cache-key": "What invalidations know the answer by.",
}


def document(version: str) -> dict[str, Any]:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlcdn edge",
            "version": version,
            "summary": "Predictions from the nearest edge, out of its caches or its models.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(),
        "components": {
            "schemas": SCHEMAS,
            "responses": {str(s): _said(text, _content("Error")) for s, text in _ERRORS.items()},
            "parameters": {
                **{
                    n: {"name": n, "in": "path", "required": True, "schema": TEXT}
                    for n in ("model", "version", "digest")
                },
                **{n: {"name": n, "in": "header", "schema": TEXT, "description": t} for n, t in _CONTROLS.items()},
                "inference-header-content-length": {
                    "name": "inference-header-content-length",
                    "in": "header",
                    "schema": WHOLE,
                    "description": "Length of the JSON before the binary data.",
                },
            },
            "headers": {name: {"description": text, "schema": TEXT} for name, text in _SAID.items()},
        },
    }


def _paths() -> dict[str, Any]:
    paths: dict[str, Any] = {
        "/predict": {"post": _post("predict", "One row in, one prediction out", "PredictRequest", "PredictAnswer")},
        "/batch_predict": {
            "post": _post("batch_predict", "Rows in, predictions out", "BatchPredictRequest", "BatchPredictAnswer")
        },
        "/v2": {"get": _get("server_metadata", "This server", "Server")},
        "/v2/health/live": {"get": _get("server_live", "Whether it lives", "Live")},
        "/v2/health/ready": {"get": _get("server_ready", "Whether it serves; 503 where not", "Ready", not_yet="Ready")},
        "/v2/models/stats": {"get": _get("all_statistics", "Counts and times of every model", "Statistics")},
        "/v2/repository/index": {"post": _index()},
        "/health": {"get": _get("health", "What it stands on, and what it does without", "Health")},
        "/metrics": {"get": _text("metrics", "Prometheus metrics of this node", "text/plain")},
        "/openapi.json": {"get": _document()},
        "/docs": {"get": _text("docs", "This document, to read", "text/html")},
        "/artifacts/{digest}": {"parameters": [_parameter("digest")], "get": _artifact()},
    }
    # Its rows have a key each, and the answer names none.
    del paths["/batch_predict"]["post"]["responses"]["200"]["headers"]["mlcdn-cache-key"]
    for act in ("load", "unload"):
        paths[f"/v2/repository/models/{{model}}/{act}"] = {
            "parameters": [_parameter("model")],
            "post": {
                "operationId": f"{act}_model",
                "summary": "Refused: the log decides which models are served",
                "responses": _responses((409,)),
            },
        }
    for prefix, suffix, named in (
        ("/v2/models/{model}", "", ["model"]),
        ("/v2/models/{model}/versions/{version}", "_version", ["model", "version"]),
    ):
        there = {"parameters": [_parameter(name) for name in named]}
        for path, name, summary, schema in (
            ("", "model_metadata", "Inputs, outputs and versions", "ModelMetadata"),
            ("/ready", "model_ready", "Whether it is served", "ModelReady"),
            ("/config", "model_config", "Batching, limits, cache policy, placement", "ModelConfig"),
            ("/stats", "model_statistics", "Counts and times", "Statistics"),
        ):
            paths[prefix + path] = there | {"get": _get(name + suffix, summary, schema, errors=_ASKING)}
        paths[f"{prefix}/infer"] = there | {"post": _infer(f"infer{suffix}")}
    return paths


def _get(name: str, summary: str, schema: str, *, errors: tuple[int, ...] = (), not_yet: str = "") -> Schema:
    responses = _responses(errors) | {"200": _said("Answered", _content(schema))}
    if not_yet:
        responses["503"] = _said("Not yet, or not any more", _content(not_yet))
    return {"operationId": name, "summary": summary, "responses": responses}


def _text(name: str, summary: str, kind: str) -> Schema:
    return {"operationId": name, "summary": summary, "responses": {"200": _said("Answered", {kind: {"schema": TEXT}})}}


def _artifact() -> Schema:
    said = _said("The bytes", {BINARY: {"schema": {"description": "As the Range header asked."}}})
    responses = _responses((403, 404, 416, 429, 503)) | {"206": said}
    return {"operationId": "artifact", "summary": "Bytes of an artifact, for other nodes", "responses": responses}


def _document() -> Schema:
    said = _said("OpenAPI 3.1", {JSON: {"schema": {"type": "object"}}})
    return {"operationId": "openapi", "summary": "This document", "responses": {"200": said}}


def _post(name: str, summary: str, asked: str, answered: str) -> Schema:
    return {
        "operationId": name,
        "summary": summary,
        "parameters": [_parameter(control) for control in _CONTROLS],
        "requestBody": {"required": True, "content": _content(asked)},
        "responses": _responses(_PREDICTING) | {"200": _said("Answered", _content(answered), _headers())},
    }


def _infer(name: str) -> Schema:
    made = _post(name, "Open Inference Protocol v2: tensors in, tensors out", "InferRequest", "InferAnswer")
    binary = {BINARY: {"schema": {"description": "JSON, then the tensors' bytes in the order of their names."}}}
    made["parameters"].append(_parameter("inference-header-content-length"))
    made["requestBody"]["content"] |= binary
    made["responses"]["200"]["content"] |= binary
    return made


def _index() -> Schema:
    return {
        "operationId": "repository_index",
        "summary": "Which models there are, in which versions and states",
        "requestBody": {"required": False, "content": _content("IndexRequest")},
        "responses": _responses((400, 408, 413, 415)) | {"200": _said("Answered", _content("Index"))},
    }


def _parameter(name: str) -> Schema:
    return {"$ref": f"#/components/parameters/{name}"}


def _responses(statuses: tuple[int, ...]) -> dict[str, Schema]:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _headers() -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in _SAID}


def _content(schema: str) -> Schema:
    return {JSON: {"schema": ref(schema)}}


def _said(description: str, content: Schema, headers: Schema | None = None) -> Schema:
    return {"description": description, "content": content} | ({"headers": headers} if headers else {})
