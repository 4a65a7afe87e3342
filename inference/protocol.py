"""Open Inference Protocol v2 in JSON, and the two plain doors beside it: bytes to tensors, tensors to bytes. No I/O.

Laws:
- Nothing is changed in silence: integers are never wrapped, rounded or truncated, a finite float never becomes
  infinite, a string is never a number. What does not fit is a BadTensor that names tensor, index and value.
- Answers are strict JSON: NaN is `null`, the infinities are `1e999` and `-1e999`, which every common parser reads as
  infinity. Input takes the same three spellings, and no other number that is too large for a double.
- BF16 has no JSON form in the protocol, so it is refused here, not approximated.
- Encoded outputs are independent of the door they leave by: the caches keep `encode_outputs`, and each door splices it.

It must not know models in memory, caches, HTTP or releases.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeVar

import msgspec
import numpy as np

from inference.datatypes import BY_NAME, FREE, TensorSpec
from schemas.errors import BadInput, BadTensor

Array = np.ndarray[Any, np.dtype[Any]]
Parameters = dict[str, str | int | float | bool]
T = TypeVar("T")

MAX_TENSORS: Final = 256
MAX_RANK: Final = 16
MAX_DIMENSION: Final = 2**31
_INFINITIES: Final = {"1e999": math.inf, "-1e999": -math.inf}


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


class PredictRequest(msgspec.Struct, frozen=True):
    features: msgspec.Raw
    model: str | None = None


class BatchPredictRequest(msgspec.Struct, frozen=True):
    features: list[msgspec.Raw]
    model: str | None = None


class EncodedOutput(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: msgspec.Raw


_ENCODED = msgspec.json.Decoder(list[EncodedOutput])
_RAWS = msgspec.json.Decoder(list[msgspec.Raw])
_FLAT: Final[Mapping[str, msgspec.json.Decoder[Any]]] = {
    "f": msgspec.json.Decoder(list[float]),
    "i": msgspec.json.Decoder(list[int]),
    "u": msgspec.json.Decoder(list[int]),
    "b": msgspec.json.Decoder(list[bool]),
    "O": msgspec.json.Decoder(list[str]),
}


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


def tensors_of(request: InferRequest) -> dict[str, Array]:
    """The request's inputs as arrays of the datatypes it declares."""
    if len(request.inputs) > MAX_TENSORS or len(request.outputs or ()) > MAX_TENSORS:
        raise BadInput(f"more than {MAX_TENSORS} tensors")
    _refuse_binary(request)
    arrays: dict[str, Array] = {}
    for tensor in request.inputs:
        if tensor.name in arrays:
            raise BadTensor(f"input {tensor.name[:80]!r} is there twice")
        arrays[tensor.name] = _array(tensor.name, tensor.datatype, tensor.shape, bytes(tensor.data))
    return arrays


def row_of(spec: TensorSpec, features: msgspec.Raw) -> Array:
    """One row as the model's input takes it: nested as the input is, or flat where its other dimensions are fixed."""
    raw = bytes(features)
    if not raw.startswith(b"["):
        raise BadTensor(f"features must be an array of values for input {spec.name!r}")
    inner = spec.shape[1:]
    if len(spec.shape) <= 1:
        # [N]: one value a row. [k]: the model takes no rows at all, so the features are the whole tensor.
        fixed = spec.shape and spec.shape[0] != FREE
        return _array(spec.name, spec.datatype, spec.shape if fixed else (1,) * len(spec.shape), raw)
    if FREE not in inner:
        return _array(spec.name, spec.datatype, (1, *inner), raw, row=True)
    values = _loads(spec.name, raw)
    shape: list[int] = []
    level: Any = values
    while isinstance(level, list) and len(shape) <= MAX_RANK:
        shape.append(len(level))
        level = level[0] if level else None
    return _array(spec.name, spec.datatype, (1, *shape), raw, row=True)


def encode_outputs(outputs: Mapping[str, Array], specs: Sequence[TensorSpec]) -> bytes:
    """The protocol's `outputs` array, in the model's order."""
    return msgspec.json.encode(
        [
            EncodedOutput(
                spec.name,
                spec.datatype,
                outputs[spec.name].shape,
                msgspec.Raw(_encode(spec, outputs[spec.name])),
            )
            for spec in specs
            if spec.name in outputs
        ]
    )


