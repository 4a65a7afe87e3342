"""The audit over a log in memory: moments, stories, and nodes that say other than the log."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from schemas.errors import BadInput, NotFound
from schemas.events import (
    Artifact,
    CacheInvalidated,
    Grant,
    Location,
    LogCheckpoint,
    ModelReleased,
    ModelSwapped,
    NodeBeat,
    ServedModel,
    Tensor,
    TrustChanged,
)
from schemas.names import Scope, ScopeKind, model_object_key
from schemas.topics import INVALIDATIONS, RELEASES
from streams.audit.control import At, fold_releases
from streams.audit.replay import state_at
from streams.audit.story import story
from streams.audit.verify import SETTLING_MS, verify
from streams.folds import chain, releases
from streams.log.local import LocalLog
from streams.log.writer import Appended, Writer


class Scene:
    """A log, a root, an operator and a node's hand; the clock moves one second an append."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000
        self.log = LocalLog(self.tick)
        root, operator = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        self.roots = (root.public_key().public_bytes_raw(),)
        grant = Grant(
            public_key=operator.public_key().public_bytes_raw(),
            label="op",
            models=("*",),
            kinds=("ModelReleased", "CacheInvalidated", "LogCheckpoint"),
        )
        self.root = Writer(self.log, source="/operators/root", signing_key=root, now_ms=self.tick)
        self.operator = Writer(self.log, source="/operators/op", signing_key=operator, now_ms=self.tick)
        self.node = Writer(self.log, source="/regions/r/nodes/n", now_ms=self.tick)
        for topic in (RELEASES.name, INVALIDATIONS.name):
            asyncio.run(self.root.append(TrustChanged(grants=(grant,), author="root"), topic=topic))

    def tick(self) -> int:
        self.now_ms += 1_000
        return self.now_ms

    def release(self, sequence: int, digest: str) -> Appended:
        artifact = Artifact(
            sha256=digest * 64,
            size_bytes=1,
            object_key=model_object_key("m", digest * 64),
            chunk_size_bytes=65_536,
            chunk_sha256=(bytes(32),),
        )
        tensor = Tensor(name="x", datatype="FP32", shape=(-1,))
        event = ModelReleased(
            model="m", version=f"v{sequence}", sequence=sequence, artifact=artifact, inputs=(tensor,),
            outputs=(tensor,), created_at_ms=0, author="op",
        )  # fmt: skip
        return asyncio.run(self.operator.append(event))

    def beat(self, number: int, *, digest: str, state: str = "live", **changed: Any) -> None:
        told, _ = fold_releases(self.log, self.roots, At())
        said: dict[str, Any] = {
            "positions": {RELEASES.name: told.position},
            "desired_digest": releases.desired_digest(releases.desired(told, "r")),
        }
        served = ServedModel(
            name="m", version="v", digest=digest * 64, sequence=1, channel="stable", state=state,
            error=changed.pop("error", ""),
        )  # fmt: skip
        beat = NodeBeat(
            node="n", region="r", worker=0, incarnation=1, beat=number, url="http://n", location=Location(lat=0, lon=0),
            capacity=0, load=0, in_flight=0, queue=0, requests=0, errors=0, p50_ms=0, p99_ms=0, hits={},
            models=(served,), **(said | changed),
        )  # fmt: skip
        asyncio.run(self.node.append(beat))

    def differences(self) -> list[str]:
        return [d.what for d in verify(self.log, self.roots, now_ms=self.now_ms).differences]


def test_a_moment_by_position_and_by_time_is_the_same() -> None:
    scene = Scene()
    first = scene.release(1, "a").record
    scene.beat(1, digest="a")
    scene.release(2, "b")
    by_position = state_at(scene.log, scene.roots, At(position=first.offset))
    by_time = state_at(scene.log, scene.roots, At(timestamp_ms=first.timestamp_ms))
    assert by_position.told == by_time.told
    assert by_position.state_digest == by_time.state_digest
    assert [w.wanted.version for w in by_position.told] == ["v1"]
    assert [w.wanted.version for w in state_at(scene.log, scene.roots, At()).told] == ["v2"]
    with pytest.raises(BadInput):
        state_at(scene.log, scene.roots, At(position=99))


def test_a_moment_is_said_as_position_or_time() -> None:
    assert At.parse("12") == At(position=12)
    assert At.parse("1970-01-01T00:00:01Z") == At(timestamp_ms=1_000)
    assert At.parse("1970-01-01T00:00:01") == At(timestamp_ms=1_000)
    with pytest.raises(BadInput):
        At.parse("yesterday")


