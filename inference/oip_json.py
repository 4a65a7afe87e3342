"""Tensors as the protocol's JSON has them: values to arrays and arrays to values, strictly.

Laws:
- Nothing is changed in silence: integers are never wrapped, rounded or truncated, a finite float never becomes
  infinite, a string is never a number. What does not fit is a BadTensor that names tensor, index and value.
- Answers are strict JSON: NaN is `null`, the infinities are `1e999` and `-1e999`, which every common parser reads as
  infinity. Input takes the same three spellings, and no other number that is too large for a double.
- BF16 has no JSON form in the protocol, so it is refused here, not approximated.

It must not know requests, answers or bytes on the wire.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import msgspec
import numpy as np

from inference.oip_binary import DTYPES
from schemas.errors import BadInput, BadTensor

Array = np.ndarray[Any, np.dtype[Any]]
MAX_RANK: Final = 16
MAX_DIMENSION: Final = 2**31
_INFINITIES: Final = {"1e999": math.inf, "-1e999": -math.inf}
_FLAT: Final[Mapping[str, msgspec.json.Decoder[Any]]] = {
    "f": msgspec.json.Decoder(list[float]),
    "i": msgspec.json.Decoder(list[int]),
    "u": msgspec.json.Decoder(list[int]),
    "b": msgspec.json.Decoder(list[bool]),
    "O": msgspec.json.Decoder(list[str]),
}
_SHORT: Final = 256
_encode = msgspec.json.Encoder().encode


def json_of(name: str, datatype: str, array: Array) -> bytes:
    """Its values, nested as the array is; BadInput where JSON cannot have them."""
    if datatype == "BF16":
        raise no_bf16(name)
    values = array.tolist()
    kind = array.dtype.kind
    if kind == "O":
        try:
            return _encode(_text(values))
        except UnicodeDecodeError:
            raise BadInput(f"output {name!r} is not UTF-8; ask for it with binary_data") from None
    encoded = _encode(values)
    # NaN and the infinities are all `null` to the encoder; looking for that costs less than looking at the array.
    if kind == "f" and b"null" in encoded and np.isinf(array).any():
        return _spelled(values)
    return encoded


def no_bf16(name: str) -> BadInput:
    return BadInput(f"output {name[:80]!r} is BF16, which has no JSON form; ask for it with binary_data")


def check_shape(name: str, datatype: str, shape: tuple[int, ...]) -> None:
    if datatype not in DTYPES:
        raise BadTensor(f"input {name[:80]!r}: unknown datatype {datatype[:40]!r}")
    if len(shape) > MAX_RANK or any(not 0 <= d < MAX_DIMENSION for d in shape):
        raise BadTensor(f"input {name[:80]!r}: shape {list(shape)[:MAX_RANK]} is not a shape")


def array_of_json(name: str, datatype: str, shape: tuple[int, ...], raw: bytes, *, row: bool = False) -> Array:
    """`row`: the values come without the leading 1 of `shape`."""
    check_shape(name, datatype, shape)
    if datatype == "BF16":
        raise BadTensor(f"input {name[:80]!r}: BF16 has no JSON form; send it as binary data")
    if not raw:
        raise BadTensor(f"input {name[:80]!r} has no data")
    dtype = DTYPES[datatype]
    try:
        flat = _FLAT[dtype.kind].decode(raw)
        if datatype == "FP32" and len(flat) <= _SHORT and len(flat) == math.prod(shape):
            # numpy's checks take 10 us however few the values are.
            with contextlib.suppress(struct.error, OverflowError):
                packed = np.frombuffer(struct.pack(f"<{len(flat)}f", *flat), "<f4")
                return packed.astype(dtype, copy=False).reshape(shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Nested, or a special value, or wrong: this way is slower, and can say which element it is.
        flat = _flatten(name, shape[1:] if row else shape, loads(name, raw))
    if len(flat) != math.prod(shape):
        raise BadTensor(f"input {name[:80]!r} has {len(flat)} values, its shape {list(shape)} needs {math.prod(shape)}")
    return _typed(name, datatype, dtype, flat).reshape(shape)


def loads(name: str, raw: bytes) -> Any:
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


def _text(values: Any) -> Any:
    return [_text(v) for v in values] if isinstance(values, list) else values.decode()


def _spelled(value: Any) -> bytes:
    if isinstance(value, list):
        return b"[" + b",".join(map(_spelled, value)) + b"]"
    if math.isinf(value):
        return b"1e999" if value > 0 else b"-1e999"
    return _encode(value)
