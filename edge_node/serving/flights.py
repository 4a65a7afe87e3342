"""Computations in flight, and who may share them. No I/O.

Laws:
- Identical requests share one computation: same key, and inputs read no earlier than the last purge of its scopes.
  A request that begins after a purge never joins a leader that began before it.
- A flight is registered before its first await, so that no twin slips in between.
- Each follower of a failed leader gets the error once; the flight is gone by then, so the next request tries anew,
  alone.

It must not know tiers, models or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Ask:
    """One look-up: its key, its name for purges, and what computes it."""

    __slots__ = ("as_of", "inputs", "key", "model", "name", "tags")

    def __init__(
        self, key: bytes, name: str, model: str, inputs: Mapping[str, Array], tags: frozenset[str], as_of: int
    ) -> None:
        self.key, self.name, self.model, self.inputs = key, name, model, inputs
        self.tags, self.as_of = tags, as_of


class Flight:
    """`outcome` ends as a result or an error, always. `fresh`: no tier is asked, the model is.

    `stale` may stand in where the model fails; `asked` are the tiers that had no answer, and `why` says so for all.
    """

    __slots__ = ("ask", "asked", "fresh", "outcome", "stale", "why")

    def __init__(self, ask: Ask, fresh: bool, stale: Any = None) -> None:
        self.ask, self.fresh, self.stale = ask, fresh, stale
        self.asked: list[str] = ["memory"]
        self.why = "stale" if stale is not None else "request" if fresh else "uri-miss"
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Every waiter may have gone at its own deadline: an error is then nobody's, and not worth a line on stderr.
        self.outcome.add_done_callback(lambda f: f.cancelled() or f.exception())


class Flights:
    def __init__(self, is_valid: Callable[[Ask], bool]) -> None:
        self._is_valid = is_valid
        self._flying: dict[tuple[bytes, bool], Flight] = {}

    def __len__(self) -> int:
        return len(self._flying)

    def find(self, ask: Ask, fresh: bool) -> Flight | None:
        """One that `ask` may join. One that asks the model also serves who would ask the tiers; not vice versa."""
        for kind in (True,) if fresh else (True, False):
            flight = self._flying.get((ask.key, kind))
            if flight is not None and ask.tags <= flight.ask.tags and self._is_valid(flight.ask):
                return flight
        return None

    def start(self, ask: Ask, fresh: bool, stale: Any = None) -> Flight:
        flight = Flight(ask, fresh, stale)
        self._flying[ask.key, fresh] = flight
        return flight

    def end(self, flight: Flight) -> None:
        """Before its outcome is set. A newer flight of the same key stays."""
        if self._flying.get((flight.ask.key, flight.fresh)) is flight:
            del self._flying[flight.ask.key, flight.fresh]
