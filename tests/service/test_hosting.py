"""Models placed at the origin: from a log in memory and a real store to a loaded model, and back out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_node.serving.origin_client import OriginClient
from inference.deadlines import Deadline
from inference.onnx_model import SessionSettings
from inference.packed import unpack
from mlcdn.local_stack.running import RunningStack
from origin.hosting import Hosting
from origin.routes import app
from schemas.errors import NotFound, NotReady
from schemas.events import (
    Artifact,
    Evidence,
    Grant,
    ModelReleased,
    ModelRetired,
    Placement,
    Plan,
    RolloutAborted,
    RolloutAdvanced,
    Tensor,
    TrustChanged,
    Verdict,
    Wave,
)
from schemas.names import model_object_key
from schemas.topics import RELEASES
from streams.artifacts import ArtifactStore, describe
from streams.log.local import LocalLog
from streams.log.writer import Writer, wall_clock_ms
from tests.models import expand_bytes, mlp_bytes
from tests.service.test_worker import truth

ROW = {"features": np.full((1, 32), 0.5, np.float32)}


class Scene:
    """An origin's hosting beside a log that this test writes."""

    def __init__(self, stack: RunningStack, directory: Path) -> None:
        a = stack.addresses
        self.store = ArtifactStore(a.s3_endpoint, a.s3_bucket, a.s3_access_key, a.s3_secret_key, "us-east-1")
        self.directory, self.log = directory, LocalLog(wall_clock_ms)
        root, key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        self.roots = (root.public_key().public_bytes_raw(),)
        self.root = Writer(self.log, source="/operators/root", signing_key=root)
        self.writer = Writer(self.log, source="/operators/op", signing_key=key)
        self.grant = Grant(
            public_key=key.public_key().public_bytes_raw(),
            label="op",
            models=("*",),
            kinds=("ModelReleased", "ModelRetired", "RolloutAdvanced", "RolloutAborted"),
        )

    async def trust(self) -> None:
        await self.root.append(TrustChanged(grants=(self.grant,), author="root"), topic=RELEASES.name)

    def upload(self, data: bytes) -> Artifact:
        path = self.directory / "upload"
        path.write_bytes(data)
        artifact = describe(path, lambda digest: model_object_key("far", digest))
        self.store.put(artifact, path)
        return artifact

    async def release(
        self,
        sequence: int,
        artifact: Artifact,
        placement: Placement = Placement.ORIGIN,
        plan: Plan = Plan(),  # noqa: B008
    ) -> None:
        tensors = (Tensor(name="features", datatype="FP32", shape=(-1, 32)),)
        event = ModelReleased(
            model="far", version=f"v{sequence}", sequence=sequence, artifact=artifact, inputs=tensors, outputs=tensors,
            placement=placement, plan=plan, created_at_ms=0, author="op",
        )  # fmt: skip
        await self.writer.append(event)

    def told(self, hosting: Hosting) -> None:
        """The whole log, as a follower hands it over."""
        for record in self.log.read(RELEASES.name, 0):
            hosting.on_record(record)
        hosting.on_caught_up()

    def files(self) -> set[str]:
        return {p.stem for p in (self.directory / "artifacts").glob("*.onnx")}

    def play(self, act: Callable[[Hosting], Awaitable[None]]) -> None:
        async def whole() -> None:
            hosting = Hosting(self.store, self.directory, self.roots, SessionSettings(), 1)
            stop = asyncio.Event()
            running = asyncio.create_task(hosting.reconcile_until(stop))
            try:
                await act(hosting)
            finally:
                stop.set()
                await running

        asyncio.run(whole())


@pytest.fixture
def scene(stack: RunningStack, tmp_path: Path) -> Scene:
    return Scene(stack, tmp_path)


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "it did not come to that in time"
        await asyncio.sleep(0.02)


async def hosted(hosting: Hosting, digest: str | None, sequence: int | None = None) -> None:
    """Waits until the model is served from `digest`, or, for None, no longer served."""
    async with asyncio.timeout(15):
        while True:
            found = hosting.models().get("far")
            if (found.wanted.digest if found else None) == digest and (
                sequence is None or (found is not None and found.wanted.sequence == sequence)
            ):
                return
            await asyncio.sleep(0.02)


def test_only_the_last_release_is_fetched_and_the_old_file_goes(scene: Scene) -> None:
    first, second = scene.upload(mlp_bytes(1)), scene.upload(mlp_bytes(2))

    async def act(hosting: Hosting) -> None:
        await scene.trust()
        await scene.release(1, first)
        await scene.release(2, second)
        for record in scene.log.read(RELEASES.name, 0):
            hosting.on_record(record)
        await asyncio.sleep(0.3)
        assert hosting.models() == {}, "it acted before it knew the whole log"
        hosting.on_caught_up()
        await hosted(hosting, second.sha256)
        assert scene.files() == {second.sha256}
        assert (await hosting.run(hosting.find("far"), ROW, None))["scores"].shape == (1, 8)
        await scene.release(3, first)
        scene.told(hosting)
        await hosted(hosting, first.sha256)
        await scene.writer.append(ModelRetired(model="far", sequence=4, author="op"))
        scene.told(hosting)
        await hosted(hosting, None)
        with pytest.raises(NotFound):
            hosting.find("far")

    scene.play(act)


def test_a_file_that_was_spoilt_on_disk_is_fetched_again(scene: Scene) -> None:
    artifact = scene.upload(mlp_bytes(3))
    path = scene.directory / "artifacts" / f"{artifact.sha256}.onnx"
    path.parent.mkdir()
    path.write_bytes(b"spoilt")

    async def act(hosting: Hosting) -> None:
        await scene.trust()
        await scene.release(1, artifact)
        scene.told(hosting)
        await hosted(hosting, artifact.sha256)

    scene.play(act)
    assert path.read_bytes() == mlp_bytes(3)


