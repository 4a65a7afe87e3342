"""Predictions for who has a task to wait in: the full path's way to the core.

    check the tensors → a key a row → `Predictor.begin_all` → wait for the flights, as long as the caller wants to

Laws: a row is looked up by itself; rows of a model that may not run together are asked for one after the other, so that one
request does not take the whole queue of its model; a caller's deadline, if shorter than the release's, ends its waiting
and nothing else.

It must not know HTTP, tiers or engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from edge_node.serving.batches import Ask
from edge_node.serving.controls import Consulted, Controls
from edge_node.serving.flights import Flight, Found, Outcome
from edge_node.serving.predict import Answer, Predictor, collapsed, model_tier
from edge_node.serving.sampling import tell
from edge_node.serving.served import Served
from inference.deadlines import Deadline
from schemas.errors import BadInput, BadTensor, DeadlineExceeded, MlcdnError

Array = np.ndarray[Any, np.dtype[Any]]


class Asking:
    """One event loop owns it."""

    def __init__(self, core: Predictor) -> None:
        self._core = core

    def now(self) -> int:
        """The stamp that a request starting here is of. Read it before its body."""
        return self._core.now()

    async def predict(
        self,
        served: Served,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        controls: Controls,
        parameters: Mapping[str, Any] | None = None,
    ) -> Answer:
        return (await self._predict(served, [inputs], outputs, controls, parameters))[0]

    async def predict_rows(
        self, served: Served, rows: Sequence[Mapping[str, Array]], controls: Controls
    ) -> list[Answer]:
        """Each row looked up by itself; those that no tier has, computed together where the model allows it."""
        return await self._predict(served, rows, None, controls, None)

    async def _predict(
        self,
        served: Served,
        rows: Sequence[Mapping[str, Array]],
        outputs: Sequence[str] | None,
        controls: Controls,
        parameters: Mapping[str, Any] | None,
    ) -> list[Answer]:
        limit_ms = served.wanted.released.limits.deadline_ms
        deadline = Deadline.after(limit_ms / 1e3)
        check(served, rows, outputs)
        asks = []
        for inputs in rows:
            key = served.key_of(inputs, outputs, parameters, controls.tenant)
            asks.append(Ask(served, key, inputs, outputs, controls, controls.as_of, deadline))
        with served.held():
            found = self._find(asks)
            if controls.deadline_ms is not None and controls.deadline_ms < limit_ms:
                try:
                    async with asyncio.timeout(controls.deadline_ms / 1e3):
                        landed = await found
                except TimeoutError:
                    raise DeadlineExceeded("no answer before the deadline") from None
            else:
                landed = await found
        if served.witness is not None:
            for ask, one in zip(asks, landed, strict=True):
                tell(ask, one.body)
        return [self._core.answer(ask, one) for ask, one in zip(asks, landed, strict=True)]

    async def _find(self, asks: Sequence[Ask]) -> list[Found]:
        served, controls = asks[0].served, asks[0].controls
        if len(asks) > 1 and served.engine is not None and not served.batchable:
            # One after the other: a batch of one request must not take the whole queue of its model.
            return [(await self._find([ask]))[0] for ask in asks]
        if controls.no_store or not served.wanted.released.cache.enabled:
            return await self._uncached(asks, "request" if controls.no_store else "bypass")
        if controls.only_if_cached:
            return await self._only_cached(asks)
        begun = [
            one if isinstance(one, Found) else _landing(one, ask)
            for ask, one in zip(asks, self._core.begin_all(asks), strict=True)
        ]
        waiting = [one for one in begun if not isinstance(one, Found)]
        if waiting:
            await _all(waiting)
        return [one if isinstance(one, Found) else one.result() for one in begun]

    async def _uncached(self, asks: Sequence[Ask], reason: str) -> list[Found]:
        waiting = [_future() for _ in asks]
        self._core.compute([(ask, partial(_settle, future)) for ask, future in zip(asks, waiting, strict=True)])
        bodies = await _all(waiting)
        trail = (Consulted("edge", False, reason),)
        return [Found(body, model_tier(ask.served), 0, trail) for ask, body in zip(asks, bodies, strict=True)]

    async def _only_cached(self, asks: Sequence[Ask]) -> list[Found]:
        found = []
        for ask in asks:
            one = await self._core.look_up(ask)
            if one is None:
                raise DeadlineExceeded("not cached, and only-if-cached was asked")
            found.append(one)
        return found


def check(served: Served, rows: Sequence[Mapping[str, Array]], outputs: Sequence[str] | None) -> None:
    """BadTensor unless the release's signature allows them."""
    known = {spec.name for spec in served.outputs}
    for name in outputs or ():
        if name not in known:
            raise BadInput(f"unknown output {name[:80]!r}; model {served.name} has {sorted(known)}")
    if served.model is not None:
        for inputs in rows:
            served.model.validate_inputs(inputs)
    else:
        # The rest is the origin's to check, which has the model.
        known_inputs = {spec.name for spec in served.inputs}
        required = {spec.name for spec in served.inputs if not spec.optional}
        for inputs in rows:
            for name in sorted(inputs.keys() - known_inputs):
                raise BadTensor(f"input {name[:80]!r} is unknown")
            for name in sorted(required - inputs.keys()):
                raise BadTensor(f"input {name[:80]!r} is missing")


def _landing(flight: Flight, ask: Ask) -> asyncio.Future[Found]:
    future, joined = _future(), flight.ask is not ask

    def land(outcome: Outcome) -> None:
        _settle(future, collapsed(outcome) if joined and isinstance(outcome, Found) else outcome)

    flight.wait(land)
    return future


def _future() -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    # Its waiter may have gone at its own deadline: an error is then nobody's, and not worth a line on stderr.
    future.add_done_callback(lambda f: f.cancelled() or f.exception())
    return future


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if not future.done():
        if isinstance(outcome, MlcdnError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


async def _all(futures: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """Every result, or the first error once all have ended, so that none is left unheard."""
    if len(futures) == 1:
        return [await futures[0]]
    await asyncio.wait(futures)
    return [future.result() for future in futures]
