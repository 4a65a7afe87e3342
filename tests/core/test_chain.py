"""The chain and its checkpoints: which bytes, what is proven, what alarms and what does not."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import codec, signing
from schemas.errors import BadInput, EventRefused, Refusal
from schemas.events import CacheInvalidated, Grant, LogCheckpoint, TrustChanged
from schemas.names import Scope, ScopeKind
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds import chain, invalidations
from streams.folds.checkpoints import RECENT, Alarm, ChainWatch
from streams.folds.invalidations import Invalidations
from streams.jobs.checkpoints import MAX_RECORDS, CheckpointJob
from streams.log.local import LocalLog
from streams.log.record import Record
from streams.log.writer import Writer

TOPIC = INVALIDATIONS.name
raw = st.none() | st.binary(max_size=6)
records = st.builds(
    Record,
    topic=st.just(TOPIC),
    partition=st.just(0),
    offset=st.integers(0, 3),
    timestamp_ms=st.integers(0, 3),
    key=raw,
    value=raw,
    headers=st.lists(st.tuples(st.text("ab", max_size=3), raw), max_size=3).map(tuple),
)


def test_the_bytes_of_a_chain_never_change() -> None:
    record = Record(
        topic=TOPIC, partition=0, offset=7, timestamp_ms=1_700_000_000_000, key=b"k", value=None,
        headers=(("a", b"1"), ("a", None), ("é", b"")),
    )  # fmt: skip
    assert chain.start(TOPIC).hex() == "74ada24f7c97e4157d61fa2fdcd9d189d6b14256192f638a96286bf1967a5b00"
    assert (
        chain.link(chain.start(TOPIC), record).hex()
        == "15b275696e14ca31424948ff757820d2fd12b96d4e6a4f0c58d7f84d491db94e"
    )


@given(records, records)
@settings(deadline=None)
def test_records_that_differ_anywhere_have_other_chains(one: Record, other: Record) -> None:
    before = chain.start(TOPIC)
    assert (chain.link(before, one) == chain.link(before, other)) == (one == other)


def test_topics_and_orders_have_chains_of_their_own() -> None:
    one, other = (Record(topic=TOPIC, partition=0, offset=0, timestamp_ms=0, key=k, value=b"") for k in (b"a", b"b"))
    begun = chain.start(TOPIC)
    assert begun != chain.start(RELEASES.name)
    assert chain.link(chain.link(begun, one), other) != chain.link(chain.link(begun, other), one)


@pytest.mark.parametrize(
    "changed",
    [
        {"position": -1},
        {"chain_sha256": "AB"},
        {"since": 6},
        {"bad_signatures": (2, 2)},
        {"bad_signatures": (0,), "since": 0},
        {"bad_signatures": (6,)},
        {"bad_signatures": tuple(range(10_001)), "position": 20_000},
        {"expires_at_ms": -1},
    ],
)
def test_a_checkpoint_that_makes_no_sense_is_none(changed: dict[str, Any]) -> None:
    good: dict[str, Any] = {"position": 5, "chain_sha256": "a" * 64, "since": -1, "expires_at_ms": 1}
    assert LogCheckpoint(**good, bad_signatures=(0, 5)).bad_signatures == (0, 5)
    assert LogCheckpoint(**(good | {"since": 5})).since == 5
    with pytest.raises(BadInput):
        LogCheckpoint(**(good | changed))


class Scene:
    """A topic in memory with a root, an operator and two checkpoint keys; one second an append."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000
        self.log = LocalLog(lambda: self.now_ms)
        self.root, self.operator, self.key, self.second = (Ed25519PrivateKey.generate() for _ in range(4))
        self.roots = (self.public(self.root),)
        for topic in (RELEASES.name, TOPIC):
            self.say(self.trust(), self.root, topic)

    @staticmethod
    def public(key: Ed25519PrivateKey) -> bytes:
        return key.public_key().public_bytes_raw()

    def trust(self) -> TrustChanged:
        kinds = {"op": (self.operator, ("CacheInvalidated", "ModelReleased")), "one": (self.key, ("LogCheckpoint",)),
                 "two": (self.second, ("LogCheckpoint",))}  # fmt: skip
        grants = (
            Grant(public_key=self.public(key), label=label, models=("*",), kinds=said)
            for label, (key, said) in kinds.items()
        )
        return TrustChanged(grants=tuple(grants), author="root")

    def say(self, event: Any, key: Ed25519PrivateKey, topic: str = TOPIC) -> Record:
        self.now_ms += 1_000
        writer = Writer(self.log, source="/operators/x", signing_key=key, now_ms=lambda: self.now_ms)
        return asyncio.run(writer.append(event, topic=topic)).record

    def purge(self, count: int = 1) -> None:
        for _ in range(count):
            self.say(CacheInvalidated(scopes=(Scope(ScopeKind.TAG, "t"),), author="op"), self.operator)

    def watch(self, log: LocalLog | None = None, watch: ChainWatch | None = None) -> ChainWatch:
        """A reader of the whole topic, as far as it stands."""
        watch = watch or ChainWatch(TOPIC)
        state = Invalidations.initial(self.roots)
        for record in (log or self.log).read(TOPIC, 0):
            step = invalidations.fold(state, record)
            state = step.state
            watch.take(record, step.envelope.event if step.envelope else None)
        return watch

    def state_before(self, record: Record) -> Invalidations:
        state = Invalidations.initial(self.roots)
        for each in self.log.read(TOPIC, 0, 0, record.offset):
            state = invalidations.fold(state, each).state
        return state

    def copy(
        self,
        changed: Mapping[int, bytes] | None = None,
        topic: str = TOPIC,
        end: int | None = None,
    ) -> LocalLog:
        """Both topics, broker times and all, under the ids they have; but for the values of `changed` positions of one of
        them, and what stands at `end` of it or above."""
        times: list[int] = []
        copied = LocalLog(lambda: times.pop() if times else self.now_ms)
        for each in (RELEASES.name, INVALIDATIONS.name):
            copied._ids[each] = self.log.topic_id(each)
            for record in self.log.read(each, 0, 0, end if each == topic else None):
                times.append(record.timestamp_ms)
                value = (changed or {}).get(record.offset, record.value) if each == topic else record.value
                copied.append_raw(each, record.key, value, record.headers)
        return copied

    def checkpoints(self) -> list[LogCheckpoint]:
        decoded = (codec.decode(r.topic, r.key, r.value, r.headers).event for r in self.log.read(TOPIC, 0)
                   if dict(r.headers).get("ce_type") == b"mlcdn.LogCheckpoint.v1")  # fmt: skip
        return [event for event in decoded if isinstance(event, LogCheckpoint)]

    def checkpoint(self, key: Ed25519PrivateKey | None = None, topic: str = TOPIC, **changed: Any) -> Record:
        watch = ChainWatch(topic)
        for record in self.log.read(topic, 0):
            watch.take(record, None)
        said: dict[str, Any] = {
            "position": watch.position, "chain_sha256": watch.chain.hex(), "since": -1,
            "expires_at_ms": self.now_ms + 60_000,
        }  # fmt: skip
        return self.say(LogCheckpoint(**(said | changed)), key or self.key, topic)

    def job(self, key: Ed25519PrivateKey | None = None) -> CheckpointJob:
        key = key or self.key
        writer = Writer(self.log, source="/streams/s", signing_key=key, now_ms=lambda: self.now_ms)
        return CheckpointJob(
            self.log, writer, self.roots, key, every_s=60, expires_s=900, now_ms=lambda: self.now_ms
        )  # fmt: skip


