"""The admin API as OpenAPI 3.1, written as data: what `/openapi.json` of the admin port says. PURE.

Law: a path is here if and only if `admin.py` routes it, its query and bodies are the types that are decoded there, and the
answers of a real origin fit its schemas; tests hold it. It must not know how anything is done.
"""

from __future__ import annotations

from typing import Any, Final

from origin import release_settings

Schema = dict[str, Any]

JSON: Final = "application/json"
_REF: Final = "#/components/schemas/"
_TEXT: Final = {"type": "string"}
_WHOLE: Final = {"type": "integer"}
_NUMBER: Final = {"type": "number"}
_FLAG: Final = {"type": "boolean"}
_BYTES: Final = {"type": "string", "contentMediaType": "application/octet-stream"}

_ERRORS: Final = {
    400: "The request is wrong; the message says where.",
    401: "A bearer token is needed.",
    403: "Another token, or a browser's request from another site.",
    404: "No such model or version.",
    408: "The body did not arrive in time.",
    409: "The log, or the version that is served now, does not allow it; the message names every tensor.",
    422: "The model must not be served; the message says why, and nothing was uploaded.",
    429: "As many releases as may are being made; Retry-After says when to come again.",
    503: "A part that it takes does not answer: which, where. Asking again is safe.",
}
_ALL: Final = (400, 401, 403, 408, 409, 503)

_QUERY: Final[dict[str, tuple[Schema, str]]] = {
    "model": (_TEXT, "Name of the model."),
    "version": (
        _TEXT,
        "Label; default the digest's first 12 characters. As all that follows, it wins over the settings.",
    ),
    "placement": ({"type": "string", "enum": ["edge", "origin", "auto"]}, "Where it runs."),
    "reason": (_TEXT, "Why, in a person's words."),
    "allow_signature_change": (_FLAG, "Release what breaks clients of the version that is served now."),
    "wait": (_FLAG, "Answer when every node with a fresh beat serves it, or cannot."),
    "timeout_s": ({"type": "number", "minimum": 0, "maximum": 600}, "Longest to wait."),
}


def document(version: str) -> Schema:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlcdn admin",
            "version": version,
            "summary": "Releases, rollbacks, retirements and invalidations: what the command line does, for automation.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"token": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The setting `admin_token`; for every path.",
                }
            },
            "schemas": _schemas(),
            "responses": {str(s): _said(text, "Error") for s, text in _ERRORS.items()},
        },
    }


def _paths() -> Schema:
    return {
        "/admin/publish": {"post": _publish()},
        "/admin/rollback": {
            "post": _post("rollback", "Serve an earlier release again", "Rollback", "Released", (*_ALL, 404))
        },
        "/admin/retire": {"post": _post("retire", "Serve the model no longer", "Retire", "Released", (*_ALL, 404))},
        "/admin/invalidate": {
            "post": _post("invalidate", "Cached answers are no longer fresh", "Invalidate", "Invalidated", _ALL)
        },
        "/openapi.json": {
            "get": {
                "operationId": "openapi",
                "summary": "This document",
                "responses": _responses((401, 403))
                | {"200": {"description": "OpenAPI 3.1", "content": {JSON: {"schema": {"type": "object"}}}}},
            }
        },
    }


def _publish() -> Schema:
    form = _object({"file": _BYTES}, {"golden": _BYTES, "settings": {"$ref": f"{_REF}ReleaseSettings"}})
    return {
        "operationId": "publish",
        "summary": "Try a model, upload it and release it",
        "parameters": [
            {"name": name, "in": "query", "required": name == "model", "schema": schema, "description": words}
            for name, (schema, words) in _QUERY.items()
        ],
        "requestBody": {
            "required": True,
            "description": "The ONNX file, at most 2 GiB; or a form of it, a golden file and settings.",
            "content": {
                "application/octet-stream": {"schema": {}},
                "multipart/form-data": {"schema": form, "encoding": {"settings": {"contentType": JSON}}},
            },
        },
        "responses": _responses((*_ALL, 422, 429)) | {"200": _said("The log took it", "Released")},
    }


def _post(name: str, summary: str, asked: str, answered: str, errors: tuple[int, ...]) -> Schema:
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": {JSON: {"schema": {"$ref": _REF + asked}}}},
        "responses": _responses(errors) | {"200": _said("The log took it", answered)},
    }


def _schemas() -> dict[str, Schema]:
    waiting = {"wait": _FLAG, "timeout_s": _QUERY["timeout_s"][0]}
    scope = _object({"kind": {"enum": ["key", "prefix", "pattern", "tag", "model", "all"]}}, {"value": _TEXT})
    place = {"region": _TEXT, "node": _TEXT}
    outcomes = {"enum": ["live", "rejected", "failed", "missing"]}
    phases = {
        "type": "object",
        "additionalProperties": _NUMBER,
        "description": "By phase, and `total` since the append.",
    }
    return {
        "Error": _object({"error": _TEXT}),
        "Rollback": _closed({"model": _TEXT}, {"to": {"type": ["string", "null"]}, "reason": _TEXT} | waiting),
        "Retire": _closed({"model": _TEXT}, {"reason": _TEXT}),
        "Invalidate": _closed({"scopes": _list(scope)}, {"soft": _FLAG, "reason": _TEXT, "wait": _FLAG}),
        "Invalidated": _object(
            {"position": _WHOLE, "event_id": _TEXT},
            {"receipts": _list(_object(place | {"applied_ms": _NUMBER})), "missing": _list(_TEXT)},
        ),
        "Released": _object(
            {
                "model": _TEXT,
                "version": _TEXT,
                "sequence": _WHOLE,
                "digest": _TEXT,
                "position": {"type": "integer", "description": "Offset of the event in the log of releases."},
                "event_id": _TEXT,
                "nodes": _list(_object(place | {"outcome": outcomes, "reason": _TEXT, "ms": phases})),
                "wall_ms": _NUMBER,
            },
            {
                "rollout": _object(
                    {
                        "status": {"enum": ["rolling", "paused", "halted", "aborted", "done", "superseded"]},
                        "step": _WHOLE,
                        "waves": _WHOLE,
                        "verdicts": _list(_object({"id": _TEXT, "step": _WHOLE, "verdict": _TEXT, "reason": _TEXT})),
                    }
                )
                | {"description": "What its waves came to, where it has some and the answer waited."},
                "trial": _object(
                    {
                        "load_ms": _NUMBER,
                        "run_ms": {"type": ["number", "null"], "description": "One row; null where none was run."},
                        "peak_rss_bytes": _WHOLE,
                        "model_rss_bytes": _WHOLE,
                        "batchable": _FLAG,
                        "batchable_reason": _TEXT,
                        "golden": {"enum": ["passed", "failed", "absent"]},
                    }
                ),
                "signature_changes": _list(
                    _object({"side": {"enum": ["input", "output"]}, "tensor": _TEXT, "how": _TEXT})
                ),
            },
        ),
        **release_settings.schemas(_REF + "{name}"),
    }


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> Schema:
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def _closed(required: dict[str, Any], optional: dict[str, Any]) -> Schema:
    return _object(required, optional) | {"additionalProperties": False}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _said(description: str, schema: str) -> Schema:
    return {"description": description, "content": {JSON: {"schema": {"$ref": _REF + schema}}}}


def _responses(statuses: tuple[int, ...]) -> Schema:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)}
