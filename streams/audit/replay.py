"""Replay: the state of things at a time or a position, from the log alone.

Laws: several partitions merge into one order (`streams.audit.order`), so a replay has one; the same log always gives
the same state digest; nothing is written and no group is joined; of the fleet only what was last said is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import msgspec

from schemas.topics import FLEET
from streams.audit.control import At, Decision, Decisions, fold_invalidations, fold_releases
from streams.audit.fleet_at import FleetAt, fleet_at
from streams.audit.order import merged
from streams.folds import invalidations, releases
from streams.folds.fleet import Fleet
from streams.folds.wanted import Seated
from streams.log.record import LogReader


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker last said of one model before the moment, in the event `said_by`: a beat, or a swap since.

    `decided_by` is None where no record that acted has the sequence, or the worker names none. `left`: it had said
    good-bye.
    """

    region: str
    node: str
    worker: int
    model: str
    version: str
    digest: str
    sequence: int
    channel: str
    state: str
    left: bool
    said_at_ms: int
    said_by: str
    decided_by: Decision | None = None


class StateAt(msgspec.Struct, frozen=True, kw_only=True):
    """What was told and what was reported, at one moment. `decisions` are those behind what was told."""

    position: int
    timestamp_ms: int | None
    state_digest: str
    desired_digest: str
    invalidations_position: int
    invalidations_digest: str
    told: tuple[Seated, ...]
    decisions: tuple[Decision, ...]
    served: tuple[Served, ...]


def fold_fleet(reader: LogReader, until_ms: int | None) -> Fleet:
    """The workers as their last beats up to a broker time say, without rhythms and reports."""
    return fleet_at(partial(merged, reader, FLEET.name, until_ms=until_ms)).folded()


def state_at(reader: LogReader, roots: tuple[bytes, ...], at: At, region: str | None = None) -> StateAt:
    """What every region (or one) was told to serve, what its workers said they served, and who decided it.

    At a position, the moment is that of the record there, so the other topics are read up to its broker time.
    """
    until_ms = at.time(reader)
    reported = fleet_at(partial(merged, reader, FLEET.name, until_ms=until_ms))
    served = sorted(_served(reported, region), key=lambda s: (s.region, s.node, s.worker, s.model, s.channel))
    decisions = Decisions(frozenset((s.model, s.sequence) for s in served))
    told, _ = fold_releases(reader, roots, at, decisions.take)
    purges, purged = fold_invalidations(reader, roots, until_ms)
    wanted = releases.desired(told, region)
    behind = [decisions.get(seated.wanted.model, seated.wanted.sequence) for seated in wanted.values()]
    return StateAt(
        position=told.position,
        timestamp_ms=until_ms,
        state_digest=releases.state_digest(told),
        desired_digest=releases.desired_digest(wanted),
        invalidations_position=purges.position,
        invalidations_digest=invalidations.state_digest(purges, purged),
        told=tuple(wanted.values()),
        decisions=tuple(decision for decision in behind if decision is not None),
        served=tuple(msgspec.structs.replace(s, decided_by=decisions.get(s.model, s.sequence)) for s in served),
    )


def _served(reported: FleetAt, region: str | None) -> Iterator[Served]:
    swaps = dict(reported.unheard)
    for at, worker in reported.workers.items():
        beat = worker.beat
        swaps |= {(*at, *key): swap for key, swap in worker.swaps.items()}
        if region is not None and beat.region != region:
            continue
        for model in beat.models:
            if (*at, model.name, model.channel) in swaps:
                continue
            yield Served(
                region=beat.region,
                node=beat.node,
                worker=beat.worker,
                model=model.name,
                version=model.version,
                digest=model.digest,
                sequence=model.sequence,
                channel=model.channel,
                state=model.state,
                left=worker.left,
                said_at_ms=worker.record.timestamp_ms,
                said_by=worker.id,
            )
    for (node, number, *_), swap in swaps.items():
        event = swap.event
        if region is not None and event.region != region:
            continue
        worker_ = reported.workers.get((node, number))
        yield Served(
            region=event.region,
            node=node,
            worker=number,
            model=event.model,
            version=event.version,
            digest=event.digest,
            sequence=event.sequence,
            channel=event.channel,
            state="live",
            left=worker_.left if worker_ is not None else False,
            said_at_ms=swap.received_ms,
            said_by=swap.id,
        )