def test_a_checkpoint_that_holds_is_the_last_and_alarms_nobody() -> None:
    scene = Scene()
    scene.purge(3)
    record = scene.checkpoint()
    scene.purge()
    watch = scene.watch()
    assert watch.last is not None
    assert (watch.last.position, watch.last.signer) == (record.offset - 1, signing.key_id(scene.public(scene.key)))
    assert watch.alarms(scene.now_ms, at_end=True) == {}
    assert not watch.holds(at_end=True)


def test_refused_records_are_in_the_chain() -> None:
    scene = Scene()
    before = scene.watch().chain
    scene.log.append_raw(TOPIC, b"x", b"junk")
    assert scene.watch().chain != before


def test_repeats_and_checkpoints_from_too_far_back_count_for_nothing() -> None:
    scene = Scene()
    scene.purge(2)
    first = scene.watch()
    for key in (scene.key, scene.second):  # a race: both read the same end
        scene.checkpoint(key, position=first.position, chain_sha256=first.chain.hex())
    watch = scene.watch()
    assert watch.last is not None
    assert watch.last.signer == signing.key_id(scene.public(scene.key))
    assert watch.alarms(scene.now_ms, at_end=True) == {}
    for _ in range(RECENT + 1):
        scene.log.append_raw(TOPIC, None, b"junk")
    scene.checkpoint(position=first.position, chain_sha256="0" * 64)
    assert scene.watch().alarms(scene.now_ms, at_end=True) == {}


