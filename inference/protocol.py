"""Open Inference Protocol v2 requests, and the two plain doors beside it: bytes to tensors. No I/O.

    JSON      {"inputs": [{"name", "shape", "datatype", "data"}], "outputs": …, "id": …, "parameters": …}
    binary    the same with `binary_data_size` in an input's parameters instead of its data; the bytes follow the JSON,
              input by input, and the header Inference-Header-Content-Length says where they begin

Laws:
- A tensor is the same array whichever way it came, and what speaks only of transport is no parameter of the request:
  the cache key cannot tell JSON from binary.
- What other servers of this protocol do and this one does not (sequences, shared memory, classification) is refused
  by name, never ignored.

It must not know models in memory, caches, HTTP or releases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
import numpy as np

from inference.datatypes import FREE, TensorSpec
from inference.oip_binary import checked_array
from inference.oip_json import MAX_RANK, array_of_json, check_shape, loads, no_bf16
from schemas.errors import BadInput, BadTensor

Array = np.ndarray[Any, np.dtype[Any]]
Parameters = dict[str, str | int | float | bool]
T = TypeVar("T")

MAX_TENSORS: Final = 256
_TRANSPORT: Final = frozenset({"binary_data_output"})
# Of Triton's extensions, by the parameter that asks for them.
_NOT_SERVED: Final = {
    "sequence_id": "sequences are",
    "sequence_start": "sequences are",
    "sequence_end": "sequences are",
    "shared_memory_region": "shared memory is",
    "shared_memory_byte_size": "shared memory is",
    "shared_memory_offset": "shared memory is",
    "classification": "classification is",
}


class InputTensor(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    datatype: str
    data: msgspec.Raw = msgspec.Raw()
    parameters: Parameters = {}


class RequestedOutput(msgspec.Struct, frozen=True):
    name: str
    parameters: Parameters = {}


class InferRequest(msgspec.Struct, frozen=True):
    """`id` is echoed and never part of a cache key."""

    inputs: tuple[InputTensor, ...]
    outputs: tuple[RequestedOutput, ...] | None = None
    id: str | None = None
    parameters: Parameters = {}

    @property
    def output_names(self) -> tuple[str, ...] | None:
        return tuple(o.name for o in self.outputs) if self.outputs else None

    @property
    def meaning(self) -> Parameters:
        """The parameters that may change an answer's values: all but those that only say how it travels."""
        if not self.parameters or _TRANSPORT.isdisjoint(self.parameters):
            return self.parameters
        return {name: value for name, value in self.parameters.items() if name not in _TRANSPORT}


class PredictRequest(msgspec.Struct, frozen=True):
    features: msgspec.Raw
    model: str | None = None


class BatchPredictRequest(msgspec.Struct, frozen=True):
    features: list[msgspec.Raw]
    model: str | None = None


_INFER = msgspec.json.Decoder(InferRequest)


