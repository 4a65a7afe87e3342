"""How the nodes are: the fold of ``mlcdn.fleet``. PURE.

Laws: a beat is judged by when the broker received it and by its number, never by the node's clock; a report of an
earlier incarnation is ignored once a later one was heard; a record at or below a partition's position is dropped
without a word; everything is bounded, and the oldest goes first. The topic has several partitions, each node in one:
any order that keeps each partition's own order folds to the same state, and a caller that needs one order merges them.
"""

from __future__ import annotations

import math
from typing import Final, TypeVar

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
WORKERS_KEPT: Final = 8_192
NODES_KEPT: Final = 8_192
REPORTS_KEPT: Final = 4_096
FIRST_INTERVAL_MS: Final = 1_000.0
# Beats that waited out an outage of the broker arrive as one batch: that is a backlog, not the worker's rhythm.
SHORTEST_INTERVAL_MS: Final = 50
PHI_MAX: Final = 100.0

K = TypeVar("K")
V = TypeVar("V")


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """A worker by its last beat. `received_ms` is the broker's time of it; `intervals_ms` are the last between
    beats."""

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
    """`workers` by "node/worker"; `incarnations` by node; `reports` by (node, worker, model, sequence), oldest first;
    `positions` by partition: the last record folded."""

    positions: dict[int, int] = {}
    workers: dict[str, WorkerState] = {}
    incarnations: dict[str, int] = {}
    reports: dict[tuple[str, int, str, int], Report] = {}
    applied: dict[str, Applied] = {}


def fold(state: Fleet, record: Record) -> Step[Fleet]:
    """One record of ``mlcdn.fleet``."""
    if record.offset <= state.positions.get(record.partition, -1):
        return Step(state)
    state = msgspec.structs.replace(state, positions=state.positions | {record.partition: record.offset})
    try:
        envelope = codec.decode(record.topic, record.key, record.value, record.headers)
    except EventRefused as refused:
        return Step(state, refused=refused)
    event = envelope.event
    if not isinstance(event, NodeBeat | ModelSwapped | SwapFailed | ArtifactRejected | InvalidationApplied | NodeLeft):
        return Step(state, envelope=envelope)
    known = state.incarnations.get(event.node, -1)
    if event.incarnation < known:
        return Step(state, envelope=envelope)
    if event.incarnation > known:
        incarnations = _put(state.incarnations, event.node, event.incarnation, NODES_KEPT)
        state = msgspec.structs.replace(state, incarnations=incarnations)
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


def current(state: Fleet, worker: WorkerState) -> bool:
    """Whether the worker is of its node's latest incarnation: an earlier one may have had more workers."""
    return worker.beat.incarnation == state.incarnations.get(worker.beat.node)


def _beaten(state: Fleet, event: NodeBeat, received_ms: int) -> Fleet:
    key = f"{event.node}/{event.worker}"
    before = state.workers.get(key)
    intervals: tuple[int, ...] = ()
    if before is not None and before.beat.incarnation == event.incarnation:
        if event.beat == before.beat.beat and not before.left:
            return state
        # A lower number is a worker that its parent has started again within the incarnation: a new life, a new rhythm.
        if event.beat > before.beat.beat:
            intervals = _rhythm(before, event.beat, received_ms)
    now = WorkerState(beat=event, received_ms=received_ms, intervals_ms=intervals)
    return msgspec.structs.replace(state, workers=_put(state.workers, key, now, WORKERS_KEPT))


def _rhythm(before: WorkerState, number: int, received_ms: int) -> tuple[int, ...]:
    # A gap in the numbers is lost beats, not one long interval.
    elapsed = (received_ms - before.received_ms) // (number - before.beat.beat)
    if elapsed < SHORTEST_INTERVAL_MS:
        return before.intervals_ms
    return (*before.intervals_ms, elapsed)[-INTERVALS_KEPT:]


def _put(kept: dict[K, V], key: K, value: V, limit: int) -> dict[K, V]:
    """A copy with the entry as its newest, and without the oldest above the limit."""
    copy = dict(kept)
    copy.pop(key, None)
    copy[key] = value
    while len(copy) > limit:
        del copy[next(iter(copy))]
    return copy


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
    return msgspec.structs.replace(state, applied=_put(state.applied, event.node, applied, NODES_KEPT))


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
    return msgspec.structs.replace(state, reports=_put(state.reports, key, report, REPORTS_KEPT))


def phi(worker: WorkerState, now_ms: int) -> float:
    """Suspicion that the worker is gone: phi accrual over its own intervals, 0 to 100.

    phi = -log10(P(a beat comes later than this)), with intervals taken as normal around their median. An interval above
    four medians was an outage and is left out: with it, one outage of the broker would blunt every judgement for the
    next minute. The deviation is floored at a quarter of the median: beats of a quiet node are so regular that one
    hiccup would bury it. Source: Hayashibara et al., "The phi accrual failure detector", 2004; the logistic
    approximation of the normal tail is Akka's.
    """
    intervals = worker.intervals_ms or (FIRST_INTERVAL_MS,)
    middle = sorted(intervals)[len(intervals) // 2]
    usual = [interval for interval in intervals if interval <= 4 * middle]
    spread = math.sqrt(sum((interval - middle) ** 2 for interval in usual) / len(usual))
    deviation = max(spread, middle / 4)
    y = (max(0, now_ms - worker.received_ms) - middle) / deviation
    if y > 8:
        return PHI_MAX
    e = math.exp(-y * (1.5976 + 0.070566 * y * y))
    tail = e / (1 + e) if y > 0 else 1 - 1 / (1 + e)
    return min(PHI_MAX, max(0.0, -math.log10(max(tail, 1e-100))))
