"""Outputs as caches keep them and engines hand them over: one form, whichever door or transport asked.

A MessagePack array of ``[name, datatype, shape, data]``, in the model's order; `data` is the protocol's binary form
(oip_binary). A door makes JSON or binary of it when it answers.

Laws: packing loses nothing, BF16 and NaN payloads included, so every transport is answered by the same entry; what
comes out of `unpack` was packed here, since entries are checked by their frame and origins by `outputs_in`.

It must not know requests, answers' other fields, caches or HTTP.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec
import numpy as np

from inference.datatypes import TensorSpec
from inference.oip_binary import array_of, raw_of
from inference.oip_json import json_of

Array = np.ndarray[Any, np.dtype[Any]]


class Output(msgspec.Struct, frozen=True, array_like=True, gc=False):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def array(self) -> Array:
        return array_of(self.datatype, self.shape, self.data)


# How the standard library reads them, where the host's byte order is the protocol's.
_CODES: Final[Mapping[str, Any]] = (
    {"FP32": "f", "FP64": "d", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q"}
    | {"UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q"}
    if sys.byteorder == "little"
    else {}
)
_SHORT_BYTES: Final = 1_024
_pack = msgspec.msgpack.Encoder().encode
_unpack: Final = msgspec.msgpack.Decoder(list[Output]).decode
_json = msgspec.json.Encoder().encode


def pack_outputs(outputs: Mapping[str, Array], specs: Sequence[TensorSpec]) -> bytes:
    """Those of `specs` that there are, in the model's order."""
    packed = []
    for spec in specs:
        array = outputs.get(spec.name)
        if array is not None:
            packed.append((spec.name, spec.datatype, array.shape, raw_of(array)))
    return _pack(packed)


def pack_rows(outputs: Mapping[str, Array], specs: Sequence[TensorSpec], counts: Sequence[int]) -> list[bytes]:
    """`pack_outputs` of each part of a run's rows: the first `counts[0]`, and so on. All outputs have that many rows."""
    columns = []
    for spec in specs:
        array = outputs.get(spec.name)
        if array is not None:
            columns.append((spec.name, spec.datatype, _rows_of(array, counts)))
    return [_pack([(name, datatype, *rows[index]) for name, datatype, rows in columns]) for index in range(len(counts))]


def _rows_of(array: Array, counts: Sequence[int]) -> list[tuple[tuple[int, ...], bytes]]:
    """Shape and data of each part."""
    inner, parts, start = array.shape[1:], [], 0
    if array.dtype.kind == "O":
        for count in counts:
            part = array[start : start + count]
            parts.append((part.shape, raw_of(part)))
            start += count
        return parts
    # One copy for all, and slices of it: a view of the array for each row took four times as long.
    data, width = raw_of(array), array.dtype.itemsize * math.prod(inner)
    for count in counts:
        end = start + count * width
        parts.append(((count, *inner), data[start:end]))
        start = end
    return parts


def unpack(packed: bytes) -> list[Output]:
    return _unpack(packed)


def outputs_json(packed: bytes) -> bytes:
    """The protocol's `outputs` array; BadInput for what has no JSON form."""
    return b"[" + b",".join([output_json(output) for output in _unpack(packed)]) + b"]"


def output_json(output: Output) -> bytes:
    return b"%b%b}" % (_start_of(output.name, output.datatype, output.shape), _values_of(output))


@lru_cache(4_096)
def _start_of(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    return b'{"name":%b,"datatype":"%b","shape":%b,"data":' % (_json(name), datatype.encode(), _json(shape))


def _values_of(output: Output) -> bytes:
    code = _CODES.get(output.datatype) if len(output.data) <= _SHORT_BYTES else None
    if code is not None:
        # numpy takes 1 us to look at a row of eight; this takes 0.3.
        values = _json(output.data.cast(code).tolist())
        if b"null" not in values:
            return values
    return json_of(output.name, output.datatype, output.array.reshape(-1))


def outputs_binary(packed: bytes, names: frozenset[str] | None) -> tuple[bytes, list[memoryview]]:
    """The `outputs` array with `names` (None: all of them) as binary data, and that data in order."""
    parts, tails = [], []
    for output in _unpack(packed):
        if names is not None and output.name not in names:
            parts.append(output_json(output))
            continue
        tails.append(output.data)
        parts.append(
            b'{"name":%b,"datatype":"%b","shape":%b,"parameters":{"binary_data_size":%d}}'
            % (_json(output.name), output.datatype.encode(), _json(output.shape), len(output.data))
        )
    return b"[" + b",".join(parts) + b"]", tails


def prediction_of(packed: bytes) -> tuple[bytes, bytes | None]:
    """What one row came to, as JSON: the first output without its row dimension, and all by name where there are several."""
    rows = [(output.name, _without_row(output)) for output in _unpack(packed)]
    if len(rows) == 1:
        return rows[0][1], None
    named = b",".join([_json(name) + b":" + value for name, value in rows])
    return rows[0][1], b"{" + named + b"}"


def _without_row(output: Output) -> bytes:
    shape = output.shape[1:] if output.shape[:1] == (1,) else output.shape
    return json_of(output.name, output.datatype, output.array.reshape(shape))
