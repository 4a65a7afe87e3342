"""What may be answered from a cache, joined and kept: every rule that asks the fence.

Laws:
- The fence is read anew for each question: what was read before an await is not known after it.
- While purges cannot be read, nothing cached is an answer, and nothing computed is kept.
- An entry that lacks a tag of the request could not be purged by that tag: it is no answer to it.
- Positions of another log empty memory and lead elsewhere in Redis and on disk.

It must not know flights, engines, tiers' insides or HTTP.
"""

from __future__ import annotations

import time
from typing import Final

from edge_node.board import POLICY, PURGE, position_of
from edge_node.board.fence import generation_of
from edge_node.caching.cache import Cache
from edge_node.caching.entry import Entry
from edge_node.caching.lookup import Verdict, judge
from edge_node.serving.batches import Ask
from edge_node.serving.board_view import BoardView
from streams.folds.invalidations import Standing

MAX_ENTRY_TAGS: Final = 128


class Freshness:
    def __init__(self, view: BoardView, cache: Cache) -> None:
        self._view, self._cache = view, cache
        self._slots = view.slots
        # What the fence said when everything it announced was last obeyed.
        self._stamp = self._policy = -1

    def obey(self) -> int:
        """Catches up with the fence; the stamp that is obeyed from here on."""
        stamp, policy = self._slots[PURGE], self._slots[POLICY]
        if stamp != self._stamp or policy != self._policy:
            stamp = self._view.catch_up()
            self._cache.adopt(self._view.namespace)
            if self._view.purges_known:
                self._stamp, self._policy = stamp, policy
        return stamp

    @property
    def shared_tiers_count(self) -> bool:
        return self._view.shared_tiers_count

    def judge(self, entry: Entry, ask: Ask) -> Verdict:
        self.obey()
        tags, max_age_s = ask.controls.tags, ask.controls.max_age_s
        if not self._view.purges_known or (tags and not tags <= set(entry.tags)):
            return Verdict.PURGED
        max_age_ms = None if max_age_s is None else max_age_s * 1_000
        return judge(entry, now_ms=now_ms(), purges=self._view.purges, max_age_ms=max_age_ms)

    def is_valid(self, ask: Ask) -> bool:
        """Whether nothing that `ask` may depend on was purged since its inputs were read."""
        stamp = self.obey()
        if not self._view.purges_known:
            return False
        if stamp == ask.as_of:
            return True
        if generation_of(ask.as_of) != generation_of(stamp):
            return False
        served = ask.served
        standing = self._view.purges.standing(position_of(ask.as_of), ask.name, served.name, ask.controls.tags)
        return standing is Standing.VALID

    def entry(self, ask: Ask, body: bytes) -> Entry:
        """`body`, computed just now from what `ask` read."""
        served, asked_tags = ask.served, ask.controls.tags
        now = now_ms()
        ttl_ms, stale_ms, error_ms = served.windows_ms
        fresh_until = now + ttl_ms
        # Not `peek`, which counts a miss: this one was counted when the answer was looked for.
        before = self._cache.memory.get(ask.key)
        # Tags add up, so that callers who name different ones do not take turns in refilling one entry.
        tags: tuple[str, ...] = ()
        if asked_tags or before is not None:
            tags = tuple(sorted(asked_tags.union(before.tags if before is not None else ())))
        return Entry(
            key=ask.key,
            model=served.name,
            version=served.wanted.version,
            digest=served.digest,
            as_of=position_of(ask.as_of),
            stored_at_ms=now,
            fresh_until_ms=fresh_until,
            stale_until_ms=fresh_until + stale_ms,
            error_until_ms=fresh_until + error_ms,
            tags=tags if len(tags) <= MAX_ENTRY_TAGS else tuple(sorted(asked_tags)),
            body=body,
        )

    def position(self, ask: Ask) -> str:
        """``releases/invalidations``, as obeyed now."""
        return f"{ask.served.wanted.position}/{position_of(self.obey())}"


def now_ms() -> int:
    return time.time_ns() // 1_000_000
