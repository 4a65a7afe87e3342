"""The control topics folded up to a moment: releases and invalidations, as every node judges them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from schemas.errors import BadInput
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds import invalidations, releases
from streams.folds.invalidations import Invalidations, PurgeMap
from streams.folds.releases import Releases
from streams.log.record import LogReader


@dataclass(frozen=True, slots=True)
class At:
    """A moment: everything up to and with a position of ``mlcdn.releases``, or up to and with a broker time."""

    position: int | None = None
    timestamp_ms: int | None = None

    @classmethod
    def parse(cls, said: str | None) -> At:
        """``12`` is a position, ``2026-01-31T12:00:00Z`` a time (UTC when it names no zone), None is now."""
        if said is None:
            return cls()
        if said.isdigit():
            return cls(position=int(said))
        try:
            moment = datetime.fromisoformat(said)
        except ValueError:
            raise BadInput(f"--at {said!r} is neither a position nor an ISO 8601 time") from None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return cls(timestamp_ms=int(moment.timestamp() * 1000))


def fold_releases(reader: LogReader, roots: tuple[bytes, ...], at: At) -> tuple[Releases, int | None]:
    """The fold of ``mlcdn.releases`` at a moment, and the broker time of the last record in it."""
    state, last_ms = Releases.initial(roots), None
    for record in reader.read(RELEASES.name, 0):
        if at.position is not None and record.offset > at.position:
            break
        if at.timestamp_ms is not None and record.timestamp_ms > at.timestamp_ms:
            break
        state, last_ms = releases.fold(state, record).state, record.timestamp_ms
    if at.position is not None and state.position < at.position:
        raise BadInput(f"position {at.position} is beyond the log's last, {state.position}")
    return state, last_ms


def fold_invalidations(
    reader: LogReader,
    roots: tuple[bytes, ...],
    until_ms: int | None,
) -> tuple[Invalidations, PurgeMap]:
    state, purged = Invalidations.initial(roots), PurgeMap()
    for record in reader.read(INVALIDATIONS.name, 0):
        if until_ms is not None and record.timestamp_ms > until_ms:
            break
        step = invalidations.fold(state, record)
        state = step.state
        purge = invalidations.purge_of(step)
        if purge is not None:
            purged.apply(purge)
    return state, purged
