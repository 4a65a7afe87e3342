"""Tensors as the protocol's binary extension has them: little-endian and row-major, nothing between elements.

    numbers   as numpy holds them        BOOL    one byte, 0 or 1
    BF16      its 16 bits, raw           BYTES   a 4-byte little-endian length, then so many bytes, element by element

Laws:
- Sizes are checked against shape and datatype before anything is copied; bytes that no element needs are refused.
- One value has one form: a BOOL of 2 would be a second spelling of true, and another cache key, so it is refused.
- The byte order is the host's: onnxruntime is built for little-endian machines only.

It must not know JSON, requests or answers.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final

import numpy as np

from inference.datatypes import BY_NAME
from schemas.errors import BadTensor

Array = np.ndarray[Any, np.dtype[Any]]
_LENGTH: Final = struct.Struct("<I")
# Of what numpy allocates, and all that onnxruntime's kernels were seen to look at.
_ALIGNMENT: Final = 16
DTYPES: Final = {d.name: np.dtype(d.dtype) for d in BY_NAME.values()}


def raw_of(array: Array) -> bytes:
    if array.dtype.kind != "O":
        return array.tobytes()
    pack = _LENGTH.pack
    return b"".join([part for element in array.ravel() for part in (pack(len(element)), element)])


def raw_size(array: Array) -> int:
    """How long `raw_of` is."""
    if array.dtype.kind != "O":
        return array.nbytes
    return sum(_LENGTH.size + len(element) for element in array.flat)


def array_of(datatype: str, shape: tuple[int, ...], raw: bytes | memoryview) -> Array:
    """From bytes that `raw_of` made: what callers send is for `checked_array`."""
    dtype = DTYPES[datatype]
    if dtype.kind != "O":
        return np.frombuffer(raw, dtype).reshape(shape)
    view, flat, at = memoryview(raw), np.empty(math.prod(shape), object), 0
    for index in range(flat.size):
        (length,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size + length
        flat[index] = bytes(view[at - length : at])
    return flat.reshape(shape)


def checked_array(name: str, datatype: str, shape: tuple[int, ...], raw: memoryview) -> Array:
    """A tensor that a caller sent; BadTensor unless its bytes are exactly what datatype and shape say."""
    dtype, count = DTYPES[datatype], math.prod(shape)
    if dtype.kind == "O":
        _check_lengths(name, count, shape, raw)
        return array_of(datatype, shape, raw)
    if len(raw) != count * dtype.itemsize:
        raise BadTensor(
            f"input {name[:80]!r} has {len(raw)} bytes, {datatype} of shape {list(shape)} needs {count * dtype.itemsize}"
        )
    if datatype == "BOOL":
        values = np.frombuffer(raw, np.uint8)
        if (wrong := values > 1).any():
            index = int(np.argmax(wrong))
            raise BadTensor(f"input {name[:80]!r}, element {index}: {values[index]} is not a value of BOOL")
    array = np.frombuffer(raw, dtype)
    # Where JSON before it left the values at another address, they move: a sum of onnxruntime's differs in the last bit
    # with where its input begins, and the same tensor must not get another answer for a longer request id.
    return (array.copy() if array.__array_interface__["data"][0] % _ALIGNMENT else array).reshape(shape)


def _check_lengths(name: str, count: int, shape: tuple[int, ...], raw: memoryview) -> None:
    needed = f"BYTES of shape {list(shape)} needs {count} elements"
    if count * _LENGTH.size > len(raw):
        raise BadTensor(f"input {name[:80]!r} has {len(raw)} bytes, {needed}")
    at = 0
    for index in range(count):
        left = len(raw) - at - _LENGTH.size
        length = _LENGTH.unpack_from(raw, at)[0] if left >= 0 else 0
        if length > left:
            raise BadTensor(f"input {name[:80]!r}, element {index}: it ends beyond the tensor's {len(raw)} bytes")
        at += _LENGTH.size + length
    if at != len(raw):
        raise BadTensor(f"input {name[:80]!r} has {len(raw) - at} bytes too many, {needed}")