def parse(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The request as its type says; BadInput says what is wrong and where."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise BadInput(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise BadInput("the body is nested too deeply") from None


def parse_infer(body: bytes, json_length: str | None) -> tuple[InferRequest, memoryview]:
    """The request and the binary data behind it; `json_length` is the header Inference-Header-Content-Length."""
    if json_length is None:
        return parse(body, _INFER), memoryview(b"")
    if not (json_length.isascii() and json_length.isdigit() and len(json_length) < 16):
        raise BadInput("Inference-Header-Content-Length is not a number of bytes")
    length = int(json_length)
    if length > len(body):
        raise BadInput(f"Inference-Header-Content-Length is {length}, the body has {len(body)} bytes")
    return parse(body[:length], _INFER), memoryview(body)[length:]


def tensors_of(request: InferRequest, binary: memoryview = memoryview(b"")) -> dict[str, Array]:  # noqa: B008
    """The request's inputs as arrays of the datatypes it declares."""
    if len(request.inputs) > MAX_TENSORS or len(request.outputs or ()) > MAX_TENSORS:
        raise BadInput(f"more than {MAX_TENSORS} tensors")
    _refuse_extensions(request)
    arrays: dict[str, Array] = {}
    at = 0
    for tensor in request.inputs:
        if tensor.name in arrays:
            raise BadTensor(f"input {tensor.name[:80]!r} is there twice")
        size = tensor.parameters.get("binary_data_size") if tensor.parameters else None
        if size is None:
            arrays[tensor.name] = array_of_json(tensor.name, tensor.datatype, tensor.shape, bytes(tensor.data))
            continue
        end = at + _binary_size(tensor, size, len(binary) - at)
        arrays[tensor.name] = checked_array(tensor.name, tensor.datatype, tensor.shape, binary[at:end])
        at = end
    if at != len(binary):
        raise BadInput(f"{len(binary) - at} bytes of binary data belong to no input")
    return arrays


def check_datatypes(request: InferRequest, specs: Sequence[TensorSpec]) -> None:
    """BF16 and UINT16 are one type to numpy, so the arrays alone cannot tell that the wrong one was declared."""
    known = {spec.name: spec.datatype for spec in specs}
    for tensor in request.inputs:
        wanted = known.get(tensor.name, tensor.datatype)
        if tensor.datatype != wanted and "BF16" in (tensor.datatype, wanted):
            raise BadTensor(f"input {tensor.name[:80]!r} is {tensor.datatype[:40]}, the model takes {wanted}")


def binary_outputs(request: InferRequest, specs: Sequence[TensorSpec]) -> frozenset[str]:
    """The outputs that are asked for as binary data; BadInput where one could only be sent so and is not."""
    standard = request.parameters.get("binary_data_output", False) if request.parameters else False
    if request.outputs:
        asked = {o.name: o.parameters.get("binary_data", standard) for o in request.outputs}
    else:
        asked = {spec.name: standard for spec in specs}
    if any(type(each) is not bool for each in asked.values()):
        raise BadInput("binary_data and binary_data_output are true or false")
    for spec in specs:
        if spec.datatype == "BF16" and asked.get(spec.name) is False:
            raise no_bf16(spec.name)
    return frozenset(name for name, binary in asked.items() if binary)


def row_of(spec: TensorSpec, features: msgspec.Raw) -> Array:
    """One row as the model's input takes it: nested as the input is, or flat where its other dimensions are fixed."""
    raw = bytes(features)
    if not raw.startswith(b"["):
        raise BadTensor(f"features must be an array of values for input {spec.name!r}")
    inner = spec.shape[1:]
    if len(spec.shape) <= 1:
        # [N]: one value a row. [k]: the model takes no rows at all, so the features are the whole tensor.
        fixed = spec.shape and spec.shape[0] != FREE
        return array_of_json(spec.name, spec.datatype, spec.shape if fixed else (1,) * len(spec.shape), raw)
    if FREE not in inner:
        return array_of_json(spec.name, spec.datatype, (1, *inner), raw, row=True)
    values = loads(spec.name, raw)
    shape: list[int] = []
    level: Any = values
    while isinstance(level, list) and len(shape) <= MAX_RANK:
        shape.append(len(level))
        level = level[0] if level else None
    return array_of_json(spec.name, spec.datatype, (1, *shape), raw, row=True)


def _binary_size(tensor: InputTensor, size: object, left: int) -> int:
    check_shape(tensor.name, tensor.datatype, tensor.shape)
    if bytes(tensor.data):
        raise BadTensor(f"input {tensor.name[:80]!r} has both data and binary_data_size")
    if type(size) is not int or size < 0:
        raise BadTensor(f"input {tensor.name[:80]!r}: binary_data_size is not a number of bytes")
    if size > left:
        raise BadTensor(f"input {tensor.name[:80]!r}: binary_data_size is {size}, {left} bytes are left of the body")
    return size


def _refuse_extensions(request: InferRequest) -> None:
    said: list[Mapping[str, object]] = [request.parameters, *(t.parameters for t in request.inputs)]
    said += [o.parameters for o in request.outputs or ()]
    for parameters in said:
        for name in parameters:
            if name in _NOT_SERVED:
                raise BadInput(f"{_NOT_SERVED[name]} not served here: parameter {name!r}")
