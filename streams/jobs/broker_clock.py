"""The broker's clock, as far as a reader of its records can tell. PURE.

now = local monotonic time + the largest difference heard of late. A record arrives late by its way here, never early,
so the largest difference is the truest; and only of late, because clocks drift apart and a broker's may be set back.
"""

from __future__ import annotations

from typing import Final

FORGET_MS: Final = 10_000


class BrokerClock:
    """All arguments are milliseconds, `monotonic_ms` of this process."""

    def __init__(self) -> None:
        self._differences: list[int] = []
        self._turned_ms = 0

    def hear(self, timestamp_ms: int, monotonic_ms: int) -> None:
        """A record that bears `timestamp_ms` arrived."""
        difference = timestamp_ms - monotonic_ms
        if not self._differences:
            self._differences, self._turned_ms = [difference], monotonic_ms
        elif monotonic_ms - self._turned_ms > FORGET_MS:
            # Two spans are kept, so what was heard counts for one to two of them.
            self._differences, self._turned_ms = [difference, self._differences[0]], monotonic_ms
        else:
            self._differences[0] = max(self._differences[0], difference)

    def now_ms(self, monotonic_ms: int) -> int | None:
        """None before anything was heard."""
        return monotonic_ms + max(self._differences) if self._differences else None
