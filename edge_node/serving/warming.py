"""What a session goes through before it answers: a run that pays for first-time work, and runs that show what it costs.

Laws: it is called in a thread beside live traffic and takes a few runs' time; where zeros are no input that the model
takes, its golden inputs are, and where it takes neither its cost is that of the run that was refused. It must not know
slots, boards or queues.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog

from edge_node.serving.batches import Ask
from edge_node.serving.placement import RunCost
from inference.deadlines import Deadline
from inference.golden import GoldenRefused, read_golden
from inference.onnx_model import OnnxModel, RunFailed
from inference.packed import pack_outputs
from schemas.errors import BadTensor, MlcdnError
from streams.folds.wanted import Wanted

_TIMES: Final = 3
_ROWS: Final = 32
# A model that takes longer is run in threads whatever its rows cost.
_SLOW_S: Final = 0.05
_VERY_SLOW_S: Final = 0.5
_PREFILL_S: Final = 1.0

Array = np.ndarray[Any, np.dtype[Any]]

log = structlog.get_logger()


def warm(model: OnnxModel, golden: Path | None, wanted: Wanted) -> RunCost:
    inputs = None
    if golden is not None:
        try:
            inputs = read_golden(golden).inputs
        except GoldenRefused as refused:
            # The agent's trial has held the model against it; for warming, zeros will do.
            log.warning("golden_unreadable", model=wanted.model, cause=str(refused))
    limit_s = wanted.released.limits.deadline_ms / 1e3
    began = time.perf_counter()
    model.warm(inputs, Deadline.after(limit_s))
    first_s = time.perf_counter() - began
    in_loop = not model.summary.has_control_flow
    if first_s > min(_VERY_SLOW_S, limit_s / 2):
        return RunCost.measured(first_s, may_run_in_loop=in_loop)
    one_s = _best(model, model.zeros(), first_s, limit_s)
    batching = wanted.released.batching
    rows = min(_ROWS, batching.max_size)
    if not batching.batchable or rows < 2 or one_s > _SLOW_S:
        return RunCost.measured(one_s, may_run_in_loop=in_loop)
    rows_s = _best(model, model.zeros(rows), one_s * rows, limit_s)
    return RunCost.measured(one_s, rows, rows_s, may_run_in_loop=in_loop)


def prefilled(model: OnnxModel, asks: Sequence[Ask]) -> list[tuple[Ask, bytes]]:
    """Each by itself, as it would be computed; those that the model does not take are left out."""
    until = time.monotonic() + _PREFILL_S
    found = []
    for ask in asks:
        if time.monotonic() > until:
            break
        try:
            model.validate_inputs(ask.inputs)
            outputs = model.run(ask.inputs, None, Deadline(until))
        except MlcdnError as error:
            log.debug("not_prefilled", cause=str(error))
            continue
        found.append((ask, pack_outputs(outputs, model.outputs)))
    return found


def _best(model: OnnxModel, inputs: Mapping[str, Array], otherwise_s: float, limit_s: float) -> float:
    """The shortest of a few runs: the others were disturbed."""
    best = otherwise_s
    for _ in range(_TIMES):
        began = time.perf_counter()
        try:
            model.run(inputs, None, Deadline.after(limit_s))
        except (BadTensor, RunFailed):
            return otherwise_s
        best = min(best, time.perf_counter() - began)
        if best > _SLOW_S:
            break
    return best
