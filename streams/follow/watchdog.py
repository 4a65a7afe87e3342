"""The watchdog's judgement: who has stood still for how long while the log moved on. PURE.

It is judged by what the broker says, never by what Faust says of itself: silent stalls after days, with `crashed` and
`should_stop` false, are known upstream. Each partition is judged alone, or a busy topic would hide a stalled one.
"""

from __future__ import annotations

from collections.abc import Mapping

from streams.log.record import TopicPartition as At


class Standstill:
    """How long a reader has owed records without a step forward."""

    def __init__(self) -> None:
        self._last: dict[At, tuple[int, float]] = {}

    def look(self, now: float, reached: Mapping[At, int], highs: Mapping[At, int]) -> dict[At, float]:
        """Seconds without progress of each partition that is below its high watermark. `now` is monotonic."""
        still = {}
        for at, high in highs.items():
            position = reached.get(at, 0)
            before, since = self._last.get(at, (-1, now))
            if position != before or position >= high:
                before, since = position, now
            self._last[at] = (before, since)
            if position < high:
                still[at] = now - since
        return still

    def excuse(self, now: float) -> None:
        """Nobody could read just now, so nobody has stood still."""
        self._last = {at: (position, now) for at, (position, _) in self._last.items()}
