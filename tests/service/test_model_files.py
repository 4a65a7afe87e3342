"""Models in several files, from a publisher's folder to answers: whole nodes and an origin on the real stack.

What a model says of its files is in tests/core/test_external_data.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import msgspec
import numpy as np
import onnx
import pytest

from edge_node.agent.model_files import MODEL, ModelFiles
from edge_node.agent.peers import weight
from edge_node.agent.reconcile import Proof
from edge_node.agent.sweep import sweep
from edge_node.peer_proof import HEADER, key_of, proof
from inference.external_data import DATA
from inference.onnx_model import OnnxModel
from inference.packed import pack_outputs
from mlcdn.identities import Identities, ensure_identities
from mlcdn.local_stack.running import RunningStack
from origin import data_files, replay
from origin.hosting import Hosting
from origin.publish import Published, Publisher
from origin.release_request import ReleaseRequest
from origin.replay import Candidate
from schemas import codec
from schemas.errors import BadInput, MlcdnError, ModelRefused
from schemas.events import (
    ArtifactRejected,
    File,
    ModelReleased,
    Placement,
    RecordedTensor,
    RequestRecorded,
    Tensor,
)
from schemas.topics import FLEET, RELEASES
from streams.artifacts import ArtifactStore
from streams.audit.recordings import Recorded, RegionSample
from streams.audit.story import story
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer
from tests import models
from tests.edge_node_process import EdgeNode, Operator, question, until
from tests.service.test_hosting import Scene, hosted
from tests.service.test_peers import came, nodes
from tests.tcp_faults import TcpFaults

START_S = 30.0
WHOLE = models.mlp_bytes(5, (32, 200, 200, 8))
NAMES = ("body.data", "head-weights.bin")
KEY = key_of("secret") or b""


@dataclass(frozen=True)
class Desk:
    """Who publishes, and what the log and the store say."""

    stack: RunningStack
    identities: Identities
    folder: Path

    @property
    def store(self) -> ArtifactStore:
        a = self.stack.addresses
        return ArtifactStore(a.s3_endpoint, a.s3_bucket, a.s3_access_key, a.s3_secret_key, "us-east-1")

    @property
    def reader(self) -> KafkaReader:
        return KafkaReader(self.stack.addresses.kafka)

    @property
    def roots(self) -> tuple[bytes, ...]:
        return load_roots(self.identities.roots)

    def lay(self, data: bytes, name: str = "model", files: tuple[str, ...] = NAMES) -> Path:
        """A model's folder, as an exporter leaves it; the ONNX file's path."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "model.onnx").write_bytes(data)
        if files:
            data, contents = models.split(data, files)
            (folder / "model.onnx").write_bytes(data)
            for file, content in contents.items():
                (folder / file).write_bytes(content)
        return folder / "model.onnx"

    def publish(self, model: str, path: Path, *, files: bool = True, **more: Any) -> Published:
        async def act() -> Published:
            appender = KafkaAppender(self.stack.addresses.kafka, client_id="test")
            writer = Writer(appender, source="/operators/test", signing_key=load_private(self.identities.operator))
            try:
                request = ReleaseRequest(model=model, path=path, author="test", files=files, **more)
                return await Publisher(self.store, writer, self.reader, self.roots).publish(request)
            finally:
                await appender.close()

        return asyncio.run(act())

    def released(self, model: str) -> list[ModelReleased]:
        found = (codec.decode(r.topic, r.key, r.value, r.headers).event for r in self.reader.read(RELEASES.name, 0))
        return [event for event in found if isinstance(event, ModelReleased) and event.model == model]

    def rejected(self, model: str) -> list[ArtifactRejected]:
        found = (
            codec.decode(r.topic, r.key, r.value, r.headers).event
            for partition in range(FLEET.partitions)
            for r in self.reader.read(FLEET.name, partition)
        )
        return [event for event in found if isinstance(event, ArtifactRejected) and event.model == model]

    def objects(self) -> set[str]:
        a = self.stack.addresses
        s3 = boto3.client(
            "s3",
            endpoint_url=a.s3_endpoint,
            aws_access_key_id=a.s3_access_key,
            aws_secret_access_key=a.s3_secret_key,
            region_name="us-east-1",
        )
        return {found["Key"] for found in s3.list_objects_v2(Bucket=a.s3_bucket).get("Contents", ())}


