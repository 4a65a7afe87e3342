"""The audit over a log in memory: moments, stories, and nodes that say other than the log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from schemas import codec
from schemas.errors import BadInput, Conflict, NotFound, Unreachable
from schemas.events import (
    Artifact,
    CacheInvalidated,
    Event,
    Evidence,
    Grant,
    InvalidationApplied,
    Location,
    LogCheckpoint,
    ModelReleased,
    ModelRolledBack,
    ModelSwapped,
    NodeBeat,
    NodeLeft,
    RolloutHalted,
    ServedModel,
    ShadowCompared,
    Side,
    SwapFailed,
    Tensor,
    TrustChanged,
)
from schemas.names import Scope, ScopeKind, model_object_key
from schemas.topics import FLEET, INVALIDATIONS, RELEASES, TOPICS
from streams.audit import export_file
from streams.audit.control import At, Decisions, fold_releases
from streams.audit.export import line, plan, told
from streams.audit.fleet_at import first_fields, fleet_at
from streams.audit.order import merged
from streams.audit.replay import state_at
from streams.audit.story import story
from streams.audit.verify import SETTLING_MS, verify
from streams.folds import chain, fleet, releases
from streams.log.local import LocalLog
from streams.log.record import Record
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
            kinds=("ModelReleased", "ModelRolledBack", "RolloutHalted", "CacheInvalidated", "LogCheckpoint"),
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
            outputs=(tensor,), created_at_ms=0, author="op", reason=f"because of {digest}",
        )  # fmt: skip
        return asyncio.run(self.operator.append(event))

    def sign(self, event: Event, **how: Any) -> Appended:
        return asyncio.run(self.operator.append(event, **how))

    def say(self, event: Event, **how: Any) -> Appended:
        return asyncio.run(self.node.append(event, **how))

    def swap(self, sequence: int, digest: str, cause: str | None = None, **changed: Any) -> Appended:
        said: dict[str, Any] = {
            "node": "n", "region": "r", "worker": 0, "incarnation": 1, "model": "m", "version": f"v{sequence}",
            "sequence": sequence, "digest": digest * 64, "position": 1, "previous_digest": "", "channel": "stable", "ms": {},
        }  # fmt: skip
        return self.say(ModelSwapped(**(said | changed)), causation_id=cause)

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
    held = {topic: checkpoint.position for topic, checkpoint in said.checkpoints.items()}
    assert held == ({} if forged else {RELEASES.name: 1})
    assert said.ok == (not alarms)


def test_refused_records_are_listed_and_judged_alike() -> None:
    scene = Scene()
    scene.log.append_raw(RELEASES.name, b"m", b"garbage")
    scene.release(1, "a")
    scene.release(1, "b")
    found = verify(scene.log, scene.roots, now_ms=scene.now_ms)
    assert [(r.position, r.refusal) for r in found.refused] == [(1, "unsigned"), (3, "sequence_conflict")]
    assert found.ok


# -- what was served, by whose decision


def test_a_past_moment_says_what_was_served_and_who_decided_it() -> None:
    scene = Scene()
    first = scene.release(1, "a")
    scene.beat(1, digest="a")
    second = scene.release(2, "b")
    swapped = scene.swap(2, "b", second.id)
    back = scene.sign(
        ModelRolledBack(model="m", version="v1", sequence=3, to_digest="a" * 64, author="kim", reason="it is worse")
    )
    scene.swap(3, "a", back.id)
    scene.beat(2, digest="a")

    def served(at: Appended) -> list[tuple[str, str, str]]:
        found = state_at(scene.log, scene.roots, At(timestamp_ms=at.record.timestamp_ms), "r")
        return [(s.digest[0], s.decided_by.author, s.decided_by.reason) for s in found.served if s.decided_by]

    assert served(second) == [("a", "op", "because of a")]
    # No beat has come since: the swap alone says it.
    assert served(swapped) == [("b", "op", "because of b")]
    assert served(back) == [("b", "op", "because of b")]
    now = state_at(scene.log, scene.roots, At(), "r")
    # The beat still names sequence 1; what it was told is the rollback, by who rolled back.
    assert [(d.id, d.author, d.reason) for d in now.decisions] == [(back.id, "kim", "it is worse")]
    assert [s.decided_by and s.decided_by.id for s in now.served] == [first.id]
    assert state_at(scene.log, scene.roots, At(), "elsewhere").served == ()


def test_a_worker_that_left_is_said_to_have_left() -> None:
    scene = Scene()
    scene.release(1, "a")
    scene.beat(1, digest="a")
    scene.say(NodeLeft(node="n", region="r", worker=-1, incarnation=1, cause="told to"))
    assert [s.left for s in state_at(scene.log, scene.roots, At()).served] == [True]
    scene.beat(2, digest="a")
    assert [s.left for s in state_at(scene.log, scene.roots, At()).served] == [False]


def test_of_the_decisions_only_those_asked_for_and_in_force_are_held() -> None:
    scene = Scene()
    for sequence in range(1, 9):
        scene.release(sequence, "abcdef01"[sequence - 1])
    decisions = Decisions(frozenset({("m", 3)}))
    fold_releases(scene.log, scene.roots, At(), decisions.take)
    held = [sequence for sequence in range(1, 9) if decisions.get("m", sequence)]
    assert held == [3, 7, 8]


def test_partitions_merge_by_the_brokers_time() -> None:
    log = LocalLog(iter([5, 5, 7, 3, 9, 8]).__next__)
    for key in (b"b", b"a", b"a", b"b", b"a", b"b"):
        log.append_raw(FLEET.name, key, None)
    found = [(r.timestamp_ms, r.partition, r.offset) for r in merged(log, FLEET.name)]
    a, b = (crc32(key) % FLEET.partitions for key in (b"a", b"b"))
    # A broker's clock that went back does not turn a partition's own order round.
    assert found == [*sorted([(5, a, 0), (5, b, 0)]), (3, b, 1), (7, a, 1), (8, b, 2), (9, a, 2)]
    assert [r.timestamp_ms for r in merged(log, FLEET.name, until_ms=7)][-1] <= 7


Op = tuple[str, int, int, int]


def _bytes_of(op: Op) -> tuple[bytes, bytes, codec.Headers]:
    what, worker, incarnation, number = op
    node = f"n{worker % 2}"
    said: dict[str, Any] = {"node": node, "region": "r", "worker": worker, "incarnation": incarnation}
    event: Event
    if what == "left":
        event = NodeLeft(**(said | {"worker": -1 if number % 2 else worker}), cause="")
    elif what == "obeys":
        event = InvalidationApplied(**said, position=number, ms=0)
    else:
        event = NodeBeat(
            **said, beat=number, url="u", location=Location(lat=0, lon=0), capacity=0, load=0, in_flight=0, queue=0,
            requests=0, errors=0, p50_ms=0, p99_ms=0, hits={}, positions={}, models=(), desired_digest="",
        )  # fmt: skip
    message = codec.encode(event, topic=FLEET.name, id=f"{op}", source="s", now_ms=0)
    headers: codec.Headers = message.headers
    value = message.value
    if what == "cut":
        value = value[:-1]
    elif what == "renamed":
        headers = [(k, b"mlcdn.NodeLeft.v1" if k == "ce_type" else v) for k, v in headers]
    return (b"other" if what == "moved" else message.key), value, headers


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["beat"] * 5 + ["cut"] * 2 + ["left", "obeys", "renamed", "moved"]),
            st.integers(0, 2),
            st.sampled_from([1, 1, 1, 1, 2, 9_000]),
            st.integers(0, 8) | st.just(100_000),
        ),
        max_size=40,
    )
)
def test_what_was_last_said_is_what_the_fold_of_every_record_comes_to(ops: list[Op]) -> None:
    log = LocalLog(iter(range(1_000)).__next__)
    for op in ops:
        log.append_raw(FLEET.name, *_bytes_of(op))
    state = fleet.Fleet()
    for record in merged(log, FLEET.name):
        state = fleet.fold(state, record).state
    found = fleet_at(lambda: merged(log, FLEET.name)).folded()
    assert found.incarnations == state.incarnations
    assert found.workers == {k: msgspec.structs.replace(w, intervals_ms=()) for k, w in state.workers.items()}


@given(st.binary(max_size=40), st.sampled_from([b"", b"n", b"n" * 63, b"n" * 64]))
def test_a_value_that_is_no_beat_has_no_first_fields_or_some(garbage: bytes, key: bytes) -> None:
    record = Record(topic=FLEET.name, partition=0, offset=0, timestamp_ms=0, key=key, value=b"\0\0\0\0\6" + garbage)
    found = first_fields(record)
    assert found is None or found[0].encode() == key


# -- stories


def test_an_answers_positions_lead_to_the_release_its_author_and_its_verdicts() -> None:
    scene = Scene()
    first = scene.release(1, "a")
    swapped = scene.swap(1, "a", first.id)
    purge = scene.sign(CacheInvalidated(scopes=(Scope(ScopeKind.TAG, "t"),), author="op", reason="stale"))
    obeyed = scene.say(
        InvalidationApplied(node="n", region="r", worker=0, incarnation=1, position=1, ms=1), causation_id=purge.id
    )
    later = scene.sign(CacheInvalidated(scopes=(Scope(ScopeKind.TAG, "u"),), author="op"))
    scene.release(2, "b")
    back = scene.sign(
        ModelRolledBack(model="m", version="v1", sequence=3, to_digest="a" * 64, author="kim", reason="no")
    )

    told_then = story(scene.log, scene.roots, f"{first.record.offset}/{purge.record.offset}")
    assert [said.id for said in told_then] == [first.id, swapped.id, purge.id, obeyed.id]
    assert (told_then[0].author, told_then[0].reason) == ("op", "because of a")
    # A rollback in force: who went back, and the story of what brought the artifact.
    told_now = story(scene.log, scene.roots, f"{back.record.offset}/{later.record.offset}")
    assert [said.id for said in told_now] == [first.id, swapped.id, later.id, back.id]
    assert "rolled back to v1" in told_now[-1].what and told_now[-1].what.endswith("by kim: no")
    assert story(scene.log, scene.roots, "3/-1", "m") and story(scene.log, scene.roots, "a" * 64)[0].id == first.id
    with pytest.raises(NotFound):
        story(scene.log, scene.roots, "-1/-1")
    for beyond in ("99/1", "1/99"):
        with pytest.raises(BadInput):
            story(scene.log, scene.roots, beyond)


def test_a_digest_leads_to_the_verdicts_on_its_release() -> None:
    scene = Scene()
    scene.release(1, "a")
    released = scene.release(2, "b")
    compared: dict[str, Any] = {
        "node": "n", "region": "r", "worker": 0, "incarnation": 1, "model": "m", "sequence": 2,
        "stable_digest": "a" * 64, "candidate_digest": "b" * 64, "started_at_ms": 0, "rows": 100,
        "max_difference": 0.5, "top1_rows": 0, "top1_agreements": 0, "failed": 0, "skipped": 0,
    }  # fmt: skip
    scene.say(ShadowCompared(**compared, disagreements=0))
    scene.say(ShadowCompared(**compared, disagreements=7))
    evidence = Evidence(since_ms=0, until_ms=1, candidate=Side(requests=200, errors=20, p99_ms=9.5), workers=3, live=2)
    scene.sign(
        RolloutHalted(
            model="m", sequence=2, step=0, verdict="fail", reason="too many errors", evidence=evidence, rollback=True  # type: ignore[arg-type]
        )
    )  # fmt: skip
    found = story(scene.log, scene.roots, "b" * 64)
    assert [said.kind for said in found] == ["ModelReleased", "ShadowCompared", "RolloutHalted"]
    assert found[0].id == released.id
    assert "7 differ" in found[1].what
    for words in (
        "halted at wave 1, fail: too many errors",
        "200 requests, 10.00% errors, p99 9.5 ms",
        "2 of 3 workers",
    ):
        assert words in found[2].what


def test_a_cause_that_is_read_after_its_effect_is_found() -> None:
    scene = Scene()
    released = scene.release(1, "a")
    # Read before what caused it: its partition's broker stamped it earlier.
    ends = scene.swap(1, "a", "middle", node="early")
    message = codec.encode(
        SwapFailed(
            node="late", region="r", worker=0, incarnation=1, model="other", version="v", sequence=1, digest="c" * 64,
            position=1, phase="load", cause="x",
        ),
        topic=FLEET.name, id="middle", source="s", now_ms=0, causation_id=released.id,
    )  # fmt: skip
    scene.log.append_raw(FLEET.name, message.key, message.value, message.headers)
    assert [said.id for said in story(scene.log, scene.roots, released.id)] == [released.id, ends.id, "middle"]
    swapped = scene.swap(1, "a", released.id)
    assert [said.id for said in story(scene.log, scene.roots, swapped.id)] == [released.id, swapped.id]
    # An effect asked for by its id brings what it names, though signed topics are read first, and nothing beside.
    assert [said.id for said in story(scene.log, scene.roots, "middle")] == [released.id, ends.id, "middle"]
    assert [said.id for said in story(scene.log, scene.roots, ends.id)] == [ends.id, "middle"]


def test_a_beat_has_a_story_when_it_is_asked_for() -> None:
    scene = Scene()
    scene.release(1, "a")
    scene.beat(1, digest="a")
    [served] = state_at(scene.log, scene.roots, At()).served
    [said] = story(scene.log, scene.roots, served.said_by)
    assert said.kind == "NodeBeat" and "m v live" in said.what


# -- exports


class Cut:
    """A reader that is killed after some records."""

    def __init__(self, log: LocalLog, records: int) -> None:
        self._log, self._left = log, records

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def read(self, *where: Any) -> Iterator[Record]:
        for record in self._log.read(*where):
            self._left -= 1
            if self._left < 0:
                raise Unreachable("Kafka", "here")
            yield record


def _mixed() -> Scene:
    scene = Scene()
    for number in range(1, 4):
        scene.release(number, "abc"[number - 1])
        scene.swap(number, "abc"[number - 1])
        scene.beat(number, digest="a")
        scene.log.append_raw(RELEASES.name, b"m", b"garbage" * 20_000)
        scene.log.append_raw(FLEET.name, b"\xff", None, (("ce_id", b"\xff"),))
    return scene


def test_an_export_has_every_record_and_why_one_did_not_act() -> None:
    scene = _mixed()
    what = plan(scene.log, scene.roots, list(TOPICS), At(), At())
    lines = [line(said) for said in told(scene.log, what, what.starts())]
    said = [json.loads(one) for one in lines]
    assert len(said) == sum(scene.log.watermarks(t.name, p)[1] for t in TOPICS.values() for p in range(t.partitions))
    assert [s["timestamp_ms"] for s in said] == sorted(s["timestamp_ms"] for s in said)
    refused = [s for s in said if "refused" in s]
    assert {s["refused"]["reason"] for s in refused} == {"unsigned", "tombstone"}
    assert refused[0]["refused"]["value_bytes"] == 140_000 and len(refused[0]["refused"]["value"]) < 90_000
    assert next(s for s in said if s["kind"] == "ModelReleased")["event"]["reason"] == "because of a"
    assert lines == [line(one) for one in told(scene.log, what, what.starts())]


def test_a_part_of_an_export_is_judged_as_the_whole() -> None:
    scene = _mixed()
    whole = plan(scene.log, scene.roots, [RELEASES.name, FLEET.name], At(), At())
    lines = [line(said) for said in told(scene.log, whole, whole.starts())]
    part = plan(scene.log, scene.roots, [FLEET.name, RELEASES.name], At(position=3), At(position=5))
    found = [line(said) for said in told(scene.log, part, part.starts())]
    first = next(n for n, one in enumerate(lines) if json.loads(one)["position"] == 3 and b"releases" in one)
    assert found == lines[first : first + len(found)]
    assert json.loads(found[-1])["position"] == 5
    with pytest.raises(BadInput):
        plan(scene.log, scene.roots, ["mlcdn.nothing"], At(), At())


@pytest.mark.parametrize("killed_after", range(0, 17, 2))
@pytest.mark.parametrize("torn", [0, 1, 25])
def test_an_export_that_is_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, torn: int
) -> None:
    monkeypatch.setattr(export_file, "_LINES", 2)
    monkeypatch.setattr(export_file, "_POINT_S", 0 if killed_after % 4 else 1_000)
    scene = _mixed()
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    what = plan(scene.log, scene.roots, list(TOPICS), At(), At())
    export_file.begin(whole, what)
    export_file.carry_on(whole, scene.log)
    export_file.begin(halves, what)
    with pytest.raises(Unreachable):
        export_file.carry_on(halves, Cut(scene.log, killed_after))
    written = halves.read_bytes() if halves.exists() else b""
    assert whole.read_bytes().startswith(written)
    point = export_file.read_point(halves)
    assert point is not None
    # What was written after the point may be lost in part.
    halves.write_bytes(written[: max(point.size, len(written) - torn)])
    # A log that grows does not make an export that has begun longer.
    scene.beat(9, digest="a")
    lines = export_file.carry_on(halves, scene.log)
    assert halves.read_bytes() == whole.read_bytes()
    assert lines == whole.read_bytes().count(b"\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["halves", "whole"]


def test_an_export_never_replaces_nor_goes_on_with_something_else(tmp_path: Path) -> None:
    scene = _mixed()
    path = tmp_path / "out"
    what = plan(scene.log, scene.roots, [FLEET.name], At(), At())
    export_file.begin(path, what)
    for _ in range(2):
        with pytest.raises(Conflict):
            export_file.begin(path, what)
        if export_file.read_point(path):
            export_file.carry_on(path, scene.log)
    path.unlink()
    export_file.begin(path, what)
    scene.log.recreate(FLEET.name)
    with pytest.raises(Conflict, match="made again"):
        export_file.carry_on(path, scene.log)
    export_file.resumable(path).write_bytes(b"{}")
    with pytest.raises(BadInput):
        export_file.read_point(path)
