"""Outputs as caches keep them and engines hand them over: one form, whichever door or transport asked.

A MessagePack array of ``[name, datatype, shape, data]``, in the model's order; `data` is the protocol's binary form
(oip_binary). A door makes JSON or binary of it when it answers.

Laws: packing loses nothing, BF16 and NaN payloads included, so every transport is answered by the same entry; what
comes out of `unpack` was packed here, since entries are checked by their frame and origins by `outputs_in`.

It must not know requests, answers' other fields, caches or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def unpack(packed: bytes) -> list[Output]:
    return _unpack(packed)


def outputs_json(packed: bytes) -> bytes:
    """The protocol's `outputs` array; BadInput for what has no JSON form."""
    return b"[" + b",".join([output_json(output) for output in _unpack(packed)]) + b"]"


def output_json(output: Output) -> bytes:
    flat = output.array.reshape(-1)
    return b'{"name":%b,"datatype":"%b","shape":%b,"data":%b}' % (
        _json(output.name),
        output.datatype.encode(),
        _json(output.shape),
        json_of(output.name, output.datatype, flat),
    )


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
