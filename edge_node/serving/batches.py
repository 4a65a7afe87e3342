"""Requests that may run together, put into one run and taken apart again. PURE.

Laws:
- A job joins others only where the trial showed that company does not change its rows, all its inputs have the same
  number of rows, and everything but that number is alike: release, outputs asked for, the other dimensions.
- Order is kept: the first that came is in the next batch. No batch has more rows than it may, unless one job alone has.
- Every job gets its own rows back, or the run did not answer row by row and is no answer at all.

It must not know event loops, threads or why a job is wanted.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edge_node.serving.controls import Controls
from edge_node.serving.served import Served
from inference.deadlines import Deadline
from inference.onnx_model import RunFailed
from inference.packed import pack_outputs, pack_rows
from schemas import names
from schemas.errors import MlcdnError

Array = np.ndarray[Any, np.dtype[Any]]
Outcome = bytes | MlcdnError


class Ask:
    """One look-up, and what computes it. `as_of` is the fence's stamp from before the inputs were read."""

    __slots__ = ("as_of", "controls", "deadline", "inputs", "key", "outputs", "served")

    def __init__(
        self,
        served: Served,
        key: bytes,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        controls: Controls,
        as_of: int,
        deadline: Deadline,
    ) -> None:
        self.served, self.key, self.inputs, self.outputs = served, key, inputs, outputs
        self.controls, self.as_of, self.deadline = controls, as_of, deadline

    @property
    def name(self) -> str:
        """What purges know it by."""
        return names.prediction_name(self.served.name, self.key.hex())

    @property
    def fresh(self) -> bool:
        """Only memory is asked by age: what another tier holds is older than what memory held."""
        return self.controls.no_cache or self.controls.max_age_s is not None


class Job:
    """A run that one ask needs; `ended` is called once, with the packed outputs or the error."""

    __slots__ = ("alone", "alone_after_failure", "ask", "ended", "group", "has_ended", "queued_ns", "rows", "timer")

    def __init__(self, ask: Ask, ended: Callable[[Outcome], None]) -> None:
        served, outputs = ask.served, ask.outputs
        self.ask, self.ended = ask, ended
        self.queued_ns = time.perf_counter_ns()
        self.timer: asyncio.TimerHandle | None = None
        self.has_ended = self.alone_after_failure = False
        self.rows = _rows(ask.inputs) if served.batchable else 0
        self.alone = self.rows == 0
        self.group: object = (
            (served, outputs)
            if served.inner_fixed
            else (served, outputs, tuple(sorted((name, array.shape[1:]) for name, array in ask.inputs.items())))
        )


class Waiting:
    """Jobs in the order they came, by what may run together. One event loop owns it."""

    def __init__(self) -> None:
        self._groups: dict[object, deque[Job]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: Job) -> None:
        self._count += 1
        # One that runs alone is a group of its own.
        group = self._groups.setdefault(job if job.alone else job.group, deque())
        group.append(job)

    def first(self) -> Job:
        return next(iter(self._groups.values()))[0]

    def take(self, most_rows: int) -> list[Job]:
        """The next batch. What it leaves of its group waits behind the other groups."""
        key, group = next(iter(self._groups.items()))
        batch = [group.popleft()]
        rows = batch[0].rows
        while group and rows + group[0].rows <= most_rows:
            rows += group[0].rows
            batch.append(group.popleft())
        del self._groups[key]
        if group:
            self._groups[key] = group
        self._count -= len(batch)
        return batch

    def drop(self, job: Job) -> bool:
        """Whether it was still waiting."""
        key = job if job.alone else job.group
        group = self._groups.get(key)
        if group is None or job not in group:
            return False
        group.remove(job)
        self._count -= 1
        if not group:
            del self._groups[key]
        return True

    def drain(self) -> list[Job]:
        jobs = [job for group in self._groups.values() for job in group]
        self._groups.clear()
        self._count = 0
        return jobs


def joined(batch: Sequence[Job]) -> Mapping[str, Array]:
    """The inputs of one run."""
    if len(batch) == 1:
        return batch[0].ask.inputs
    return {name: np.concatenate([job.ask.inputs[name] for job in batch]) for name in batch[0].ask.inputs}


def parted(batch: Sequence[Job], outputs: Mapping[str, Array]) -> list[bytes]:
    """The packed outputs of every job. RunFailed where the outputs have not the rows of the inputs."""
    served = batch[0].ask.served
    if len(batch) == 1:
        return [pack_outputs(outputs, served.outputs)]
    counts = [job.rows for job in batch]
    if any(array.shape[:1] != (sum(counts),) for array in outputs.values()):
        raise RunFailed(f"model {served.name} did not answer row by row")
    return pack_rows(outputs, served.outputs, counts)


def _rows(inputs: Mapping[str, Array]) -> int:
    """0 where the inputs do not agree on a number of rows."""
    if len(inputs) == 1:
        (only,) = inputs.values()
        return only.shape[0] if only.ndim else 0
    rows = {array.shape[0] if array.ndim else 0 for array in inputs.values()}
    return rows.pop() if len(rows) == 1 else 0