def infer_answer(model: str, version: str, request_id: str | None, outputs: bytes) -> bytes:
    head: dict[str, Any] = {"model_name": model, "model_version": version}
    if request_id is not None:
        head["id"] = request_id
    return msgspec.json.encode(head)[:-1] + b',"outputs":' + outputs + b"}"


def prediction_of(outputs: bytes) -> tuple[bytes, bytes | None]:
    """What one row came to: the first output without its row dimension, and all by name where there are several."""
    rows = [(o.name, _without_row(o)) for o in _ENCODED.decode(outputs)]
    if len(rows) == 1:
        return rows[0][1], None
    named = b",".join(msgspec.json.encode(name) + b":" + value for name, value in rows)
    return rows[0][1], b"{" + named + b"}"


def outputs_in(answer: bytes) -> bytes:
    """The `outputs` of an infer answer that another server of ours gave, checked to be what `prediction_of` reads."""
    try:
        raw = msgspec.json.decode(answer, type=_Answer).outputs
        _ENCODED.decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadInput(f"not an infer answer: {error}") from None
    return bytes(raw)


class _Answer(msgspec.Struct):
    outputs: msgspec.Raw


def infer_body(inputs: Mapping[str, Array], specs: Sequence[TensorSpec], outputs: Sequence[str] | None) -> bytes:
    """An infer request for another server of ours."""
    body: dict[str, Any] = {
        "inputs": [
            EncodedOutput(spec.name, spec.datatype, array.shape, msgspec.Raw(_encode(spec, array)))
            for spec in specs
            if (array := inputs.get(spec.name)) is not None
        ]
    }
    if outputs is not None:
        body["outputs"] = [{"name": name} for name in outputs]
    return msgspec.json.encode(body)


def _refuse_binary(request: InferRequest) -> None:
    parameters = [request.parameters, *(t.parameters for t in request.inputs)]
    parameters += [o.parameters for o in request.outputs or ()]
    for each in parameters:
        if each.get("binary_data") or each.get("binary_data_output") or each.get("binary_data_size"):
            raise BadInput("the binary tensor extension is not served; send and ask for JSON data")


def _array(name: str, datatype: str, shape: tuple[int, ...], raw: bytes, *, row: bool = False) -> Array:
    """`row`: the values come without the leading 1 of `shape`."""
    kind = BY_NAME.get(datatype)
    if kind is None:
        raise BadTensor(f"input {name[:80]!r}: unknown datatype {datatype[:40]!r}")
    if datatype == "BF16":
        raise BadTensor(f"input {name[:80]!r}: BF16 has no JSON form")
    if len(shape) > MAX_RANK or any(not 0 <= d < MAX_DIMENSION for d in shape):
        raise BadTensor(f"input {name[:80]!r}: shape {list(shape)[:MAX_RANK]} is not a shape")
    if not raw:
        raise BadTensor(f"input {name[:80]!r} has no data")
    dtype = np.dtype(kind.dtype)
    try:
        flat = _FLAT[dtype.kind].decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Nested, or a special value, or wrong: this way is slower, and can say which element it is.
        flat = _flatten(name, shape[1:] if row else shape, _loads(name, raw))
    if len(flat) != math.prod(shape):
        raise BadTensor(f"input {name[:80]!r} has {len(flat)} values, its shape {list(shape)} needs {math.prod(shape)}")
    return _typed(name, datatype, dtype, flat).reshape(shape)


def _loads(name: str, raw: bytes) -> Any:
    """The standard parser, for what the typed ones refuse: it lets us judge each number by its spelling."""

    def number(text: str) -> float:
        value = float(text)
        if math.isinf(value) and text not in _INFINITIES:
            raise BadTensor(f"input {name[:80]!r}: {text[:40]} is too large for a double")
        return value

    def integer(text: str) -> int:
        if len(text) > 400:
            raise BadTensor(f"input {name[:80]!r}: {text[:20]}… is an integer of {len(text)} digits")
        return int(text)

    def constant(text: str) -> NoReturn:
        raise BadTensor(f"input {name[:80]!r}: {text} is not JSON; write null, 1e999 or -1e999")

    try:
        return json.loads(raw, parse_float=number, parse_int=integer, parse_constant=constant)
    except RecursionError:
        raise BadTensor(f"input {name[:80]!r} is nested too deeply") from None
    except ValueError as error:
        raise BadTensor(f"input {name[:80]!r}: not JSON: {error}") from None


