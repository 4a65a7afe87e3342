"""A log as a network leaves it behind, written fast: beats and request batches, and one record in a hundred signed.

    1 %    signed: 2 in 100 of them releases and rollbacks, the others purges
    1 %    reports: who swapped, who obeys which purge
    60 %   beats, 38 % request batches of eight rows, all of them of WORKERS workers in turn

Laws: everything in it is valid, so a reader that refuses a record is wrong; values are prebuilt but for what differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

from confluent_kafka import Producer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from schemas import codec, signing
from schemas.codec import Message
from schemas.events import (
    Artifact,
    CacheInvalidated,
    Event,
    Grant,
    InvalidationApplied,
    Location,
    ModelRef,
    ModelReleased,
    ModelRolledBack,
    ModelSwapped,
    NodeBeat,
    RequestBatch,
    ServedModel,
    Tensor,
    TrustChanged,
)
from schemas.events.traffic import COLUMNS
from schemas.names import Scope, ScopeKind, model_object_key
from schemas.topics import FLEET, INVALIDATIONS, RELEASES, REQUESTS
from streams.log.client import QUIET
from streams.log.keys import generate, load_private, write_roots
from streams.log.producer import KafkaAppender
from streams.log.writer import Writer

MODELS: Final = 20
VERSIONS: Final = 10
NODES: Final = tuple((region, f"{region}-{n}") for region in ("tokyo", "london", "virginia") for n in range(4))
WORKERS: Final = tuple((region, node, worker) for region, node in NODES for worker in range(2))
ROWS: Final = 8


def write(kafka: str, events: int, directory: Path) -> Path:
    """Appends `events` records and returns the file of the roots that signed trust."""
    root, operator = (load_private(generate(directory, name)) for name in ("root", "operator"))
    roots = write_roots(directory / "roots.txt", {"root": root})
    asyncio.run(_trust(kafka, root, operator))
    refused: list[object] = []
    producer = Producer(
        {
            **QUIET,
            "bootstrap.servers": kafka,
            "enable.idempotence": True,
            "linger.ms": 20,
            # Below the smallest limit a topic has, or the broker refuses the whole batch.
            "batch.size": 250_000,
            "delivery.report.only.error": True,
            "on_delivery": lambda error, _: refused.append(error),
            "queue.buffering.max.messages": 200_000,
            "queue.buffering.max.kbytes": 262_144,
        }
    )
    for number, message in enumerate(_messages(events, operator)):
        while True:
            try:
                producer.produce(message.topic, message.value, message.key, headers=list(message.headers))
                break
            except BufferError:
                producer.poll(0.05)
        if number % 10_000 == 0:
            producer.poll(0)
    left = producer.flush(120)
    if left or refused:
        raise RuntimeError(f"{left} records were not taken, {len(refused)} refused: {refused[:1]}")
    return roots


async def _trust(kafka: str, root: Ed25519PrivateKey, operator: Ed25519PrivateKey) -> None:
    grant = Grant(
        public_key=operator.public_key().public_bytes_raw(),
        label="operator",
        models=("*",),
        kinds=("ModelReleased", "ModelRolledBack", "CacheInvalidated"),
    )
    writer = Writer(KafkaAppender(kafka, client_id="bench"), source="/operators/root", signing_key=root)
    for topic in (RELEASES.name, INVALIDATIONS.name):
        await writer.append(TrustChanged(grants=(grant,), author="root"), topic=topic)
    await writer.close()


def _messages(events: int, operator: Ed25519PrivateKey) -> Iterator[Message]:
    """Each hundred of them: a signed record, a report, 60 beats, 38 batches."""
    beats = [_numbered(lambda beat, at=at: _beat(*at, beat), f"/regions/{at[0]}/nodes/{at[1]}") for at in WORKERS]
    batches = [_encoded(_batch(*at), f"/regions/{at[0]}/nodes/{at[1]}") for at in WORKERS]
    signed = _signed(operator)
    reports = _reports()
    beaten = batched = 0
    for number in range(events):
        place = number % 100
        if place == 0:
            yield next(signed)
        elif place == 1:
            yield next(reports)
        elif place % 5 in (2, 3, 4):
            worker, beat = beaten % len(WORKERS), beaten // len(WORKERS)
            head, tail, headers, key = beats[worker]
            yield Message(
                topic=FLEET.name, key=key, value=head + _varint(beat + 1) + tail, headers=(*headers, _id(number))
            )
            beaten += 1
        else:
            batch = batches[batched % len(WORKERS)]
            yield Message(topic=batch.topic, key=batch.key, value=batch.value, headers=(*batch.headers, _id(number)))
            batched += 1


def _signed(operator: Ed25519PrivateKey) -> Iterator[Message]:
    number = 0
    while True:
        kind, topic = ("release", RELEASES.name) if number % 50 == 0 else ("purge", INVALIDATIONS.name)
        event = _release(number // 50) if kind == "release" else _purge(number)
        message = _encoded(event, "/operators/operator", topic)
        headers = (*message.headers, ("ce_id", _release_id(number // 50)) if kind == "release" else _id(number, b"c"))
        yield signing.sign(Message(topic=topic, key=message.key, value=message.value, headers=headers), operator)
        number += 1


def _reports() -> Iterator[Message]:
    number = 0
    while True:
        region, node, worker = WORKERS[number // 2 % len(WORKERS)]
        if number % 2 == 0:
            release = number // 200
            event, cause = _swap(region, node, worker, release), _release_id(release)
        else:
            event, cause = _applied(region, node, number), _id(number // 2, b"c")[1]
        message = _encoded(event, f"/regions/{region}/nodes/{node}")
        headers = (*message.headers, _id(number, b"e"), ("ce_causationid", cause))
        yield Message(topic=FLEET.name, key=message.key, value=message.value, headers=headers)
        number += 1


def _release(number: int) -> Event:
    """Each model is released VERSIONS times; after that it goes back to what it had, again and again."""
    model, turn = f"model-{number % MODELS}", number // MODELS
    digest = _digest(number % (MODELS * VERSIONS))
    if turn >= VERSIONS:
        return ModelRolledBack(
            model=model, version=f"v{turn % VERSIONS}", sequence=turn + 1, to_digest=digest, author="operator",
            reason="the one before was better",
        )  # fmt: skip
    artifact = Artifact(
        sha256=digest, size_bytes=1_000_000, object_key=model_object_key(model, digest), chunk_size_bytes=8_388_608,
        chunk_sha256=(bytes(32),),
    )  # fmt: skip
    tensor = Tensor(name="features", datatype="FP32", shape=(-1, 32))
    return ModelReleased(
        model=model, version=f"v{turn}", sequence=turn + 1, artifact=artifact, inputs=(tensor,), outputs=(tensor,),
        created_at_ms=0, author="operator", reason="better on the hold-out set",
    )  # fmt: skip


def _purge(number: int) -> Event:
    scopes = (Scope(ScopeKind.TAG, f"customer-{number % 5_000}"),)
    return CacheInvalidated(scopes=scopes, author="operator", reason="the profile changed")


def _swap(region: str, node: str, worker: int, release: int) -> Event:
    model, turn = f"model-{release % MODELS}", release // MODELS
    return ModelSwapped(
        node=node, region=region, worker=worker, incarnation=1, model=model, version=f"v{turn % VERSIONS}",
        sequence=turn + 1, digest=_digest(release % (MODELS * VERSIONS)), position=release + 1, previous_digest="",
        channel="stable", ms={"download": 12.0, "load": 3.0, "swap": 0.1},
    )  # fmt: skip


def _applied(region: str, node: str, number: int) -> Event:
    return InvalidationApplied(node=node, region=region, worker=0, incarnation=1, position=number // 2 + 1, ms=3.0)


def _beat(region: str, node: str, worker: int, beat: int) -> Event:
    models = tuple(
        ServedModel(name=f"model-{n}", version="v0", digest=_digest(n), sequence=1, channel="stable", state="live")
        for n in range(4)
    )
    return NodeBeat(
        node=node, region=region, worker=worker, incarnation=1, beat=beat, url="http://10.0.0.1:8080",
        location=Location(lat=35.6, lon=139.7), capacity=1_000, load=0.4, in_flight=3, queue=0, requests=400, errors=0,
        p50_ms=1.2, p99_ms=8.5, hits={"memory": 300, "redis": 40, "model": 60},
        positions={RELEASES.name: 20, INVALIDATIONS.name: 100}, models=models, desired_digest="d" * 64,
    )  # fmt: skip


def _batch(region: str, node: str, worker: int) -> Event:
    columns = {name: bytes(width * ROWS) for name, width in COLUMNS.items()}
    return RequestBatch(
        node=node, region=region, worker=worker, incarnation=1, started_at_ms=1, rows=ROWS,
        models=(ModelRef(name="model-0", version="v0", digest=_digest(0)),), dropped=0, **columns,
    )  # fmt: skip


def _digest(number: int) -> str:
    return sha256(b"%d" % number).hexdigest()


def _id(number: int, kind: bytes = b"f") -> tuple[str, bytes]:
    return "ce_id", b"%b-%031d" % (kind, number)


def _release_id(number: int) -> bytes:
    return _id(number, b"r")[1]


def _encoded(event: Event, source: str, topic: str | None = None) -> Message:
    """Without its id, which is what differs."""
    topic = topic or (REQUESTS.name if isinstance(event, RequestBatch) else FLEET.name)
    message = codec.encode(event, topic=topic, id="x", source=source, now_ms=1_767_225_600_000)
    kept = tuple(header for header in message.headers if header[0] != "ce_id")
    return Message(topic=topic, key=message.key, value=message.value, headers=kept)


def _numbered(build: Callable[[int], Event], source: str) -> tuple[bytes, bytes, tuple[tuple[str, bytes], ...], bytes]:
    """What stands before and after the beat's number in its value, its headers, its key."""
    zero, one = (_encoded(build(number), source) for number in (0, 1))
    at = next(i for i, (a, b) in enumerate(zip(zero.value, one.value, strict=True)) if a != b)
    return zero.value[:at], zero.value[at + 1 :], zero.headers, zero.key


def _varint(number: int) -> bytes:
    """Avro's long: zigzag, seven bits a byte, the lowest first."""
    left, said = number << 1, bytearray()
    while left > 0x7F:
        said.append(left & 0x7F | 0x80)
        left >>= 7
    said.append(left)
    return bytes(said)
