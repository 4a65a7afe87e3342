"""Replay: the state of things at a time or a position, from the log alone.

Laws: several partitions merge by (broker timestamp, partition, offset), so a replay has one order; the same log always
gives the same state digest; nothing is written and no group is joined.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from schemas.errors import BadInput
from schemas.topics import FLEET, INVALIDATIONS, RELEASES
from streams.folds import fleet, invalidations, releases
from streams.folds.fleet import Fleet
from streams.folds.invalidations import Invalidations, PurgeMap
from streams.folds.releases import Releases
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
            raise BadInput(f"--at {said!r} is neither a position nor an ISO 8601 time") from None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return cls(timestamp_ms=int(moment.timestamp() * 1000))


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker last said of one model before the moment."""

    region: str
    node: str
    worker: int
    model: str
    version: str
    digest: str
    sequence: int
    state: str
    said_at_ms: int


class StateAt(msgspec.Struct, frozen=True, kw_only=True):
    """What was told and what was reported, at one moment."""

    position: int
    timestamp_ms: int | None
    state_digest: str
    desired_digest: str
    invalidations_position: int
    invalidations_digest: str
    told: tuple[releases.Wanted, ...]
    served: tuple[Served, ...]


def merged(reader: LogReader, topic: str, *, until_ms: int | None = None) -> Iterator[Record]:
    """All records of a topic in the one order: (broker timestamp, partition, offset)."""
    streams = [reader.read(topic, p) for p in range(reader.partitions(topic))]
    for record in heapq.merge(*streams, key=lambda r: (r.timestamp_ms, r.partition, r.offset)):
        if until_ms is None or record.timestamp_ms <= until_ms:
            yield record


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


def fold_fleet(reader: LogReader, until_ms: int | None) -> Fleet:
    state = Fleet()
    for record in merged(reader, FLEET.name, until_ms=until_ms):
        state = fleet.fold(state, record).state
    return state


def state_at(reader: LogReader, roots: tuple[bytes, ...], at: At, region: str | None = None) -> StateAt:
    """What every region (or one) was told to serve, and what its workers said they served.

    At a position, the moment is that of the record there, so the other topics are read up to its broker time.
    """
    told, last_ms = fold_releases(reader, roots, at)
    until_ms = at.timestamp_ms if at.timestamp_ms is not None else last_ms if at.position is not None else None
    purges, purged = fold_invalidations(reader, roots, until_ms)
    reported = fold_fleet(reader, until_ms)
    wanted = releases.desired(told)
    return StateAt(
        position=told.position,
        timestamp_ms=until_ms,
        state_digest=releases.state_digest(told),
        desired_digest=releases.desired_digest(wanted),
        invalidations_position=purges.position,
        invalidations_digest=invalidations.state_digest(purges, purged),
        told=tuple(wanted.values()),
        served=tuple(_served(reported, region)),
    )


def _served(reported: Fleet, region: str | None) -> Iterator[Served]:
    for worker in sorted(reported.workers.values(), key=lambda w: (w.beat.region, w.beat.node, w.beat.worker)):
        beat = worker.beat
        if region is not None and beat.region != region:
            continue
        for model in beat.models:
            yield Served(
                region=beat.region,
                node=beat.node,
                worker=beat.worker,
                model=model.name,
                version=model.version,
                digest=model.digest,
                sequence=model.sequence,
                state=model.state,
                said_at_ms=worker.received_ms,
            )