def test_a_checkpoint_of_its_own_position_is_refused() -> None:
    scene = Scene()
    record = scene.checkpoint(position=1)
    assert record.offset == 1
    with pytest.raises(EventRefused) as refused:
        raise invalidations.fold(scene.state_before(record), record).refused or AssertionError
    assert refused.value.refusal is Refusal.CHECKPOINT_AHEAD


def test_a_checkpoint_key_signs_nothing_else() -> None:
    scene = Scene()
    purge = scene.say(CacheInvalidated(scopes=(Scope(ScopeKind.ALL),), author="x"), scene.key)
    step = invalidations.fold(scene.state_before(purge), purge)
    assert step.refused is not None
    assert step.refused.refusal is Refusal.KEY_NOT_ALLOWED
    step = invalidations.fold(step.state, scene.checkpoint(scene.operator))
    assert step.refused is not None
    assert step.refused.refusal is Refusal.KEY_NOT_ALLOWED


def test_any_changed_record_is_a_rewritten_log_until_a_root_answers_for_it() -> None:
    scene = Scene()
    scene.purge(3)
    scene.checkpoint()
    for at in (1, 2, 3):
        forged = scene.copy({at: b"other"})
        watch = scene.watch(forged)
        assert list(watch.alarms(scene.now_ms, at_end=True)) == [Alarm.REWRITTEN]
        assert watch.holds(at_end=False)
        original, scene.log = scene.log, forged
        scene.say(TrustChanged(grants=(), revoked=(scene.public(scene.key),), author="root"), scene.root)
        scene.checkpoint(scene.second)
        watch, scene.log = scene.watch(), original
        assert watch.alarms(scene.now_ms, at_end=True) == {}
        assert watch.last is not None


def test_what_held_in_an_earlier_life_must_hold_again() -> None:
    scene = Scene()
    scene.purge(3)
    short = scene.copy()
    scene.checkpoint()
    remembered = scene.watch().last
    assert remembered is not None
    scene.purge(2)
    assert scene.watch(watch=ChainWatch(TOPIC, remembered)).alarms(scene.now_ms, at_end=True) == {}
    # The end is gone, the checkpoint with it.
    cut = ChainWatch(TOPIC, msgspec.structs.replace(remembered, position=remembered.position + 1))
    scene.watch(short, cut)
    assert list(cut.alarms(scene.now_ms, at_end=True)) == [Alarm.TRUNCATED]
    assert cut.alarms(scene.now_ms, at_end=False) == {}
    assert cut.holds(at_end=True)
    # … and then goes on otherwise.
    grown = ChainWatch(TOPIC, remembered)
    other = Scene()
    other.purge(5)
    scene.watch(other.log, grown)
    assert list(grown.alarms(scene.now_ms, at_end=True)) == [Alarm.REWRITTEN]
    assert grown.last == remembered


def test_a_root_may_revoke_a_key_that_only_another_log_knew() -> None:
    """The topic was made again and grants new keys; what a node remembers was signed by an old one."""
    scene, other = Scene(), Scene()
    scene.purge(3)
    scene.checkpoint()
    remembered = scene.watch().last
    revoked = TrustChanged(grants=(), revoked=(scene.public(scene.key),), author="root")
    record = other.say(revoked, other.root)
    assert other.state_before(record).trust.keys.get(signing.key_id(scene.public(scene.key))) is None
    watch = other.watch(watch=ChainWatch(TOPIC, remembered))
    assert not watch.another
    assert watch.alarms(other.now_ms, at_end=True) == {}
    other.purge()
    state = other.state_before(other.checkpoint())
    assert state.trust.keys[signing.key_id(scene.public(scene.key))].revoked_at == record.offset