@pytest.fixture(scope="module")
def desk(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    return Desk(stack, asyncio.run(ensure_identities(folder / "keys", stack.addresses.kafka, lambda _: None)), folder)


@pytest.fixture(scope="module")
def line(desk: Desk) -> Iterator[TcpFaults]:
    """The nodes' way to the store."""
    with TcpFaults(int(desk.stack.addresses.s3_endpoint.rpartition(":")[2])) as made:
        yield made


@pytest.fixture(scope="module")
def region(desk: Desk, line: TcpFaults, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EdgeNode]]:
    """Two nodes that serve `whole`, of one file, and know each other."""
    whole = desk.publish("whole", desk.lay(WHOLE, "whole", ()), files=True)
    places = {"files-1": "tokyo", "files-2": "tokyo"}
    changes = {"MLCDN_S3_ENDPOINT": f"http://127.0.0.1:{line.port}", "MLCDN_PEER_PATIENCE_S": "0.5"}
    folder = tmp_path_factory.mktemp("nodes")
    with nodes(desk.stack, desk.identities, folder, places, MLCDN_PEER_SECRET="secret", **changes) as made:
        until(lambda: all(node.serves("whole", whole.digest) for node in made.values()), START_S)
        time.sleep(1.5)  # each has heard a beat of the other
        yield made


@dataclass(frozen=True)
class Split:
    """`whole` in several files, served by both nodes. `came` is what each node had from the store and from the other."""

    done: Published
    event: ModelReleased
    came: list[tuple[int, int]]


@pytest.fixture(scope="module")
def split(desk: Desk, region: dict[str, EdgeNode]) -> Split:
    before = {name: (came(node, "s3"), came(node, "peer")) for name, node in region.items()}
    done = desk.publish("split", desk.lay(WHOLE))
    until(lambda: all(node.serves("split", done.digest) for node in region.values()), START_S)
    since = [(came(node, "s3") - before[n][0], came(node, "peer") - before[n][1]) for n, node in region.items()]
    return Split(done, desk.released("split")[0], sorted(since))


def scores(node: EdgeNode, model: str) -> list[list[float]]:
    return [node.predict(model, number).json()["prediction"] for number in range(1, 6)]


def test_a_model_in_files_is_published_and_served_by_both_nodes(
    desk: Desk, region: dict[str, EdgeNode], split: Split
) -> None:
    done, event = split.done, split.event
    assert [file.name for file in event.files] == list(NAMES)
    assert done.digest == event.digest != event.artifact.sha256
    assert done.version == done.digest[:12]
    assert {artifact.object_key for artifact in event.artifacts} <= desk.objects()
    size = sum(artifact.size_bytes for artifact in event.artifacts)
    assert split.came == [(0, size), (size, 0)], "one node has it from the store, the other from that node"
    for node in region.values():
        assert scores(node, "split") == scores(node, "whole")
    answer = next(iter(region.values())).predict("split", 1)
    assert answer.headers["mlcdn-digest"] == done.digest
    assert event.memory_bytes >= len(WHOLE)


def test_a_replay_asks_it_in_a_child(desk: Desk, split: Split, tmp_path: Path) -> None:
    found = Candidate(version="v", digest=split.event.digest, released=split.event)
    path = replay.fetched(found, desk.store, tmp_path)
    row = np.array([question("split", 1)["features"]], np.float32)
    whole = OnnxModel.from_bytes(WHOLE, models.sha256(WHOLE))
    answer = pack_outputs(whole.run({"features": row}), whole.outputs)
    recorded = RequestRecorded(
        node="n",
        region="r",
        worker=0,
        incarnation=1,
        model="split",
        sequence=1,
        digest=split.event.digest,
        recorded_at_ms=1,
        inputs=(RecordedTensor(name="features", datatype="FP32", shape=(1, 32), data=row.tobytes()),),
        outputs=answer,
    )
    sample = RegionSample("r", (Recorded(0, 0, recorded),), ())
    report = replay.replay(found, path, "split", [sample], last=1)
    assert (report.rows, report.disagreement, report.passed) == (1, 0.0, True)
    spoilt = next(tmp_path.glob("*.data"))
    spoilt.write_bytes(bytes(spoilt.stat().st_size))
    with pytest.raises(ModelRefused, match="SHA-256 of its file"):
        replay.replay(found, path, "split", [sample], last=1)


