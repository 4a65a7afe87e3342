"""The bodies of the worker's HTTP as JSON Schema: what openapi.py refers to by name. PURE.

Law: the answers of a real worker fit these; a test holds it. It must not know paths.
"""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None, about: str = "") -> Schema:
    made: Schema = {"type": "object", "properties": required | (optional or {}), "required": list(required)}
    return made | ({"description": about} if about else {})


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


TEXT: Final = {"type": "string"}
WHOLE: Final = {"type": "integer"}
NUMBER: Final = {"type": "number"}
FLAG: Final = {"type": "boolean"}
SHAPE: Final = _list(WHOLE)
PARAMETERS: Final = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
DATATYPES: Final = {
    "type": "string",
    "enum": [
        "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
        "FP16", "FP32", "FP64", "BF16", "BYTES",
    ],
}  # fmt: skip
VALUES: Final = {
    "type": "array",
    "description": "Flat in row-major order, or nested as the shape is. NaN is null, the infinities are 1e999, -1e999.",
    "items": {"type": ["number", "string", "boolean", "null", "array"]},
}
PREDICTION: Final = {
    "type": ["number", "string", "boolean", "null", "array"],
    "description": "The first output without its row dimension.",
}
_TIMED: Final = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
COUNTED: Final = _object({"count": WHOLE, "ns": WHOLE})
SOURCE: Final = {"edge_region": TEXT, "model": TEXT, "version": TEXT, "digest": TEXT}

SCHEMAS: Final[dict[str, Schema]] = {
    "Error": _object({"error": TEXT}, about="Every answer that is not a 2xx."),
    "PredictRequest": _object(
        {"features": {"type": "array", "description": "One row of the model's only required input."}},
        {"model": {"type": ["string", "null"], "description": "May be left out where one model is served."}},
    ),
    "PredictAnswer": _object(
        {
            "prediction": PREDICTION,
            "cached": FLAG,
            "tier": {"type": "string", "enum": ["memory", "redis", "disk", "model", "origin"]},
            **SOURCE,
        },
        {"outputs": {"type": "object", "description": "All outputs by name, where there are several."}},
    ),
    "BatchPredictRequest": _object(
        {"features": _list({"type": "array"})}, {"model": {"type": ["string", "null"]}}, "Each row looked up by itself."
    ),
    "BatchPredictAnswer": _object(
        {"predictions": _list(PREDICTION), "count": WHOLE, "cached": _list(FLAG), **SOURCE},
    ),
    "InputTensor": _object(
        {"name": TEXT, "shape": SHAPE, "datatype": DATATYPES},
        {
            "data": VALUES,
            "parameters": PARAMETERS | {"description": "`binary_data_size`: that many bytes behind the JSON."},
        },
    ),
    "RequestedOutput": _object(
        {"name": TEXT},
        {"parameters": PARAMETERS | {"description": "`binary_data`: answer this output as binary data."}},
    ),
    "InferRequest": _object(
        {"inputs": _list(ref("InputTensor"))},
        {
            "id": {"type": ["string", "null"], "description": "Echoed."},
            "outputs": {"type": ["array", "null"], "items": ref("RequestedOutput")},
            "parameters": PARAMETERS | {"description": "`binary_data_output`: answer all outputs as binary data."},
        },
    ),
    "OutputTensor": _object(
        {"name": TEXT, "shape": SHAPE, "datatype": DATATYPES}, {"data": VALUES, "parameters": PARAMETERS}
    ),
    "InferAnswer": _object(
        {"model_name": TEXT, "model_version": TEXT, "outputs": _list(ref("OutputTensor"))}, {"id": TEXT}
    ),
    "TensorMetadata": _object(
        {"name": TEXT, "datatype": DATATYPES, "shape": SHAPE},
        {
            "parameters": _object(
                {},
                {
                    "labels": {"type": "array", "description": "What the columns stand for: a classifier's classes."},
                    "optional": {"type": "boolean", "description": "The input may be left out."},
                    "any_rank": {"type": "boolean", "description": "Any number of dimensions is taken."},
                },
            )
        },
    ),
    "ModelMetadata": _object(
        {
            "name": TEXT,
            "versions": _list(TEXT),
            "platform": TEXT,
            "inputs": _list(ref("TensorMetadata")),
            "outputs": _list(ref("TensorMetadata")),
        },
        {"parameters": _object({}, {"candidate": ref("Candidate")})},
    ),
    "Candidate": _object({"version": TEXT, "digest": TEXT, "percent": NUMBER}),
    "ModelReady": _object({"name": TEXT, "ready": FLAG}),
    "ConfiguredTensor": _object({"name": TEXT, "data_type": TEXT, "dims": SHAPE}, {"optional": FLAG}),
    "ModelConfig": _object(
        {
            "name": TEXT,
            "platform": TEXT,
            "backend": TEXT,
            "max_batch_size": {"type": "integer", "description": "0 where rows of requests do not run together."},
            "input": _list(ref("ConfiguredTensor")),
            "output": _list(ref("ConfiguredTensor")),
            "response_cache": _object({"enable": FLAG}),
            "mlcdn": _object(
                {
                    "version": TEXT,
                    "digest": TEXT,
                    "channel": TEXT,
                    "candidate": {"oneOf": [ref("Candidate"), {"type": "null"}]},
                    "placement": _object({"wanted": TEXT, "answers": TEXT}),
                    "batching": _object({"batchable": FLAG, "reason": TEXT, "max_size": WHOLE, "max_delay_us": WHOLE}),
                    "limits": _object(
                        dict.fromkeys(("deadline_ms", "max_queue", "max_batch_rows", "max_body_bytes"), WHOLE)
                    ),
                    "cache": _object(
                        {
                            "enabled": FLAG,
                            "ttl_s": NUMBER,
                            "stale_while_revalidate_s": NUMBER,
                            "stale_if_error_s": NUMBER,
                        }
                    ),
                }
            ),
        },
        {"version_policy": {"type": "object"}, "dynamic_batching": {"type": "object"}},
    ),
    "ModelStatistics": _object(
        {
            "name": TEXT,
            "version": TEXT,
            "last_inference": {"type": "integer", "description": "Milliseconds since 1970; 0 for never."},
            "inference_count": {"type": "integer", "description": "Rows computed; what caches answered is not in it."},
            "execution_count": {"type": "integer", "description": "Runs of the model, in any version."},
            "inference_stats": _object(dict.fromkeys((*_TIMED, "cache_hit", "cache_miss"), COUNTED)),
            "batch_stats": _list({"type": "object"}),
        }
    ),
    "Statistics": _object({"model_stats": _list(ref("ModelStatistics"))}, about="Of the worker that answers."),
    "IndexRequest": _object({}, {"ready": {"type": "boolean", "description": "Only what is ready."}}),
    "Index": _list(
        _object(
            {"name": TEXT, "state": {"type": "string", "enum": ["READY", "LOADING", "UNAVAILABLE"]}, "reason": TEXT},
            {"version": TEXT},
        )
    ),
    "Server": _object({"name": TEXT, "version": TEXT, "extensions": _list(TEXT)}),
    "Live": _object({"live": FLAG}),
    "Ready": _object({"ready": FLAG}),
    "Health": _object(
        {
            "status": {"type": "string", "enum": ["ok", "degraded"]},
            "serving": FLAG,
            "degraded": _list(TEXT),
            "dependencies": {"type": "object", "additionalProperties": TEXT},
            "models": {"type": "object"},
            "positions": {"type": "object"},
            "log_alarms": {"type": "object"},
            "node": TEXT,
            "region": TEXT,
            "worker": WHOLE,
        }
    ),
}
