"""Which sessions stay in memory when there is not room for all. PURE.

Laws: what is asked for stays, whatever it takes; the sessions of earlier releases go first, of the model that was idle
longest, then whole models that nobody asked for within `IDLE_S`, again the longest idle first; never more goes than has
to. A model whose session went still answers: its next request waits for it to be loaded again.

It must not know sessions, clocks or queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

IDLE_S: Final = 60.0
Which = Literal["previous", "current"]


class Resident(msgspec.Struct, frozen=True):
    """A model's sessions in memory; 0 bytes where there is none."""

    model: str
    current_bytes: int
    previous_bytes: int
    idle_s: float


def to_let_go(residents: Sequence[Resident], budget_bytes: int) -> list[tuple[str, Which]]:
    over = sum(r.current_bytes + r.previous_bytes for r in residents) - budget_bytes
    gone: list[tuple[str, Which]] = []
    longest_idle = sorted(residents, key=lambda r: -r.idle_s)
    kinds: tuple[Which, ...] = ("previous", "current")
    for which in kinds:
        for resident in longest_idle:
            size = resident.previous_bytes if which == "previous" else resident.current_bytes
            if over <= 0:
                return gone
            if size and (which == "previous" or resident.idle_s >= IDLE_S):
                gone.append((resident.model, which))
                over -= size
    return gone
