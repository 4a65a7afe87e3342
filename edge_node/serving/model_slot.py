"""One model as a worker serves it: what is live, what was live before, how much is in flight.

Laws:
- A request holds the `Served` it began with to its end, so a swap is one assignment and no answer mixes two releases.
- The previous release stays loaded for a rollback; the one before it is closed once the last request has left it.
- Each slot has threads of its own: a model that hangs until its deadline keeps no other model from running.
- The queue is bounded: a computation above the release's `max_queue` is refused at once, and not kept to time out.

It must not know the board, caches or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from inference.datatypes import TensorSpec
from inference.deadlines import Deadline
from inference.onnx_model import OnnxModel
from schemas.errors import BadInput, NotFound, NotReady, Overloaded
from streams.folds.releases import Wanted

Array = np.ndarray[Any, np.dtype[Any]]


class Served:
    """A release that answers: from its session, or, where `model` is None, from the origin."""

    def __init__(self, wanted: Wanted, channel: str, model: OnnxModel | None) -> None:
        self.wanted, self.channel, self.model = wanted, channel, model
        self.slot: ModelSlot | None = None
        self.in_flight = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def name(self) -> str:
        return self.wanted.model

    @property
    def digest(self) -> str:
        return self.wanted.digest

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        if self.model is not None:
            return self.model.inputs
        return tuple(TensorSpec(t.name, t.datatype, t.shape) for t in self.wanted.released.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        if self.model is not None:
            return self.model.outputs
        return tuple(TensorSpec(t.name, t.datatype, t.shape) for t in self.wanted.released.outputs)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For as long as a request may still need the session."""
        self.in_flight += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._empty.set()

    async def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None, deadline: Deadline
    ) -> dict[str, Array]:
        if self.model is None or self.slot is None:
            raise NotReady(f"model {self.name} has no session here")
        return await self.slot.run(self.model, self.wanted.released.limits.max_queue, inputs, outputs, deadline)

    async def drained(self) -> None:
        await self._empty.wait()


class ModelSlot:
    """Where one model is served from. One event loop owns it; only `run` leaves for a thread."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.current: Served | None = None
        self.previous: Served | None = None
        # What the last attempt to take over a newer release came to; empty when there was none or it succeeded.
        self.error = ""
        self.loading = False
        self.queued = 0
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"run-{name}")
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> Served:
        if self.current is None:
            reason = f": {self.error}" if self.error else " yet"
            raise NotReady(f"model {self.name} is not served here{reason}")
        return self.current

    @property
    def in_flight(self) -> int:
        return self.current.in_flight if self.current else 0

    def swap(self, new: Served) -> Served | None:
        """`new` answers from the next request on; returns what answered before."""
        old, before = self.current, self.previous
        new.slot = self
        self.current, self.error = new, ""
        if old is not None and old.digest == new.digest:
            if old.model is not None and old.model is not new.model:
                self._close(old)
            return old
        self.previous = old
        if before is not None and before.model is not new.model:
            self._close(before)
        return old

    def loaded(self, digest: str) -> OnnxModel | None:
        """The session of an artifact that is still in memory: a rollback needs no file."""
        for served in (self.current, self.previous):
            if served is not None and served.digest == digest and served.model is not None:
                return served.model
        return None

    async def run(
        self,
        model: OnnxModel,
        limit: int,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: Deadline,
    ) -> dict[str, Array]:
        if self.queued >= limit:
            raise Overloaded(f"model {self.name} has {limit} computations waiting")
        self.queued += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, model.run, inputs, outputs, deadline)
        finally:
            self.queued -= 1

    async def close(self) -> None:
        """After the last request has left: nothing of the model stays in memory."""
        for served in (self.current, self.previous):
            if served is not None:
                self._close(served)
        self.current = self.previous = None
        await asyncio.gather(*self._closing)
        self._threads.shutdown(wait=False)

    def _close(self, served: Served) -> None:
        async def drain_and_close() -> None:
            await served.drained()
            if served.model is not None:
                served.model.close()

        task = asyncio.get_running_loop().create_task(drain_and_close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class Slots:
    """The models of a worker by name. `default` is the one that `/predict` means where a request names none."""

    def __init__(self, default: str, threads: int) -> None:
        self._default, self._threads = default, threads
        self._slots: dict[str, ModelSlot] = {}

    def __iter__(self) -> Iterator[ModelSlot]:
        return iter(list(self._slots.values()))

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, name: str) -> ModelSlot | None:
        return self._slots.get(name)

    def get(self, name: str) -> ModelSlot:
        slot = self._slots.get(name)
        if slot is None:
            raise NotFound(f"no model {name[:80]!r}; served here: {sorted(self._slots) or 'none'}")
        return slot

    def meant(self, name: str | None) -> ModelSlot:
        """The named model, else the only one, else the default."""
        if name is not None:
            return self.get(name)
        if len(self._slots) == 1:
            return next(iter(self._slots.values()))
        if self._default:
            return self.get(self._default)
        if not self._slots:
            raise NotReady("no model is served here yet")
        raise BadInput(f"say which model: {sorted(self._slots)}")

    def add(self, name: str) -> ModelSlot:
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = ModelSlot(name, self._threads)
        return slot

    def remove(self, name: str) -> ModelSlot | None:
        """The slot answers nothing new from here on; the caller closes it."""
        return self._slots.pop(name, None)
