"""Computations in flight, and who may share them. No I/O.

Laws:
- Identical requests share one computation: same key, and inputs read no earlier than the last purge of its scopes.
  A request that begins after a purge never joins a leader that began before it.
- A flight is registered before anything is awaited, so that no twin slips in between.
- Each follower of a failed leader gets the error once; the flight is gone by then, so the next request tries anew,
  alone.

It must not know tiers, engines or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from edge_node.caching.entry import Entry
from edge_node.serving.batches import Ask
from edge_node.serving.controls import Consulted
from schemas.errors import MlcdnError


class Found(msgspec.Struct, frozen=True):
    """What a look-up or a flight comes to. `entry` is what memory holds of it; None where nothing was kept."""

    body: bytes
    tier: str
    stored_at_ms: int
    trail: tuple[Consulted, ...]
    entry: Entry | None = None


Outcome = Found | MlcdnError
Land = Callable[[Outcome], None]
_MEMORY: Final = ("memory",)


class Flight:
    """`fresh`: no tier is asked, the model is. `stale` may stand in where the model fails.

    `asked` are the tiers that had no answer, and `why` says so for all.
    """

    __slots__ = ("_waiting", "ask", "asked", "fresh", "outcome", "stale", "why")

    def __init__(self, ask: Ask, fresh: bool, stale: Found | None = None) -> None:
        self.ask, self.fresh, self.stale = ask, fresh, stale
        self.asked: tuple[str, ...] = _MEMORY
        self.why = "stale" if stale is not None else "request" if fresh else "uri-miss"
        self.outcome: Outcome | None = None
        self._waiting: list[Land] = []

    def wait(self, land: Land) -> None:
        """`land` is called once, at once where the outcome is known already."""
        if self.outcome is not None:
            land(self.outcome)
        else:
            self._waiting.append(land)

    def land(self, outcome: Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            for land in self._waiting:
                land(outcome)
            self._waiting.clear()


class Flights:
    def __init__(self, is_valid: Callable[[Ask], bool]) -> None:
        self._is_valid = is_valid
        # Those that ask the model whatever the tiers have, and the others.
        self._fresh: dict[bytes, Flight] = {}
        self._plain: dict[bytes, Flight] = {}

    def __len__(self) -> int:
        return len(self._fresh) + len(self._plain)

    def __iter__(self) -> Iterator[Flight]:
        return iter([*self._fresh.values(), *self._plain.values()])

    def find(self, ask: Ask, fresh: bool) -> Flight | None:
        """One that `ask` may join. One that asks the model also serves who would ask the tiers; not vice versa."""
        if self._fresh and self._joins(ask, flight := self._fresh.get(ask.key)):
            return flight
        if not fresh and self._joins(ask, flight := self._plain.get(ask.key)):
            return flight
        return None

    def start(self, ask: Ask, fresh: bool, stale: Found | None = None) -> Flight:
        flight = Flight(ask, fresh, stale)
        (self._fresh if fresh else self._plain)[ask.key] = flight
        return flight

    def end(self, flight: Flight) -> None:
        """Before it lands. A newer flight of the same key stays."""
        flying = self._fresh if flight.fresh else self._plain
        if flying.get(flight.ask.key) is flight:
            del flying[flight.ask.key]

    def _joins(self, ask: Ask, flight: Flight | None) -> bool:
        return flight is not None and ask.controls.tags <= flight.ask.controls.tags and self._is_valid(flight.ask)
