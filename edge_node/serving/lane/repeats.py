"""Answers to requests that come again byte by byte, as the bytes that go out. PURE.

Laws:
- A repeat is known from its second sighting on: a stream of requests that never repeat fills nothing.
- It holds until anything in it would be said otherwise: its age and ttl, once a second; the purges and the board that it
  obeyed; what answers, release or share; the entry that memory has.
- Bounded by bytes, oldest first, and what was renewed of late goes round once more.

It must not know how an answer is found or written.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec

from edge_node.caching.entry import Entry
from edge_node.caching.memory_tier import Place
from edge_node.serving.lane.heads import Head
from edge_node.serving.model_slot import ModelSlot

MAX_HEADS: Final = 1_024
_OVERHEAD: Final = 600
_ROUNDS: Final = 32


class Repeat(msgspec.Struct, gc=False):
    """`wire` is all of the answer behind its date; `until_ns` on perf_counter_ns.

    `slot.turn` must still be `turn`, and `place.entry` the `entry` that it was made of.
    """

    wire: bytes
    until_ns: int
    stamp: int
    policy: int
    slot: ModelSlot
    turn: int
    place: Place
    entry: Entry
    cells: bytes
    size: int
    renewed: bool = False


class KnownHead:
    """A head that was admitted, and the bodies that came again under it."""

    __slots__ = ("head", "length", "repeats")

    def __init__(self, head: Head) -> None:
        self.head, self.length = head, head.length
        self.repeats: dict[bytes, Repeat] = {}


class Repeats:
    """One event loop owns it. `heads` is read by connections, and written here only."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.heads: dict[bytes, KnownHead] = {}
        self._heads: deque[bytes] = deque()
        self._order: deque[tuple[KnownHead, bytes]] = deque()
        self._stale = 0

    def know(self, raw: bytes, head: Head) -> None:
        if raw in self.heads:
            return
        while len(self._heads) >= MAX_HEADS:
            self._forget(self.heads.pop(self._heads.popleft()))
        self.heads[raw] = KnownHead(head)
        self._heads.append(raw)

    def put(self, known: KnownHead, body: bytes, repeat: Repeat) -> None:
        repeat.size = _OVERHEAD + len(body) + len(repeat.wire)
        before = known.repeats.get(body)
        if before is not None:
            repeat.renewed = True
            self.bytes -= before.size
        elif repeat.size > self.max_bytes:
            return
        else:
            self._order.append((known, body))
        known.repeats[body] = repeat
        self.bytes += repeat.size
        rounds = 0
        while self.bytes > self.max_bytes and self._order:
            owner, oldest = self._order.popleft()
            held = owner.repeats.get(oldest)
            if held is None:
                continue
            if held.renewed and rounds < _ROUNDS:
                rounds += 1
                held.renewed = False
                self._order.append((owner, oldest))
                continue
            del owner.repeats[oldest]
            self.bytes -= held.size

    def clear(self) -> None:
        for known in self.heads.values():
            known.repeats.clear()
        self._order.clear()
        self.bytes = 0

    def _forget(self, known: KnownHead) -> None:
        if known.repeats:
            self.bytes -= sum(repeat.size for repeat in known.repeats.values())
            self._stale += len(known.repeats)
            known.repeats.clear()
            # A client can mint heads: what it leaves in the queue must not grow with them.
            if self._stale > MAX_HEADS:
                self._order = deque((owner, body) for owner, body in self._order if body in owner.repeats)
                self._stale = 0
