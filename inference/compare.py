"""Whether a candidate answered as the stable release did: two sets of outputs, held against each other. PURE.

Laws:
- By the rules of golden files (golden.py): NaN equals NaN; integers, booleans and strings must be equal; floats within
  `atol + rtol * |wanted|`. An output that is wanted and not there, or of another shape or kind, differs.
- BF16 is compared as the numbers it means, not by its bits.
- The largest difference is of values that are finite on both sides, whether it is allowed or not.
- Top-1 is of float outputs of two dimensions, the rows of a classifier or a ranking: the place of the largest value.

It must not know sessions, requests or who asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from inference.datatypes import TensorSpec
from inference.golden import Difference, compare
from inference.oip_binary import DTYPES, checked_array
from inference.packed import Output, unpack
from schemas.errors import BadTensor

Array = np.ndarray[Any, np.dtype[Any]]


class Compared(msgspec.Struct, frozen=True):
    """`difference` is the first one that counts, None where the two agree."""

    difference: Difference | None
    max_difference: float
    top1_rows: int
    top1_agreements: int


def compared(wanted: Mapping[str, Array], got: Mapping[str, Array], rtol: float, atol: float) -> Compared:
    largest, rows, agreements = 0.0, 0, 0
    for name, want in wanted.items():
        have = got.get(name)
        if (
            have is None
            or have.shape != want.shape
            or want.dtype.kind != "f"
            or have.dtype.kind != "f"
            or not want.size
        ):
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(have.astype(np.float64) - want.astype(np.float64))
        apart = apart[np.isfinite(apart)]
        largest = max(largest, float(apart.max()) if apart.size else 0.0)
        if want.ndim == 2 and want.shape[1] > 1:
            rows += len(want)
            agreements += int(np.count_nonzero(want.argmax(axis=1) == have.argmax(axis=1)))
    return Compared(compare(wanted, got, rtol, atol), largest, rows, agreements)


def packed_values(packed: bytes) -> dict[str, Array]:
    """Outputs as caches keep them, as numbers. For what was packed here."""
    return {output.name: _values(output.datatype, output.array) for output in unpack(packed)}


def checked_tensors(tensors: Sequence[Output]) -> dict[str, Array]:
    """As arrays, whoever packed them: BadTensor unless bytes, datatype and shape fit one another."""
    arrays = {}
    for tensor in tensors:
        if tensor.datatype not in DTYPES or any(d < 0 for d in tensor.shape):
            raise BadTensor(f"tensor {tensor.name[:80]!r} is no {tensor.datatype[:16]!r} of shape {tensor.shape}")
        arrays[tensor.name] = checked_array(tensor.name, tensor.datatype, tensor.shape, tensor.data)
    return arrays


def checked_values(packed: bytes) -> dict[str, Array]:
    """As `packed_values`, of outputs that a stranger packed: BadTensor for what is none."""
    try:
        outputs = unpack(packed)
    except msgspec.MsgspecError as error:
        raise BadTensor(f"no packed outputs: {error}") from None
    arrays = checked_tensors(outputs)
    return {output.name: _values(output.datatype, arrays[output.name]) for output in outputs}


def values(outputs: Mapping[str, Array], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Outputs as a session gives them, as numbers."""
    return {s.name: _values(s.datatype, outputs[s.name]) for s in specs if s.name in outputs}


def _values(datatype: str, array: Array) -> Array:
    if datatype != "BF16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)
