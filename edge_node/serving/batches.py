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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edge_node.serving.served import Served
from inference.deadlines import Deadline
from inference.onnx_model import RunFailed
from inference.protocol import encode_outputs
from schemas.errors import MlcdnError

Array = np.ndarray[Any, np.dtype[Any]]
Outcome = bytes | MlcdnError


class Job:
    """What one request wants computed; `land` is called once, with the packed outputs or the error."""

    __slots__ = (
        "alone",
        "alone_after_failure",
        "deadline",
        "group",
        "inputs",
        "land",
        "landed",
        "outputs",
        "queued_ns",
        "rows",
        "served",
        "timer",
    )

    def __init__(
        self,
        served: Served,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: Deadline,
        land: Callable[[Outcome], None],
        queued_ns: int,
    ) -> None:
        self.served, self.inputs, self.outputs = served, inputs, outputs
        self.deadline, self.land, self.queued_ns = deadline, land, queued_ns
        self.timer: asyncio.TimerHandle | None = None
        self.landed = self.alone_after_failure = False
        self.rows = _rows(inputs) if served.batchable else 0
        self.alone = self.rows == 0
        self.group: object = (served, outputs if outputs is None else tuple(outputs), _inner(served, inputs))


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
        return batch[0].inputs
    return {name: np.concatenate([job.inputs[name] for job in batch]) for name in batch[0].inputs}


def parted(batch: Sequence[Job], outputs: Mapping[str, Array]) -> list[bytes]:
    """The packed outputs of every job. RunFailed where the outputs have not the rows of the inputs."""
    specs = batch[0].served.outputs
    if len(batch) == 1:
        return [encode_outputs(outputs, specs)]
    total = sum(job.rows for job in batch)
    if any(array.shape[:1] != (total,) for array in outputs.values()):
        raise RunFailed(f"model {batch[0].served.name} did not answer row by row")
    packed = []
    start = 0
    for job in batch:
        end = start + job.rows
        packed.append(encode_outputs({name: array[start:end] for name, array in outputs.items()}, specs))
        start = end
    return packed


def _rows(inputs: Mapping[str, Array]) -> int:
    """0 where the inputs do not agree on a number of rows."""
    if len(inputs) == 1:
        (only,) = inputs.values()
        return only.shape[0] if only.ndim else 0
    rows = {array.shape[0] if array.ndim else 0 for array in inputs.values()}
    return rows.pop() if len(rows) == 1 else 0


def _inner(served: Served, inputs: Mapping[str, Array]) -> object:
    """What must be alike beside the number of rows; nothing where the signature fixes it."""
    if served.inner_fixed:
        return None
    return tuple(sorted((name, array.shape[1:]) for name, array in inputs.items()))
