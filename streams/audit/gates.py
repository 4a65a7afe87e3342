"""A verdict asked again: on what it rests, and whether the same records lead to it.

    explain     the event, its evidence, and what stood in the log before it
    recompute   reads the evidence's ranges (or, where retention has taken them, its archive) and judges anew

Law: a verdict is recomputed from the state of the log before it and from what its evidence names, and nothing else. What
the archive holds are the counts of requests and comparisons; of workers it says what the evidence says.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from schemas import codec, names
from schemas.errors import BadInput, EventRefused, NotFound
from schemas.events import Range, RolloutAdvanced, RolloutHalted, Verdict
from schemas.topics import FLEET, RELEASES
from streams.folds import fleet, gates, releases
from streams.folds.comparison import Comparison
from streams.folds.fleet import Fleet
from streams.folds.gates import Standing
from streams.folds.releases import Releases
from streams.folds.rollouts import Rollout
from streams.log.boot import in_order
from streams.log.record import LogReader

Fetch = Callable[[str], bytes]
"""The object of a key, as the store has it."""


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict of the log. `refused` says why it did not act; empty where it did. `rollout` is as it stood before."""

    id: str
    position: int
    time: str
    source: str
    event: RolloutAdvanced | RolloutHalted
    rollout: Rollout
    refused: str = ""


class Recomputed(msgspec.Struct, frozen=True, kw_only=True):
    """`source` is ``log`` or ``archive``; `same` whether the verdict is the one that was signed."""

    id: str
    source: str
    signed: Verdict
    verdict: Verdict | None
    reason: str
    same: bool
    differences: tuple[str, ...]


class VerdictLine(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict on one wave. `refused` says why it did not act; empty where it did."""

    id: str
    position: int
    time: str
    step: int
    verdict: Verdict
    reason: str
    refused: str = ""


def verdicts(reader: LogReader, roots: tuple[bytes, ...], model: str, sequence: int) -> tuple[VerdictLine, ...]:
    """Every verdict on a release's waves, in the log's order."""
    state, found = Releases.initial(roots), []
    for record in reader.read(RELEASES.name, 0):
        step = releases.fold(state, record)
        state = step.state
        try:
            envelope = step.envelope or codec.decode(record.topic, record.key, record.value, record.headers)
        except EventRefused:
            continue
        event = envelope.event
        if isinstance(event, RolloutAdvanced | RolloutHalted) and (event.model, event.sequence) == (model, sequence):
            found.append(
                VerdictLine(
                    id=envelope.id,
                    position=record.offset,
                    time=envelope.time,
                    step=event.step,
                    verdict=event.verdict,
                    reason=event.reason,
                    refused=str(step.refused) if step.refused else "",
                )
            )
    return tuple(found)


def explain(reader: LogReader, roots: tuple[bytes, ...], event_id: str) -> Explained:
    """`NotFound` where no verdict of that id stands in the log."""
    state = Releases.initial(roots)
    for record in reader.read(RELEASES.name, 0):
        before, step = state, releases.fold(state, record)
        state = step.state
        try:
            envelope = step.envelope or codec.decode(record.topic, record.key, record.value, record.headers)
        except EventRefused:
            continue
        event = envelope.event
        if envelope.id != event_id or not isinstance(event, RolloutAdvanced | RolloutHalted):
            continue
        history = before.models.get(event.model)
        if history is None or history.rollout is None or history.rollout.wanted.sequence != event.sequence:
            raise NotFound(f"the verdict {event_id} is of a rollout that was not under way")
        return Explained(
            id=event_id,
            position=record.offset,
            time=envelope.time,
            source=envelope.source,
            event=event,
            rollout=history.rollout,
            refused=str(step.refused) if step.refused else "",
        )
    raise NotFound(f"no verdict {event_id} in the log; `mlcdn audit story MODEL` lists a model's")


def recompute(reader: LogReader, roots: tuple[bytes, ...], event_id: str, fetch: Fetch) -> Recomputed:
    """Judges again. `NotFound` where neither the log nor the store has the records any more."""
    found = explain(reader, roots, event_id)
    rollout, evidence = found.rollout, found.event.evidence
    # A halt may contradict the advance before it: then it judged the wave before the one in force.
    if found.event.step != rollout.step:
        rollout = _at(reader, roots, found)
    subject = gates.subject_of(rollout)
    if all(reader.watermarks(r.topic, r.partition)[0] <= r.start or r.start == r.end for r in evidence.ranges):
        source, comparison, state = "log", Comparison(subject), Fleet()
        for record in in_order(reader.read(r.topic, r.partition, r.start, r.end) for r in evidence.ranges):
            if record.topic == FLEET.name:
                state = fleet.fold(state, record).state
            try:
                comparison.take(record, codec.decode(record.topic, record.key, record.value, record.headers))
            except EventRefused:
                continue
        standing = gates.standing_of(state, subject, evidence.until_ms)
    elif evidence.archive:
        source, comparison = (
            "archive",
            Comparison.of_archive(fetch(names.evidence_object_key(found.event.model, evidence.archive))),
        )
        if comparison.subject != subject:
            raise BadInput(f"the archive {evidence.archive} is of another wave")
        standing = Standing(workers=evidence.workers, live=evidence.live, objections=evidence.objections)
    else:
        gone = ", ".join(_shown(r) for r in evidence.ranges)
        raise NotFound(f"the records are gone ({gone}), and nothing was archived of them")
    judgement = gates.judged(rollout, comparison, standing, evidence.until_ms)
    again = judgement.evidence
    differences = [
        f"{field}: {getattr(evidence, field)} was signed, {getattr(again, field)} is read"
        for field in ("stable", "candidate", "compared", "disagreements", "workers", "live", "objections")
        if getattr(evidence, field) != getattr(again, field)
    ]
    return Recomputed(
        id=event_id,
        source=source,
        signed=found.event.verdict,
        verdict=judgement.verdict,
        reason=judgement.reason,
        same=judgement.verdict is found.event.verdict,
        differences=tuple(differences),
    )


def _at(reader: LogReader, roots: tuple[bytes, ...], found: Explained) -> Rollout:
    """The rollout when the wave that was judged was in force."""
    state = Releases.initial(roots)
    last: Rollout | None = None
    for record in reader.read(RELEASES.name, 0, 0, found.position):
        state = releases.fold(state, record).state
        history = state.models.get(found.event.model)
        rollout = history.rollout if history is not None else None
        if rollout is not None and (rollout.wanted.sequence, rollout.step) == (found.event.sequence, found.event.step):
            last = rollout
    if last is None:
        raise NotFound(f"wave {found.event.step} of {found.event.model} was never in force")
    return last


def _shown(r: Range) -> str:
    return f"{r.topic} {r.partition}/{r.start}-{r.end}"
