"""Which tiers outside a worker are worth asking for one model: those whose look-up takes less than its row. PURE.

    look-up    what it takes from the question to the replies, the loop's own time included, measured at each
    row        what the model takes for a row alone, measured when it is warmed and at each of its runs
    asked      look-up < row; once asked, until look-up > 1.5 × row

Laws:
- Both are compared again every 0.1 s, so a choice follows what it was made of; a tier that no model asks is probed (see
  cache.py), or its cost would be of the past.
- The cost is what a look-up takes undisturbed, as a row's is when it is warmed: a quick one counts ten times as much as a
  slow one, since on a busy host look-ups wait for a core as runs do. Many slow ones in a row still tell.
- A tier that is not asked is not filled either. What the origin runs is always worth it.
- Each choice has its reason in words.

It must not know tiers' insides, models or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from schemas.events import TierUse

# Until a tier was measured.
PRIOR_S: Final = 0.0005
# The first look-ups make connections and open files, on a host that is busy with a start: of so many the shortest counts.
FIRST_LOOKUPS: Final = 8
# What a further key adds: 1.2 us to send and read, the rest to unpack.
_KEY_S: Final = 8e-6
_WEIGHT_UP, _WEIGHT_DOWN = 0.05, 0.5
_LARGEST_RATIO: Final = 4.0
STAYS: Final = 1.5


class LookupCost:
    """Seconds that the look-up of one key takes. One event loop owns it."""

    def __init__(self) -> None:
        self.seconds, self.lookups = PRIOR_S, 0
        self._shortest = float("inf")

    def observe(self, seconds: float, keys: int) -> None:
        one = max(seconds / keys, seconds - (keys - 1) * _KEY_S)
        self.lookups += 1
        if self.lookups <= FIRST_LOOKUPS:
            self._shortest = min(self._shortest, one)
            if self.lookups == FIRST_LOOKUPS:
                self.seconds = self._shortest
        else:
            one = min(one, _LARGEST_RATIO * self.seconds)
            self.seconds += (_WEIGHT_UP if one > self.seconds else _WEIGHT_DOWN) * (one - self.seconds)


class TierChoice:
    """Of one release."""

    def __init__(self, use: TierUse) -> None:
        self.use = use
        self.asked: tuple[str, ...] = ()
        self.reasons: Mapping[str, str] = {}

    def decide(self, lookup_s: Mapping[str, float], row_s: float | None) -> tuple[str, ...]:
        """Those of the tiers in `lookup_s` to ask, in its order. `row_s` is None where no session is at hand."""
        if self.use is not TierUse.AUTO:
            self.asked = tuple(lookup_s) if self.use is TierUse.ALWAYS else ()
            self.reasons = dict.fromkeys(lookup_s, f"the release says {self.use}")
            return self.asked
        before, asked, reasons = self.asked, [], {}
        for tier, seconds in lookup_s.items():
            if row_s is None:
                reasons[tier] = "no session of the model is at hand"
                worth = True
            else:
                worth = seconds < row_s * (STAYS if tier in before else 1.0)
                reasons[tier] = f"a look-up takes {seconds * 1e3:.3g} ms, a row of the model {row_s * 1e3:.3g} ms"
            if worth:
                asked.append(tier)
        self.asked, self.reasons = tuple(asked), reasons
        return self.asked
