"""Replay: the state of things at a time or a position, from the log alone.

Laws: several partitions merge by (broker timestamp, partition, offset), so a replay has one order; the same log always
gives the same state digest; nothing is written and no group is joined.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import msgspec

from schemas.topics import FLEET
from streams.audit.control import At, fold_invalidations, fold_releases
from streams.folds import fleet, invalidations, releases
from streams.folds.fleet import Fleet
from streams.log.record import LogReader, Record


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
