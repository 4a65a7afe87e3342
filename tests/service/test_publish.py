"""Publishing, rolling back and invalidating over a real store and a real log."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mlcdn.identities import change_trust, ensure_identities
from mlcdn.local_stack.running import RunningStack
from origin.invalidate import Invalidator
from origin.publish import Published, Publisher, ReleaseRequest
from schemas.errors import BadInput, Conflict, ModelRefused, NotFound
from schemas.events import Grant, TrustChanged
from schemas.names import Scope, ScopeKind
from streams.artifacts import ArtifactStore
from streams.audit.control import At, fold_releases
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer
from tests.models import mlp_bytes


@dataclass(frozen=True)
class Desk:
    """Everything a publisher sits at."""

    kafka: str
    store: ArtifactStore
    reader: KafkaReader
    roots: tuple[bytes, ...]
    operator: Path
    root: Path

    def run(self, act: Callable[[Publisher], Coroutine[Any, Any, Any]], key: Ed25519PrivateKey | None = None) -> Any:
        async def with_writer() -> Any:
            appender = KafkaAppender(self.kafka, client_id="test")
            writer = Writer(appender, source="/operators/test", signing_key=key or load_private(self.operator))
            try:
                return await act(Publisher(self.store, writer, self.reader, self.roots))
            finally:
                await appender.close()

        return asyncio.run(with_writer())

    def publish(self, model: str, path: Path, **more: Any) -> Published:
        request = ReleaseRequest(model=model, path=path, author="test", **more)
        published: Published = self.run(lambda publisher: publisher.publish(request))
        return published

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


@pytest.mark.parametrize("how", ["empty", "cut off", "not a model"])
def test_a_broken_file_leaves_nothing_behind(desk: Desk, tmp_path: Path, how: str) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes({"empty": b"", "cut off": mlp_bytes(2)[:-50], "not a model": b"<html></html>" * 50}[how])
    before = desk.records()
    with pytest.raises(ModelRefused):
        desk.publish("broken", path)
    assert desk.records() == before
    assert "broken" not in fold_releases(desk.reader, desk.roots, At())[0].models


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
