"""Where a model's next batch runs, and how large it may be: by what its runs were measured to cost. PURE.

    cost of a batch ≈ fixed + rows × per row, both measured when the model is warmed, corrected by every run after

    under `IN_LOOP_S`   in the event loop: a hand-over to a thread costs more than the run (30 us and two switches)
    above               in a thread, while the loop serves others; what arrives meanwhile is its next batch

Laws: a graph with control flow never runs in the loop, since how long it took says nothing of how long it takes; a run
that was once slow by chance does not move a model, several in a row do; between the two places lies a margin, so that a
model near the border does not move back and forth.

It must not know models, queues or clocks.
"""

from __future__ import annotations

from typing import Final

IN_LOOP_S: Final = 0.0005
# Back into the loop only from well below the border.
_RETURN_S: Final = IN_LOOP_S / 2
_WEIGHT: Final = 0.1
# A run that was preempted took many times its cost; more than this it does not count.
_LARGEST_RATIO: Final = 4.0
_SMALLEST_S: Final = 1e-6


class RunCost:
    """Seconds. One event loop owns it."""

    def __init__(self, fixed_s: float, per_row_s: float = 0.0, *, may_run_in_loop: bool = True) -> None:
        self._fixed, self._per_row = max(fixed_s, _SMALLEST_S), max(per_row_s, 0.0)
        self._scale = 1.0
        self._may = may_run_in_loop
        self.in_loop = may_run_in_loop and self.of(1) < IN_LOOP_S

    @classmethod
    def measured(cls, one_s: float, rows: int = 1, rows_s: float = 0.0, *, may_run_in_loop: bool = True) -> RunCost:
        """From the time of a single row, and, where rows may run together, of `rows` of them."""
        per_row = max(0.0, (rows_s - one_s) / (rows - 1)) if rows > 1 else 0.0
        return cls(one_s - per_row, per_row, may_run_in_loop=may_run_in_loop)

    def of(self, rows: int) -> float:
        return self._scale * (self._fixed + self._per_row * rows)

    def rows_in_loop(self, most: int) -> int:
        """How many rows a batch in the loop may have: one at least, else it would never run."""
        if not self._per_row:
            return most
        return max(1, min(most, int((IN_LOOP_S / self._scale - self._fixed) / self._per_row)))

    def observe(self, rows: int, seconds: float) -> None:
        ratio = min(seconds / (self._fixed + self._per_row * rows), _LARGEST_RATIO * self._scale)
        self._scale += _WEIGHT * (ratio - self._scale)
        if self._may:
            self.in_loop = self.of(1) < (IN_LOOP_S if self.in_loop else _RETURN_S)
