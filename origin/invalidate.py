"""Invalidating: a signed event, read back to see that the fold took it.

Laws: an invalidation that no node will obey is never reported as done; what a call costs does not grow with the purges
that were ever made.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from schemas.errors import Conflict, EventRefused
from schemas.events import CacheInvalidated
from schemas.names import Scope
from schemas.topics import INVALIDATIONS
from streams.folds import invalidations
from streams.folds.invalidations import Invalidations
from streams.log.record import LogReader, Record
from streams.log.writer import Writer

_TRUST: Final = b"mlcdn.TrustChanged."


@dataclass(frozen=True, slots=True, kw_only=True)
class Invalidated:
    """`position` is the event's offset, `appended_ms` the broker's time of it."""

    event_id: str
    position: int
    appended_ms: int


class Invalidator:
    """The library call behind the command line and the admin API. `writer` signs with a key that may invalidate."""

    def __init__(self, writer: Writer, reader: LogReader, roots: tuple[bytes, ...]) -> None:
        self._writer, self._reader, self._roots = writer, reader, roots
        self._alone = asyncio.Lock()
        self._log_id, self._state = "", Invalidations.initial(roots)

    async def invalidate(self, scopes: tuple[Scope, ...], *, soft: bool, author: str, reason: str) -> Invalidated:
        """`Conflict` when the log holds the event but no node will obey it, with the reason."""
        event = CacheInvalidated(scopes=scopes, soft=soft, author=author, reason=reason)
        # One at a time, so that the state never is beyond a position that is still to be judged.
        async with self._alone:
            appended = await self._writer.append(event)
            position = appended.record.offset
            refused = await asyncio.to_thread(self._refused, position)
        if refused is not None:
            raise Conflict(f"the log holds the event at position {position}, refused: {refused}")
        return Invalidated(event_id=appended.id, position=position, appended_ms=appended.record.timestamp_ms)

    def _refused(self, position: int) -> EventRefused | None:
        """Why the fold does not take the record at `position`; None if it does."""
        log_id = self._reader.topic_id(INVALIDATIONS.name)
        if log_id != self._log_id:
            self._log_id, self._state = log_id, Invalidations.initial(self._roots)
        for record in self._reader.read(INVALIDATIONS.name, 0, self._state.position + 1, position + 1):
            if record.offset == position or _changes_trust(record):
                step = invalidations.fold(self._state, record)
                self._state = step.state
                if record.offset == position:
                    return step.refused
        raise Conflict(f"position {position} is not in the log that acknowledged it: was the topic made again?")


def _changes_trust(record: Record) -> bool:
    """Whether later records are judged differently because of this one.

    Only a change of trust does that, and a body under another `ce_type` is refused by every reader. To verify all that
    was ever purged would cost 0.2 ms for each: 10,000 purges, two seconds.
    """
    return any(name == "ce_type" and value is not None and value.startswith(_TRUST) for name, value in record.headers)
