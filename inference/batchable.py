"""May rows of different requests share one run? Decided by trying, because nothing in a graph promises it.

Laws:
- Yes only if every input and every output leads with the same free dimension, and each row comes out bit-equal alone
  and among others, at several batch sizes and places. A model that averages over its rows, normalises by them or draws
  random numbers says no here.
- Graphs with control flow are never batched: a branch may look at all rows at once, and no sample of rows shows every
  branch.
- In doubt the answer is no, with its reason: rows are also cached one by one, so a wrong yes would be served for ever.

It must not know processes, golden files as files, or who asks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import numpy as np

from inference.datatypes import FREE, TensorSpec
from inference.deadlines import Deadline
from inference.onnx_model import Array, OnnxModel, RunFailed
from schemas.errors import BadTensor

# Matrix kernels change with the number of rows: one row is a vector product, others go in blocks of 4, 6, 12 or 16.
SIZES: Final = (2, 3, 5, 8, 13, 16, 33)
_INNER: Final = 4  # what a free dimension other than the leading one gets


class Batchable(msgspec.Struct, frozen=True):
    yes: bool
    reason: str = ""
    # No by the law above, but yes if a lone row is always run as two of itself. A linear model of scikit-learn is so:
    # its lone row goes by another matrix kernel and differs in the last bit, two and more never did.
    if_padded: bool = False


def sample(model: OnnxModel, rows: int, like: Mapping[str, Array] | None = None, seed: int = 0) -> dict[str, Array]:
    """Distinct plausible inputs; free inner dimensions are those of `like`, where it is given."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: _random(rng, spec, _shape(spec, rows, (like or {}).get(spec.name)))
        for spec in model.inputs
        if not spec.optional
    }


def check_batchable(
    model: OnnxModel, golden_inputs: Mapping[str, Array] | None, budget_s: float, run_s: float
) -> Batchable:
    """Costs about `budget_s`, or seven runs if that is more."""
    reason = _static(model)
    if reason:
        return Batchable(False, reason)
    try:
        return _rows_agree(model, sample(model, SIZES[-1], golden_inputs), SIZES[-1], budget_s, run_s)
    except (BadTensor, RunFailed) as error:
        # Random rows may be no sensible input (an index out of range); the golden ones are.
        rows = _common_rows(golden_inputs or {})
        if rows < 2:
            return Batchable(False, f"random rows are refused and there are no golden ones: {error}")
        try:
            return _rows_agree(model, dict(golden_inputs or {}), rows, budget_s, run_s)
        except (BadTensor, RunFailed) as again:
            return Batchable(False, f"rows of the golden file cannot be run one by one: {again}")


def _static(model: OnnxModel) -> str:
    if model.summary.has_control_flow:
        return "the graph has control flow"
    if len(model.leading_names) > 1:
        return f"its inputs lead with different dimensions: {sorted(model.leading_names)}"
    required = [spec for spec in model.inputs if not spec.optional]
    if not required:
        return "it has no inputs"
    for spec in (*required, *model.outputs):
        if not spec.ranked or not spec.shape or spec.shape[0] != FREE:
            return f"{spec.name!r} does not lead with a free dimension"
    return ""


def _rows_agree(model: OnnxModel, inputs: Mapping[str, Array], rows: int, budget_s: float, run_s: float) -> Batchable:
    first = _try_rows(model, inputs, rows, budget_s / 2, run_s, copies=1)
    if first.yes:
        return first
    return Batchable(False, first.reason, _try_rows(model, inputs, rows, budget_s / 2, run_s, copies=2).yes)


def _try_rows(
    model: OnnxModel, inputs: Mapping[str, Array], rows: int, budget_s: float, run_s: float, copies: int
) -> Batchable:
    def lone(index: int) -> dict[str, Array]:
        row = {name: np.repeat(array[index : index + 1], copies, axis=0) for name, array in inputs.items()}
        return model.run(row, None, Deadline.after(run_s))

    started = time.monotonic()
    alone = [lone(0)]
    cost = time.monotonic() - started
    # Half of the budget for single rows, half for batches of as many rows.
    rows = min(rows, max(5, int(budget_s / 2 / max(cost, 1e-6))))
    alone += [lone(i) for i in range(1, rows)]
    for row in alone:
        for name, value in row.items():
            if len(value) != copies:
                return Batchable(False, f"output {name!r} has {len(value)} rows for {copies}")
    for size in [s for s in SIZES if s < rows] + [rows]:
        first = (rows - size) // 2
        together = model.run(_part(inputs, first, first + size), None, Deadline.after(run_s))
        for name, value in together.items():
            if len(value) != size:
                return Batchable(False, f"output {name!r} has {len(value)} rows for {size}")
            for i in range(size):
                if not _same_bits(value[i : i + 1], alone[first + i][name][:1]):
                    return Batchable(False, f"a row of output {name!r} differs between alone and among {size}")
    return Batchable(True)


def _part(inputs: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
    return {name: np.ascontiguousarray(array[start:stop]) for name, array in inputs.items()}


def _same_bits(a: Array, b: Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(np.all(a == b)) if a.dtype == object else a.tobytes() == b.tobytes()


def _common_rows(inputs: Mapping[str, Array]) -> int:
    counts = {len(a) if a.ndim else 0 for a in inputs.values()}
    return counts.pop() if len(counts) == 1 else 0


def _shape(spec: TensorSpec, rows: int, like: Array | None) -> list[int]:
    shape = [rows if spec.shape and spec.shape[0] == FREE else d for d in spec.shape[:1]]
    for index, size in enumerate(spec.shape[1:], start=1):
        known = like.shape[index] if like is not None and like.ndim == len(spec.shape) else _INNER
        shape.append(known if size == FREE else size)
    return shape


def _random(rng: np.random.Generator, spec: TensorSpec, shape: list[int]) -> Array:
    if spec.datatype == "BYTES":
        texts: Any = np.empty(shape, object)
        texts.reshape(-1)[:] = [b"%d" % n for n in rng.integers(0, 10, texts.size)]
        return np.asarray(texts)
    if spec.datatype == "BF16":
        # The upper half of a float32 is a bfloat16.
        return (rng.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if spec.dtype.kind == "f":
        return rng.standard_normal(shape).astype(spec.dtype)
    # Small, so that they are valid indices of most tables.
    return rng.integers(0, 2, shape).astype(spec.dtype)
