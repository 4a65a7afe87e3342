"""The core of a prediction: key → memory → [in flight?] → Redis → disk → model or origin → fill. Both doors end here.

    1. the fence was read before the inputs were (`Ask.as_of`)
    2. memory is asked; a hit is an answer
    3. a twin in flight is joined, if no purge of its scopes lies between
    4. else a flight is registered, which asks Redis and disk, then has its job run by the model's engine
    5. the fence is read again: what was read before a purge is not an answer from a cache, nor worth a fill
    6. memory is filled before the answer leaves, Redis and disk behind it

`begin` is 2 to 4 and returns at once: the answer, or the flight that will land. `predict` waits for it.

Laws: a key holds the digest, so no release is answered by its predecessor; Redis and disk count only once the agent has
caught up; a cache that fails costs a counter and its time-out; every flight lands by the release's deadline, and a
caller's own, shorter one cuts off only its waiting.

It must not know HTTP, how tiers store, or where models come from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Final

import msgspec
import numpy as np

from edge_node.caching.cache import Cache
from edge_node.caching.lookup import Verdict
from edge_node.caching.tallies import missed
from edge_node.caching.tier_choice import TierChoice
from edge_node.serving.batches import Ask, Job
from edge_node.serving.board_view import BoardView
from edge_node.serving.controls import Consulted, Controls
from edge_node.serving.flights import Flight, Flights, Found, Outcome
from edge_node.serving.forwarding import Forwarding
from edge_node.serving.freshness import Freshness, now_ms
from edge_node.serving.hottest import Hottest
from edge_node.serving.origin_client import OriginClient
from edge_node.serving.served import Served
from edge_node.serving.tier_lookup import TierLookup, of_entry
from inference.deadlines import Deadline
from schemas.errors import BadInput, BadTensor, DeadlineExceeded, MlcdnError, NotReady

Array = np.ndarray[Any, np.dtype[Any]]
CACHE_TIERS: Final = ("memory", "redis", "disk")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`body` is the packed outputs; `position` is ``releases/invalidations``, as obeyed."""

    body: bytes
    tier: str
    key: bytes
    age_s: int
    trail: tuple[Consulted, ...]
    position: str

    @property
    def cached(self) -> bool:
        return self.tier in CACHE_TIERS


