"""PURE. One table: how a tensor's element type is called by numpy, by onnxruntime and by the Open Inference Protocol.

Laws:
- The protocol's name is the one our API speaks; the other two are looked up here and nowhere else.
- BYTES is an object array of `bytes`. BF16 is a uint16 array of raw bits, because numpy has no bfloat16.
- A type that is not in the table cannot be served; the 8-bit and 4-bit float types are not, since the protocol has no
  names for them.

It must not know a model, a session or a request.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
import numpy as np

FREE: Final = -1  # a dimension that the caller chooses


class Datatype(msgspec.Struct, frozen=True):
    name: str  # Open Inference Protocol
    ort: str  # the element type in onnxruntime's type strings
    dtype: str  # numpy
    onnx: int  # TensorProto.DataType


DATATYPES: Final = (
    Datatype("BOOL", "bool", "bool", 9),
    Datatype("UINT8", "uint8", "uint8", 2),
    Datatype("UINT16", "uint16", "uint16", 4),
    Datatype("UINT32", "uint32", "uint32", 12),
    Datatype("UINT64", "uint64", "uint64", 13),
    Datatype("INT8", "int8", "int8", 3),
    Datatype("INT16", "int16", "int16", 5),
    Datatype("INT32", "int32", "int32", 6),
    Datatype("INT64", "int64", "int64", 7),
    Datatype("FP16", "float16", "float16", 10),
    Datatype("FP32", "float", "float32", 1),
    Datatype("FP64", "double", "float64", 11),
    Datatype("BYTES", "string", "object", 8),
    Datatype("BF16", "bfloat16", "uint16", 16),
)
BY_NAME: Final = {d.name: d for d in DATATYPES}
BY_ORT: Final = {d.ort: d for d in DATATYPES}

_TENSOR = re.compile(r"(?:optional\()?tensor\((\w+)\)\)?")
# onnxruntime writes the inner type as `float` or `tensor(float)`, by version.
_ZIPMAP = re.compile(r"seq\(map\((?:int64|string),(?:tensor\()?(float)\)+")


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a model."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False
    labels: tuple[int | str, ...] | None = None  # column names, where a ZipMap is served as a tensor [N, classes]
    ranked: bool = True  # False: any number of dimensions; `shape` is then (FREE,)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(BY_NAME[self.datatype].dtype)


def of_tensor(ort_type: str) -> Datatype | None:
    """The datatype of `tensor(…)` or `optional(tensor(…))`; None for anything that cannot be served."""
    match = _TENSOR.fullmatch(ort_type)
    return BY_ORT.get(match[1]) if match else None


def of_zipmap(ort_type: str) -> Datatype | None:
    """The datatype of the values of `seq(map(int64 or string, float))`."""
    match = _ZIPMAP.fullmatch(ort_type)
    return BY_ORT[match[1]] if match else None
