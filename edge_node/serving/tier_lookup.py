"""Redis and disk, asked for all the flights of one turn of the loop together, each answer judged after the wait.

Which are asked is each release's choice, made anew now and then (see caching/tier_choice.py).

Laws: a tier's answer is judged with the fence as it is after the await, and again where another tier was waited for
since; what has no answer goes on to the model; a stale one answers, and one refill follows. No error leaves here: a
tier that fails is a tier without an answer.

It must not know engines, HTTP or how tiers store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final
from weakref import WeakKeyDictionary

import structlog

from edge_node.caching.cache import Cache
from edge_node.caching.entry import Entry
from edge_node.caching.lookup import Verdict
from edge_node.caching.tier_choice import TierChoice
from edge_node.serving.controls import Consulted
from edge_node.serving.flights import Flight, Found
from edge_node.serving.freshness import Freshness, now_ms
from edge_node.serving.served import Served
from schemas.metrics import gauge

CHOICE_S: Final = 0.1

log = structlog.get_logger()


class TierLookup:
    """`missed` gets the flights that no tier answered; `land` those that one did; `refill` those found stale."""

    def __init__(
        self,
        cache: Cache,
        freshness: Freshness,
        missed: Callable[[list[Flight]], None],
        land: Callable[[Flight, Found], None],
        refill: Callable[[Flight, Found], None],
    ) -> None:
        self._cache, self._freshness = cache, freshness
        self._missed, self._land, self._refill = missed, land, refill
        self._choices: WeakKeyDictionary[Served, tuple[TierChoice, float]] = WeakKeyDictionary()
        self._asking: list[Flight] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def worth_asking(self, served: Served) -> tuple[str, ...]:
        """The tiers to ask and to fill now."""
        return self.choice(served).asked if self._freshness.shared_tiers_count else ()

    def choice(self, served: Served) -> TierChoice:
        now = time.monotonic()
        choice, until = self._choices.get(served) or (TierChoice(served.wanted.released.cache.tiers), 0.0)
        if now >= until:
            before = choice.asked
            lookup_s = self._cache.lookup_s()
            # A session that was let go must be loaded first.
            asked = choice.decide(lookup_s, None if served.model is None or served.asleep else served.cost.of(1))
            if asked != before or not until:
                for tier in lookup_s:
                    gauge("mlcdn_tier_consulted").labels(served.name, tier).set(tier in asked)
            self._choices[served] = choice, now + CHOICE_S
        return choice

    def ask(self, flights: Sequence[Flight]) -> None:
        """Together with all others of this turn of the loop."""
        if not self._asking:
            asyncio.get_running_loop().call_soon(self._depart)
        self._asking += flights

    async def look(self, flights: list[Flight]) -> list[Flight]:
        """Lands what a tier has, all of one digest; returns the others."""
        served = flights[0].ask.served
        tiers = self.worth_asking(served)
        if not tiers:
            return flights
        asks = {flight.ask.key: flight for flight in flights}

        def accept(entry: Entry) -> bool:
            flight = asks[entry.key]
            verdict = self._freshness.judge(entry, flight.ask)
            if verdict is Verdict.STALE_IF_ERROR and flight.stale is None:
                flight.stale = of_entry(entry, tiers[-1], ())
            return verdict.answers and self._freshness.shared_tiers_count

        found = await self._cache.lookup_shared(list(asks), served.digest, accept, tiers)
        left = []
        for flight in flights:
            hit = found.get(flight.ask.key)
            verdict = self._freshness.judge(hit[0], flight.ask) if hit is not None else Verdict.EXPIRED
            if hit is None or not verdict.answers:
                flight.asked = (*flight.asked, *tiers)
                left.append(flight)
                continue
            entry, tier = hit
            passed = ("memory", *tiers[: tiers.index(tier)])
            one = of_entry(entry, tier, tuple(Consulted(t, False) for t in passed))
            self._land(flight, one)
            if verdict is Verdict.STALE:
                self._refill(flight, one)
        return left

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _depart(self) -> None:
        flights, self._asking = self._asking, []
        by_digest: dict[str, list[Flight]] = {}
        for flight in flights:
            by_digest.setdefault(flight.ask.served.digest, []).append(flight)
        for together in by_digest.values():
            task = asyncio.get_running_loop().create_task(self._look_and_go_on(together))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _look_and_go_on(self, flights: list[Flight]) -> None:
        left = flights
        try:
            left = await self.look(flights)
        except Exception:
            # A defect of ours: the model can still answer.
            log.exception("tier_lookup_broke")
        self._missed([flight for flight in left if flight.outcome is None])


def of_entry(entry: Entry, tier: str, missed: tuple[Consulted, ...]) -> Found:
    # Negative when stale, as RFC 9211 has it.
    ttl_s = (entry.fresh_until_ms - now_ms()) // 1_000
    return Found(entry.body, tier, entry.stored_at_ms, (*missed, Consulted(tier, True, ttl_s=ttl_s)), entry)