def test_the_door_gives_each_file_by_its_digest(desk: Desk, region: dict[str, EdgeNode], split: Split) -> None:
    node, event = region["files-1"], split.event
    folder = desk.folder / "model"
    for artifact, name in zip(event.artifacts, ("model.onnx", *NAMES), strict=True):
        last = artifact.size_bytes - 1
        headers = {"range": f"bytes=0-{last}", HEADER: proof(KEY, node.url, artifact.sha256, 0, last)}
        answer = httpx.get(f"{node.url}/artifacts/{artifact.sha256}", headers=headers, trust_env=False)
        assert (answer.status_code, answer.content) == (206, (folder / name).read_bytes())
    headers = {"range": "bytes=0-9", HEADER: proof(KEY, node.url, event.digest, 0, 9)}
    assert httpx.get(f"{node.url}/artifacts/{event.digest}", headers=headers, trust_env=False).status_code == 404


def test_the_story_of_a_file_is_that_of_its_release(desk: Desk, split: Split) -> None:
    event = split.event
    of_release = story(desk.reader, desk.roots, event.digest)
    assert len(of_release) > 2
    for artifact in event.artifacts:
        assert story(desk.reader, desk.roots, artifact.sha256) == of_release


def test_the_same_graph_with_other_weights_is_another_release(
    desk: Desk, region: dict[str, EdgeNode], split: Split
) -> None:
    other = models.mlp_bytes(6, (32, 200, 200, 8))
    assert models.split(other, NAMES)[0] == models.split(WHOLE, NAMES)[0], "the ONNX file is the same"
    done = desk.publish("retrained", desk.lay(other, "retrained"))
    until(lambda: all(node.serves("retrained", done.digest) for node in region.values()), START_S)
    expected = OnnxModel.from_bytes(other, models.sha256(other)).run(
        {"features": np.array([question("retrained", 1)["features"]], np.float32)}
    )
    np.testing.assert_allclose(scores(region["files-1"], "retrained")[0], expected["scores"][0], rtol=1e-5)


def test_a_file_that_is_spoilt_in_the_store_is_refused_by_its_name(
    desk: Desk, region: dict[str, EdgeNode], tmp_path: Path
) -> None:
    operator = Operator(desk.stack.addresses, desk.identities, tmp_path)
    spoilt = {f"spoilt-{number}": name for number, name in enumerate(("", *NAMES))}
    good = {model: operator.release(model, models.mlp_bytes(7)) for model in spoilt}
    until(lambda: all(node.serves(*one) for node in region.values() for one in good.items()), START_S)
    events = {}
    for number, model in enumerate(spoilt):
        # Another graph for each: an ONNX file that two models share is fetched for either.
        path = desk.lay(models.mlp_bytes(20, (32, 100 + number, 8)), model)
        event = operator.prepare(model, path.read_bytes())
        events[model] = msgspec.structs.replace(event, files=data_files.described(path, model, NAMES))
        contents = [path.read_bytes(), *((path.parent / file).read_bytes() for file in NAMES)]
        for index, (artifact, content) in enumerate(zip(events[model].artifacts, contents, strict=True)):
            other = bytes([content[0] ^ 1]) + content[1:]
            desk.store.put_bytes(artifact.object_key, other if index == number else content)
    operator.append_all(list(events.values()))
    for number, (model, name) in enumerate(spoilt.items()):
        until(lambda m=model: len(desk.rejected(m)) >= 2, START_S)
        said = desk.rejected(model)[-1]
        assert (said.digest, said.phase, said.retrying) == (events[model].digest, "verify", False)
        assert said.cause.startswith(f"file {name}: chunk 0 of" if name else "chunk 0 of"), said.cause
        assert events[model].artifacts[number].object_key in said.cause
        assert all(node.serves(model, good[model]) for node in region.values())
        assert region["files-1"].predict(model, number).status_code == 200


