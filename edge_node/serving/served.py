"""A release as a worker serves it: from its session, or from the origin.

Law: what still needs its session has entered it and not left, so it is closed when the last has left. It must not know
slots, swaps, caches or requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edge_node.caching.keys import PlainKeys, prediction_key
from edge_node.serving.placement import RunCost
from inference.datatypes import FREE, TensorSpec
from inference.onnx_model import OnnxModel
from schemas.events import Tensor
from streams.folds.wanted import Channel, Wanted, seat

if TYPE_CHECKING:
    from edge_node.serving.batches import Ask
    from edge_node.serving.engine import Engine

Array = np.ndarray[Any, np.dtype[Any]]


class Prepared(msgspec.Struct, frozen=True):
    """A session that is warm, and what its runs cost."""

    model: OnnxModel
    cost: RunCost


class Served:
    """A release that answers: from its session, or, where there is none, from the origin."""

    def __init__(self, wanted: Wanted, channel: Channel, prepared: Prepared | None, path: str = "") -> None:
        """`path` is its file's, in the node's directory."""
        self.wanted, self.channel, self.path = wanted, channel, path
        self.digest = wanted.digest  # asked for by every request, and hashed where there are several files
        self.model = prepared.model if prepared is not None else None
        self.cost = prepared.cost if prepared is not None else RunCost(0.0, may_run_in_loop=False)
        self.batchable = prepared is not None and wanted.released.batching.batchable
        self.inputs: tuple[TensorSpec, ...]
        self.outputs: tuple[TensorSpec, ...]
        if self.model is not None:
            self.inputs, self.outputs = self.model.inputs, self.model.outputs
        else:
            self.inputs, self.outputs = _specs(wanted.released.inputs), _specs(wanted.released.outputs)
        # Whether the number of rows is all that two requests' inputs may differ in.
        self.inner_fixed = all(spec.ranked and FREE not in spec.shape[1:] for spec in self.inputs)
        policy = wanted.released.cache
        seconds = (policy.ttl_s, policy.stale_while_revalidate_s, policy.stale_if_error_s)
        # Fresh for so long, then stale while it is refilled, and stale where the model fails.
        self.windows_ms = tuple(int(s * 1e3) for s in seconds)
        # Where its jobs go: its slot's. None before it is swapped in, and for ever where the origin answers.
        self.engine: Engine | None = None
        self.in_flight = 0
        # Who is told of its answers: see sampling.py.
        self.witness: Callable[[Ask, bytes], None] | None = None
        self._keys: PlainKeys | None = None
        self._drained: asyncio.Event | None = None

    @property
    def name(self) -> str:
        return self.wanted.model

    @property
    def seat(self) -> str:
        return seat(self.name, self.channel)

    @property
    def asleep(self) -> bool:
        """Whether its session was let go, and must be loaded again before it can run."""
        return self.model is not None and not self.model.is_open

    @property
    def memory_bytes(self) -> int:
        """What its session takes, as its trial measured it."""
        if self.model is None or not self.model.is_open:
            return 0
        return max(self.wanted.released.memory_bytes, self.model.size_bytes)

    def key_of(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        parameters: Mapping[str, Any] | None,
        tenant: str,
    ) -> bytes:
        """`prediction_key` of these, the short way where they are as usual."""
        if len(inputs) == 1 and outputs is None and not parameters and not tenant:
            ((name, array),) = inputs.items()
            if name == self.inputs[0].name and array.dtype == self.inputs[0].dtype and not array.dtype.hasobject:
                if self._keys is None:
                    self._keys = PlainKeys(self.name, self.digest, name, array.dtype)
                little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
                return self._keys.of(array.shape, little.tobytes())
        return prediction_key(self.name, self.digest, inputs, outputs, parameters, tenant)

    def enter(self) -> None:
        """A request that may still need the session; `leave` follows, whatever happens."""
        self.in_flight += 1

    def leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight and self._drained is not None:
            self._drained.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()

    async def drained(self) -> None:
        """Once it answers nothing new: when the last request has left."""
        while self.in_flight:
            self._drained = asyncio.Event()
            await self._drained.wait()


def _specs(tensors: Sequence[Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t.name, t.datatype, t.shape, optional=t.optional, ranked=t.ranked) for t in tensors)
