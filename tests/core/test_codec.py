"""Events in bytes and back; and every way in which bytes are not an event."""

from __future__ import annotations

import io
import json
from typing import Any

import fastavro
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from schemas import codec, signing
from schemas.codec import Message
from schemas.errors import BadInput, EventRefused, Refusal
from schemas.events import (
    Artifact,
    CacheInvalidated,
    CachePolicy,
    EventRejected,
    ModelReleased,
    ModelRetired,
    RequestBatch,
    Tensor,
    TierUse,
)
from schemas.names import Scope, ScopeKind, model_object_key

EVENT = ModelRetired(model="m", sequence=3, author="me", reason="old")


def message(event: ModelRetired = EVENT) -> Message:
    return codec.encode(event, topic="mlcdn.releases", id="id-1", source="/operators/me", now_ms=0)


def refusal(
    value: bytes | None, *, key: bytes = b"m", headers: object = None, topic: str = "mlcdn.releases"
) -> Refusal:
    said = message().headers if headers is None else headers
    with pytest.raises(EventRefused) as refused:
        codec.decode(topic, key, value, said)  # type: ignore[arg-type]
    return refused.value.refusal


def test_an_event_comes_back_as_it_was() -> None:
    m = message()
    envelope = codec.decode(m.topic, m.key, m.value, m.headers)
    assert envelope.event == EVENT
    assert (envelope.id, envelope.source, envelope.time) == ("id-1", "/operators/me", "1970-01-01T00:00:00.000Z")


def test_what_is_no_event_is_refused_with_its_reason() -> None:
    value = message().value
    assert refusal(None) is Refusal.TOMBSTONE
    assert refusal(b"") is Refusal.MALFORMED
    assert refusal(b"\0") is Refusal.MALFORMED
    assert refusal(b"\x01" + value[1:]) is Refusal.MALFORMED
    assert refusal(b"\0\0\0\xff\xff" + value[5:]) is Refusal.UNKNOWN_SCHEMA
    assert refusal(value + b"\0") is Refusal.MALFORMED
    assert refusal(value[:-1]) is Refusal.MALFORMED
    assert refusal(bytes(2 * 2**20)) is Refusal.TOO_LARGE
    assert refusal(value, key=b"other") is Refusal.WRONG_KEY
    assert refusal(value, topic="mlcdn.fleet") is Refusal.WRONG_TOPIC


def test_headers_are_read_strictly() -> None:
    m = message()
    for missing in ("ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time"):
        assert refusal(m.value, headers=[h for h in m.headers if h[0] != missing]) is Refusal.MALFORMED
    assert refusal(m.value, headers=[*m.headers, ("ce_id", b"again")]) is Refusal.MALFORMED
    assert refusal(m.value, headers=[*m.headers, *(("x", b"") for _ in range(100))]) is Refusal.MALFORMED
    other = [("ce_type", b"mlcdn.ModelReleased.v1") if k == "ce_type" else (k, v) for k, v in m.headers]
    assert refusal(m.value, headers=other) is Refusal.MALFORMED


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(body: bytes) -> None:
    for schema in codec.SCHEMAS:
        said = [("ce_type", schema.ce_type.encode()) if k == "ce_type" else (k, v) for k, v in message().headers]
        for topic in ("mlcdn.releases", "mlcdn.fleet", "mlcdn.requests"):
            try:
                codec.decode(topic, b"m", b"\0" + schema.id.to_bytes(4, "big") + body, said)
            except EventRefused:
                continue


def test_out_of_range_values_are_no_event() -> None:
    for sequence in (0, -1, 2**63):
        with pytest.raises(BadInput):
            ModelRetired(model="m", sequence=sequence, author="me")
    with pytest.raises(BadInput):
        CacheInvalidated(scopes=(), author="me")
    with pytest.raises(BadInput):
        Scope(ScopeKind.ALL, "everything")
    with pytest.raises(BadInput):
        codec.encode(EVENT, topic="mlcdn.fleet", id="1", source="/", now_ms=0)


