"""The tiers together: asked from the nearest on, filled from the nearest on.

    lookup   memory → Redis → disk; what is found further out is promoted inward, with the `as_of` it has
    fill     memory at once; Redis and disk behind the answer

Laws:
- `shared=False` means that Redis and disk are neither read nor filled: the agent has not caught up, so purges of
  what they hold may be unknown here. The same holds while no log is known (`adopt`).
- Another log is another namespace: nothing of the old one is found again, and memory is emptied.
- A tier that no look-up asked for a second is probed, so that what it costs, and whether it answers, is known.
- A tier that fails, or holds what it should not, costs a counter and never an error.

It must not know whether an entry may answer (see lookup.judge), which tiers are worth asking (see tier_choice), nor
requests or models. One event loop owns it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Sequence
from typing import Final

from edge_node.caching.entry import Entry
from edge_node.caching.memory_tier import MemoryTier, Place
from edge_node.caching.tallies import missed
from edge_node.caching.tier_choice import FIRST_LOOKUPS
from edge_node.caching.tiers import SharedTier
from schemas.metrics import gauge

PROBE_EVERY_S: Final = 1.0
Accept = Callable[[Entry], bool]


class Cache:
    def __init__(self, memory: MemoryTier, redis: SharedTier | None, disk: SharedTier | None) -> None:
        self.memory, self.redis, self.disk = memory, redis, disk
        self._shared = [tier for tier in (redis, disk) if tier is not None]
        self._namespace = ""
        # How many look-ups a tier had had when it was last seen to, and when that was.
        self._seen: dict[str, tuple[int, float]] = {}
        self._probes: dict[str, asyncio.Task[None]] = {}

    def adopt(self, namespace: str) -> None:
        """Whose positions `as_of` counts in from here on; empty while no log is known. The same again costs nothing."""
        if namespace != self._namespace:
            self._namespace = namespace
            self.memory.clear()

    def peek(self, key: bytes, digest: str) -> Entry | None:
        """Memory only, and at once."""
        entry = self.memory.get(key)
        if entry is None or entry.digest != digest:
            missed("memory", "absent" if entry is None else "other_digest")
            return None
        return entry

    def place(self, key: bytes) -> Place | None:
        """Where memory holds the entry of this key."""
        return self.memory.place(key)

    async def lookup(
        self, key: bytes, digest: str, *, shared: bool, accept: Accept | None = None
    ) -> tuple[Entry, str] | None:
        """The nearest entry that `accept` takes, and the tier that had it."""
        entry = self.peek(key, digest)
        if entry is not None and (accept is None or accept(entry)):
            return entry, self.memory.name
        if not shared:
            return None
        return (await self.lookup_shared((key,), digest, accept)).get(key)

    async def lookup_shared(
        self, keys: Sequence[bytes], digest: str, accept: Accept | None = None, tiers: Container[str] | None = None
    ) -> dict[bytes, tuple[Entry, str]]:
        """Redis, then disk for what it did not have; a round trip each, however many keys. `tiers` are all, or these."""
        found: dict[bytes, tuple[Entry, str]] = {}
        namespace = self._namespace
        left = list(dict.fromkeys(keys))
        passed: list[SharedTier] = []
        for tier in self._among(tiers) if namespace else ():
            if not left:
                break
            for key, entry in (await tier.get_many(left, digest, namespace)).items():
                if accept is None or accept(entry):
                    found[key] = entry, tier.name
                    self._promote(entry, passed, namespace)
                else:
                    missed(tier.name, "not_accepted")
            left = [key for key in left if key not in found]
            passed.append(tier)
        return found

    def fill(self, entry: Entry, *, shared: bool, tiers: Container[str] | None = None) -> None:
        self.memory.put(entry)
        if shared and self._namespace:
            for tier in self._among(tiers):
                tier.offer(entry, self._namespace)

    def lookup_s(self) -> dict[str, float]:
        """Tiers outside this process, in the order they are asked, and what a look-up in each takes."""
        return {tier.name: tier.cost.seconds for tier in self._shared}

    def standing(self) -> dict[str, bool]:
        """Tiers outside this process, and whether each answers."""
        return {tier.name: tier.answers for tier in self._shared}

    async def settle(self) -> None:
        """Returns when everything filled so far is where it goes."""
        for tier in self._shared:
            await tier.settle()

    def tend(self) -> None:
        """Now and then: what is due beside requests."""
        self.measure()
        now = asyncio.get_running_loop().time()
        for tier in self._shared:
            lookups, (seen, since) = tier.cost.lookups, self._seen.get(tier.name, (-1, now))
            if lookups != seen:
                since = now
            due = now - since >= PROBE_EVERY_S or lookups < FIRST_LOOKUPS
            if due and tier.answers and tier.name not in self._probes:
                since = now
                probe = self._probes[tier.name] = asyncio.get_running_loop().create_task(tier.probe())
                probe.add_done_callback(lambda _, name=tier.name: self._probes.pop(name))  # type: ignore[misc]
            self._seen[tier.name] = lookups, since

    async def close(self) -> None:
        for probe in self._probes.values():
            probe.cancel()
        for tier in self._shared:
            await tier.close()

    def _among(self, tiers: Container[str] | None) -> Sequence[SharedTier]:
        return self._shared if tiers is None else [tier for tier in self._shared if tier.name in tiers]

    def _promote(self, entry: Entry, passed: Sequence[SharedTier], namespace: str) -> None:
        # Another log may have been adopted while a tier was asked.
        if namespace == self._namespace:
            self.memory.put(entry)
            for tier in passed:
                tier.offer(entry, namespace)

    def measure(self) -> None:
        """Says how much memory holds: for the metrics, now and then."""
        gauge("mlcdn_cache_bytes").labels(self.memory.name).set(self.memory.bytes)
