"""How an event is written down: Confluent framing, Avro, and the CloudEvents Kafka binding in binary mode. PURE.

    value    0x00 · schema id, 4 bytes big-endian · Avro body             (Confluent wire format)
    headers  ce_specversion ce_id ce_type ce_source ce_time content-type
             ce_causationid (the event that led to this one) ce_traceparent

Laws: a published schema file is never edited, a new version is a new file and a new id in `SCHEMAS`; decoding is strict
(byte cap, known id, all input consumed, every value in range), and what fails is an `EventRefused` with its reason.
Sources: Confluent wire format (schema registry documentation); CloudEvents Kafka protocol binding 1.0.2, section 3.2.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from typing import Any, Final

import fastavro
import msgspec

from schemas.errors import BadInput, EventRefused, Refusal
from schemas.events import KINDS, Event
from schemas.topics import TOPICS


@dataclass(frozen=True, slots=True)
class SchemaVersion:
    """One published Avro file: ``avsc/<kind>.v<version>.avsc``."""

    id: int
    kind: str
    version: int

    @property
    def ce_type(self) -> str:
        return f"mlcdn.{self.kind}.v{self.version}"

    @property
    def source(self) -> str:
        return (resources.files("schemas") / "avsc" / f"{self.kind}.v{self.version}.avsc").read_text("utf-8")


SCHEMAS: Final = (
    SchemaVersion(1, "TrustChanged", 1),
    SchemaVersion(2, "ModelReleased", 1),
    SchemaVersion(3, "ModelRolledBack", 1),
    SchemaVersion(4, "ModelRetired", 1),
    SchemaVersion(5, "CacheInvalidated", 1),
    SchemaVersion(6, "NodeBeat", 1),
    SchemaVersion(7, "ModelSwapped", 1),
    SchemaVersion(8, "SwapFailed", 1),
    SchemaVersion(9, "ArtifactRejected", 1),
    SchemaVersion(10, "InvalidationApplied", 1),
    SchemaVersion(11, "NodeLeft", 1),
    SchemaVersion(12, "RequestBatch", 1),
    SchemaVersion(13, "RoutesPublished", 1),
    SchemaVersion(14, "EventRejected", 1),
    SchemaVersion(15, "ModelReleased", 2),
    SchemaVersion(16, "LogCheckpoint", 1),
    SchemaVersion(17, "ModelReleased", 3),
    SchemaVersion(18, "RolloutAdvanced", 1),
    SchemaVersion(19, "RolloutHalted", 1),
    SchemaVersion(20, "RolloutPaused", 1),
    SchemaVersion(21, "RolloutResumed", 1),
    SchemaVersion(22, "RolloutAborted", 1),
    SchemaVersion(23, "ShadowCompared", 1),
    SchemaVersion(24, "RequestRecorded", 1),
)
BY_ID: Final = {s.id: s for s in SCHEMAS}
LATEST: Final = {s.kind: s for s in SCHEMAS}

Headers = Sequence[tuple[str, bytes | None]]
_FRAME: Final = struct.Struct(">bI")


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What is appended: not yet a record, since it has no position."""

    topic: str
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]

    def header(self, name: str) -> bytes | None:
        return next((v for k, v in self.headers if k == name), None)


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """An event and what CloudEvents says of it. `time` is the writer's clock: for people, never for decisions."""

    id: str
    source: str
    time: str
    causation_id: str | None
    traceparent: str | None
    event: Event


@cache
def _parsed(schema_id: int) -> Any:
    return fastavro.parse_schema(json.loads(BY_ID[schema_id].source))


