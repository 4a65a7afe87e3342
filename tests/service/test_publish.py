"""Publishing, rolling back and invalidating over a real store and a real log."""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from inference.trial_report import TrialLimits
from mlcdn.identities import change_trust, ensure_identities
from mlcdn.local_stack.running import RunningStack
from origin.invalidate import Invalidator
from origin.publish import Published, Publisher, ReleaseRequest, SignatureChanged
from schemas import names
from schemas.errors import BadInput, Conflict, ModelRefused, NotFound
from schemas.events import Grant, TrustChanged
from schemas.names import Scope, ScopeKind
from streams.artifacts import ArtifactStore
from streams.audit.control import At, fold_releases
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer
from tests.models import (
    FLOAT,
    endless_loop_bytes,
    expand_bytes,
    external_bytes,
    mlp_bytes,
    model_bytes,
    nan_bytes,
    node,
    sha256,
    value,
)


@dataclass(frozen=True)
class Desk:
    """Everything a publisher sits at."""

    kafka: str
    store: ArtifactStore
    reader: KafkaReader
    roots: tuple[bytes, ...]
    operator: Path
    root: Path

    def run(
        self,
        act: Callable[[Publisher], Coroutine[Any, Any, Any]],
        key: Ed25519PrivateKey | None = None,
        limits: TrialLimits | None = None,
    ) -> Any:
        async def with_writer() -> Any:
            appender = KafkaAppender(self.kafka, client_id="test")
            writer = Writer(appender, source="/operators/test", signing_key=key or load_private(self.operator))
            try:
                return await act(Publisher(self.store, writer, self.reader, self.roots, limits or TrialLimits()))
            finally:
                await appender.close()

        return asyncio.run(with_writer())

    def publish(self, model: str, path: Path, **more: Any) -> Published:
        request = ReleaseRequest(model=model, path=path, author="test", **more)
        published: Published = self.run(lambda publisher: publisher.publish(request))
        return published

    def stored(self, model: str, data: bytes) -> bool:
        try:
            self.store.get(names.model_object_key(model, sha256(data)), 2**30)
        except NotFound:
            return False
        return True

    def records(self) -> int:
        return self.reader.watermarks("mlcdn.releases", 0)[1]


