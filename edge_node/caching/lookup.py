"""Whether an entry may answer. PURE.

    purged                          PURGED          never
    from a clock far ahead          FUTURE          never
    older than the request wants    TOO_OLD         never, for this request
    before fresh_until              FRESH           answers
    before stale_until              STALE           answers, and one refill follows
    before error_until              STALE_IF_ERROR  answers if nothing else can
    later                           EXPIRED         never

Laws: a hard purge of any scope the entry is in, after the position its inputs were read at, ends it; a soft one ends
its freshness only. Every verdict's value is the word that metrics and `Cache-Status` say.

It must not know tiers, keys or requests.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from edge_node.caching.entry import Entry
from streams.folds.invalidations import PurgeMap, Standing

# Hosts of a region agree to well within this; an entry from further ahead would outlive its ttl by the difference.
MAX_CLOCK_LEAD_MS: Final = 5_000


class Verdict(StrEnum):
    FRESH = "fresh"
    STALE = "stale"
    STALE_IF_ERROR = "stale_if_error"
    PURGED = "purged"
    EXPIRED = "expired"
    TOO_OLD = "too_old"
    FUTURE = "future"

    @property
    def answers(self) -> bool:
        """Without asking the model first."""
        return self is Verdict.FRESH or self is Verdict.STALE

    @property
    def refused(self) -> bool:
        """Whatever happens."""
        return not self.answers and self is not Verdict.STALE_IF_ERROR


def judge(entry: Entry, *, now_ms: int, purges: PurgeMap, max_age_ms: int | None = None) -> Verdict:
    """`purges` as of now, `max_age_ms` as the request wants it."""
    standing = purges.standing(entry.as_of, entry.name, entry.model, entry.tags)
    if standing is Standing.HARD:
        return Verdict.PURGED
    if entry.stored_at_ms > now_ms + MAX_CLOCK_LEAD_MS:
        return Verdict.FUTURE
    if max_age_ms is not None and now_ms - entry.stored_at_ms > max_age_ms:
        return Verdict.TOO_OLD
    if now_ms < entry.fresh_until_ms and standing is Standing.VALID:
        return Verdict.FRESH
    if now_ms < entry.stale_until_ms:
        return Verdict.STALE
    if now_ms < entry.error_until_ms:
        return Verdict.STALE_IF_ERROR
    return Verdict.EXPIRED
