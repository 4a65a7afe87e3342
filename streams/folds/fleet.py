"""How the nodes are: the fold of ``mlcdn.fleet``. PURE.

Laws: a beat is judged by when the broker received it and by its number, never by the node's clock; a report of an earlier
incarnation is ignored once a later one was heard; everything is bounded, and the oldest goes first. The topic has several
partitions, each node in one: any order that keeps each node's own order folds to the same state.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from schemas import codec
from schemas.errors import EventRefused
from schemas.events import (
    AGENT,
    ArtifactRejected,
    InvalidationApplied,
    ModelSwapped,
    NodeBeat,
    NodeLeft,
    SwapFailed,
)
from streams.folds.step import Step
from streams.log.record import Record

INTERVALS_KEPT: Final = 64
REPORTS_KEPT: Final = 4_096
FIRST_INTERVAL_MS: Final = 1_000.0
PHI_MAX: Final = 100.0


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """A worker by its last beat. `received_ms` is the broker's time of it; `intervals_ms` are the last between beats."""

    beat: NodeBeat
    received_ms: int
    intervals_ms: tuple[int, ...] = ()
    left: bool = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker (or the agent, worker -1) last said of one release. `outcome`: live, failed or rejected."""

    region: str
    node: str
    worker: int
    model: str
    sequence: int
    digest: str
    outcome: str
    reason: str
    retrying: bool
    ms: dict[str, float]
    received_ms: int


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """The highest invalidation that a node has said it obeys."""

    region: str
    node: str
    position: int
    ms: float


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """`workers` by "node/worker"; `incarnations` by node; `reports` by (node, worker, model, sequence), oldest first."""

    workers: dict[str, WorkerState] = {}
    incarnations: dict[str, int] = {}
    reports: dict[tuple[str, int, str, int], Report] = {}
    applied: dict[str, Applied] = {}


def fold(state: Fleet, record: Record) -> Step[Fleet]:
    """One record of ``mlcdn.fleet``."""
    try:
        envelope = codec.decode(record.topic, record.key, record.value, record.headers)
    except EventRefused as refused:
        return Step(state, refused=refused)
    event = envelope.event
    if not isinstance(event, NodeBeat | ModelSwapped | SwapFailed | ArtifactRejected | InvalidationApplied | NodeLeft):
        return Step(state, envelope=envelope)
    known = state.incarnations.get(event.node, 0)
    if event.incarnation < known:
        return Step(state, envelope=envelope)
    if event.incarnation > known:
        state = msgspec.structs.replace(state, incarnations=state.incarnations | {event.node: event.incarnation})
    match event:
        case NodeBeat():
            state = _beaten(state, event, record.timestamp_ms)
        case NodeLeft():
            state = _left(state, event)
        case InvalidationApplied():
            state = _applied(state, event)
        case ModelSwapped() | SwapFailed() | ArtifactRejected():
            state = _reported(state, event, record.timestamp_ms)
    return Step(state, envelope=envelope)


def _beaten(state: Fleet, event: NodeBeat, received_ms: int) -> Fleet:
    key = f"{event.node}/{event.worker}"
    before = state.workers.get(key)
    intervals: tuple[int, ...] = ()
    if before is not None and before.beat.incarnation == event.incarnation:
        if event.beat <= before.beat.beat:
            return state
        # A gap in the numbers is lost beats, not one long interval.
        elapsed = max(0, received_ms - before.received_ms) // (event.beat - before.beat.beat)
        intervals = (*before.intervals_ms, elapsed)[-INTERVALS_KEPT:]
    now = WorkerState(beat=event, received_ms=received_ms, intervals_ms=intervals)
    return msgspec.structs.replace(state, workers=state.workers | {key: now})


def _left(state: Fleet, event: NodeLeft) -> Fleet:
    keys = [
        key
        for key, worker in state.workers.items()
        if worker.beat.node == event.node and event.worker in (AGENT, worker.beat.worker)
    ]
    gone = {key: msgspec.structs.replace(state.workers[key], left=True) for key in keys}
    return msgspec.structs.replace(state, workers=state.workers | gone) if gone else state


def _applied(state: Fleet, event: InvalidationApplied) -> Fleet:
    before = state.applied.get(event.node)
    if before is not None and event.position <= before.position:
        return state
    applied = Applied(region=event.region, node=event.node, position=event.position, ms=event.ms)
    return msgspec.structs.replace(state, applied=state.applied | {event.node: applied})


def _reported(state: Fleet, event: ModelSwapped | SwapFailed | ArtifactRejected, received_ms: int) -> Fleet:
    outcome = {"ModelSwapped": "live", "SwapFailed": "failed", "ArtifactRejected": "rejected"}[event.kind]
    report = Report(
        region=event.region,
        node=event.node,
        worker=event.worker,
        model=event.model,
        sequence=event.sequence,
        digest=event.digest,
        outcome=outcome,
        reason="" if isinstance(event, ModelSwapped) else f"{event.phase}: {event.cause}",
        retrying=isinstance(event, ArtifactRejected) and event.retrying,
        ms=dict(event.ms) if isinstance(event, ModelSwapped) else {},
        received_ms=received_ms,
    )
    key = (event.node, event.worker, event.model, event.sequence)
    reports = {k: v for k, v in state.reports.items() if k != key}
    reports[key] = report
    while len(reports) > REPORTS_KEPT:
        del reports[next(iter(reports))]
    return msgspec.structs.replace(state, reports=reports)


def phi(worker: WorkerState, now_ms: int) -> float:
    """Suspicion that the worker is gone: phi accrual over its own intervals, 0 to 100.

    phi = -log10(P(a beat comes later than this)), with intervals taken as normal. The deviation is floored at a quarter
    of the mean: beats of a quiet node are so regular that one hiccup would bury it. Source: Hayashibara et al., "The phi
    accrual failure detector", 2004; the logistic approximation of the normal tail is Akka's.
    """
    intervals = worker.intervals_ms or (FIRST_INTERVAL_MS,)
    mean = max(sum(intervals) / len(intervals), 50.0)
    deviation = math.sqrt(sum((i - mean) ** 2 for i in intervals) / len(intervals))
    deviation = max(deviation, mean / 4)
    y = (max(0, now_ms - worker.received_ms) - mean) / deviation
    if y > 8:
        return PHI_MAX
    e = math.exp(-y * (1.5976 + 0.070566 * y * y))
    tail = e / (1 + e) if y > 0 else 1 - 1 / (1 + e)
    return min(PHI_MAX, max(0.0, -math.log10(max(tail, 1e-100))))