@pytest.fixture(scope="module")
def desk(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    a = stack.addresses
    keys = tmp_path_factory.mktemp("keys")
    # The log outlives this module in the session's stack, so its root is one of several: a root of our own is enough.
    identities = asyncio.run(ensure_identities(keys, a.kafka, lambda _: None))
    return Desk(
        a.kafka,
        ArtifactStore(a.s3_endpoint, a.s3_bucket, a.s3_access_key, a.s3_secret_key, "us-east-1"),
        KafkaReader(a.kafka),
        load_roots(identities.roots),
        identities.operator,
        identities.root,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(mlp_bytes(1))
    return path


def test_the_same_bytes_twice_are_one_artifact_and_two_releases(desk: Desk, file: Path) -> None:
    first, second = desk.publish("twice", file, version="a"), desk.publish("twice", file, version="b")
    assert first.digest == second.digest
    assert second.sequence == first.sequence + 1
    state, _ = fold_releases(desk.reader, desk.roots, At())
    assert state.models["twice"].stable is not None
    assert state.models["twice"].stable.version == "b"
    assert len(state.models["twice"].brought) == 1


def flipped(data: bytes) -> bytes:
    """One bit of the operator's name: still a whole protobuf, of another model."""
    at = data.index(b"Gemm")
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "cut off": (mlp_bytes(2)[:-50], "truncated"),
    "a bit flipped": (flipped(mlp_bytes(2)), "Femm"),
    "a web page": (b"<html></html>" * 50, "HTML"),
    "a zip archive": (b"PK\x03\x04" + bytes(64), "a zip archive"),
    "a pickle": (pickle.dumps({"weights": [1.0]}), "a pickle"),
    "data above": (external_bytes("../weights.bin"), "external data"),
    "data by absolute path": (external_bytes("/etc/passwd"), "external data"),
    "data beside": (external_bytes("weights.bin"), "external data"),
    "data by symlink": (external_bytes("symlink"), "external data"),
    "data by hard link": (external_bytes("hardlink"), "external data"),
    "a custom operator": (
        model_bytes(
            [node("Exec", ["x"], ["y"], domain="evil.ops")],
            [value("x", FLOAT, ["N", 4])],
            [value("y", FLOAT, ["N", 4])],
            domains=(("evil.ops", 1),),
        ),
        "evil.ops.Exec",
    ),
    "operators of the future": (
        mlp_bytes(2).replace(b"B\x04\n\x00\x10\x11", b"B\x05\n\x00\x10\xe7\x07"),
        "ai.onnx' 999",
    ),
    "12 GB of Expand": (expand_bytes(), "memory"),
    "no end": (endless_loop_bytes(), "a run took longer than 1 s"),
}


def test_a_bad_file_is_refused_for_its_reason_and_leaves_nothing_behind(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(16))
    (tmp_path / "symlink").symlink_to("weights.bin")
    (tmp_path / "hardlink").hardlink_to(tmp_path / "weights.bin")
    limits = TrialLimits(run_s=1.0)
    before = desk.records()
    said: dict[str, str] = {}

    async def try_one(publisher: Publisher, name: str, turns: asyncio.Semaphore) -> None:
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(BAD[name][0])
        async with turns:
            with pytest.raises(ModelRefused) as refused:
                await publisher.publish(ReleaseRequest(model="broken", path=path, author="test"))
        said[name] = str(refused.value)

    async def try_all(publisher: Publisher) -> None:
        turns = asyncio.Semaphore(2)
        await asyncio.gather(*(try_one(publisher, name, turns) for name in BAD))

    desk.run(try_all, limits=limits)
    assert {name: text for name, text in said.items() if BAD[name][1] not in text} == {}
    assert desk.records() == before
    assert "broken" not in fold_releases(desk.reader, desk.roots, At())[0].models
    for data, _ in BAD.values():
        assert not desk.stored("broken", data)
    # NaN is an answer like another; and what was refused before is not held against it.
    (tmp_path / "good.onnx").write_bytes(nan_bytes())
    assert desk.publish("broken", tmp_path / "good.onnx").sequence == 1
    assert desk.stored("broken", nan_bytes())


def test_a_file_of_more_than_two_gigabytes_is_not_even_read(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("origin.publish.describe", lambda *_: pytest.fail("its digest was asked for"))
    with (tmp_path / "huge.onnx").open("wb") as huge:
        huge.truncate(2**31)
    with pytest.raises(ModelRefused, match="2147483648 bytes"):
        desk.publish("huge", tmp_path / "huge.onnx")


def test_a_file_that_becomes_another_models_is_refused(desk: Desk, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bytes under the digest that was tried, between the trial and the upload."""
    tried = Publisher._try

    def then_replaced(publisher: Publisher, *more: Any) -> Any:
        report = tried(publisher, *more)
        file.write_bytes(mlp_bytes(99))
        return report

    monkeypatch.setattr(Publisher, "_try", then_replaced)
    before = desk.records()
    with pytest.raises(BadInput, match="changed while"):
        desk.publish("swapped", file)
    assert desk.records() == before
    assert not desk.stored("swapped", mlp_bytes(1)) and not desk.stored("swapped", mlp_bytes(99))


def test_another_signature_is_refused_before_anything_is_uploaded(desk: Desk, file: Path, tmp_path: Path) -> None:
    desk.publish("signed", file, version="one")
    other = tmp_path / "other.onnx"
    other.write_bytes(mlp_bytes(2, (16, 8)))
    before = desk.records()
    with pytest.raises(SignatureChanged, match=r"one, which is served now: input 'features' was \[N, 32\], takes"):
        desk.publish("signed", other)
    assert desk.records() == before and not desk.stored("signed", other.read_bytes())
    allowed = desk.publish("signed", other, allow_signature_change=True)
    assert [(c.side, c.tensor) for c in allowed.changes] == [("input", "features")]
    # Held against what is served, not against what was released last.
    desk.run(lambda p: p.rollback("signed", "one", author="test", reason=""))
    with pytest.raises(SignatureChanged):
        desk.publish("signed", other)
    desk.run(lambda p: p.retire("signed", author="test", reason=""))
    assert desk.publish("signed", other).changes == ()


def test_a_signature_is_compared_again_with_the_winner_of_a_race(
    desk: Desk, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was served when the loser's upload began."""
    both, upload = asyncio.Barrier(2), Publisher._upload

    async def uploaded_together(publisher: Publisher, *more: Any) -> None:
        await both.wait()
        await upload(publisher, *more)

    monkeypatch.setattr(Publisher, "_upload", uploaded_together)
    other = tmp_path / "other.onnx"
    other.write_bytes(mlp_bytes(2, (16, 8)))

    async def race(publisher: Publisher) -> list[Any]:
        requests = [ReleaseRequest(model="first-ever", path=p, author="test") for p in (file, other)]
        return list(await asyncio.gather(*(publisher.publish(r) for r in requests), return_exceptions=True))

    found = desk.run(race)
    assert sorted(type(one).__name__ for one in found) == ["Published", "SignatureChanged"], found


def test_a_golden_test_that_fails_refuses_the_release(desk: Desk, file: Path, tmp_path: Path) -> None:
    import numpy as np

    golden = tmp_path / "golden.npz"
    rows = np.zeros((1, 32), np.float32)
    np.savez(golden, **{"input.features": rows, "output.scores": np.full((1, 8), 1e6, np.float32)})
    with pytest.raises(ModelRefused, match="scores"):
        desk.publish("golden", file, golden=golden)


def test_two_publishers_at_once_both_land(desk: Desk, tmp_path: Path) -> None:
    paths = []
    for seed in (11, 12, 13):
        paths.append(tmp_path / f"{seed}.onnx")
        paths[-1].write_bytes(mlp_bytes(seed))

    async def race(publisher: Publisher) -> list[Published]:
        requests = [ReleaseRequest(model="raced", path=p, author="test") for p in paths]
        return list(await asyncio.gather(*(publisher.publish(r) for r in requests)))

    published = desk.run(race)
    assert sorted(p.sequence for p in published) == [1, 2, 3]
    state, _ = fold_releases(desk.reader, desk.roots, At())
    assert state.models["raced"].stable is not None
    assert state.models["raced"].stable.digest == max(published, key=lambda p: p.sequence).digest


def test_rollback_goes_to_the_release_before_or_to_a_named_one(desk: Desk, tmp_path: Path) -> None:
    digests = {}
    for seed in (21, 22, 23):
        path = tmp_path / f"{seed}.onnx"
        path.write_bytes(mlp_bytes(seed))
        digests[f"v{seed}"] = desk.publish("back", path, version=f"v{seed}").digest
    back = desk.run(lambda p: p.rollback("back", None, author="test", reason=""))
    assert (back.version, back.digest) == ("v22", digests["v22"])
    back = desk.run(lambda p: p.rollback("back", "v21", author="test", reason=""))
    assert back.digest == digests["v21"]
    with pytest.raises(NotFound, match="v23"):
        desk.run(lambda p: p.rollback("back", "v99", author="test", reason=""))
    with pytest.raises(NotFound):
        desk.run(lambda p: p.rollback("never-released", None, author="test", reason=""))


def test_a_key_that_may_not_is_told_that_its_event_does_not_act(desk: Desk, file: Path) -> None:
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(Conflict, match="unknown_key"):
        desk.run(lambda p: p.publish(ReleaseRequest(model="strange", path=file, author="test")), stranger)
    grant = Grant(
        public_key=stranger.public_key().public_bytes_raw(),
        label="narrow",
        models=("other-*",),
        kinds=("ModelReleased",),
    )
    trust = TrustChanged(grants=(grant,), author="test")
    asyncio.run(change_trust(desk.kafka, load_private(desk.root), trust, desk.roots))
    with pytest.raises(Conflict, match="key_not_allowed"):
        desk.run(lambda p: p.publish(ReleaseRequest(model="strange", path=file, author="test")), stranger)
    allowed = desk.run(lambda p: p.publish(ReleaseRequest(model="other-one", path=file, author="test")), stranger)
    assert allowed.sequence == 1
    revoke = TrustChanged(grants=(), revoked=(grant.public_key,), author="test")
    asyncio.run(change_trust(desk.kafka, load_private(desk.root), revoke, desk.roots))
    with pytest.raises(Conflict, match="key_revoked"):
        desk.run(lambda p: p.publish(ReleaseRequest(model="other-one", path=file, author="test")), stranger)
    # What was signed before the revocation stays.
    assert "other-one" in fold_releases(desk.reader, desk.roots, At())[0].models


def test_a_root_key_alone_changes_trust(desk: Desk, tmp_path: Path) -> None:
    false_root = Ed25519PrivateKey.generate()
    grant = Grant(public_key=bytes(32), label="x", models=("*",), kinds=("ModelReleased",))
    with pytest.raises(Conflict):
        asyncio.run(change_trust(desk.kafka, false_root, TrustChanged(grants=(grant,), author="test"), desk.roots))
    roots = tmp_path / "roots.txt"
    roots.write_text(f"other {base64.b64encode(false_root.public_key().public_bytes_raw()).decode()}\n")
    assert load_roots(roots) != desk.roots


def test_an_invalidation_is_read_back(desk: Desk) -> None:
    async def act() -> int:
        appender = KafkaAppender(desk.kafka, client_id="test")
        writer = Writer(appender, source="/operators/test", signing_key=load_private(desk.operator))
        try:
            invalidator = Invalidator(writer, desk.reader, desk.roots)
            scopes = (Scope(ScopeKind.PREFIX, "prediction:m:"), Scope(ScopeKind.TAG, "user:1"))
            done = await invalidator.invalidate(scopes, soft=True, author="test", reason="")
            return done.position
        finally:
            await appender.close()

    position = asyncio.run(act())
    assert desk.reader.watermarks("mlcdn.invalidations", 0)[1] == position + 1


@pytest.mark.parametrize("model", ["", "UPPER", "a/b", "..", "a" * 64, "x y"])
def test_a_name_that_is_none_is_refused_before_anything(desk: Desk, file: Path, model: str) -> None:
    before = desk.records()
    with pytest.raises(BadInput):
        desk.publish(model, file)
    assert desk.records() == before