def test_a_reference_that_its_release_does_not_list_is_refused_by_the_node(
    desk: Desk, region: dict[str, EdgeNode], tmp_path: Path
) -> None:
    operator, path = (
        Operator(desk.stack.addresses, desk.identities, tmp_path),
        desk.lay(models.mlp_bytes(9), "unlisted"),
    )

    def listed(model: str, *others: str) -> tuple[File, ...]:
        """The files, each under its own name, or another's."""
        made = data_files.described(path, model, NAMES)
        for file in made:
            desk.store.put(file.artifact, path.parent / file.name)
        return tuple(msgspec.structs.replace(f, name=name) for f, name in zip(made, others, strict=False))

    cases = {
        "none": ((), "external data is not allowed"),
        "one": (listed("unlisted-one", NAMES[0]), "external data in 'head-weights.bin', which is not listed"),
        "other": (listed("unlisted-other", NAMES[0], "other"), "'head-weights.bin', which is not listed"),
        "swapped": (listed("unlisted-swapped", *reversed(NAMES)), "ends behind the file's"),
    }
    good = {f"unlisted-{case}": operator.release(f"unlisted-{case}", models.mlp_bytes(8)) for case in cases}
    until(lambda: all(node.serves(*one) for node in region.values() for one in good.items()), START_S)
    for case, (files, _) in cases.items():
        operator.append(msgspec.structs.replace(operator.prepare(f"unlisted-{case}", path.read_bytes()), files=files))
    for case, (_, words) in cases.items():
        until(lambda m=f"unlisted-{case}": len(desk.rejected(m)) >= 2, START_S)
        said = desk.rejected(f"unlisted-{case}")[-1]
        assert said.phase == "trial" and words in said.cause, said
    assert all(node.serves(*one) for node in region.values() for one in good.items())
    with pytest.raises(BadInput, match="file name"):
        msgspec.structs.replace(cases["one"][0][0], name="in/body.data")


def test_a_kill_between_two_files_costs_what_had_not_arrived(
    desk: Desk, region: dict[str, EdgeNode], line: TcpFaults
) -> None:
    path = desk.lay(models.big_model_bytes(2 * 2**20, seed=3), "resumed")
    line.bytes_s = 2**20
    try:
        done = desk.publish("resumed", path)
        first, second = (file.artifact.sha256 for file in desk.released("resumed")[-1].files)
        node = max(region.values(), key=lambda one: weight(done.digest, one.name))
        brought = node.directory / "artifacts" / f"{first}.data"
        until(brought.exists, START_S)
        agent = until(node.pids, 5)["agent"]
        os.kill(agent, signal.SIGKILL)
        there = brought.stat().st_ino
        assert not brought.with_name(f"{second}.data").exists()
    finally:
        line.heal()
    until(lambda: all(one.serves("resumed", done.digest) for one in region.values()), START_S)
    assert brought.stat().st_ino == there, "it was brought once"
    assert until(node.pids, 5)["agent"] != agent
    assert node.predict("resumed", 1).status_code == 200


def test_parts_of_data_are_counted_swept_and_go_with_their_wish(tmp_path: Path) -> None:
    files, digest, onnx = ModelFiles(tmp_path), "a" * 64, "b" * 64
    part = files.part(digest, DATA)
    part.write_bytes(bytes(5_000))
    files.path(digest, DATA).write_bytes(b"12345")
    stored, begun, _ = files.on_disk()
    assert [(file.name, file.digest, file.size) for file in stored] == [(f"{digest}.data", digest, 5)]
    assert begun == {digest: 8192}
    assert sweep(tmp_path, "", time.time() + 1_000, {digest}) == 0
    assert sweep(tmp_path, "", time.time() + 1_000, {onnx}) == 5_000
    # One ONNX file, two sets of weights: each has a proof, and both go with the file.
    proofs = [Proof(digest=c * 64, golden=None, rtol=0, atol=0, runtime="r") for c in "cd"]
    files.path(onnx, MODEL).write_bytes(b"onnx")
    for one in proofs:
        files.prove(one, onnx)
    assert ModelFiles(tmp_path).proofs == set(proofs)
    files.remove((f"{digest}.data",))
    assert files.proofs == set(proofs)
    files.remove((f"{onnx}.onnx",))
    assert files.proofs == ModelFiles(tmp_path).proofs == frozenset()


NOT_TAKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (lambda file: None, "body.data that it names is not beside it"),
    "a symbolic link": (lambda file: file.symlink_to("real"), "body.data is a symbolic link"),
    "a hard link": (lambda file: file.hardlink_to(file.with_name("real")), "body.data is a hard link"),
    "a folder": (lambda file: file.mkdir(), "body.data is not a regular file"),
    "a pipe": (os.mkfifo, "body.data is not a regular file"),
    "empty": (lambda file: file.write_bytes(b""), "the file is empty"),
}


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_what_lies_beside_is_taken_only_where_it_is_a_plain_file(tmp_path: Path, case: str) -> None:
    (tmp_path / "real").write_bytes(b"secret")
    make, words = NOT_TAKEN[case]
    make(tmp_path / "body.data")
    with pytest.raises(ModelRefused, match=words):
        data_files.described(tmp_path / "model.onnx", "any", ["body.data"])
    with pytest.raises(BadInput):
        data_files.described(tmp_path / "model.onnx", "any", ["../real"])


