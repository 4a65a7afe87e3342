"""Which sessions stay in memory when there is not room for all. PURE.

Laws: what is asked for stays, whatever it takes; the sessions of earlier releases go first, of the model that was idle
longest, then whole models that nobody asked for within `IDLE_S`, again the longest idle first; never more goes than has
to. A model whose session went still answers: its next request waits for it to be loaded again.

A candidate and its stable release are idle together: one that waited for its session while the other had its own would be
judged by that. Of the two, the one that fewer requests ask for goes first.

It must not know sessions, clocks or queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

IDLE_S: Final = 60.0
_HALF: Final = 50.0
Which = Literal["previous", "current", "candidate"]


class Resident(msgspec.Struct, frozen=True):
    """A model's sessions in memory; 0 bytes where there is none. `percent` of its requests are the candidate's."""

    model: str
    current_bytes: int
    previous_bytes: int
    idle_s: float
    candidate_bytes: int = 0
    percent: float = 0.0

    @property
    def seated(self) -> list[tuple[Which, int]]:
        """Of its two seats, the less asked one first."""
        stable: tuple[Which, int] = ("current", self.current_bytes)
        candidate: tuple[Which, int] = ("candidate", self.candidate_bytes)
        return [candidate, stable] if self.percent < _HALF else [stable, candidate]


def to_let_go(residents: Sequence[Resident], budget_bytes: int) -> list[tuple[str, Which]]:
    over = sum(r.current_bytes + r.candidate_bytes + r.previous_bytes for r in residents) - budget_bytes
    longest_idle = sorted(residents, key=lambda r: -r.idle_s)
    spare: list[tuple[str, Which, int]] = [(r.model, "previous", r.previous_bytes) for r in longest_idle]
    idle = [(r.model, which, size) for r in longest_idle if r.idle_s >= IDLE_S for which, size in r.seated]
    gone: list[tuple[str, Which]] = []
    for model, which, size in (*spare, *idle):
        if over <= 0:
            break
        if size:
            gone.append((model, which))
            over -= size
    return gone
