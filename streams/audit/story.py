"""Story: what happened to a model, or because of one event, as one timeline with causes.

Laws: a line names its event's id and the id of its cause, so any line can be asked for in turn; the order is the log's
(broker timestamp, topic, partition, offset); the same log gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import msgspec

from schemas import codec
from schemas.codec import Envelope
from schemas.errors import EventRefused, NotFound
from schemas.events import (
    ArtifactRejected,
    CacheInvalidated,
    Event,
    EventRejected,
    InvalidationApplied,
    LogCheckpoint,
    ModelReleased,
    ModelRetired,
    ModelRolledBack,
    ModelSwapped,
    NodeLeft,
    SwapFailed,
    TrustChanged,
)
from schemas.names import ScopeKind
from schemas.topics import FLEET, INVALIDATIONS, RELEASES
from streams.folds import invalidations, releases
from streams.folds.invalidations import Invalidations
from streams.folds.releases import Releases
from streams.log.record import LogReader, Record


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened. `refused` says why a record did not act; empty when it did."""

    timestamp_ms: int
    topic: str
    partition: int
    position: int
    kind: str
    id: str
    cause: str | None
    source: str
    what: str
    refused: str = ""

    @property
    def time(self) -> str:
        moment = datetime.fromtimestamp(self.timestamp_ms / 1000, UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def story(reader: LogReader, roots: tuple[bytes, ...], what: str) -> list[Line]:
    """The timeline of a model, of an event (by its id), or of an artifact (by its digest); `NotFound` when there is none.

    An event's story is the event, all that names it as its cause, directly or through others, and the event it names
    itself. Beats are left out: they say that nothing happened.
    """
    told = list(_all(reader, roots))
    by_id = {line.id: line for line, _ in told}
    if what in by_id:
        picked = _because_of(what, [line for line, _ in told])
    else:
        picked = [line for line, event in told if event is not None and _concerns(event, what)]
        ids = {line.id for line in picked}
        picked += [line for line, _ in told if line.cause in ids and line.id not in ids]
    if not picked:
        raise NotFound(f"the log says nothing of {what!r}: no model, event id or digest of that name")
    return sorted(picked, key=lambda line: (line.timestamp_ms, line.topic, line.partition, line.position))


def _all(reader: LogReader, roots: tuple[bytes, ...]) -> Iterator[tuple[Line, Event | None]]:
    told = Releases.initial(roots)
    for record in reader.read(RELEASES.name, 0):
        step = releases.fold(told, record)
        told = step.state
        yield _line(record, step.envelope, step.refused)
    purged = Invalidations.initial(roots)
    for record in reader.read(INVALIDATIONS.name, 0):
        step_ = invalidations.fold(purged, record)
        purged = step_.state
        yield _line(record, step_.envelope, step_.refused)
    for partition in range(reader.partitions(FLEET.name)):
        for record in reader.read(FLEET.name, partition):
            # A beat a second and worker would be nearly all of the topic; its type stands in a header.
            if dict(record.headers).get("ce_type") == codec.LATEST["NodeBeat"].ce_type.encode():
                continue
            try:
                envelope = codec.decode(record.topic, record.key, record.value, record.headers)
            except EventRefused as refused:
                yield _line(record, None, refused)
            else:
                yield _line(record, envelope, None)


def _line(record: Record, envelope: Envelope | None, refused: EventRefused | None) -> tuple[Line, Event | None]:
    said = {k: (v or b"").decode("ascii", "replace") for k, v in record.headers if k.startswith("ce_")}
    event = envelope.event if envelope else None
    line = Line(
        timestamp_ms=record.timestamp_ms,
        topic=record.topic,
        partition=record.partition,
        position=record.offset,
        kind=event.kind if event else said.get("ce_type", "?").removeprefix("mlcdn.").split(".")[0],
        id=said.get("ce_id", ""),
        cause=said.get("ce_causationid"),
        source=said.get("ce_source", ""),
        what=describe(event) if event else "did not act",
        refused=str(refused) if refused else "",
    )
    return line, event


def _because_of(root: str, lines: Iterable[Line]) -> list[Line]:
    lines = list(lines)
    chosen = {root}
    cause = next((line.cause for line in lines if line.id == root), None)
    grown = True
    while grown:
        found = {line.id for line in lines if line.cause in chosen and line.id not in chosen}
        grown = bool(found)
        chosen |= found
    if cause:
        chosen.add(cause)
    return [line for line in lines if line.id in chosen]


def _concerns(event: Event, what: str) -> bool:
    match event:
        case ModelReleased():
            return what in (event.model, event.artifact.sha256)
        case ModelRolledBack():
            return what in (event.model, event.to_digest)
        case ModelRetired():
            return what == event.model
        case ModelSwapped() | SwapFailed() | ArtifactRejected():
            return what in (event.model, event.digest)
        case CacheInvalidated():
            return any(s.kind is ScopeKind.MODEL and s.value == what for s in event.scopes)
        case _:
            return False


def describe(event: Event) -> str:
    """One line for a person."""
    match event:
        case TrustChanged():
            granted = ", ".join(
                f"{g.label} may sign {'/'.join(g.kinds)} for {'/'.join(g.models)}" for g in event.grants
            )
            return f"trust: {granted or 'no grants'}; {len(event.revoked)} revoked, by {event.author}: {event.reason}"
        case ModelReleased():
            return (
                f"{event.model} {event.version} released as sequence {event.sequence} by {event.author}"
                f" ({event.artifact.sha256[:12]}, {event.artifact.size_bytes} bytes): {event.reason}"
            )
        case ModelRolledBack():
            return (
                f"{event.model} rolled back to {event.version} ({event.to_digest[:12]}) as sequence {event.sequence}"
                f" by {event.author}: {event.reason}"
            )
        case ModelRetired():
            return f"{event.model} retired as sequence {event.sequence} by {event.author}: {event.reason}"
        case LogCheckpoint():
            return f"vouches for everything to position {event.position} ({event.chain_sha256[:12]})"
        case CacheInvalidated():
            kind = "softly" if event.soft else "hard"
            return f"purged {kind} by {event.author}: {', '.join(map(str, event.scopes))}: {event.reason}"
        case ModelSwapped():
            phases = ", ".join(f"{k} {v:.0f} ms" for k, v in event.ms.items())
            return f"{event.node} worker {event.worker} serves {event.model} {event.version} ({phases})"
        case SwapFailed() | ArtifactRejected():
            verb = "rejected" if isinstance(event, ArtifactRejected) else "could not take over"
            return f"{event.node} {verb} {event.model} {event.version} at {event.phase}: {event.cause}"
        case InvalidationApplied():
            return f"{event.node} obeys position {event.position} after {event.ms:.0f} ms"
        case NodeLeft():
            return f"{event.node} worker {event.worker} left: {event.cause}"
        case EventRejected():
            return (
                f"{event.node} refused {event.topic} {event.partition}/{event.offset}: {event.refusal} {event.detail}"
            )
        case _:
            return event.kind
