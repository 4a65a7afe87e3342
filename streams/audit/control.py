"""The control topics folded up to a moment: releases and invalidations, as every node judges them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from schemas.errors import BadInput
from schemas.events import ModelReleased, ModelRetired, ModelRolledBack
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds import invalidations, releases
from streams.folds.invalidations import Invalidations, PurgeMap
from streams.folds.releases import Releases
from streams.folds.step import Step
from streams.log.record import LogReader, Record


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
            raise BadInput(f"{said!r} is neither a position nor an ISO 8601 time") from None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return cls(timestamp_ms=int(moment.timestamp() * 1000))

    def time(self, reader: LogReader) -> int | None:
        """The broker's time of the moment, by which other topics are read; None is now."""
        if self.position is None:
            return self.timestamp_ms
        high = reader.watermarks(RELEASES.name, 0)[1]
        if self.position >= high:
            raise BadInput(f"position {self.position} is beyond the log's last, {high - 1}")
        for record in reader.read(RELEASES.name, 0, self.position, self.position + 1):
            return record.timestamp_ms
        raise BadInput(f"no record stands at position {self.position} of {RELEASES.name}")


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Who decided, in the event `id` at `position`, that a model be served as its `sequence` has it, and why."""

    model: str
    sequence: int
    kind: str
    id: str
    position: int
    timestamp_ms: int
    author: str
    reason: str


class Decisions:
    """Of a fold of the releases: the decisions that are `asked` for, by (model, sequence), and those in force at its end."""

    def __init__(self, asked: frozenset[tuple[str, int]] = frozenset()) -> None:
        self._asked = asked
        self._of_model: dict[str, dict[int, Decision]] = {}

    def get(self, model: str, sequence: int) -> Decision | None:
        return self._of_model.get(model, {}).get(sequence)

    def take(self, record: Record, step: Step[Releases]) -> None:
        event = step.envelope.event if step.envelope is not None else None
        if step.envelope is None or not isinstance(event, ModelReleased | ModelRolledBack | ModelRetired):
            return
        of_model = self._of_model.setdefault(event.model, {})
        of_model[event.sequence] = Decision(
            model=event.model,
            sequence=event.sequence,
            kind=event.kind,
            id=step.envelope.id,
            position=record.offset,
            timestamp_ms=record.timestamp_ms,
            author=event.author,
            reason=event.reason,
        )
        history = step.state.models[event.model]
        rollout = history.rollout
        seats = (history.stable, rollout.wanted, rollout.before) if rollout is not None else (history.stable,)
        kept = {wanted.sequence for wanted in seats if wanted is not None} | {event.sequence}
        for sequence in [s for s in of_model if s not in kept and (event.model, s) not in self._asked]:
            del of_model[sequence]


Each = Callable[[Record, Step[Releases]], None]


def fold_releases(
    reader: LogReader,
    roots: tuple[bytes, ...],
    at: At,
    each: Each = lambda record, step: None,
) -> tuple[Releases, int | None]:
    """The fold of ``mlcdn.releases`` at a moment, and the broker time of the last record in it."""
    state, last_ms = Releases.initial(roots), None
    for record in reader.read(RELEASES.name, 0):
        if at.position is not None and record.offset > at.position:
            break
        if at.timestamp_ms is not None and record.timestamp_ms > at.timestamp_ms:
            break
        step = releases.fold(state, record)
        each(record, step)
        state, last_ms = step.state, record.timestamp_ms
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
