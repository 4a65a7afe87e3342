"""Export: every record of the log as a line of JSON, in the one order, as bytes that are the same each time.

    {"topic", "partition", "position", "timestamp_ms", "key", "kind", "id", "source", "time", "cause", "event"}

A record that did not act has `refused` in place of `event`: the reason, its detail, and what it was made of, in base64: key,
headers, and at most the first RAW_BYTES of its value; `value_bytes` says how long that was.

Laws: the plan names all that decides which bytes come out, so a plan carried out in two halves gives what it gives in one;
signed topics are judged from their first record on, as every node judges them, also where a later part is asked for; one
record a partition is held beside what the reader has fetched.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

import msgspec

from schemas import codec
from schemas.codec import Envelope
from schemas.errors import BadInput, Conflict, EventRefused
from schemas.events import Event
from schemas.topics import RELEASES, TOPICS
from streams.audit.control import At
from streams.audit.order import end_at, partitions
from streams.folds import invalidations, releases
from streams.folds.invalidations import Invalidations
from streams.folds.releases import Releases
from streams.log.record import LogReader, Record

RAW_BYTES: Final = 65_536
_RAW_HEADERS: Final = 64

Place = tuple[str, int]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """The records of one partition from `start` to before `end`. `topic_id` is another once the topic was made again."""

    topic: str
    topic_id: str
    partition: int
    start: int
    end: int

    @property
    def place(self) -> Place:
        return self.topic, self.partition


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is exported: fixed when it begins, so that it does not grow with the log. `roots` are those that judge."""

    parts: tuple[Part, ...]
    roots: tuple[bytes, ...]

    def starts(self) -> dict[Place, int]:
        return {part.place: part.start for part in self.parts}

    def left(self, positions: Mapping[Place, int]) -> int:
        """How many positions are still to be read."""
        return sum(max(0, part.end - positions[part.place]) for part in self.parts)


class Told(msgspec.Struct, frozen=True):
    record: Record
    envelope: Envelope | None
    refused: EventRefused | None


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    reason: str
    detail: str
    key: bytes | None
    value: bytes | None
    value_bytes: int
    headers: tuple[tuple[str, bytes | None], ...]


class _Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    topic: str
    partition: int
    position: int
    timestamp_ms: int
    key: str | None
    kind: str
    id: str
    source: str
    time: str
    cause: str | None
    event: Event | None = None
    refused: Refused | None = None


def plan(reader: LogReader, roots: tuple[bytes, ...], topics: Sequence[str], since: At, until: At) -> Plan:
    """All records of `topics` from one moment to another, both included; positions are those of ``mlcdn.releases``."""
    unknown = [topic for topic in topics if topic not in TOPICS]
    if unknown:
        raise BadInput(f"no topic {', '.join(unknown)}; there are {', '.join(TOPICS)}")
    since_ms, until_ms = since.time(reader), until.time(reader)
    parts = []
    for topic, partition in partitions(reader, sorted(set(topics))):
        start = reader.watermarks(topic, partition)[0]
        if since_ms is not None:
            start = max(start, reader.offset_at(topic, partition, since_ms))
        end = end_at(reader, topic, partition, until_ms)
        if topic == RELEASES.name:
            start = since.position if since.position is not None else start
            end = until.position + 1 if until.position is not None else end
        parts.append(
            Part(topic=topic, topic_id=reader.topic_id(topic), partition=partition, start=start, end=max(start, end))
        )
    return Plan(parts=tuple(parts), roots=roots)


def told(reader: LogReader, what: Plan, positions: Mapping[Place, int]) -> Iterator[Told]:
    """The records of a plan from `positions` on, in the one order; `Conflict` where some of them are gone."""
    for part in what.parts:
        if reader.topic_id(part.topic) != part.topic_id:
            raise Conflict(f"{part.topic} was deleted and made again since the export began")
        low = reader.watermarks(part.topic, part.partition)[0]
        if positions[part.place] < min(low, part.end):
            raise Conflict(f"{part.topic} {part.partition} begins at {low} by now: what the export lacks has expired")
    streams = [_judged(reader, part, positions[part.place], what.roots) for part in what.parts]
    return heapq.merge(*streams, key=_told_in_order)


_told_in_order = attrgetter("record.timestamp_ms", "record.topic", "record.partition", "record.offset")


def _judged(reader: LogReader, part: Part, start: int, roots: tuple[bytes, ...]) -> Iterator[Told]:
    if TOPICS[part.topic].signed:
        judge: Any = releases.fold if part.topic == RELEASES.name else invalidations.fold
        state: Any = (Releases if part.topic == RELEASES.name else Invalidations).initial(roots)
        for record in reader.read(part.topic, part.partition, 0, part.end) if start < part.end else ():
            step = judge(state, record)
            state = step.state
            if record.offset >= start:
                yield Told(record, step.envelope, step.refused)
        return
    for record in reader.read(part.topic, part.partition, start, part.end):
        try:
            envelope = codec.decode(record.topic, record.key, record.value, record.headers)
        except EventRefused as refused:
            yield Told(record, None, refused)
        else:
            yield Told(record, envelope, None)


_encoder: Final = msgspec.json.Encoder()


def line(said: Told) -> bytes:
    """One line, its end included."""
    record, envelope = said.record, said.envelope
    if envelope is not None and said.refused is None:
        return _encoder.encode(
            _Line(
                topic=record.topic,
                partition=record.partition,
                position=record.offset,
                timestamp_ms=record.timestamp_ms,
                key=envelope.event.key,
                kind=envelope.event.kind,
                id=envelope.id,
                source=envelope.source,
                time=envelope.time,
                cause=envelope.causation_id,
                event=envelope.event,
            )
        ) + b"\n"  # fmt: skip
    return _encoder.encode(_refused(record, said.refused)) + b"\n"


def _refused(record: Record, refused: EventRefused | None) -> _Line:
    names = {name: (raw or b"").decode("ascii", "replace")[:1_024] for name, raw in record.headers[:_RAW_HEADERS]}
    return _Line(
        topic=record.topic,
        partition=record.partition,
        position=record.offset,
        timestamp_ms=record.timestamp_ms,
        key=record.key.decode("utf-8", "replace") if record.key is not None else None,
        kind=names.get("ce_type", "").removeprefix("mlcdn.").split(".")[0],
        id=names.get("ce_id", ""),
        source=names.get("ce_source", ""),
        time=names.get("ce_time", ""),
        cause=names.get("ce_causationid"),
        refused=Refused(
            reason=str(refused.refusal) if refused is not None else "",
            detail=refused.detail if refused is not None else "",
            key=record.key,
            value=record.value[:RAW_BYTES] if record.value is not None else None,
            value_bytes=len(record.value or b""),
            headers=tuple((name, raw and raw[:1_024]) for name, raw in record.headers[:_RAW_HEADERS]),
        ),
    )
