"""The core of a prediction: key → memory → [in flight?] → Redis → disk → model or origin → fill. Both doors end here.

    1. the fence was read before the inputs were (`Ask.as_of`)
    2. memory is asked; a hit is an answer
    3. a twin in flight is joined, if no purge of its scopes lies between
    4. else a flight is registered, which asks Redis and disk, then has its job run by the model's engine
    5. the fence is read again: what was read before a purge is not an answer from a cache, nor worth a fill
    6. memory is filled before the answer leaves, Redis and disk behind it

`begin` is 2 to 4 and returns at once: the answer, or the flight that will land. `asking.py` waits for it, the lane does not.

Laws: a key holds the digest, so no release is answered by its predecessor; Redis and disk count only once the agent has
caught up; a cache that fails costs a counter and its time-out; every flight lands by the release's deadline, and a
caller's own, shorter one cuts off only its waiting.

It must not know HTTP, how tiers store, or where models come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, Final

import msgspec
import numpy as np

from edge_node.caching.cache import Cache
from edge_node.caching.lookup import Verdict
from edge_node.caching.memory_tier import Place
from edge_node.caching.tallies import missed
from edge_node.caching.tier_choice import TierChoice
from edge_node.serving.batches import Ask, Job
from edge_node.serving.board_view import BoardView
from edge_node.serving.controls import Consulted
from edge_node.serving.flights import Flight, Flights, Found
from edge_node.serving.forwarding import Forwarding
from edge_node.serving.freshness import Freshness, now_ms
from edge_node.serving.hottest import Hottest
from edge_node.serving.origin_client import OriginClient
from edge_node.serving.served import Served
from edge_node.serving.tier_lookup import TierLookup, of_entry
from schemas.errors import MlcdnError, NotReady

Array = np.ndarray[Any, np.dtype[Any]]
CACHE_TIERS: Final = ("memory", "redis", "disk")
# Gets the packed outputs or the error.
Ended = Callable[[bytes | MlcdnError], None]


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

    def begin(self, ask: Ask) -> Found | Flight:
        """What memory has, or the flight that will have it: a twin's, or one that departs now."""
        one, departing = self._begin(ask)
        if departing:
            self._depart([departing])
        return one

    def begin_all(self, asks: Sequence[Ask]) -> list[Found | Flight]:
        """`begin` for each of one request's rows: they depart together."""
        begun: list[Found | Flight] = []
        leaving: list[Flight] = []
        for ask in asks:
            one, departing = self._begin(ask)
            begun.append(one)
            if departing:
                leaving.append(departing)
        if leaving:
            self._depart(leaving)
        return begun

    def compute(self, rows: Sequence[tuple[Ask, Ended]]) -> None:
        """Those of one request, whatever caches have. Each `Ended` gets its outcome, perhaps before this returns."""
        served = rows[0][0].served
        if served.engine is None or served.model is None:
            for ask, ended in rows:
                self.forwarding.submit(ask, ended)
            return
        try:
            served.engine.submit([Job(ask, ended) for ask, ended in rows])
        except MlcdnError as error:
            for _, ended in rows:
                ended(error)

    async def look_up(self, ask: Ask) -> Found | None:
        """What a cache has, and nothing is computed."""
        hit, _ = self._memory(ask)
        if hit is None:
            flight = Flight(ask, False)
            await self._tiers.look([flight])
            return flight.outcome if isinstance(flight.outcome, Found) else None
        return hit

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

    def place(self, key: bytes) -> Place | None:
        """Where memory holds the entry of a hit."""
        return self._cache.place(key)

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
        # A turn's flights may be of several requests; the rows of one share its deadline.
        for _, rows in groupby(flights, lambda flight: id(flight.ask.deadline)):
            self.compute([(flight.ask, partial(self._computed, flight)) for flight in rows])

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
        self._land(flight, Found(outcome, model_tier(ask.served), 0, trail, entry))

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


def collapsed(found: Found) -> Found:
    """As one sees it who joined."""
    *first, last = found.trail
    return msgspec.structs.replace(found, trail=(*first, msgspec.structs.replace(last, collapsed=True)))


@lru_cache(1024)
def _missed_trail(asked: tuple[str, ...], why: str, stored: bool) -> tuple[Consulted, ...]:
    return tuple(Consulted(tier, False, why, stored=stored) for tier in asked)


def model_tier(served: Served) -> str:
    return "model" if served.model is not None else "origin"
