"""A pace: so many bytes a second, kept by whoever moves them. PURE but for its own state.

Laws: what was moved in excess is waited for afterwards, so no piece is too large for a pace; what was not used is kept for
`BURST_S` and no longer. It must not know what moves, nor how to wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

BURST_S: Final = 0.1


class Pace:
    """Its calls may come from any thread. `bytes_s` 0 is no limit."""

    def __init__(self, bytes_s: int, now: Callable[[], float]) -> None:
        self.bytes_s, self._now = bytes_s, now
        self._lock = threading.Lock()
        self._free_at = now()

    def moved(self, count: int) -> float:
        """Counts bytes that were moved; the seconds to wait before more of them."""
        if not self.bytes_s:
            return 0.0
        with self._lock:
            now = self._now()
            self._free_at = max(self._free_at, now - BURST_S) + count / self.bytes_s
            return max(0.0, self._free_at - now)
