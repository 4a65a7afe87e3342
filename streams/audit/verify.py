"""Verify: the log judged again from its first record, and every live node held against it.

What is checked: each record of the signed topics (signature, signer, sequence rules) as every node judges it; both
topics against the checkpoints that stand in them; each live worker's report: the digest of what its board says should be
served against the fold at the position it names, and each model it calls live against the artifact that the log wants,
and each it does not call live against its having said why. A difference names the node.

A record's signature is checked unless a checkpoint speaks for it (`streams.audit.vouched`); those of the releases that are
wanted at the end are checked whatever it says, so no digest is called wanted that its publisher did not sign. If one fails,
a checkpoint lied: that is an alarm, and all is checked.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from schemas import signing
from schemas.errors import EventRefused
from schemas.events import ModelReleased, ModelRolledBack, ServedModel
from schemas.topics import INVALIDATIONS, RELEASES
from streams.audit.replay import fold_fleet
from streams.audit.vouched import judged
from streams.folds import invalidations, releases
from streams.folds.checkpoints import ChainWatch, Held
from streams.folds.fleet import WorkerState
from streams.folds.invalidations import Invalidations, PurgeMap
from streams.folds.releases import Releases
from streams.folds.wanted import Channel, Seated, seat
from streams.log.record import LogReader, Record

FRESH_MS = 10_000
# How long a release may be on its way before a node that neither serves it nor says why is a difference.
SETTLING_MS = 30_000


class RefusedRecord(msgspec.Struct, frozen=True, kw_only=True):
    topic: str
    position: int
    refusal: str
    detail: str


class LogAlarm(msgspec.Struct, frozen=True, kw_only=True):
    """A signed topic that is frozen, truncated or rewritten, by its own checkpoints or one remembered; or one `lied`."""

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

    `checkpoints` has each topic's last checkpoint that held; no entry where none did. `checked` is the number of
    signatures that were checked here.
    """

    records: int
    checked: int
    releases_position: int
    invalidations_position: int
    state_digest: str
    desired_digest: str
    invalidations_digest: str
    refused: tuple[RefusedRecord, ...]
    checkpoints: dict[str, Held]
    alarms: tuple[LogAlarm, ...]
    nodes: int
    stale: tuple[str, ...]
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        return not self.differences and not self.alarms


class Lied(Exception):
    """A record passed on a checkpoint's word, and its signature does not hold."""


class Wanting:
    """The records behind what is wanted, where their signatures were not checked: who asked for it, and who brought it."""

    def __init__(self) -> None:
        self._asked: dict[str, dict[int, Record]] = {}
        self._brought: dict[tuple[str, str], Record] = {}

    def take(self, record: Record, event: ModelReleased | ModelRolledBack, state: Releases) -> None:
        if isinstance(event, ModelReleased):
            self._brought[(event.model, event.digest)] = record
        history = state.models[event.model]
        asked = self._asked.get(event.model, {}) | {record.offset: record}
        serve = {wanted.position for wanted in (history.stable, history.newest) if wanted is not None}
        self._asked[event.model] = {position: asked[position] for position in serve if position in asked}

    def check(self, state: Releases) -> None:
        """Raises `Lied`."""
        for seated in releases.desired(state, None).values():
            wanted = seated.wanted
            for record in (
                self._asked.get(wanted.model, {}).get(wanted.position),
                self._brought.get((wanted.model, wanted.digest)),
            ):
                if record is None:
                    continue
                grant = state.trust.keys[signing.signer(record.headers)]
                try:
                    signing.verify(grant.public_key, record.topic, record.key, record.value, record.headers)
                except EventRefused:
                    raise Lied(f"the signature at position {record.offset} does not hold") from None


def verify(
    reader: LogReader,
    roots: tuple[bytes, ...],
    *,
    now_ms: int,
    since: Mapping[str, Held] | None = None,
    full: bool = False,
) -> Verified:
    """Replays the signed topics and compares every worker whose last beat is at most 10 s old at `now_ms`.

    `since` has checkpoints that held in an earlier verification: where one holds no longer, the log is not what it was.
    `full`: every signature is checked, whatever checkpoints say.
    """
    try:
        return _verify(reader, roots, now_ms, since or {}, full)
    except Lied as lie:
        found = _verify(reader, roots, now_ms, since or {}, full=True)
        alarm = LogAlarm(topic=RELEASES.name, reason="lied", what=f"a checkpoint speaks for a record, but {lie}")
        return msgspec.structs.replace(found, alarms=(*found.alarms, alarm))


