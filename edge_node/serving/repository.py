"""What a worker says of its models: metadata, configuration, versions, the index. No I/O.

    versions   the usual one, its candidate, and the one before while its session is loaded: a client that names one of
               them is served by it
    config     Triton's names, so that its tools read it, and `mlcdn`: what Triton has no words for

Laws: only what is true of this worker now is said; what a model cannot do is said with its reason. Which models there
are is the log's to decide, so nothing here loads or unloads one.

It must not know requests' bodies, predictions or caches.
"""

from __future__ import annotations

from typing import Any, Final

from starlette.requests import Request

from edge_node.caching.tier_choice import TierChoice
from edge_node.serving.model_slot import ModelSlot, Slots
from edge_node.serving.served import Served
from inference.datatypes import FREE, TensorSpec
from schemas.errors import MlcdnError, NotFound
from schemas.events import ModelRef

PLATFORM: Final = "onnxruntime_onnx"
# Triton's names of the extensions that are served; model_repository without load and unload, which answer 409.
EXTENSIONS: Final = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
LOG_DECIDES: Final = "the log decides which models are served: publish, roll back or retire a release instead"


def named(slots: Slots, request: Request) -> Served:
    """What the path names: a model, or one version of it."""
    slot = slots.get(request.path_params["model"])
    version = request.path_params.get("version")
    live = slot.serving
    if version is None or version == live.wanted.version:
        return live
    for served in versions(slot):
        if served.wanted.version == version:
            return served
    there = ", ".join(served.wanted.version for served in versions(slot))
    raise NotFound(f"no version {version[:80]!r} of model {slot.name}; served here: {there}")


def versions(slot: ModelSlot) -> list[Served]:
    """The usual one first. Of two with one label the first is meant by it."""
    before = slot.previous if slot.previous is not None and slot.previous.model is not None else None
    found: dict[str, Served] = {}
    for served in (slot.serving, slot.candidate, before):
        if served is not None:
            found.setdefault(served.wanted.version, served)
    return list(found.values())


def ref_of(served: Served) -> ModelRef:
    return ModelRef(name=served.name, version=served.wanted.version, digest=served.digest)


def metadata(slot: ModelSlot, served: Served) -> dict[str, Any]:
    return {
        "name": served.name,
        "versions": [each.wanted.version for each in versions(slot)],
        "platform": PLATFORM,
        "inputs": [_tensor(spec, served) for spec in served.inputs],
        "outputs": [_tensor(spec, served) for spec in served.outputs],
        **({"parameters": {"candidate": candidate_of(slot)}} if slot.candidate is not None else {}),
    }


def candidate_of(slot: ModelSlot) -> dict[str, Any] | None:
    """What answers a share of a model's requests, and how large a share; None where nothing does."""
    candidate = slot.candidate
    if candidate is None:
        return None
    return {"version": candidate.wanted.version, "digest": candidate.digest, "percent": slot.percent}


def index(slots: Slots, ready_only: bool) -> list[dict[str, str]]:
    entries: list[dict[str, str]] = []
    for slot in slots:
        try:
            there = versions(slot)
        except MlcdnError as error:
            state = "LOADING" if slot.loading else "UNAVAILABLE"
            if not ready_only:
                entries.append({"name": slot.name, "state": state, "reason": str(error)})
            continue
        entries += [_entry(slot, served) for served in there]
    return sorted(entries, key=lambda entry: entry["name"])


def _entry(slot: ModelSlot, served: Served) -> dict[str, str]:
    reason = f"the candidate, for {slot.percent:g} percent of the requests" if served is slot.candidate else ""
    return {"name": served.name, "version": served.wanted.version, "state": "READY", "reason": reason}


def config(slot: ModelSlot, served: Served, choice: TierChoice, most_rows: int, most_bytes: int) -> dict[str, Any]:
    released = served.wanted.released
    batching, cache, limits = released.batching, released.cache, released.limits
    reason = not_batchable(served)
    rows = 0 if reason else most_rows
    return {
        "name": served.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"specific": {"versions": [served.wanted.version]}},
        "max_batch_size": rows,
        "input": [_configured(spec, rows > 0) | {"optional": spec.optional} for spec in served.inputs],
        "output": [_configured(spec, rows > 0) for spec in served.outputs],
        **({"dynamic_batching": {"max_queue_delay_microseconds": batching.max_delay_us}} if rows else {}),
        "response_cache": {"enable": cache.enabled},
        "model_transaction_policy": {"decoupled": False},
        "mlcdn": {
            "version": served.wanted.version,
            "digest": served.digest,
            "channel": served.channel,
            "candidate": candidate_of(slot),
            "placement": {"wanted": str(released.placement), "answers": "edge" if served.model else "origin"},
            "batching": {
                "batchable": not reason,
                "reason": reason,
                "max_size": batching.max_size,
                "max_delay_us": batching.max_delay_us,
            },
            "limits": {
                "deadline_ms": limits.deadline_ms,
                "max_queue": limits.max_queue,
                "max_batch_rows": most_rows,
                "max_body_bytes": most_bytes,
            },
            "cache": {
                "enabled": cache.enabled,
                "ttl_s": cache.ttl_s,
                "stale_while_revalidate_s": cache.stale_while_revalidate_s,
                "stale_if_error_s": cache.stale_if_error_s,
                "tiers": {
                    "wanted": str(choice.use),
                    **{
                        tier: {"asked": tier in choice.asked, "reason": reason}
                        for tier, reason in choice.reasons.items()
                    },
                },
            },
        },
    }


def not_batchable(served: Served) -> str:
    """Why rows of different requests do not run together; empty where they do."""
    if served.batchable:
        return ""
    if served.model is None:
        return "the origin runs it, request by request"
    if served.model.summary.has_control_flow:
        return "the graph has control flow"
    for spec in (*(s for s in served.inputs if not s.optional), *served.outputs):
        if not spec.ranked or spec.shape[:1] != (FREE,):
            return f"{spec.name!r} does not lead with a free dimension"
    return "its trial did not show that rows come out alike alone and among others"


def _tensor(spec: TensorSpec, served: Served) -> dict[str, Any]:
    said: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}
    more: dict[str, Any] = {}
    if labels := _labels(spec, served):
        more["labels"] = labels
    if spec.optional:
        more["optional"] = True
    if not spec.ranked:
        more["any_rank"] = True
    return said | {"parameters": more} if more else said


def _labels(spec: TensorSpec, served: Served) -> list[int | str]:
    if spec.labels is not None:
        return list(spec.labels)
    # Where the origin has the model, its release says them.
    released = {tensor.name: tensor.labels for tensor in served.wanted.released.outputs}
    return list(released.get(spec.name, ()))


def _configured(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    kind = {"BYTES": "TYPE_STRING"}.get(spec.datatype, f"TYPE_{spec.datatype}")
    return {"name": spec.name, "data_type": kind, "dims": list(spec.shape[1:] if batched else spec.shape)}