def test_a_story_holds_what_an_event_led_to() -> None:
    scene = Scene()
    released = scene.release(1, "a")
    swapped = ModelSwapped(
        node="n", region="r", worker=0, incarnation=1, model="m", version="v1", sequence=1, digest="a" * 64,
        position=released.record.offset, previous_digest="", channel="stable", ms={"load": 1.0},
    )  # fmt: skip
    asyncio.run(scene.node.append(swapped, causation_id=released.id))
    purge = CacheInvalidated(scopes=(Scope(ScopeKind.MODEL, "m"),), author="op")
    asyncio.run(scene.operator.append(purge))
    assert [line.kind for line in story(scene.log, scene.roots, "m")] == [
        "ModelReleased",
        "ModelSwapped",
        "CacheInvalidated",
    ]
    assert [line.kind for line in story(scene.log, scene.roots, released.id)] == ["ModelReleased", "ModelSwapped"]
    assert [line.kind for line in story(scene.log, scene.roots, "a" * 64)] == ["ModelReleased", "ModelSwapped"]
    assert story(scene.log, scene.roots, "m") == story(scene.log, scene.roots, "m")
    with pytest.raises(NotFound):
        story(scene.log, scene.roots, "nobody")


def test_a_node_that_agrees_is_no_difference() -> None:
    scene = Scene()
    scene.release(1, "a")
    scene.beat(1, digest="a")
    assert scene.differences() == []


def test_a_node_that_obeys_an_earlier_position_is_held_against_that() -> None:
    scene = Scene()
    scene.release(1, "a")
    scene.beat(1, digest="a")
    scene.release(2, "b")
    assert scene.differences() == []


@pytest.mark.parametrize(
    ("digest", "changed", "says"),
    [
        ("a", {"desired_digest": "0" * 64}, "its board does not say"),
        ("a", {"positions": {RELEASES.name: 77}}, "which the log does not have"),
        ("a", {}, "is live from"),
        ("c", {}, "which no release brought"),
    ],
)
def test_a_node_that_says_other_than_the_log_is_named(digest: str, changed: dict[str, Any], says: str) -> None:
    scene = Scene()
    scene.release(1, "a")
    scene.release(2, "b")
    scene.beat(1, digest=digest, **changed)
    assert any(says in what for what in scene.differences())


def test_an_old_version_needs_a_reason_after_a_while() -> None:
    scene = Scene()
    scene.release(1, "a")
    scene.release(2, "b")
    scene.beat(1, digest="a", state="loading")
    assert scene.differences() == []
    scene.now_ms += SETTLING_MS
    scene.beat(2, digest="a", state="loading")
    assert any("does not say why" in what for what in scene.differences())
    scene.beat(3, digest="a", state="failed", error="load: it is broken")
    assert scene.differences() == []


@pytest.mark.parametrize(
    ("forged", "late_ms", "alarms"),
    [(False, 0, []), (True, 0, ["rewritten"]), (False, 61_000, ["frozen"]), (True, 61_000, ["rewritten"])],
)
def test_a_log_that_its_checkpoints_do_not_bear_out_is_an_alarm(forged: bool, late_ms: int, alarms: list[str]) -> None:
    scene = Scene()
    scene.release(1, "a")
    found = chain.start(RELEASES.name)
    for record in scene.log.read(RELEASES.name, 0):
        found = chain.link(found, record)
    checkpoint = LogCheckpoint(
        position=1, chain_sha256="0" * 64 if forged else found.hex(), since=-1, expires_at_ms=scene.now_ms + 60_000
    )
    asyncio.run(scene.operator.append(checkpoint, topic=RELEASES.name))
    said = verify(scene.log, scene.roots, now_ms=scene.now_ms + late_ms)
    assert [(a.topic, a.reason) for a in said.alarms] == [(RELEASES.name, reason) for reason in alarms]
    assert said.checkpoints == ({} if forged else {RELEASES.name: 1})
    assert said.ok == (not alarms)


def test_refused_records_are_listed_and_judged_alike() -> None:
    scene = Scene()
    scene.log.append_raw(RELEASES.name, b"m", b"garbage")
    scene.release(1, "a")
    scene.release(1, "b")
    found = verify(scene.log, scene.roots, now_ms=scene.now_ms)
    assert [(r.position, r.refusal) for r in found.refused] == [(1, "unsigned"), (3, "sequence_conflict")]
    assert found.ok
