"""The object store client against a real store: what is stored is what was meant, and what is fetched is what was named."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from mlcdn.local_stack.running import RunningStack
from schemas.errors import ModelRefused, NotFound, Unreachable
from schemas.events import Artifact
from streams.artifacts import CHUNK_BYTES, ArtifactStore, FetchOptions, describe


@pytest.fixture
def store(stack: RunningStack) -> ArtifactStore:
    a = stack.addresses
    return ArtifactStore(a.s3_endpoint, a.s3_bucket, a.s3_access_key, a.s3_secret_key, "us-east-1", read_timeout_s=3)


def made(path: Path, size: int, seed: int) -> Artifact:
    path.write_bytes(random.Random(seed).randbytes(size))
    return describe(path, lambda digest: f"models/test/{digest}.onnx")


@pytest.mark.parametrize("size", [1, 4_096, CHUNK_BYTES, 2 * CHUNK_BYTES + 17])
def test_what_is_put_is_fetched_back(store: ArtifactStore, tmp_path: Path, size: int) -> None:
    artifact = made(tmp_path / "a", size, seed=size)
    assert store.put(artifact, tmp_path / "a")
    assert not store.put(artifact, tmp_path / "a")
    store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=30))
    assert (tmp_path / "got").read_bytes() == (tmp_path / "a").read_bytes()
    assert list(tmp_path.glob(".*.part")) == []


def test_a_stored_object_that_is_short_is_replaced(store: ArtifactStore, tmp_path: Path) -> None:
    artifact = made(tmp_path / "a", 10_000, seed=1)
    store.put_bytes(artifact.object_key, (tmp_path / "a").read_bytes()[:500])
    store.put(artifact, tmp_path / "a")
    assert store.replaced == 1
    store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=30))


@pytest.mark.parametrize("spoil", ["flipped", "short", "long"])
def test_wrong_bytes_in_the_store_are_never_an_artifact(store: ArtifactStore, tmp_path: Path, spoil: str) -> None:
    artifact = made(tmp_path / "a", 10_000, seed=len(spoil))
    whole = bytearray((tmp_path / "a").read_bytes())
    if spoil == "flipped":
        whole[5_000] ^= 1
    wrong = {"flipped": bytes(whole), "short": bytes(whole[:9_000]), "long": bytes(whole) + b"x"}[spoil]
    store.put_bytes(artifact.object_key, wrong)
    if spoil == "long":
        # What the release names is all that is read: a longer object holds the right bytes in front.
        store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=30))
        assert hashlib.sha256((tmp_path / "got").read_bytes()).hexdigest() == artifact.sha256
        return
    with pytest.raises(ModelRefused):
        store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=30))
    assert not (tmp_path / "got").exists()


def test_a_wrong_chunk_ends_the_fetch_before_the_next_one_is_asked_for(store: ArtifactStore, tmp_path: Path) -> None:
    artifact = made(tmp_path / "a", 2 * CHUNK_BYTES, seed=5)
    wrong = bytearray((tmp_path / "a").read_bytes())
    wrong[10] ^= 1
    store.put_bytes(artifact.object_key, bytes(wrong))
    fetched: list[int] = []
    with pytest.raises(ModelRefused, match="chunk 0"):
        store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=30, on_bytes=fetched.append))
    assert sum(fetched) <= CHUNK_BYTES


@pytest.mark.parametrize("there", ["nothing", "a chunk", "a chunk and rubbish", "all of it", "rubbish"])
def test_a_fetch_goes_on_from_what_holds(store: ArtifactStore, tmp_path: Path, there: str) -> None:
    artifact = made(tmp_path / "a", CHUNK_BYTES + 1_000, seed=7)
    store.put(artifact, tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    begun = {
        "nothing": b"",
        "a chunk": whole[:CHUNK_BYTES],
        "a chunk and rubbish": whole[:CHUNK_BYTES] + b"rubbish",
        "all of it": whole,
        "rubbish": b"rubbish",
    }[there]
    (tmp_path / ".got.part").write_bytes(begun)
    fetched: list[int] = []
    store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=30, on_bytes=fetched.append))
    assert (tmp_path / "got").read_bytes() == whole
    assert sum(fetched) == {"a chunk": 1_000, "a chunk and rubbish": 1_000, "all of it": 0}.get(there, len(whole))


def test_what_is_not_there_is_named(store: ArtifactStore, tmp_path: Path) -> None:
    artifact = made(tmp_path / "a", 100, seed=99)
    with pytest.raises(NotFound):
        store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=5))


def test_a_store_that_is_away_is_unreachable_in_bounded_time(tmp_path: Path) -> None:
    away = ArtifactStore("http://127.0.0.1:9", "b", "k", "s", "us-east-1", connect_timeout_s=0.2, read_timeout_s=0.2)
    artifact = made(tmp_path / "a", 100, seed=98)
    with pytest.raises(Unreachable):
        away.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=5))