@cache
def catalogue_digest() -> str:
    """SHA-256 over every published schema, in id order: what a snapshot must have been written with."""
    digest = hashlib.sha256()
    for schema in SCHEMAS:
        digest.update(f"{schema.id} {schema.ce_type}\n".encode())
        digest.update(json.dumps(json.loads(schema.source), sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def encode(
    event: Event,
    *,
    topic: str,
    id: str,  # noqa: A002 - CloudEvents' own word
    source: str,
    now_ms: int,
    causation_id: str | None = None,
    traceparent: str | None = None,
) -> Message:
    """The event as a message for `topic`, in its latest schema version.

    `id` is a UUIDv7, `source` is ``/regions/<r>/nodes/<n>`` or ``/operators/<who>``, `now_ms` is Unix milliseconds.
    """
    if event.kind not in TOPICS[topic].kinds:
        raise BadInput(f"{event.kind} does not belong on {topic}")
    schema = LATEST[event.kind]
    body = io.BytesIO()
    body.write(_FRAME.pack(0, schema.id))
    fastavro.schemaless_writer(body, _parsed(schema.id), msgspec.to_builtins(event, builtin_types=(bytes,)))
    value = body.getvalue()
    if len(value) > TOPICS[topic].max_bytes:
        raise BadInput(f"{event.kind} of {len(value)} bytes is over the {TOPICS[topic].max_bytes} bytes of {topic}")
    time = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    headers = [
        ("ce_specversion", b"1.0"),
        ("ce_id", id.encode()),
        ("ce_type", schema.ce_type.encode()),
        ("ce_source", source.encode()),
        ("ce_time", time.encode()),
        ("content-type", b"application/avro"),
    ]
    if causation_id:
        headers.append(("ce_causationid", causation_id.encode()))
    if traceparent:
        headers.append(("ce_traceparent", traceparent.encode()))
    return Message(topic=topic, key=event.key.encode(), value=value, headers=tuple(headers))


def decode(topic: str, key: bytes | None, value: bytes | None, headers: Headers) -> Envelope:
    """The event that a record holds, or `EventRefused` with the reason. Judges no signature."""
    catalogued = TOPICS[topic]
    if value is None:
        raise EventRefused(Refusal.TOMBSTONE)
    if len(value) > catalogued.max_bytes:
        raise EventRefused(Refusal.TOO_LARGE, f"{len(value)} bytes, at most {catalogued.max_bytes}")
    said = _cloud_event(headers)
    if len(value) < _FRAME.size:
        raise EventRefused(Refusal.MALFORMED, "shorter than its frame")
    magic, schema_id = _FRAME.unpack_from(value)
    if magic != 0:
        raise EventRefused(Refusal.MALFORMED, f"magic byte {magic}")
    schema = BY_ID.get(schema_id)
    if schema is None:
        raise EventRefused(Refusal.UNKNOWN_SCHEMA, f"schema id {schema_id}")
    if said["ce_type"] != schema.ce_type:
        raise EventRefused(Refusal.MALFORMED, f"ce_type {said['ce_type']!r} over a body of {schema.ce_type}")
    if schema.kind not in catalogued.kinds:
        raise EventRefused(Refusal.WRONG_TOPIC, f"{schema.kind} on {topic}")
    event = _body(schema, value)
    if key != event.key.encode():
        raise EventRefused(Refusal.WRONG_KEY, f"key {key!r}, event says {event.key!r}")
    return Envelope(
        id=said["ce_id"],
        source=said["ce_source"],
        time=said["ce_time"],
        causation_id=said.get("ce_causationid"),
        traceparent=said.get("ce_traceparent"),
        event=event,
    )


def _body(schema: SchemaVersion, value: bytes) -> Event:
    stream = io.BytesIO(value)
    stream.seek(_FRAME.size)
    try:
        latest = LATEST[schema.kind]
        reader = None if latest is schema else _parsed(latest.id)
        fields = fastavro.schemaless_reader(stream, _parsed(schema.id), reader)
    # fastavro raises whatever its bytes led it into: EOFError, IndexError, UnicodeDecodeError, OverflowError, …
    except Exception as error:
        raise EventRefused(Refusal.MALFORMED, f"Avro body: {type(error).__name__}") from error
    # fastavro takes trailing garbage in silence.
    if stream.tell() != len(value):
        raise EventRefused(Refusal.MALFORMED, f"{len(value) - stream.tell()} bytes after the Avro body")
    try:
        return msgspec.convert(fields, KINDS[schema.kind], builtin_types=(bytes,))
    except (msgspec.ValidationError, BadInput, ValueError) as error:
        raise EventRefused(Refusal.MALFORMED, str(error)) from error


_CE_MAX: Final = 1_024
_CE_KNOWN: Final = frozenset(
    {"ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time", "ce_causationid", "ce_traceparent"},
)


def _cloud_event(headers: Headers) -> dict[str, str]:
    if len(headers) > 64:
        raise EventRefused(Refusal.MALFORMED, f"{len(headers)} headers, at most 64")
    said: dict[str, str] = {}
    for name, raw in headers:
        if name not in _CE_KNOWN:
            continue
        if name in said:
            raise EventRefused(Refusal.MALFORMED, f"header {name} stands twice")
        if raw is None or not 0 < len(raw) <= _CE_MAX:
            raise EventRefused(Refusal.MALFORMED, f"header {name} is empty or over {_CE_MAX} bytes")
        try:
            said[name] = raw.decode("ascii")
        except UnicodeDecodeError:
            raise EventRefused(Refusal.MALFORMED, f"header {name} is not ASCII") from None
    for needed in ("ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time"):
        if needed not in said:
            raise EventRefused(Refusal.MALFORMED, f"header {needed} is missing")
    if said["ce_specversion"] != "1.0":
        raise EventRefused(Refusal.MALFORMED, f"CloudEvents {said['ce_specversion'][:16]!r}")
    return said