def name_it(path: Path, location: str) -> None:
    model = onnx.ModelProto.FromString(path.read_bytes())
    next(e for t in model.graph.initializer for e in t.external_data if e.key == "location").value = location
    path.write_bytes(model.SerializeToString())


PUBLISHED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "above": (lambda path: name_it(path, "../body.data"), "external data is not allowed"),
    "an absolute path": (lambda path: name_it(path, str(path.parent / "body.data")), "external data is not allowed"),
    "in a folder": (lambda path: name_it(path, "in/body.data"), "external data is not allowed"),
    "a link": (lambda path: linked(path.parent), "body.data is a symbolic link"),
    "short": (lambda path: os.truncate(path.parent / "body.data", 99), "ends behind the file's 99 bytes"),
}


def linked(folder: Path) -> None:
    (folder / "body.data").rename(folder / "real")
    (folder / "body.data").symlink_to("real")


def test_what_may_not_be_published_leaves_nothing_behind(desk: Desk) -> None:
    objects, records = desk.objects(), desk.reader.watermarks(RELEASES.name, 0)[1]
    said = {}
    for case, (change, _) in PUBLISHED.items():
        path = desk.lay(WHOLE, f"refused {case}")
        change(path)
        with pytest.raises(MlcdnError) as refused:
            desk.publish("refused", path)
        said[case] = str(refused.value)
    assert {case: words for case, words in said.items() if PUBLISHED[case][1] not in words} == {}
    with pytest.raises(ModelRefused, match="with --files"):
        desk.publish("refused", desk.lay(WHOLE, "not asked for"), files=False)
    assert (desk.objects(), desk.reader.watermarks(RELEASES.name, 0)[1]) == (objects, records)


def test_a_file_that_changes_after_its_trial_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, path = Publisher._try, desk.lay(WHOLE, "changed")
    data = path.parent / NAMES[1]

    def then_changed(publisher: Publisher, *more: Any) -> Any:
        found = tried(publisher, *more)
        data.write_bytes(bytes(data.stat().st_size))
        return found

    monkeypatch.setattr(Publisher, "_try", then_changed)
    records = desk.reader.watermarks(RELEASES.name, 0)[1]
    with pytest.raises(BadInput, match="changed while"):
        desk.publish("changed", path)
    assert desk.reader.watermarks(RELEASES.name, 0)[1] == records


def test_an_origin_hosts_it_and_fetches_only_what_is_spoilt(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(desk.stack, tmp_path)
    path = desk.lay(WHOLE, "far")
    artifact, files = scene.upload(path.read_bytes()), data_files.described(path, "far", NAMES)
    for file in files:
        scene.store.put(file.artifact, path.parent / file.name)
    tensors = (Tensor(name="features", datatype="FP32", shape=(-1, 32)),)
    event = ModelReleased(
        model="far", version="v1", sequence=1, artifact=artifact, files=files, inputs=tensors, outputs=tensors,
        placement=Placement.ORIGIN, created_at_ms=0, author="op",
    )  # fmt: skip
    rows = {"features": np.full((1, 32), 0.5, np.float32)}
    expected = OnnxModel.from_bytes(WHOLE, models.sha256(WHOLE)).run(rows)["scores"]

    async def serves(hosting: Hosting) -> None:
        scene.told(hosting)
        await hosted(hosting, event.digest)
        found = await hosting.run(hosting.find("far", event.digest), rows, None)
        assert (found["scores"] == expected).all()

    async def first(hosting: Hosting) -> None:
        await scene.trust()
        await scene.writer.append(event)
        await serves(hosting)

    scene.play(first)
    kept = scene.directory / "artifacts"
    assert {p.name for p in kept.iterdir()} == {
        f"{artifact.sha256}.onnx",
        *(f"{f.artifact.sha256}.data" for f in files),
    }
    spoilt = kept / f"{files[1].artifact.sha256}.data"
    spoilt.write_bytes(bytes(spoilt.stat().st_size))
    fetched, fetch = [], ArtifactStore.fetch
    monkeypatch.setattr(ArtifactStore, "fetch", lambda s, a, *more: (fetched.append(a), fetch(s, a, *more))[1])
    scene.play(serves)
    assert fetched == [files[1].artifact]