def test_columns_of_another_length_are_no_batch() -> None:
    widths = {"start_offset_us": 4, "latency_us": 4, "tier": 1, "status": 2, "model": 2, "request_bytes": 4}
    widths |= {"response_bytes": 4, "key_hash": 8}
    columns = {name: bytes(2 * width) for name, width in widths.items()}
    who = {"node": "n", "region": "r", "worker": 0, "incarnation": 1, "started_at_ms": 0, "models": (), "dropped": 0}
    assert RequestBatch(rows=2, **who, **columns).rows == 2  # type: ignore[arg-type]
    for name in widths:
        with pytest.raises(BadInput):
            RequestBatch(rows=2, **who, **(columns | {name: columns[name] + b"\0"}))  # type: ignore[arg-type]


def test_a_signature_holds_for_exactly_one_record() -> None:
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    m = signing.sign(message(), key)
    signing.verify(public, m.topic, m.key, m.value, m.headers)
    moved = [
        ("mlcdn.invalidations", m.key, m.value, m.headers),
        (m.topic, b"n", m.value, m.headers),
        (m.topic, m.key, m.value + b"\0", m.headers),
        *(
            (m.topic, m.key, m.value, tuple((k, b"x" if k == name else v) for k, v in m.headers))
            for name in ("ce_type", "ce_id", "ce_source", "ce_time", "mlcdn-signature")
        ),
        (m.topic, m.key, m.value, (*m.headers, ("ce_causationid", b"x"))),
    ]
    for topic, record_key, value, headers in moved:
        with pytest.raises(EventRefused):
            signing.verify(public, topic, record_key, value, headers)
    with pytest.raises(EventRefused):
        signing.verify(other.public_key().public_bytes_raw(), m.topic, m.key, m.value, m.headers)


def test_a_dead_letter_carries_the_record_key_under_its_own_name() -> None:
    letter = EventRejected(
        node="n", region="r", topic="mlcdn.fleet", partition=0, offset=1, timestamp_ms=2, record_key=b"k",
        value=b"v", size_bytes=1, headers=(), refusal="malformed", detail="",
    )  # fmt: skip
    m = codec.encode(letter, topic="mlcdn.dead_letters", id="1", source="/", now_ms=0)
    assert codec.decode(m.topic, m.key, m.value, m.headers).event == letter
    assert m.key == b"mlcdn.fleet"


def released(**policy: Any) -> ModelReleased:
    digest = "d" * 64
    return ModelReleased(
        model="m",
        version="v1",
        sequence=1,
        artifact=Artifact(
            sha256=digest,
            size_bytes=1,
            object_key=model_object_key("m", digest),
            chunk_size_bytes=65_536,
            chunk_sha256=(bytes(32),),
        ),
        inputs=(),
        outputs=(Tensor(name="y", datatype="FP32", shape=(-1,)),),
        cache=CachePolicy(**policy),
        created_at_ms=0,
        author="me",
    )


def test_a_release_of_before_the_choice_of_tiers_leaves_it_to_the_node() -> None:
    # Its bytes, as who knew only the first version wrote them.
    fields = msgspec.to_builtins(released(ttl_s=7.0), builtin_types=(bytes,))
    del fields["cache"]["tiers"]
    first = codec.BY_ID[2]
    body = io.BytesIO()
    fastavro.schemaless_writer(body, fastavro.parse_schema(json.loads(first.source)), fields)
    value = b"\0" + first.id.to_bytes(4, "big") + body.getvalue()
    headers = [("ce_type", first.ce_type.encode()) if k == "ce_type" else (k, v) for k, v in message().headers]
    assert codec.decode("mlcdn.releases", b"m", value, headers).event == released(ttl_s=7.0, tiers=TierUse.AUTO)


@pytest.mark.parametrize("tiers", list(TierUse))
def test_a_release_says_which_tiers_it_wants(tiers: TierUse) -> None:
    event = released(tiers=tiers)
    m = codec.encode(event, topic="mlcdn.releases", id="id-1", source="/operators/me", now_ms=0)
    assert codec.decode(m.topic, m.key, m.value, m.headers).event == event
    assert m.header("ce_type") == b"mlcdn.ModelReleased.v3"
