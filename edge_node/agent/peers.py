"""Whom to ask for an artifact before the store, and for how long. PURE.

    the region's nodes, as their beats tell ──► those that serve the artifact, then those that come before this one
    nobody, or no progress for the patience ──► the store

Laws:
- For each digest the region's nodes have an order (rendezvous hashing): the first asks the store, the others ask those
  before them. So a region fetches an artifact once, a large number of artifacts spreads over its nodes, nobody waits for
  one that waits for it, and a node that comes or goes moves no more than its own share.
- Only progress is patience renewed: a peer that gets next to nothing is as one that is silent. Later nodes in the order
  are more patient, so that one takes over, and not all.

It must not know HTTP, the log or the clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

import msgspec

# What a peer has to get of the artifact, in each second that it is waited for.
PROGRESS_BYTES_S: Final = 256 * 1024


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """Another node of the region. `live` are the digests that it serves."""

    node: str
    url: str
    live: frozenset[str]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to ask, in order. `turn` is how many nodes come before this one and do not have it yet."""

    peers: tuple[Neighbour, ...]
    turn: int


def before(digest: str, node: str, neighbours: Iterable[Neighbour], left: frozenset[str] = frozenset()) -> Asked:
    """Who has the artifact, or gets it before `node` does; without those that are `left` alone."""
    others = [neighbour for neighbour in neighbours if neighbour.node != node and neighbour.node not in left]
    having = sorted((n for n in others if digest in n.live), key=lambda n: weight(digest, n.node), reverse=True)
    mine = weight(digest, node)
    getting = [n for n in others if digest not in n.live and weight(digest, n.node) > mine]
    getting.sort(key=lambda n: weight(digest, n.node), reverse=True)
    return Asked(peers=(*having, *getting), turn=len(getting))


def weight(digest: str, node: str) -> tuple[bytes, str]:
    """The node's place for this digest: the highest is first."""
    return hashlib.blake2b(f"{digest}\n{node}".encode(), digest_size=16).digest(), node


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How far the peers have come, and when they were last seen to come on."""

    since_s: float
    bytes: int = 0

    def heard(self, had: int, now_s: float, patience_s: float) -> Patience:
        """`had` is what a peer says it has of the artifact, or what was received of it here."""
        if had >= self.bytes + max(1, int(patience_s * PROGRESS_BYTES_S)):
            return Patience(since_s=now_s, bytes=had)
        return self

    def over(self, now_s: float, patience_s: float, turn: int) -> bool:
        return now_s - self.since_s > patience_s * max(1, turn)
