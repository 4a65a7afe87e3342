"""Which requests a candidate answers: a share of the cohorts, by a bucket that each of them has for good. PURE.

    bucket of a cohort = hash(model, sequence of the candidate's release, cohort) in [0, 10 000)
    the candidate answers it where bucket < percent × 100

A cohort is what the header `mlcdn-cohort` names, else the request's own canonical input.

Laws: a cohort is answered by one release as long as the percentage stands, whichever worker, node or life of a process is
asked; raising the percentage sends nobody back; another release of the model draws other buckets, so that it is not
always the same cohorts who go first.

It must not know requests, sessions or how a percentage comes about.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

BUCKETS: Final = 10_000
_PERSON: Final = b"mlcdn-cohort-1"


class Split:
    """Of one candidate at one percentage. `takes` costs 0.5 us."""

    __slots__ = ("_below", "_start")

    def __init__(self, model: str, sequence: int, percent: float) -> None:
        self._start = hashlib.blake2b(f"{model}\0{sequence}\0".encode(), digest_size=8, person=_PERSON)
        # 1.1 × 100 is a little more than 110; and a share above nothing is at least one bucket.
        self._below = math.ceil(round(percent * 100, 6))

    def bucket(self, cohort: bytes) -> int:
        hasher = self._start.copy()
        hasher.update(cohort)
        return int.from_bytes(hasher.digest(), "big") % BUCKETS

    def takes(self, cohort: bytes) -> bool:
        """Whether the candidate answers it."""
        return self.bucket(cohort) < self._below


def named_cohort(name: str) -> bytes:
    """Of a request that names its cohort."""
    return b"named " + name.encode()


def input_cohort(keys: Sequence[bytes]) -> bytes:
    """Of a request that names none, by the keys that its rows have in the caches of the stable release."""
    return b"input " + b"".join(keys)