class Predictor:
    """One event loop owns it."""

    def __init__(self, view: BoardView, cache: Cache, origin: OriginClient | None) -> None:
        self._cache, self._freshness = cache, Freshness(view, cache)
        self._flights = Flights(self._freshness.is_valid)
        self._tiers = TierLookup(cache, self._freshness, self._compute_all, self._land, self._refill)
        self.forwarding = Forwarding(origin)
        self.hottest = Hottest()

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def now(self) -> int:
        """The stamp that a request starting here is of. Read it before its body."""
        return self._freshness.obey()

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

    def begin(self, ask: Ask) -> Found | Flight:
        """What memory has, or the flight that will have it: a twin's, or one that departs now."""
        one, departing = self._begin(ask)
        if departing:
            self._depart([departing])
        return one

    def answer(self, ask: Ask, found: Found) -> Answer:
        return Answer(
            body=found.body,
            tier=found.tier,
            key=ask.key,
            age_s=self.age_s(found),
            trail=found.trail,
            position=self.position(ask),
        )

    def age_s(self, found: Found) -> int:
        return max(0, (now_ms() - found.stored_at_ms) // 1_000) if found.stored_at_ms else 0

    def position(self, ask: Ask) -> str:
        """What an answer given now obeys."""
        return self._freshness.position(ask)

    def tiers_of(self, served: Served) -> TierChoice:
        """Which tiers outside this process are asked for it, and why."""
        return self._tiers.choice(served)

    def prefill(self, served: Served, answers: Sequence[tuple[Ask, bytes]]) -> None:
        """Memory knows these answers of a release that is about to serve; `answers` name asks of the one before."""
        for asked, body in answers:
            key = served.key_of(asked.inputs, None, None, "")
            ask = Ask(served, key, asked.inputs, None, asked.controls, asked.as_of, asked.deadline)
            if self._freshness.is_valid(ask):
                self._cache.fill(self._freshness.entry(ask, body), shared=False)

    async def close(self) -> None:
        await self._tiers.close()
        await self.forwarding.close()
        for flight in self._flights:
            self._fail(flight, NotReady("the worker stops"))

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
        return [self.answer(ask, one) for ask, one in zip(asks, landed, strict=True)]

    async def _find(self, asks: Sequence[Ask]) -> list[Found]:
        served, controls = asks[0].served, asks[0].controls
        if len(asks) > 1 and served.engine is not None and not served.batchable:
            # One after the other: a batch of one request must not take the whole queue of its model.
            return [(await self._find([ask]))[0] for ask in asks]
        if controls.no_store or not served.wanted.released.cache.enabled:
            return await self._uncached(asks, "request" if controls.no_store else "bypass")
        if controls.only_if_cached:
            return await self._only_cached(asks)
        begun: list[Found | asyncio.Future[Found]] = []
        departing: list[Flight] = []
        for ask in asks:
            one, leaving = self._begin(ask)
            if leaving:
                departing.append(leaving)
            begun.append(one if isinstance(one, Found) else _landing(one, joined=leaving is None))
        if departing:
            self._depart(departing)
        waiting = [one for one in begun if not isinstance(one, Found)]
        if waiting:
            await _all(waiting)
        return [one if isinstance(one, Found) else one.result() for one in begun]

    def _begin(self, ask: Ask) -> tuple[Found | Flight, Flight | None]:
        """2 to 4 without an await, and the flight that is to depart."""
        hit, stale = self._memory(ask)
        if hit is not None:
            self.hottest.asked_again(ask)
            refill = stale is not None and self._flights.find(ask, True) is None
            return hit, self._flights.start(ask, True, stale) if refill else None
        fresh = ask.fresh
        flight = self._flights.find(ask, fresh)
        if flight is not None:
            return flight, None
        flight = self._flights.start(ask, fresh, stale)
        return flight, flight

    def _memory(self, ask: Ask) -> tuple[Found | None, Found | None]:
        """An answer, if memory has one; and what may stand in, or is to be refilled, if that is stale."""
        self._freshness.obey()
        if ask.controls.no_cache or (entry := self._cache.peek(ask.key, ask.served.digest)) is None:
            return None, None
        verdict = self._freshness.judge(entry, ask)
        if verdict.refused:
            missed("memory", str(verdict))
            return None, None
        found = of_entry(entry, "memory", ())
        return (found if verdict.answers else None), (found if verdict is not Verdict.FRESH else None)

    def _depart(self, flights: list[Flight]) -> None:
        if not self._tiers.worth_asking(flights[0].ask.served):
            self._compute_all(flights)
            return
        fresh = [flight for flight in flights if flight.fresh]
        if fresh:
            self._compute_all(fresh)
        if len(fresh) < len(flights):
            self._tiers.ask([flight for flight in flights if not flight.fresh])

    def _compute_all(self, flights: list[Flight]) -> None:
        for flight in flights:
            self._compute(flight.ask, partial(self._computed, flight))

    def _compute(self, ask: Ask, ended: Callable[[bytes | MlcdnError], None]) -> None:
        """`ended` gets the packed outputs or the error, perhaps before this returns."""
        engine = ask.served.engine
        if engine is None or ask.served.model is None:
            self.forwarding.submit(ask, ended)
            return
        try:
            engine.submit(Job(ask, ended))
        except MlcdnError as error:
            ended(error)

    def _computed(self, flight: Flight, outcome: bytes | MlcdnError) -> None:
        if isinstance(outcome, MlcdnError):
            self._fail(flight, outcome)
            return
        ask = flight.ask
        # 5, 6. What was purged meanwhile is answered to who asked before, and not kept.
        entry = self._freshness.entry(ask, outcome) if self._freshness.is_valid(ask) else None
        if entry is not None:
            self._cache.fill(entry, shared=True, tiers=self._tiers.worth_asking(ask.served))
        trail = _missed_trail(flight.asked, flight.why, entry is not None)
        self._land(flight, Found(outcome, _model_tier(ask.served), 0, trail, entry))

    def _fail(self, flight: Flight, error: MlcdnError) -> None:
        self._flights.end(flight)
        flight.land(flight.stale if flight.stale is not None and error.status >= 500 else error)

    def _land(self, flight: Flight, found: Found) -> None:
        self._flights.end(flight)
        flight.land(found)

    def _refill(self, flight: Flight, stale: Found) -> None:
        """`flight` was answered by what is stale: one flight fetches what is fresh."""
        if self._flights.find(flight.ask, True) is None:
            self._depart([self._flights.start(flight.ask, True, stale)])

    async def _uncached(self, asks: Sequence[Ask], reason: str) -> list[Found]:
        waiting = []
        for ask in asks:
            future = _future()
            self._compute(ask, partial(_settle, future))
            waiting.append(future)
        bodies = await _all(waiting)
        trail = (Consulted("edge", False, reason),)
        return [Found(body, _model_tier(ask.served), 0, trail) for ask, body in zip(asks, bodies, strict=True)]

    async def _only_cached(self, asks: Sequence[Ask]) -> list[Found]:
        found: list[Found] = []
        for ask in asks:
            hit, _ = self._memory(ask)
            if hit is None:
                flight = Flight(ask, False)
                await self._tiers.look([flight])
                if not isinstance(flight.outcome, Found):
                    raise DeadlineExceeded("not cached, and only-if-cached was asked")
                hit = flight.outcome
            found.append(hit)
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
        expected = {spec.name: spec for spec in served.inputs}
        for inputs in rows:
            for name in inputs.keys() ^ expected.keys():
                raise BadTensor(f"input {name[:80]!r} is {'unknown' if name in inputs else 'missing'}")


def collapsed(found: Found) -> Found:
    """As one sees it who joined."""
    *first, last = found.trail
    return msgspec.structs.replace(found, trail=(*first, msgspec.structs.replace(last, collapsed=True)))


def _landing(flight: Flight, *, joined: bool) -> asyncio.Future[Found]:
    future = _future()

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


@lru_cache(1024)
def _missed_trail(asked: tuple[str, ...], why: str, stored: bool) -> tuple[Consulted, ...]:
    return tuple(Consulted(tier, False, why, stored=stored) for tier in asked)


def _model_tier(served: Served) -> str:
    return "model" if served.model is not None else "origin"