def _verify(
    reader: LogReader, roots: tuple[bytes, ...], now_ms: int, since: Mapping[str, Held], full: bool
) -> Verified:
    refused: list[RefusedRecord] = []
    # Before the log that they obey, so that none is ahead of what is read of it.
    workers = fold_fleet(reader, None).workers.values()
    there = [w for w in workers if not w.left]
    lives = [w for w in there if now_ms - w.received_ms <= FRESH_MS]
    obeyed = {w.beat.positions.get(RELEASES.name, -1) for w in lives}
    state = Releases.initial(roots)
    # The state at each position that a worker obeys: what a node that lags behind is held against.
    history: dict[int, Releases] = {-1: state}
    times: dict[int, int] = {}
    records = checked = 0
    watches = [ChainWatch(topic, since.get(topic)) for topic in (RELEASES.name, INVALIDATIONS.name)]
    wanting = Wanting()
    for record, linked, known in judged(RELEASES.name, roots, reader.read(RELEASES.name, 0), full=full):
        step = releases.fold(state, record, known)
        state = step.state
        event = step.envelope.event if step.envelope else None
        watches[0].take(record, event, linked)
        records += 1
        checked += known is None
        if state.position in obeyed:
            history[state.position] = state
        if isinstance(event, ModelReleased | ModelRolledBack):
            times[state.position] = record.timestamp_ms
            if known:
                wanting.take(record, event, state)
        if step.refused is not None:
            refused.append(_refused(record.topic, record.offset, step.refused.refusal, step.refused.detail))
    wanting.check(state)
    purges, purged = Invalidations.initial(roots), PurgeMap()
    for record, linked, known in judged(INVALIDATIONS.name, roots, reader.read(INVALIDATIONS.name, 0), full=full):
        step_ = invalidations.fold(purges, record, known)
        purges = step_.state
        watches[1].take(record, step_.envelope.event if step_.envelope else None, linked)
        records += 1
        checked += known is None
        if (purge := invalidations.purge_of(step_)) is not None:
            purged.apply(purge)
        if step_.refused is not None:
            refused.append(_refused(record.topic, record.offset, step_.refused.refusal, step_.refused.detail))
    return Verified(
        records=records,
        checked=checked,
        releases_position=state.position,
        invalidations_position=purges.position,
        state_digest=releases.state_digest(state),
        desired_digest=releases.desired_digest(releases.desired(state, None)),
        invalidations_digest=invalidations.state_digest(purges, purged),
        refused=tuple(refused),
        checkpoints={watch.topic: watch.last for watch in watches if watch.last is not None},
        alarms=tuple(
            LogAlarm(topic=watch.topic, reason=str(reason), what=what)
            for watch in watches
            for reason, what in watch.alarms(now_ms, at_end=True).items()
        ),
        nodes=len(lives),
        stale=tuple(sorted(f"{w.beat.node}/{w.beat.worker}" for w in there if now_ms - w.received_ms > FRESH_MS)),
        differences=tuple(
            difference
            for worker in sorted(lives, key=lambda w: (w.beat.region, w.beat.node, w.beat.worker))
            for difference in _differences(worker, history, times, state)
        ),
    )


def _refused(topic: str, position: int, refusal: str, detail: str) -> RefusedRecord:
    return RefusedRecord(topic=topic, position=position, refusal=str(refusal), detail=detail)


def _differences(
    worker: WorkerState,
    history: dict[int, Releases],
    times: dict[int, int],
    state: Releases,
) -> list[Difference]:
    beat = worker.beat
    found: list[str] = []
    position = beat.positions.get(RELEASES.name, -1)
    known = history.get(position)
    if known is None:
        found.append(f"says it obeys position {position} of {RELEASES.name}, which the log does not have")
    else:
        told = releases.desired(known, beat.region)
        if beat.desired_digest != releases.desired_digest(told):
            found.append(f"its board does not say what the log says at position {position}")
        for served in beat.models:
            channel = Channel.CANDIDATE if served.channel == Channel.CANDIDATE else Channel.STABLE
            want = told.get(seat(served.name, channel))
            age_ms = worker.received_ms - times[want.wanted.position] if want is not None else 0
            found += _served(served, want, age_ms, state)
    return [Difference(region=beat.region, node=beat.node, worker=beat.worker, what=what) for what in found]


def _served(served: ServedModel, want: Seated | None, age_ms: int, state: Releases) -> list[str]:
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