def _flatten(name: str, shape: tuple[int, ...], values: Any) -> list[Any]:
    """Row-major elements of what is flat already, or nested exactly as `shape` says."""
    if not isinstance(values, list):
        raise BadTensor(f"input {name[:80]!r}: data must be an array, not {_show(values)}")
    if not any(isinstance(v, list) for v in values):
        return values
    level: list[Any] = [values]
    for depth, wanted in enumerate(shape):
        for index, element in enumerate(level):
            if not isinstance(element, list):
                raise BadTensor(f"input {name[:80]!r} is ragged: {_show(element)} where dimension {depth} should be")
            if len(element) != wanted:
                raise BadTensor(
                    f"input {name[:80]!r} is ragged: {len(element)} values in part {index} of dimension {depth},"
                    f" its shape says {wanted}"
                )
        level = list(itertools.chain.from_iterable(level))
    for index, element in enumerate(level):
        if isinstance(element, list):
            raise BadTensor(f"input {name[:80]!r}, element {index}: nested deeper than its {len(shape)} dimensions")
    return level


def _typed(name: str, datatype: str, dtype: np.dtype[Any], flat: list[Any]) -> Array:
    match dtype.kind:
        case "f":
            return _floats(name, datatype, dtype, flat)
        case "i" | "u":
            _each(name, datatype, flat, lambda v: type(v) is int)
            low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
            if flat and not low <= min(flat) <= max(flat) <= high:
                _each(name, datatype, flat, lambda v: low <= v <= high)
            return np.array(flat, dtype)
        case "b":
            _each(name, datatype, flat, lambda v: type(v) is bool)
            return np.array(flat, dtype)
        case _:
            _each(name, datatype, flat, _is_text)
            array = np.empty(len(flat), object)
            array[:] = [text.encode() for text in flat]
            return array


def _floats(name: str, datatype: str, dtype: np.dtype[Any], flat: list[Any]) -> Array:
    _each(name, datatype, flat, _is_number)
    wide = np.array([math.nan if v is None else v for v in flat], np.float64)
    if dtype == np.float64:
        return wide
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype)
    overflowed = np.isinf(narrow) & ~np.isinf(wide)
    if overflowed.any():
        _refuse(name, datatype, int(np.argmax(overflowed)), flat)
    return narrow


def _is_number(value: Any) -> bool:
    if type(value) is int:
        # A double holds integers of up to 309 digits; what it cannot hold must not become infinite.
        return -(2**1023) <= value <= 2**1023
    return value is None or type(value) is float


def _is_text(value: Any) -> bool:
    return type(value) is str and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


def _each(name: str, datatype: str, flat: list[Any], allowed: Callable[[Any], bool]) -> None:
    for index, value in enumerate(flat):
        if not allowed(value):
            _refuse(name, datatype, index, flat)


def _refuse(name: str, datatype: str, index: int, flat: list[Any]) -> NoReturn:
    raise BadTensor(f"input {name[:80]!r}, element {index}: {_show(flat[index])} is not a value of {datatype}")


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 48 else text[:47] + "…"


def _encode(spec: TensorSpec, array: Array) -> bytes:
    if spec.datatype == "BF16":
        raise BadInput(f"output {spec.name!r} is BF16, which has no JSON form")
    values = array.reshape(-1).tolist()
    if array.dtype.kind == "O":
        values = [v.decode() for v in values]
    if array.dtype.kind == "f" and np.isinf(array).any():
        return b"[" + b",".join(_number(v) for v in values) + b"]"
    return msgspec.json.encode(values)


def _number(value: float) -> bytes:
    if math.isinf(value):
        return b"1e999" if value > 0 else b"-1e999"
    return msgspec.json.encode(value)


def _without_row(output: EncodedOutput) -> bytes:
    shape = output.shape[1:] if output.shape[:1] == (1,) else output.shape
    data = bytes(output.data)
    if len(shape) == 1:
        return data
    if not shape:
        return data[1:-1]
    if 0 in shape:
        return msgspec.json.encode(np.empty(shape).tolist())
    parts = [bytes(element) for element in _RAWS.decode(data)]
    for size in reversed(shape):
        parts = [b"[" + b",".join(parts[i : i + size]) + b"]" for i in range(0, len(parts), size)]
    return parts[0]
