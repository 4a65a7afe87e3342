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

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from edge_node.caching.entry import Entry
from edge_node.serving.controls import Consulted, Controls
from edge_node.serving.served import Served
from inference.deadlines import Deadline
from schemas import names
from schemas.errors import MlcdnError

Array = np.ndarray[Any, np.dtype[Any]]


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


class Found(msgspec.Struct, frozen=True):
    """What a look-up or a flight comes to. `entry` is what memory holds of it; None where nothing was kept."""

    body: bytes
    tier: str
    stored_at_ms: int
    trail: tuple[Consulted, ...]
    entry: Entry | None = None


Outcome = Found | MlcdnError
Land = Callable[[Outcome], None]


class Flight:
    """`fresh`: no tier is asked, the model is. `stale` may stand in where the model fails.

    `asked` are the tiers that had no answer, and `why` says so for all.
    """

    __slots__ = ("_waiting", "ask", "asked", "fresh", "outcome", "stale", "why")

    def __init__(self, ask: Ask, fresh: bool, stale: Found | None = None) -> None:
        self.ask, self.fresh, self.stale = ask, fresh, stale
        self.asked: tuple[str, ...] = ("memory",)
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
        self._flying: dict[tuple[bytes, bool], Flight] = {}

    def __len__(self) -> int:
        return len(self._flying)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._flying.values()))

    def find(self, ask: Ask, fresh: bool) -> Flight | None:
        """One that `ask` may join. One that asks the model also serves who would ask the tiers; not vice versa."""
        for kind in (True,) if fresh else (True, False):
            flight = self._flying.get((ask.key, kind))
            if flight is not None and ask.controls.tags <= flight.ask.controls.tags and self._is_valid(flight.ask):
                return flight
        return None

    def start(self, ask: Ask, fresh: bool, stale: Found | None = None) -> Flight:
        flight = Flight(ask, fresh, stale)
        self._flying[ask.key, fresh] = flight
        return flight

    def end(self, flight: Flight) -> None:
        """Before it lands. A newer flight of the same key stays."""
        if self._flying.get((flight.ask.key, flight.fresh)) is flight:
            del self._flying[flight.ask.key, flight.fresh]
