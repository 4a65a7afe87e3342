"""How the usual bodies become the one input of a release, and its key. PURE.

    infer     {"inputs": [{"name": …, "shape": [n, …], "datatype": …, "data": [flat numbers]}], "id": …?}
    binary    the same with "parameters": {"binary_data_size": n} for data, "binary_data_output" at will, and the data behind
    predict   {"features": [flat numbers], "model": …?}

Laws:
- What is taken here is read exactly as `inference.protocol` reads it; whatever is not of these forms, has another
  field, or does not fit the signature is not refused but left to the full path, which says what is wrong with it.
- A number that its datatype cannot hold is such a case: nothing is wrapped, rounded to an integer or made infinite.

It must not know caches, connections or headers.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final, Self

import msgspec
import numpy as np

from edge_node.caching.keys import PlainKeys
from edge_node.serving.served import Served
from inference.datatypes import FREE, TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
# Longer answers are for the full path, which makes them smaller in a thread.
_MAX_ELEMENTS: Final = 2_048
_CODES: Final = {
    "FP32": "f",
    "FP64": "d",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
}


class _Floats(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class _Integers(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    name: str
    shape: list[int]
    datatype: str
    data: list[int]


class _InferFloats(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    inputs: tuple[_Floats]
    id: str | None = None


class _InferIntegers(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    inputs: tuple[_Integers]
    id: str | None = None


class _BinarySize(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    binary_data_size: int


class _Binary(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    name: str
    shape: list[int]
    datatype: str
    parameters: _BinarySize


class _BinaryOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    binary_data_output: bool = False


class _InferBinary(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    inputs: tuple[_Binary]
    id: str | None = None
    parameters: _BinaryOutput = _BinaryOutput()


class _PredictFloats(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    features: list[float]
    model: str | None = None


class _PredictIntegers(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    features: list[int]
    model: str | None = None


class _Named(msgspec.Struct):
    model: str | None = None


_INFER: Final = {True: msgspec.json.Decoder(_InferFloats).decode, False: msgspec.json.Decoder(_InferIntegers).decode}
_PREDICT: Final = {
    True: msgspec.json.Decoder(_PredictFloats).decode,
    False: msgspec.json.Decoder(_PredictIntegers).decode,
}
_read_binary = msgspec.json.Decoder(_InferBinary).decode
_named = msgspec.json.Decoder(_Named).decode
# msgspec's, of a body in neither form; struct's, of a number that its type cannot hold.
NOT_USUAL: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, struct.error, OverflowError)


class Taken(msgspec.Struct, gc=False):
    """One request: its input by name, its key, the id that its answer repeats, and whether it wants binary data."""

    inputs: dict[str, Array]
    key: bytes
    id: str | None
    binary: bool = False


class Binding:
    """Of one release. `infer` and `predict` give None, or raise one of `NOT_USUAL`, for what the full path must see."""

    def __init__(self, served: Served, spec: TensorSpec, max_rows: int) -> None:
        self._name, self._datatype, self._dtype = spec.name, spec.datatype, spec.dtype.newbyteorder("<")
        self._inner, self._width = list(spec.shape[1:]), math.prod(spec.shape[1:])
        self._max_rows = max_rows
        floats = spec.dtype.kind == "f"
        self._read_infer: Any = _INFER[floats]
        self._read_predict: Any = _PREDICT[floats]
        self._model = served.name
        self._code = _CODES[spec.datatype]
        self._packs: dict[int, struct.Struct] = {}
        # Values in an answer to one row.
        self._answers = sum(math.prod(out.shape[1:]) for out in served.outputs)
        self._keys = PlainKeys(served.name, served.digest, spec.name, spec.dtype)

    @classmethod
    def of(cls, served: Served, max_rows: int) -> Self | None:
        """None for a release whose requests are all for the full path."""
        required = [spec for spec in served.inputs if not spec.optional]
        if len(required) != 1 or not served.wanted.released.cache.enabled:
            return None
        (spec,) = required
        for out in served.outputs:
            if out.datatype == "BF16" or not out.ranked or FREE in out.shape[1:]:
                return None
        plain = spec.datatype in _CODES and spec.ranked and len(spec.shape) > 1 and spec.shape[0] == FREE
        if not plain or FREE in spec.shape[1:]:
            return None
        return cls(served, spec, max_rows)

    def infer(self, body: bytes) -> Taken | None:
        asked = self._read_infer(body)
        (tensor,) = asked.inputs
        if not self._fits(tensor, len(tensor.data)):
            return None
        return self._taken(tuple(tensor.shape), tensor.data, asked.id)

    def binary(self, body: bytes, json_length: int) -> Taken | None:
        asked = _read_binary(body[:json_length])
        (tensor,) = asked.inputs
        raw = body[json_length:]
        values, rest = divmod(len(raw), self._dtype.itemsize)
        if rest or tensor.parameters.binary_data_size != len(raw) or not self._fits(tensor, values):
            return None
        shape = tuple(tensor.shape)
        array = np.frombuffer(raw, self._dtype).reshape(shape)
        return Taken({self._name: array}, self._keys.of(shape, raw), asked.id, asked.parameters.binary_data_output)

    def _fits(self, tensor: _Floats | _Integers | _Binary, values: int) -> bool:
        shape = tensor.shape
        return (
            tensor.datatype == self._datatype
            and (tensor.name == self._name or not tensor.name)
            and shape[1:] == self._inner
            and 0 < shape[0] <= self._max_rows
            and values == shape[0] * self._width
            and shape[0] * self._answers <= _MAX_ELEMENTS
        )

    def predict(self, body: bytes) -> Taken | None:
        asked = self._read_predict(body)
        if len(asked.features) != self._width or asked.model not in (None, self._model):
            return None
        return self._taken((1, *self._inner), asked.features, None)

    def _taken(self, shape: tuple[int, ...], data: list[float] | list[int], request_id: str | None) -> Taken:
        packs = self._packs.get(len(data))
        if packs is None:
            # Little-endian by name: a native "f" would pack 1e39 as infinity.
            packs = struct.Struct(f"<{len(data)}{self._code}")
            if len(self._packs) < 256:
                self._packs[len(data)] = packs
        raw = packs.pack(*data)
        array = np.frombuffer(raw, self._dtype).reshape(shape)
        return Taken({self._name: array}, self._keys.of(shape, raw), request_id)


def named_model(body: bytes) -> str | None:
    """The model that a `/predict` body names. Raises one of `NOT_USUAL`."""
    return _named(body).model
