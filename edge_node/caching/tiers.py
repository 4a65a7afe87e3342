"""What a tier outside this process is to the cache: one port, for Redis and disk.

Laws: no method raises, whatever the store does or holds: anything wrong is a counted miss or a counted drop. `offer`
returns at once, and the write comes later or not at all. A write never replaces an entry of a higher `as_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edge_node.caching.entry import Entry
from edge_node.caching.tier_choice import LookupCost


class SharedTier(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def cost(self) -> LookupCost:
        """What its look-ups take."""

    @property
    def answers(self) -> bool:
        """False while it is left alone because it failed."""

    async def get_many(self, keys: Sequence[bytes], digest: str, namespace: str) -> dict[bytes, Entry]:
        """Those that are there, whole, and what was asked for."""

    async def probe(self) -> None:
        """A look-up of what is not there, for the time it takes."""

    def offer(self, entry: Entry, namespace: str) -> None:
        """Takes an entry to be written behind the answer."""

    async def settle(self) -> None:
        """Returns when everything offered before was written or dropped."""

    async def close(self) -> None: ...
