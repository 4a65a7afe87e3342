"""Verify: the log judged again from its first record, and every live node held against it.

What is checked: each record of the signed topics (signature, signer, sequence rules) as every node judges it; both
topics against the checkpoints that stand in them; each live worker's report: the digest of what its board says should be
served against the fold at the position it names, and each model it calls live against the artifact that the log wants,
and each it does not call live against its having said why. A difference names the node.
"""

from __future__ import annotations

import msgspec

from schemas.events import ServedModel
from schemas.topics import INVALIDATIONS, RELEASES
from streams.audit.replay import fold_fleet
from streams.folds import invalidations, releases
from streams.folds.checkpoints import ChainWatch
from streams.folds.fleet import WorkerState
from streams.folds.invalidations import Invalidations, PurgeMap
from streams.folds.releases import Releases, Wanted
from streams.log.record import LogReader

FRESH_MS = 10_000
# How long a release may be on its way before a node that neither serves it nor says why is a difference.
SETTLING_MS = 30_000


class RefusedRecord(msgspec.Struct, frozen=True, kw_only=True):
    topic: str
    position: int
    refusal: str
    detail: str


class LogAlarm(msgspec.Struct, frozen=True, kw_only=True):
    """A signed topic that is frozen or rewritten, by its own checkpoints."""

    topic: str
    reason: str
    what: str


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A live node that says other than the log."""

    region: str
    node: str
    worker: int
    what: str


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """`refused` are records that stand in the log and never acted: they are no fault of the log, but worth a look.

    `checkpoints` has the position of each topic's last checkpoint that held; no entry where none did.
    """

    records: int
    releases_position: int
    invalidations_position: int
    state_digest: str
    desired_digest: str
    invalidations_digest: str
    refused: tuple[RefusedRecord, ...]
    checkpoints: dict[str, int]
    alarms: tuple[LogAlarm, ...]
    nodes: int
    stale: tuple[str, ...]
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        return not self.differences and not self.alarms


def verify(reader: LogReader, roots: tuple[bytes, ...], *, now_ms: int) -> Verified:
    """Replays the signed topics and compares every worker whose last beat is at most 10 s old at `now_ms`."""
    refused: list[RefusedRecord] = []
    state = Releases.initial(roots)
    # What was desired at each position: what a node that lags behind is held against.
    history: dict[int, dict[str, Wanted]] = {-1: {}}
    times: dict[int, int] = {}
    records = 0
    watches = [ChainWatch(RELEASES.name), ChainWatch(INVALIDATIONS.name)]
    for record in reader.read(RELEASES.name, 0):
        step = releases.fold(state, record)
        state = step.state
        watches[0].take(record, step.envelope.event if step.envelope else None)
        records += 1
        history[state.position] = releases.desired(state)
        times[state.position] = record.timestamp_ms
        if step.refused is not None:
            refused.append(_refused(record.topic, record.offset, step.refused.refusal, step.refused.detail))
    purges, purged = Invalidations.initial(roots), PurgeMap()
    for record in reader.read(INVALIDATIONS.name, 0):
        step_ = invalidations.fold(purges, record)
        purges = step_.state
        watches[1].take(record, step_.envelope.event if step_.envelope else None)
        records += 1
        if (purge := invalidations.purge_of(step_)) is not None:
            purged.apply(purge)
        if step_.refused is not None:
            refused.append(_refused(record.topic, record.offset, step_.refused.refusal, step_.refused.detail))
    differences: list[Difference] = []
    stale: list[str] = []
    live = 0
    workers = fold_fleet(reader, None).workers.values()
    for worker in sorted(workers, key=lambda w: (w.beat.region, w.beat.node, w.beat.worker)):
        if worker.left:
            continue
        if now_ms - worker.received_ms > FRESH_MS:
            stale.append(f"{worker.beat.node}/{worker.beat.worker}")
            continue
        live += 1
        differences += _differences(worker, history, times, state)
    return Verified(
        records=records,
        releases_position=state.position,
        invalidations_position=purges.position,
        state_digest=releases.state_digest(state),
        desired_digest=releases.desired_digest(releases.desired(state)),
        invalidations_digest=invalidations.state_digest(purges, purged),
        refused=tuple(refused),
        checkpoints={watch.topic: watch.last.position for watch in watches if watch.last is not None},
        alarms=tuple(
            LogAlarm(topic=watch.topic, reason=str(reason), what=what)
            for watch in watches
            for reason, what in watch.alarms(now_ms, at_end=True).items()
        ),
        nodes=live,
        stale=tuple(stale),
        differences=tuple(differences),
    )


def _refused(topic: str, position: int, refusal: str, detail: str) -> RefusedRecord:
    return RefusedRecord(topic=topic, position=position, refusal=str(refusal), detail=detail)


def _differences(
    worker: WorkerState,
    history: dict[int, dict[str, Wanted]],
    times: dict[int, int],
    state: Releases,
) -> list[Difference]:
    beat = worker.beat
    found: list[str] = []
    position = beat.positions.get(RELEASES.name, -1)
    wanted = history.get(position)
    if wanted is None:
        found.append(f"says it obeys position {position} of {RELEASES.name}, which the log does not have")
    else:
        if beat.desired_digest != releases.desired_digest(wanted):
            found.append(f"its board does not say what the log says at position {position}")
        for served in beat.models:
            want = wanted.get(served.name)
            age_ms = worker.received_ms - times[want.position] if want is not None else 0
            found += _served(served, want, age_ms, state)
    return [Difference(region=beat.region, node=beat.node, worker=beat.worker, what=what) for what in found]


def _served(served: ServedModel, want: Wanted | None, age_ms: int, state: Releases) -> list[str]:
    """`want` is what the log wanted at the node's own position, `age_ms` how long it had when the node spoke."""
    model = state.models.get(served.name)
    if model is None:
        return [f"serves {served.name}, which the log does not know"]
    if served.digest and served.digest not in model.brought:
        return [f"serves {served.name} from {served.digest[:12]}, which no release brought"]
    if want is None or served.digest == want.digest:
        return []
    if served.state == "live":
        return [f"says {served.name} is live from {served.digest[:12]}, but the log wants {want.digest[:12]}"]
    if served.state != "forwarded" and not served.error and age_ms > SETTLING_MS:
        return [f"serves {served.name} from {served.digest[:12]}, not {want.digest[:12]}, and does not say why"]
    return []
