"""The key of a prediction. PURE.

BLAKE2b-128 over model, artifact digest, tenant, the requested outputs, the parameters and every input tensor (name,
dtype, shape, bytes), each part behind its own length, so that no two different requests write the same bytes.

Laws:
- What does not change the answer does not change the key: order of inputs, outputs and parameters, memory layout, byte
  order, spelling of numbers in JSON, the request's id.
- What may change it does: a tensor's bits. `-0.0` and `0.0` are two keys, and so are two NaNs of different payload.
- The artifact's digest is in it, so no release is answered by its predecessor.

It must not know JSON, HTTP or tiers.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

KEY_BYTES: Final = 16
_MAX_SHAPES: Final = 256
# Changes with the framing below: old and new nodes of a region then never meet under one key.
_PERSON: Final = b"mlcdn-key-1"

Array = np.ndarray[Any, np.dtype[Any]]
_Update = Callable[[bytes | memoryview], None]


def prediction_key(
    model: str,
    digest: str,
    inputs: Mapping[str, Array],
    outputs: Sequence[str] | None = None,
    parameters: Mapping[str, object] | None = None,
    tenant: str | None = None,
) -> bytes:
    """16 bytes. No outputs asked for (None) means all, and is another key than naming them all.

    TypeError for an object tensor whose elements are not bytes, or a parameter that JSON could not have held.
    """
    hasher = hashlib.blake2b(digest_size=KEY_BYTES, person=_PERSON)
    update: _Update = hasher.update
    for text in (model, digest, tenant or ""):
        _blob(update, text.encode())
    _value(update, None if outputs is None else sorted(set(outputs)))
    _value(update, parameters or {})
    update(struct.pack(">I", len(inputs)))
    for name in sorted(inputs):
        _blob(update, name.encode())
        _tensor(update, inputs[name])
    return hasher.digest()


class PlainKeys:
    """`prediction_key` of requests with one input, no tenant, no parameters and no outputs named: all that precedes the
    input's shape is hashed once. `dtype` is not object.
    """

    def __init__(self, model: str, digest: str, name: str, dtype: np.dtype[Any]) -> None:
        self._start = hashlib.blake2b(digest_size=KEY_BYTES, person=_PERSON)
        update: _Update = self._start.update
        for text in (model, digest, ""):
            _blob(update, text.encode())
        _value(update, None)
        _value(update, {})
        update(struct.pack(">I", 1))
        _blob(update, name.encode())
        _blob(update, dtype.newbyteorder("<").str.encode())
        self._shapes: dict[tuple[int, ...], hashlib.blake2b] = {}

    def of(self, shape: tuple[int, ...], data: bytes) -> bytes:
        """`data` is little-endian and row-major."""
        start = self._shapes.get(shape)
        if start is None:
            start = self._start.copy()
            _blob(start.update, struct.pack(f">{len(shape)}Q", *shape))
            if len(self._shapes) < _MAX_SHAPES:
                self._shapes[shape] = start
        hasher = start.copy()
        hasher.update(data)
        return hasher.digest()


def _blob(update: _Update, data: bytes) -> None:
    update(struct.pack(">Q", len(data)))
    update(data)


def _tensor(update: _Update, array: Array) -> None:
    dtype = array.dtype
    if dtype.hasobject:
        _blob(update, b"bytes")
        _blob(update, struct.pack(f">{array.ndim}Q", *array.shape))
        for element in array.ravel():
            if not isinstance(element, bytes):
                raise TypeError(f"an element is {type(element).__name__}, not bytes")
            _blob(update, element)
        return
    little = dtype.newbyteorder("<")
    _blob(update, little.str.encode())
    _blob(update, struct.pack(f">{array.ndim}Q", *array.shape))
    # Copies only what is not laid out so already.
    update(np.ascontiguousarray(array, dtype=little).data)


def _value(update: _Update, value: object) -> None:
    """Typed: `1`, `1.0`, `true` and `"1"` differ."""
    match value:
        case None:
            update(b"n")
        case bool():
            update(b"t" if value else b"f")
        case int():
            update(b"i")
            _blob(update, str(value).encode())
        case float():
            update(b"d" + struct.pack(">d", value))
        case str():
            update(b"s")
            _blob(update, value.encode())
        case bytes():
            update(b"b")
            _blob(update, value)
        case Mapping():
            update(b"m" + struct.pack(">I", len(value)))
            for name in sorted(value):
                _blob(update, str(name).encode())
                _value(update, value[name])
        case list() | tuple():
            update(b"l" + struct.pack(">I", len(value)))
            for item in value:
                _value(update, item)
        case _:
            raise TypeError(f"a parameter is a {type(value).__name__}")
