"""The tier in the worker itself: entries as they are, bounded by bytes, second chance.

Laws:
- Every operation is O(1). Eviction takes from the head of a queue; what was asked for since it last stood there goes
  round once more, so a scan of keys that nobody asks for again passes without washing out the rest.
- A write never replaces an entry of a higher `as_of`, unless that one was past all use when the new one was stored.
- What would take more than an eighth of the tier is not kept.

It must not know whether an entry may answer. One event loop owns it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import msgspec

from edge_node.caching.entry import Entry

# The objects around the strings counted below: 603 to 663 bytes an entry at 20,000 to 175,000, most just after the table
# of places has doubled.
_OVERHEAD: Final = 664
_OF_TAGS, _OF_A_TAG = 48, 72
_LARGEST_SHARE: Final = 8
# Sent round for one eviction: with 100,000 entries all asked for, one put held the loop for 20 ms without a limit.
_MAX_ROUNDS: Final = 64


class Place(msgspec.Struct, gc=False):
    """Where an entry stands. Who made something of it sees here whether it still does; None once it is gone."""

    entry: Entry | None
    size: int
    asked_for: bool = False


class MemoryTier:
    name: Final = "memory"

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._places: OrderedDict[bytes, Place] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: bytes) -> Entry | None:
        place = self._places.get(key)
        if place is None:
            return None
        place.asked_for = True
        return place.entry

    def place(self, key: bytes) -> Place | None:
        return self._places.get(key)

    def put(self, entry: Entry) -> bool:
        """Whether it is kept."""
        size = _size(entry)
        held = self._places.get(entry.key)
        if size > self.max_bytes // _LARGEST_SHARE or (
            held is not None and held.entry is not None and _outranks(held.entry, entry)
        ):
            return False
        if held is not None:
            self.bytes += size - held.size
            held.entry, held.size = entry, size
        else:
            self._places[entry.key] = Place(entry, size)
            self.bytes += size
        while self.bytes > self.max_bytes:
            self._evict()
        return entry.key in self._places

    def drop(self, key: bytes) -> None:
        place = self._places.pop(key, None)
        if place is not None:
            place.entry = None
            self.bytes -= place.size

    def clear(self) -> None:
        for place in self._places.values():
            place.entry = None
        self._places.clear()
        self.bytes = 0

    def _evict(self) -> None:
        for _ in range(_MAX_ROUNDS):
            key, place = next(iter(self._places.items()))
            if not place.asked_for:
                break
            place.asked_for = False
            self._places.move_to_end(key)
        _, place = self._places.popitem(last=False)
        place.entry = None
        self.bytes -= place.size


def _outranks(held: Entry, new: Entry) -> bool:
    """A peer that is ahead may have filled what this node, lagging, could else not refill once it expired."""
    return held.as_of > new.as_of and held.last_use_ms > new.stored_at_ms


def _size(entry: Entry) -> int:
    size = _OVERHEAD + len(entry.body)
    return size + _OF_TAGS + sum(_OF_A_TAG + len(tag) for tag in entry.tags) if entry.tags else size
