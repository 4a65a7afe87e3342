"""Story: what happened to a model, or because of one event, as one timeline with causes.

A record that is not of the story is forgotten as it passes. What it named as its cause leaves a mark in a map of fixed
size, so that a cause which is found later than its effect is noticed, and the log read once more.

Laws: a line names its event's id and the id of its cause, so any line can be asked for in turn; the order is the log's
(broker timestamp, topic, partition, offset); the same log gives the same bytes; memory grows with the story, never with
the log; a beat is decoded only where it was asked for by its id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final
from zlib import crc32

import msgspec

from schemas import codec
from schemas.codec import Envelope
from schemas.errors import BadInput, EventRefused, NotFound
from schemas.events import (
    ArtifactRejected,
    CacheInvalidated,
    ModelReleased,
    ModelRetired,
    ModelRolledBack,
    ModelSwapped,
    RolloutEvent,
    ShadowCompared,
    SwapFailed,
)
from schemas.names import ScopeKind
from schemas.topics import FLEET, INVALIDATIONS, RELEASES
from streams.audit.control import At, fold_releases
from streams.audit.order import merged
from streams.audit.words import describe
from streams.folds import invalidations, releases
from streams.folds.invalidations import Invalidations
from streams.folds.releases import Releases
from streams.log.record import LogReader, Record

_BEAT: Final = ("ce_type", codec.LATEST["NodeBeat"].ce_type.encode())
_POSITIONS: Final = re.compile(r"(-1|\d+)/(-1|\d+)")
_MARKS: Final = 1 << 23


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
    author: str = ""
    reason: str = ""
    refused: str = ""

    @property
    def time(self) -> str:
        moment = datetime.fromtimestamp(self.timestamp_ms / 1000, UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Told(msgspec.Struct, frozen=True):
    """A record as the log's readers judge it."""

    record: Record
    envelope: Envelope | None
    refused: EventRefused | None


def story(reader: LogReader, roots: tuple[bytes, ...], what: str, model: str | None = None) -> list[Line]:
    """The timeline of a model, an event (by its id), an artifact (by its digest), or of what was in force at positions of
    releases and invalidations (``12/34``, as in an answer's ``mlcdn-position``); `NotFound` when there is none.

    A model's, digest's or position's story is all that concerns it, and all that names that as its cause, directly or
    through others. An event's is the event, all that names it as its cause, and the event it names itself. `model` leaves
    what positions had in force of other models out. Beats, and comparisons in which nothing differed, are left
    out: they say that nothing happened.
    """
    if not what:
        raise BadInput("a story is of a model, an event id, a digest, or positions such as 12/34")
    picking = _of_positions(reader, roots, what, model) or _Picking(what)
    again = True
    while again:
        again = picking.read(_all(reader, roots, what))
    if not picking.lines:
        raise NotFound(f"the log says nothing of {what!r}: no model, event id or digest of that name")
    return [picking.lines[place] for place in sorted(picking.lines)]