def test_what_the_store_spoilt_or_no_trial_passes_is_never_hosted(scene: Scene) -> None:
    good, broken = scene.upload(mlp_bytes(4)), scene.upload(b"no model at all" * 100)
    spoilt = scene.upload(mlp_bytes(5))
    scene.store.put_bytes(spoilt.object_key, bytes(spoilt.size_bytes))

    async def act(hosting: Hosting) -> None:
        await scene.trust()
        await scene.release(1, good)
        scene.told(hosting)
        await hosted(hosting, good.sha256)
        for sequence, bad in ((2, broken), (3, spoilt)):
            await scene.release(sequence, bad)
            scene.told(hosting)
            await asyncio.sleep(1)
            await until(lambda: scene.files() == {good.sha256})
            assert hosting.find("far").wanted.digest == good.sha256

    scene.play(act)


def test_a_model_that_would_take_all_memory_is_stopped_in_its_trial(scene: Scene) -> None:
    """It loads well enough: only a run shows what it does, and that must not happen in this process."""
    good, greedy = scene.upload(mlp_bytes(7)), scene.upload(expand_bytes())

    async def act(hosting: Hosting) -> None:
        await scene.trust()
        await scene.release(1, good)
        scene.told(hosting)
        await hosted(hosting, good.sha256)
        await scene.release(2, greedy)
        scene.told(hosting)
        await asyncio.sleep(1)
        await until(lambda: scene.files() == {good.sha256})
        assert hosting.find("far").wanted.digest == good.sha256
        await scene.release(3, good)
        scene.told(hosting)
        await hosted(hosting, good.sha256, sequence=3)

    scene.play(act)


def test_a_model_for_the_edges_is_not_hosted(scene: Scene) -> None:
    artifact = scene.upload(mlp_bytes(6))

    async def act(hosting: Hosting) -> None:
        await scene.trust()
        await scene.release(1, artifact, Placement.EDGE)
        scene.told(hosting)
        await asyncio.sleep(0.5)
        assert hosting.models() == {}

    scene.play(act)


def test_a_release_in_waves_is_hosted_beside_the_stable_one_and_each_is_asked_by_its_digest(scene: Scene) -> None:
    one, two, three = (scene.upload(mlp_bytes(seed)) for seed in (1, 2, 3))
    waves = Plan(waves=(Wave(percent=5), Wave()))

    async def act(hosting: Hosting) -> None:
        client = OriginClient("http://origin", transport=httpx.ASGITransport(app(hosting, 2**20)))

        async def answered(artifact: Artifact) -> bool:
            specs = hosting.find("far").model.inputs
            try:
                packed = await client.infer("far", artifact.sha256, ROW, specs, None, Deadline.after(5))
            except NotReady:
                assert not await client.offers("far", artifact.sha256, 1)
                return False
            assert await client.offers("far", artifact.sha256, 1)
            data = {one.sha256: mlp_bytes(1), two.sha256: mlp_bytes(2), three.sha256: mlp_bytes(3)}[artifact.sha256]
            assert np.allclose(unpack(packed)[0].array, truth(data, ROW["features"].tolist()), rtol=1e-4)
            return True

        async def comes(seats: dict[str, Artifact]) -> None:
            scene.told(hosting)
            wanted = {seat: artifact.sha256 for seat, artifact in seats.items()}
            await until(lambda: {seat: found.wanted.digest for seat, found in hosting.models().items()} == wanted)

        await scene.trust()
        await scene.release(1, one)
        await comes({"far": one})
        assert not await answered(two)
        await scene.release(2, two, plan=waves)
        await comes({"far": one, "far@candidate": two})
        assert await answered(one) and await answered(two) and hosting.find("far").wanted.digest == one.sha256
        candidate = hosting.find("far", two.sha256).model
        for step in (0, 1):
            evidence = Evidence(since_ms=0, until_ms=1)
            event = RolloutAdvanced(
                model="far", sequence=2, step=step, verdict=Verdict.PASS, reason="", evidence=evidence
            )
            await scene.writer.append(event)
        await comes({"far": two})
        assert hosting.find("far").model is candidate, "it was loaded already"
        assert await answered(one), "an edge that has not heard of it yet"
        await scene.release(3, three, plan=waves)
        await comes({"far": two, "far@candidate": three})
        await scene.writer.append(RolloutAborted(model="far", sequence=3, author="op"))
        await comes({"far": two})
        assert await answered(two) and await answered(three)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app(hosting, 2**20)), base_url="http://o") as http:
            assert (await http.get("/v2/models/far", headers={"mlcdn-digest": "no digest"})).status_code == 400
            said = (await http.get("/v2/models/far")).headers["mlcdn-model"]
            assert said == "far;v2;stable"
        await client.close()

    scene.play(act)


def test_what_left_its_seat_is_let_go_once_every_edge_has_heard(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("origin.hosting.LATE_EDGES_S", 0.3)
    one, two = scene.upload(mlp_bytes(1)), scene.upload(mlp_bytes(2))

    async def act(hosting: Hosting) -> None:
        await scene.trust()
        for sequence, artifact in ((1, one), (2, two)):
            await scene.release(sequence, artifact)
            scene.told(hosting)
            await hosted(hosting, artifact.sha256)
        assert hosting.find("far", one.sha256)
        await until(lambda: scene.files() == {two.sha256})
        with pytest.raises(NotFound):
            hosting.find("far", one.sha256)

    scene.play(act)