def test_no_checkpoint_counts_over_a_log_that_is_disputed() -> None:
    scene = Scene()
    scene.purge(3)
    scene.checkpoint()
    remembered = scene.watch().last
    forged = scene.copy({1: b"other"})
    scene.log = forged
    scene.purge(3)
    scene.checkpoint(scene.second)  # of a job that remembers nothing
    watch = scene.watch(watch=ChainWatch(TOPIC, remembered))
    assert watch.another
    assert watch.last == remembered
    scene.say(TrustChanged(grants=(), revoked=(scene.public(scene.key),), author="root"), scene.root)
    scene.checkpoint(scene.second)
    watch = scene.watch(watch=ChainWatch(TOPIC, remembered))
    assert not watch.another
    assert watch.last is not None
    assert watch.last.signer == signing.key_id(scene.public(scene.second))


def test_a_log_that_goes_silent_is_frozen_and_thaws() -> None:
    scene = Scene()
    scene.checkpoint()
    watch = scene.watch()
    assert list(watch.alarms(scene.now_ms + 61_000, at_end=True)) == [Alarm.FROZEN]
    assert not watch.holds(at_end=True)
    scene.now_ms += 61_000
    scene.checkpoint()
    assert scene.watch().alarms(scene.now_ms, at_end=True) == {}
    assert ChainWatch(TOPIC).alarms(scene.now_ms, at_end=True) == {}  # nobody ever promised one


# -- the job, over the log in memory


def test_the_job_signs_what_is_due_and_no_more() -> None:
    scene = Scene()
    job = scene.job()
    assert asyncio.run(job.tick()) == [RELEASES.name, TOPIC]
    assert asyncio.run(job.tick()) == []
    scene.purge()
    assert asyncio.run(job.tick()) == []
    scene.now_ms += 60_000
    assert asyncio.run(job.tick()) == [TOPIC]
    scene.now_ms += 299_000  # a third of a life
    assert asyncio.run(job.tick()) == [RELEASES.name]
    scene.now_ms += 61_000
    assert asyncio.run(job.tick()) == [TOPIC]
    for _ in range(MAX_RECORDS):
        scene.log.append_raw(TOPIC, None, b"junk")
    assert asyncio.run(job.tick()) == [TOPIC]
    assert scene.watch().alarms(scene.now_ms, at_end=True) == {}


def test_two_jobs_do_no_harm() -> None:
    scene = Scene()
    scene.purge(3)
    one, two = scene.job(), scene.job(scene.second)

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(one.tick(), two.tick()))

    for _ in range(5):
        asyncio.run(both())
        scene.purge()
        scene.now_ms += 60_000
    watch = scene.watch()
    assert watch.alarms(scene.now_ms, at_end=True) == {}
    assert asyncio.run(two.tick()) or asyncio.run(one.tick())
    assert asyncio.run(one.tick()) == asyncio.run(two.tick()) == []


def test_the_job_says_which_signatures_are_bad_and_waits_for_its_key() -> None:
    scene = Scene()
    good = scene.say(CacheInvalidated(scopes=(Scope(ScopeKind.ALL),), author="x"), scene.operator)
    scene.log.append_raw(TOPIC, good.key, (good.value or b"")[:-1] + b"!", good.headers)
    scene.log.append_raw(TOPIC, None, b"junk")
    stranger = Ed25519PrivateKey.generate()
    assert asyncio.run(scene.job(stranger).tick()) == []
    asyncio.run(scene.job().tick())
    found = scene.checkpoints()
    assert [(c.since, c.position, c.bad_signatures) for c in found] == [(-1, 3, (2,))]
    scene.purge()
    scene.now_ms += 1_000_000
    asyncio.run(scene.job().tick())
    assert [(c.since, c.position, c.bad_signatures) for c in scene.checkpoints()[1:]] == [(3, 5, ())]


def test_a_disputed_log_gets_no_checkpoint() -> None:
    scene = Scene()
    scene.checkpoint(chain_sha256="0" * 64)
    assert asyncio.run(scene.job(scene.second).tick()) == [RELEASES.name]
    scene.say(TrustChanged(grants=(), revoked=(scene.public(scene.key),), author="root"), scene.root)
    assert asyncio.run(scene.job(scene.second).tick()) == [TOPIC]