class _Picking:
    """What belongs to the story so far. `family` are ids whose effects belong to it too, `kin` ids that do themselves."""

    def __init__(self, what: str, family: frozenset[str] = frozenset(), purge_until: int | None = None) -> None:
        self.what = what
        self.family, self.kin = set(family), set(family)
        self.releases: set[tuple[str, int]] = set()
        self.brought: set[tuple[str, int]] = set()
        self.lines: dict[tuple[int, str, int, int], Line] = {}
        # The digests of releases that a file, whose story it is, belongs to.
        self._of_file: set[str] = set()
        self._purge_until = purge_until
        self._passed: set[str] = set()
        self._again = False

    def read(self, log: Iterator[_Told]) -> bool:
        """Reads the log once; True if something found belongs together with something that had passed already."""
        self._causes, self._ids = bytearray(_MARKS // 8), bytearray(_MARKS // 8)
        looked_for, self._passed = self._passed, set()
        only_kin = bool(looked_for) and not self._again
        self._again = False
        purge: _Told | None = None
        for told in log:
            if told.record.topic == FLEET.name and only_kin and not looked_for:
                # All that was missing is what an effect named as its cause, and that was signed.
                break
            if purge is not None and (told.record.topic != INVALIDATIONS.name or self._is_later(told.record)):
                self._take(purge)
                purge = None
            if self._purge_until is not None and _is_purge(told) and not self._is_later(told.record):
                purge = told
            said = dict(told.record.headers)
            id_, cause = (_text(said.get(name)) for name in ("ce_id", "ce_causationid"))
            if id_ == self.what:
                if cause not in self.kin and _marked(self._ids, cause):
                    self._passed.add(cause)
                self.kin.add(cause)
                self._grow(id_)
                self._take(told)
            elif (cause and cause in self.family) or self._concerns(told):
                self._grow(id_)
                self._take(told)
            elif id_ and id_ in self.kin:
                self._take(told)
                looked_for.discard(id_)
            else:
                _mark(self._causes, cause)
                _mark(self._ids, id_)
        if purge is not None:
            self._take(purge)
        return self._again or bool(self._passed)

    def _grow(self, id_: str) -> None:
        """The id's effects belong to the story; one may have passed already."""
        if id_ and id_ not in self.family:
            self.family.add(id_)
            self._again = self._again or _marked(self._causes, id_)

    def _take(self, told: _Told) -> None:
        record = told.record
        self.lines[(record.timestamp_ms, record.topic, record.partition, record.offset)] = _line(told)
        if self._purge_until is not None and _is_purge(told) and told.envelope is not None:
            self._grow(told.envelope.id)

    def _is_later(self, record: Record) -> bool:
        return self._purge_until is not None and record.offset > self._purge_until

    def _concerns(self, told: _Told) -> bool:
        event = told.envelope.event if told.envelope is not None else None
        match event:
            case ModelReleased():
                if (event.model, event.sequence) in self.brought:
                    return True
                of_file = any(artifact.sha256 == self.what for artifact in event.artifacts)
                found = of_file or self.what in (event.model, event.digest)
                if found:
                    self.releases.add((event.model, event.sequence))
                if of_file:
                    self._of_file.add(event.digest)
                return found
            case ModelRolledBack():
                return self.what in (event.model, event.to_digest) or event.to_digest in self._of_file
            case ModelRetired():
                return self.what == event.model
            case RolloutEvent():
                return self.what == event.model or (event.model, event.sequence) in self.releases
            case ModelSwapped() | SwapFailed() | ArtifactRejected():
                return self.what in (event.model, event.digest)
            case ShadowCompared():
                of_it = self.what in (event.model, event.candidate_digest)
                return of_it and bool(event.disagreements or event.failed)
            case CacheInvalidated():
                return any(s.kind is ScopeKind.MODEL and s.value == self.what for s in event.scopes)
            case _:
                return False


def _of_positions(reader: LogReader, roots: tuple[bytes, ...], what: str, model: str | None) -> _Picking | None:
    """What was in force at positions of both signed topics: every release that could serve, and the last purge."""
    found = _POSITIONS.fullmatch(what)
    if found is None:
        if model is not None:
            raise BadInput("--model narrows positions such as 12/34, nothing else")
        return None
    at, purges = int(found[1]), int(found[2])
    told = fold_releases(reader, roots, At(position=at))[0] if at >= 0 else Releases.initial(roots)
    if purges >= (high := reader.watermarks(INVALIDATIONS.name, 0)[1]):
        raise BadInput(f"position {purges} of {INVALIDATIONS.name} is beyond the log's last, {high - 1}")
    seats = [s.wanted for s in releases.desired(told, None).values() if model in (None, s.wanted.model)]
    picking = _Picking(what, frozenset(wanted.cause for wanted in seats), purges)
    # A rollback says who went back; who brought the artifact, why, and how it was judged, says its release.
    picking.brought = {(wanted.model, wanted.released.sequence) for wanted in seats}
    picking.releases = {(wanted.model, wanted.sequence) for wanted in seats} | picking.brought
    return picking


def _all(reader: LogReader, roots: tuple[bytes, ...], what: str) -> Iterator[_Told]:
    told = Releases.initial(roots)
    for record in reader.read(RELEASES.name, 0):
        step = releases.fold(told, record)
        told = step.state
        yield _Told(record, step.envelope, step.refused)
    purged = Invalidations.initial(roots)
    for record in reader.read(INVALIDATIONS.name, 0):
        step_ = invalidations.fold(purged, record)
        purged = step_.state
        yield _Told(record, step_.envelope, step_.refused)
    asked = ("ce_id", what.encode())
    for record in merged(reader, FLEET.name):
        # A beat a second and worker is nearly all of the topic; its type stands in a header.
        if _BEAT in record.headers and asked not in record.headers:
            continue
        try:
            yield _Told(record, codec.decode(record.topic, record.key, record.value, record.headers), None)
        except EventRefused as refused:
            yield _Told(record, None, refused)


def _line(told: _Told) -> Line:
    record = told.record
    said = {k: _text(v) for k, v in record.headers if k.startswith("ce_")}
    event = told.envelope.event if told.envelope is not None else None
    return Line(
        timestamp_ms=record.timestamp_ms,
        topic=record.topic,
        partition=record.partition,
        position=record.offset,
        kind=event.kind if event else said.get("ce_type", "?").removeprefix("mlcdn.").split(".")[0],
        id=said.get("ce_id", ""),
        cause=said.get("ce_causationid"),
        source=said.get("ce_source", ""),
        what=describe(event) if event else "did not act",
        author=getattr(event, "author", ""),
        reason=getattr(event, "reason", ""),
        refused=str(told.refused) if told.refused else "",
    )


def _is_purge(told: _Told) -> bool:
    return told.envelope is not None and isinstance(told.envelope.event, CacheInvalidated)


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("ascii", "replace")


def _mark(marks: bytearray, id_: str) -> None:
    if id_:
        at = crc32(id_.encode()) % _MARKS
        marks[at >> 3] |= 1 << (at & 7)


def _marked(marks: bytearray, id_: str) -> bool:
    at = crc32(id_.encode()) % _MARKS
    return bool(id_) and bool(marks[at >> 3] & 1 << (at & 7))
