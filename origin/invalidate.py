"""Invalidating: a signed event, read back to see that the fold took it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from schemas.errors import Conflict
from schemas.events import CacheInvalidated
from schemas.names import Scope
from schemas.topics import INVALIDATIONS
from streams.folds import invalidations
from streams.folds.invalidations import Invalidations
from streams.log.record import LogReader
from streams.log.writer import Writer


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

    async def invalidate(self, scopes: tuple[Scope, ...], *, soft: bool, author: str, reason: str) -> Invalidated:
        """`Conflict` when the log holds the event but no node will obey it, with the reason."""
        event = CacheInvalidated(scopes=scopes, soft=soft, author=author, reason=reason)
        appended = await self._writer.append(event)
        refused = await asyncio.to_thread(self._refused, appended.record.offset)
        if refused is not None:
            raise Conflict(f"the log holds the event at position {appended.record.offset}, refused: {refused}")
        return Invalidated(
            event_id=appended.id,
            position=appended.record.offset,
            appended_ms=appended.record.timestamp_ms,
        )

    def _refused(self, position: int) -> str | None:
        state = Invalidations.initial(self._roots)
        for record in self._reader.read(INVALIDATIONS.name, 0, 0, position + 1):
            step = invalidations.fold(state, record)
            if record.offset == position:
                return str(step.refused) if step.refused is not None else None
            state = step.state
        raise Conflict(f"position {position} is not in the log that acknowledged it: was the topic made again?")
