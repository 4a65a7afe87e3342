"""Open Inference Protocol v2 answers, and what one server of ours asks of another. No I/O.

Between servers tensors travel as binary data only: it is smaller, BF16 has no other form, and what comes back is what
`packed` keeps.

Laws: an answer of a peer is checked as a caller's request is, before it can become an entry of a cache.
It must not know models in memory, caches, HTTP or releases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from inference.datatypes import TensorSpec
from inference.oip_binary import checked_array, raw_of
from inference.oip_json import check_shape
from inference.packed import outputs_binary, pack_outputs
from schemas.errors import BadInput

Array = np.ndarray[Any, np.dtype[Any]]
_json = msgspec.json.Encoder().encode


def infer_answer(model: str, version: str, request_id: str | None, outputs: bytes) -> bytes:
    """`outputs` is the JSON array of them."""
    if request_id is None:
        return b"%b%b}" % (_start_of(model, version), outputs)
    head = {"model_name": model, "model_version": version, "id": request_id}
    return b'%b,"outputs":%b}' % (_json(head)[:-1], outputs)


@lru_cache(256)
def _start_of(model: str, version: str) -> bytes:
    return b'%b,"outputs":' % _json({"model_name": model, "model_version": version})[:-1]


def binary_answer(
    model: str, version: str, request_id: str | None, packed: bytes, names: frozenset[str] | None
) -> tuple[bytes, int]:
    """The body, and how much of it is JSON; `names` (None: all) are the outputs that follow as binary data."""
    outputs, tails = outputs_binary(packed, names)
    head = infer_answer(model, version, request_id, outputs)
    return b"".join([head, *tails]), len(head)


def infer_body(
    inputs: Mapping[str, Array], specs: Sequence[TensorSpec], outputs: Sequence[str] | None
) -> tuple[bytes, int]:
    """An infer request for another server of ours, and how much of it is JSON."""
    tensors, tails = [], []
    for spec in specs:
        array = inputs.get(spec.name)
        if array is not None:
            raw = raw_of(array)
            tails.append(raw)
            tensors.append(
                {
                    "name": spec.name,
                    "datatype": spec.datatype,
                    "shape": array.shape,
                    "parameters": {"binary_data_size": len(raw)},
                }
            )
    body: dict[str, Any] = {"inputs": tensors, "parameters": {"binary_data_output": True}}
    if outputs is not None:
        body["outputs"] = [{"name": name} for name in outputs]
    head = _json(body)
    return b"".join([head, *tails]), len(head)


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int]


class _Answer(msgspec.Struct):
    outputs: list[_Output]


def outputs_in(answer: bytes, json_length: int) -> bytes:
    """The packed outputs of an answer to `infer_body`; BadInput says what is wrong with it."""
    try:
        outputs = msgspec.json.decode(answer[:json_length], type=_Answer).outputs
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not an infer answer: {error}") from None
    view, at = memoryview(answer), json_length
    arrays, specs = {}, []
    for output in outputs:
        check_shape(output.name, output.datatype, output.shape)
        size = output.parameters.get("binary_data_size", -1)
        if not 0 <= size <= len(answer) - at:
            raise BadInput(f"not an infer answer: output {output.name[:80]!r} has no data")
        arrays[output.name] = checked_array(output.name, output.datatype, output.shape, view[at : at + size])
        specs.append(TensorSpec(output.name, output.datatype, output.shape))
        at += size
    if at != len(answer):
        raise BadInput(f"not an infer answer: {len(answer) - at} bytes belong to no output")
    return pack_outputs(arrays, specs)
