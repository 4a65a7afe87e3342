"""The audit on a checkpoint's word: the same verdict as without it, and what a stolen checkpoint key comes to."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from schemas import codec, signing
from schemas.errors import Refusal
from schemas.events import ModelRolledBack, TrustChanged
from schemas.topics import INVALIDATIONS, RELEASES
from streams.audit import vouched
from streams.audit.verify import Verified, verify
from streams.folds import releases
from streams.folds.releases import Releases
from streams.log.local import LocalLog
from streams.log.record import Record
from tests.core.test_chain import TOPIC, Scene
from tests.core.test_folds_control import DIGESTS, release


def known(scene: Scene, topic: str = TOPIC, *, full: bool = False) -> list[bool | None]:
    found = list(vouched.judged(topic, scene.roots, scene.log.read(topic, 0), full=full))
    assert [record for record, _, _ in found] == list(scene.log.read(topic, 0))
    assert found[-1][1] == (scene.watch().chain if topic == TOPIC else found[-1][1])
    return [said for _, _, said in found]


def verified(scene: Scene, log: LocalLog | None = None, **options: object) -> Verified:
    return verify(log or scene.log, scene.roots, now_ms=scene.now_ms, **options)  # type: ignore[arg-type]


def released(scene: Scene, sequence: int, key: Ed25519PrivateKey | None = None) -> Record:
    event = release("digits", sequence, DIGESTS[sequence % len(DIGESTS)])
    return scene.say(event, key or scene.operator, RELEASES.name)


def spoil(scene: Scene, record: Record) -> None:
    """The record once more, with a byte changed."""
    value = record.value or b""
    scene.log.append_raw(record.topic, record.key, value[:-1] + bytes([value[-1] ^ 1]), record.headers)


def test_a_checkpoint_speaks_for_what_stands_below_it() -> None:
    scene = Scene()
    scene.purge(2)
    spoil(scene, list(scene.log.read(TOPIC, 0))[-1])
    scene.checkpoint(bad_signatures=(3,))
    scene.purge()
    assert known(scene) == [True, True, True, False, None, None]
    assert known(scene, full=True) == [None] * 6
    scene.checkpoint(since=4)
    assert known(scene) == [True, True, True, False, None, True, None]  # the first checkpoint is checked, as each is


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"key": "operator"},
        {"key": "stranger"},
        {"chain_sha256": "0" * 64},
        {"position": 99},
    ],
    ids=str,
)
def test_a_checkpoint_that_may_not_or_does_not_hold_speaks_for_nothing(checkpoint: dict[str, str]) -> None:
    scene = Scene()
    scene.purge(2)
    keys = {"operator": scene.operator, "stranger": Ed25519PrivateKey.generate()}
    scene.checkpoint(keys.get(checkpoint.pop("key", "")), **checkpoint)
    assert set(known(scene)) == {None}
    before = len(known(scene))
    scene.checkpoint(scene.second)
    # After one that lies about the chain none is believed; the others were simply nobody's.
    assert set(known(scene)[:before]) == ({None} if "chain_sha256" in checkpoint else {True})


def test_a_revoked_key_speaks_for_nothing_any_more() -> None:
    scene = Scene()
    scene.say(TrustChanged(grants=(), revoked=(scene.public(scene.key),), author="root"), scene.root)
    scene.purge()
    scene.checkpoint()
    assert set(known(scene)) == {None}


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vouched, "MOST_WAITING", 5)
    scene = Scene()
    scene.purge(6)
    scene.checkpoint()
    assert known(scene) == [None] * 5 + [True, True, None]


def test_the_verdict_is_the_same_with_and_without() -> None:
    scene = Scene()
    released(scene, 1)
    scene.purge(3)
    spoil(scene, released(scene, 2))
    released(scene, 1)
    released(scene, 5, Ed25519PrivateKey.generate())
    for topic in (RELEASES.name, INVALIDATIONS.name):
        scene.log.append_raw(topic, b"x", b"junk")
    asyncio.run(scene.job().tick())
    scene.purge(2)
    fast, full = verified(scene), verified(scene, full=True)
    assert fast.checked == 4  # two checkpoints and two purges
    assert full.checked == full.records
    assert msgspec.structs.replace(fast, checked=full.checked) == full
    assert [r.refusal for r in fast.refused if r.topic == RELEASES.name] == [
        Refusal.BAD_SIGNATURE, Refusal.SEQUENCE_NOT_HIGHER, Refusal.UNKNOWN_KEY, Refusal.UNSIGNED
    ]  # fmt: skip


def forge(scene: Scene, event: object, like: Record) -> None:
    """Appends an event in the name, and with a signature, of who signed `like`."""
    message = codec.encode(event, topic=RELEASES.name, id=f"x{scene.now_ms}", source="/x", now_ms=1)  # type: ignore[arg-type]
    signed = [h for h in like.headers if h[0] in (signing.KEYID_HEADER, signing.SIGNATURE_HEADER)]
    scene.log.append_raw(RELEASES.name, message.key, message.value, [*message.headers, *signed])


@pytest.mark.parametrize("asked", [False, True], ids=["brought", "asked for by the operator"])
def test_a_stolen_checkpoint_key_brings_no_digest_in(asked: bool) -> None:
    scene = Scene()
    true = released(scene, 1)
    forge(scene, release("digits", 2, "f" * 64), true)
    if asked:  # a rollback that an operator did sign, to what was never released
        scene.operator, second = Ed25519PrivateKey.generate(), scene.operator
        grant = scene.trust()
        scene.say(msgspec.structs.replace(grant, grants=tuple(
            msgspec.structs.replace(g, kinds=("ModelRolledBack", "ModelReleased")) for g in grant.grants[:1]
        )), scene.root, RELEASES.name)  # fmt: skip
        back = ModelRolledBack(model="digits", version="v", sequence=3, to_digest="f" * 64, author="op")
        scene.say(back, scene.operator, RELEASES.name)
        scene.operator = second
    scene.checkpoint(topic=RELEASES.name, bad_signatures=())  # the thief says that all is well
    found, full = verified(scene), verified(scene, full=True)
    assert [alarm.reason for alarm in found.alarms] == ["lied"]
    assert not found.ok
    assert found.desired_digest == full.desired_digest == releases.desired_digest(wanted(scene))
    assert found.checked == found.records


def wanted(scene: Scene) -> dict[str, releases.Seated]:
    state = Releases.initial(scene.roots)
    for record in scene.log.read(RELEASES.name, 0):
        state = releases.fold(state, record).state
    assert state.models["digits"].brought.keys() == {DIGESTS[1]}
    return releases.desired(state, None)


def test_what_an_earlier_audit_saw_must_stand_there_still() -> None:
    scene = Scene()
    released(scene, 1)
    released(scene, 2)
    for topic in (RELEASES.name, INVALIDATIONS.name):
        scene.checkpoint(topic=topic)
    before = verified(scene).checkpoints
    assert before.keys() == {RELEASES.name, INVALIDATIONS.name}
    released(scene, 3)
    assert verified(scene, since=before).alarms == ()
    cut = scene.copy(topic=RELEASES.name, end=2)
    assert verified(scene, cut).alarms == ()  # nothing in the log itself tells
    found = verified(scene, cut, since=before)
    assert [(a.topic, a.reason) for a in found.alarms] == [(RELEASES.name, "truncated")]
    assert not found.ok
    scene.log = cut
    released(scene, 2)
    scene.checkpoint(topic=RELEASES.name)
    found = verified(scene, since=before)
    assert [(a.topic, a.reason) for a in found.alarms] == [(RELEASES.name, "rewritten")]
