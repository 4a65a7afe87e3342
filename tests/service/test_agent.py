"""The agent: real processes on the real stack, killed at every step; and its control path over the log in memory."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import boto3
import httpx
import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_node.agent.control import TOPICS, Control
from edge_node.agent.download import Downloader
from edge_node.agent.incarnation import last_heard
from edge_node.agent.install import Installer, Surroundings
from edge_node.agent.model_files import ModelFiles
from edge_node.agent.reconcile import Desired, Proof
from edge_node.agent.sweep import sweep
from edge_node.board import (
    CAUGHT_UP,
    HEARTBEAT,
    INCARNATION,
    PURGE,
    BoardFile,
    BoardReader,
    BoardWriter,
    Fence,
    position_of,
)
from edge_node.main import end_old_agent
from inference.golden import write_golden
from inference.onnx_model import OnnxModel
from inference.trial_report import TrialReport
from mlcdn.identities import Identities, ensure_identities
from mlcdn.local_stack.running import RunningStack
from mlcdn.local_stack.stack import StackAddresses
from processes.ports import free_port
from schemas import codec
from schemas.errors import EventRefused, Unreachable
from schemas.events import (
    AGENT,
    ArtifactRejected,
    CacheInvalidated,
    Event,
    Golden,
    Grant,
    InvalidationApplied,
    ModelReleased,
    ModelRetired,
    ModelRolledBack,
    Tensor,
    TrustChanged,
)
from schemas.names import Scope, ScopeKind, golden_object_key, model_object_key
from schemas.topics import FLEET, INVALIDATIONS, RELEASES
from streams.artifacts import ArtifactStore, FetchOptions, describe
from streams.folds.wanted import Seated, Wanted
from streams.log.keys import load_private
from streams.log.local import LocalLog
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.record import Record
from streams.log.writer import Writer
from tests import models

T = TypeVar("T")
INPUTS = (Tensor(name="features", datatype="FP32", shape=(-1, 32)),)
OUTPUTS = (Tensor(name="scores", datatype="FP32", shape=(-1, 8)),)


def until(what: Callable[[], T | None], seconds: float = 15.0) -> T:
    """The first value that is neither None nor False."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = what()
        if value is not None and value is not False:
            return value
        time.sleep(0.002)
    raise AssertionError(f"not within {seconds} s")


# -- real processes


class Publisher:
    """Signs and appends as an operator; puts artifacts as `publish` does."""

    def __init__(self, addresses: StackAddresses, identities: Identities, scratch: Path) -> None:
        self.addresses, self.identities, self._scratch = addresses, identities, scratch
        self.store = ArtifactStore(
            addresses.s3_endpoint, addresses.s3_bucket, addresses.s3_access_key, addresses.s3_secret_key, "us-east-1"
        )
        self._sequences: dict[str, int] = {}

    def append(self, event: Event) -> tuple[str, Record]:
        async def append() -> tuple[str, Record]:
            appender = KafkaAppender(self.addresses.kafka, client_id="test")
            writer = Writer(appender, source="/operators/test", signing_key=load_private(self.identities.operator))
            appended = await writer.append(event)
            await writer.close()
            return appended.id, appended.record

        return asyncio.run(append())

    def artifact(self, model: str, data: bytes, *, upload: bool = True) -> Any:
        path = self._scratch / "artifact.onnx"
        path.write_bytes(data)
        artifact = describe(path, lambda digest: model_object_key(model, digest))
        if upload:
            self.store.put(artifact, path)
        return artifact

    def sequence(self, model: str) -> int:
        self._sequences[model] = self._sequences.get(model, 0) + 1
        return self._sequences[model]

    def release(self, model: str, data: bytes, *, upload: bool = True, **fields: Any) -> ModelReleased:
        sequence = self.sequence(model)
        event = ModelReleased(
            **{
                "model": model,
                "version": f"v{sequence}",
                "sequence": sequence,
                "artifact": self.artifact(model, data, upload=upload),
                "inputs": INPUTS,
                "outputs": OUTPUTS,
                "created_at_ms": 1,
                "author": "test",
            }
            | fields
        )
        self.append(event)
        return event

    def s3(self) -> Any:
        a = self.addresses
        return boto3.client(
            "s3",
            endpoint_url=a.s3_endpoint,
            aws_access_key_id=a.s3_access_key,
            aws_secret_access_key=a.s3_secret_key,
            region_name="us-east-1",
        )

    def fleet(self, node: str) -> list[Event]:
        """What the node has said."""
        reader = KafkaReader(self.addresses.kafka)
        said: list[Event] = []
        for partition in range(FLEET.partitions):
            records = reader.read(FLEET.name, partition)
            said += [codec.decode(r.topic, r.key, r.value, r.headers).event for r in records if r.key == node.encode()]
        return said

    def settings(self, directory: Path, node: str) -> dict[str, str]:
        a = self.addresses
        return {
            "MLCDN_KAFKA": a.kafka,
            "MLCDN_S3_ENDPOINT": a.s3_endpoint,
            "MLCDN_S3_BUCKET": a.s3_bucket,
            "MLCDN_S3_ACCESS_KEY": a.s3_access_key,
            "MLCDN_S3_SECRET_KEY": a.s3_secret_key,
            "MLCDN_ROOT_KEYS": str(self.identities.roots),
            "MLCDN_DIR": str(directory),
            "MLCDN_NODE": node,
            "MLCDN_REGION": "tokyo",
        }


@pytest.fixture(scope="module")
def publisher(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    scratch = tmp_path_factory.mktemp("publisher")
    identities = asyncio.run(ensure_identities(scratch / "keys", stack.addresses.kafka, lambda _: None))
    return Publisher(stack.addresses, identities, scratch)


class Node:
    """An agent's process on a directory, and the board as a worker would see it."""

    def __init__(self, settings: Mapping[str, str], module: str = "edge_node.agent.main") -> None:
        self.directory = Path(settings["MLCDN_DIR"])
        self._settings, self._module = dict(settings), module
        self.process: subprocess.Popen[bytes] | None = None
        fence = Fence.open(self.directory / "board" / "fence", writable=True)
        fence.raise_to(INCARNATION, 1)
        fence.close()
        self.reader = BoardReader(self.directory)

    def start(self, **settings: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLCDN_")}
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                env=environment | self._settings | settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> int | None:
        if self.process is None or self.process.poll() is not None:
            return None
        self.process.terminate()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def board(self) -> BoardFile:
        found = self.reader.load()
        assert found is not None
        return found

    def serves(self, model: str, sequence: int) -> bool | None:
        file = self.reader.load()
        if file is None or model not in file.models or file.models[model].wanted.sequence != sequence:
            return None
        return True

    def path(self, model: str) -> Path:
        path = self.board().models[model].path
        assert path is not None
        return self.directory / path

    def log(self) -> str:
        return (self.directory / "log").read_text()


@contextmanager
def running(settings: Mapping[str, str], **changes: str) -> Iterator[Node]:
    node = Node(settings)
    node.start(**changes)
    try:
        yield node
    except BaseException:
        print(node.log()[-4_000:])  # noqa: T201 (what the process said belongs to the failure)
        raise
    finally:
        node.kill()  # whatever it was at: a graceful end is a test of its own
        node.reader.close()


def test_a_release_an_invalidation_a_rollback_and_a_retirement(publisher: Publisher, tmp_path: Path) -> None:
    model = "walk"
    golden = tmp_path / "golden.npz"
    data = models.mlp_bytes(1)
    loaded = OnnxModel.from_bytes(data, models.sha256(data))
    inputs = {"features": np.ones((1, 32), np.float32)}
    write_golden(golden, inputs, loaded.run(inputs))
    loaded.close()
    proof = models.sha256(golden.read_bytes())
    publisher.store.put_bytes(golden_object_key(model, proof), golden.read_bytes())
    first = publisher.release(model, data, golden=Golden(object_key=golden_object_key(model, proof), sha256=proof))
    with running(publisher.settings(tmp_path / "n", "walk-1")) as node:
        until(lambda: node.serves(model, 1))
        assert node.path(model).read_bytes() == data
        told = node.board().models[model]
        assert told.golden_path is not None
        assert (node.directory / told.golden_path).read_bytes() == golden.read_bytes()
        assert told.ms.keys() >= {"download", "verify", "trial"}
        assert node.reader.fence.caught_up
        assert node.board().desired[model].wanted.released == first

        publisher.release(model, models.mlp_bytes(2))
        until(lambda: node.serves(model, 2))
        cause, record = publisher.append(CacheInvalidated(scopes=(Scope(ScopeKind.MODEL, model),), author="test"))
        until(lambda: position_of(node.reader.fence[PURGE]) >= record.offset)
        purges = {p.position: p for p in node.reader.read_purges(0)[0]}
        assert purges[record.offset].cause == cause
        receipt = until(
            lambda: next(
                (
                    e
                    for e in publisher.fleet("walk-1")
                    if isinstance(e, InvalidationApplied) and e.position == record.offset
                ),
                None,
            )
        )
        assert (receipt.worker, receipt.incarnation) == (AGENT, 1)
        assert 0 <= receipt.ms < 10_000

        back = ModelRolledBack(
            model=model,
            version="v1",
            sequence=publisher.sequence(model),
            to_digest=first.artifact.sha256,
            author="test",
        )
        publisher.s3().delete_object(Bucket=publisher.addresses.s3_bucket, Key=first.artifact.object_key)
        publisher.append(back)  # what it goes back to is on disk
        until(lambda: node.serves(model, 3))
        assert node.path(model).read_bytes() == data

        publisher.append(ModelRetired(model=model, sequence=publisher.sequence(model), author="test"))
        until(lambda: model not in node.board().models)
        assert node.end() == 0


def test_spoilt_bytes_are_never_activated_and_said_once(publisher: Publisher, tmp_path: Path) -> None:
    model, node_name = "spoilt", "spoilt-1"
    publisher.release(model, models.mlp_bytes(10))
    with running(publisher.settings(tmp_path / "n", node_name)) as node:
        until(lambda: node.serves(model, 1))
        data = bytearray(models.mlp_bytes(11))
        artifact = publisher.artifact(model, bytes(data), upload=False)
        data[len(data) // 2] ^= 1
        publisher.s3().put_object(Bucket=publisher.addresses.s3_bucket, Key=artifact.object_key, Body=bytes(data))
        publisher.release(model, models.mlp_bytes(11), upload=False)  # spoilt in the store
        until(lambda: "SHA-256" in node.board().errors.get(model, ""))
        publisher.release(model, b"not a model at all")  # whole, and no model
        until(lambda: node.board().errors.get(model, "").startswith("trial"))
        publisher.release(model, models.mlp_bytes(12), outputs=(Tensor(name="y", datatype="FP32", shape=(-1, 8)),))
        until(lambda: "not those of the release" in node.board().errors.get(model, ""))
        assert node.serves(model, 1)
        assert node.path(model).read_bytes() == models.mlp_bytes(10)
        rejections = until(
            lambda: (
                said
                if len(said := [e for e in publisher.fleet(node_name) if isinstance(e, ArtifactRejected)]) >= 3
                else None
            )
        )
        assert [(e.sequence, e.phase, e.retrying) for e in rejections] == [
            (2, "verify", False),
            (3, "trial", False),
            (4, "trial", False),
        ]
        publisher.release(model, models.mlp_bytes(13))
        until(lambda: node.serves(model, 5))
        assert model not in node.board().errors


# What is on disk when a step is over; a kill right then leaves the next step undone.
STEPS: dict[str, Callable[[Path, str], bool]] = {
    "downloading": lambda folder, digest: (folder / "artifacts" / f".{digest}.onnx.part").exists(),
    "downloaded": lambda folder, digest: (folder / "artifacts" / f"{digest}.onnx").exists(),
    "tried": lambda folder, digest: (folder / "artifacts" / f"{digest}.tried").exists(),
    "on the board": lambda folder, digest: digest.encode() in (folder / "board" / "models.json").read_bytes(),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_leaves_old_or_new_and_the_next_life_comes_through(
    publisher: Publisher, stack: RunningStack, tmp_path: Path, step: str
) -> None:
    model = f"killed-{step.replace(' ', '-')}"
    old, new = models.mlp_bytes(20), models.big_model_bytes(1 << 20, seed=list(STEPS).index(step))
    publisher.release(model, old)
    with running(publisher.settings(tmp_path / "n", model)) as node:
        until(lambda: node.serves(model, 1))
        publisher.artifact(model, new)
        if step == "downloading":
            # The one step that leaves no trace when it is over: a store that does not answer makes it last.
            stack.pause_part("s3")
        try:
            digest = publisher.release(model, new, upload=False).artifact.sha256
            until(lambda: STEPS[step](node.directory, digest))
            node.kill()
        finally:
            stack.resume_part("s3")
        served = node.board().models[model].wanted.sequence
        assert node.path(model).read_bytes() == {1: old, 2: new}[served]
        began = time.monotonic()
        node.start()
        until(lambda: node.serves(model, 2))
        assert time.monotonic() - began < 10
        assert node.path(model).read_bytes() == new
        assert node.board().generation == 1


@pytest.mark.parametrize("left", [0, 1, 8 << 20, (8 << 20) + 1, 20 << 20, None], ids=str)
def test_a_part_that_a_kill_left_is_resumed_to_the_right_bytes(
    publisher: Publisher, tmp_path: Path, left: int | None
) -> None:
    """`left` bytes of it; None: all of them, and only the rename was missing."""
    data = models.big_model_bytes(20 << 20, seed=77)
    artifact = publisher.artifact("parted", data)
    files = ModelFiles(tmp_path)
    path = files.path(artifact.sha256, "onnx")
    path.with_name(f".{path.name}.part").write_bytes(data[:left])
    wanted = a_wanted("parted")
    wanted = msgspec.structs.replace(wanted, released=msgspec.structs.replace(wanted.released, artifact=artifact))
    downloader = Downloader(publisher.store, files, FetchOptions(deadline_s=30))
    for _ in range(2):
        try:
            asyncio.run(downloader.fetch(wanted, threading.Event()))
            break
        except Unreachable:
            assert not path.exists(), "a file that is not what its name says is removed, and fetched anew"
    assert path.read_bytes() == data
    assert files.verified == {artifact.sha256}


def test_without_kafka_it_waits_and_touches_nothing(publisher: Publisher, tmp_path: Path) -> None:
    model = "patient"
    publisher.release(model, models.mlp_bytes(30))
    settings = publisher.settings(tmp_path / "n", "patient-1")
    with running(settings) as node:
        until(lambda: node.serves(model, 1))
    fence = Fence.open(tmp_path / "n" / "board" / "fence", writable=True)
    fence.raise_to(INCARNATION, fence[INCARNATION] + 1)
    beat = fence[HEARTBEAT]
    with running(settings, MLCDN_KAFKA=f"127.0.0.1:{free_port()}") as node:
        until(lambda: fence[HEARTBEAT] > beat + 500)
        assert node.serves(model, 1)
        assert not fence.caught_up
    fence.close()


def test_a_second_agent_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    settings = publisher.settings(tmp_path / "n", "twice-1")
    with running(settings) as node:
        until(lambda: node.reader.fence[HEARTBEAT] > 0)
        second = subprocess.run(
            [sys.executable, "-m", "edge_node.agent.main"],
            env={k: v for k, v in os.environ.items() if not k.startswith("MLCDN_")} | settings,
            capture_output=True,
            timeout=20,
            check=False,
        )
        assert second.returncode == 2
        assert b"held by process" in second.stderr
        assert node.process is not None
        assert node.process.poll() is None
        asyncio.run(end_old_agent(node.directory))  # as a parent does that finds one
        assert node.process.wait(5) == 0
        BoardWriter(node.directory).close()


def test_the_parent_keeps_its_children_and_drains_them(publisher: Publisher, tmp_path: Path) -> None:
    publisher.release("household", models.mlp_bytes(40))
    settings = publisher.settings(tmp_path / "n", "parent-1") | {"MLCDN_WORKERS": "2", "MLCDN_DRAIN_S": "2"}
    port = free_port()
    parent = Node(settings | {"MLCDN_PORT": str(port)}, module="edge_node.main")
    parent.start()
    try:

        def pids() -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = json.loads((parent.directory / "pids.json").read_text())
            except FileNotFoundError:
                return None
            return found if found["agent"] and len(found["workers"]) == 2 else None

        def ready() -> bool:
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/v2/models/household/ready", timeout=1, trust_env=False)
            except httpx.HTTPError:
                return False
            return answer.status_code == 200

        until(lambda: parent.serves("household", 1), 25)
        first = until(pids)
        until(ready, 25)
        assert parent.reader.fence[INCARNATION] >= 2  # the parent raised what the test began with
        os.kill(first["agent"], signal.SIGKILL)
        os.kill(first["workers"][0], signal.SIGKILL)

        def replaced() -> dict[str, Any] | None:
            now = pids()
            dead = {first["agent"], first["workers"][0]}
            return now if now is not None and not dead & {now["agent"], *now["workers"]} else None

        after = until(replaced)
        assert first["workers"][1] in after["workers"]
        until(lambda: parent.reader.fence.caught_up)

        parent.kill()  # its children die with it
        life, began = parent.reader.fence[INCARNATION], time.monotonic()
        parent.start()
        until(lambda: parent.reader.fence[INCARNATION] > life)
        until(ready)
        assert time.monotonic() - began < 5
        until(lambda: parent.reader.fence.caught_up)
        second = subprocess.run(
            [sys.executable, "-m", "edge_node.main"],
            env={k: v for k, v in os.environ.items() if not k.startswith("MLCDN_")} | settings,
            capture_output=True,
            timeout=20,
            check=False,
        )
        assert second.returncode == 2
        assert b"held by process" in second.stderr
        last = until(pids)
        assert parent.end() == 0
        for pid in (last["agent"], *last["workers"]):
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert not (parent.directory / "pids.json").exists()
    finally:
        parent.end()
        parent.reader.close()


# -- the control path over the log in memory


class Desk:
    """A log in memory with trust in it, and a control that reads it."""

    def __init__(self, directory: Path) -> None:
        self.now_ms = 1_000_000
        self.log = LocalLog(lambda: self.now_ms)
        root, operator = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        self.roots = (root.public_key().public_bytes_raw(),)
        self._root = Writer(self.log, source="/operators/root", signing_key=root)
        self.operator = Writer(self.log, source="/operators/op", signing_key=operator)
        self._public = operator.public_key().public_bytes_raw()
        self.trust()
        self.said: list[Event] = []
        self.desired: list[Desired | None] = []
        self.board = BoardWriter(directory)
        self.board.fence.raise_to(INCARNATION, 1)
        self.control = self.another_life()

    def trust(self, *topics: str) -> None:
        grant = Grant(public_key=self._public, label="op", models=("*",), kinds=("ModelReleased", "CacheInvalidated"))
        for topic in topics or TOPICS:
            asyncio.run(self._root.append(TrustChanged(grants=(grant,), author="root"), topic=topic))

    def another_life(self) -> Control:
        self.control = Control(
            self.board,
            "n",
            self.roots,
            lambda event, causation_id=None: self.said.append(event),
            fleet=lambda: {"node": "n", "region": "r", "worker": AGENT, "incarnation": self.board.fence[INCARNATION]},
            topic_ids=lambda: {topic: self.log.topic_id(topic) for topic in TOPICS},
            now_ms=lambda: self.now_ms,
            on_desired=lambda desired, positions: self.desired.append(desired),
        )
        return self.control

    def boot(self) -> list[EventRefused]:
        refused = [r for topic in TOPICS for record in self.log.read(topic, 0) if (r := self.feed(record))]
        self.control.on_caught_up()
        return refused

    def feed(self, record: Record) -> EventRefused | None:
        try:
            self.control.on_record(record)
        except EventRefused as refused:
            return refused
        return None

    def invalidate(self, key: str) -> Record:
        event = CacheInvalidated(scopes=(Scope(ScopeKind.KEY, key),), author="op")
        return asyncio.run(self.operator.append(event)).record


def test_a_purge_moves_the_fence_before_its_receipt(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.boot()
    assert desk.board.fence.caught_up
    record = desk.invalidate("a")
    desk.now_ms += 7
    desk.feed(record)
    assert position_of(desk.board.fence[PURGE]) == record.offset
    [receipt] = desk.said
    assert isinstance(receipt, InvalidationApplied)
    assert (receipt.position, receipt.ms) == (record.offset, 7.0)
    desk.feed(record)  # a redelivery
    assert len(desk.said) == 1
    desk.board.close()


def test_a_boot_of_many_purges_is_one_write_and_one_receipt(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for i in range(50):
        desk.invalidate(f"k{i}")
    for record in desk.log.read(INVALIDATIONS.name, 0):
        desk.feed(record)
        assert desk.board.fence[CAUGHT_UP] == 0
    desk.control.on_caught_up()
    assert [e.position for e in desk.said if isinstance(e, InvalidationApplied)] == [50]
    reader = BoardReader(tmp_path)
    assert len(reader.read_purges(0)[0]) == 50
    reader.close()
    desk.another_life()
    desk.boot()
    assert len(desk.said) == 1  # nothing new, nothing said
    desk.board.close()


def test_a_disk_that_takes_nothing_delays_receipt_and_caught_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    record = desk.invalidate("a")

    def full(purges: object) -> list[Any]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(desk.board, "append_purges", full)
        desk.boot()
        desk.control.flush()
        assert not desk.board.fence.caught_up
        assert not desk.said
    desk.control.flush()  # there is room again
    assert desk.board.fence.caught_up
    assert position_of(desk.board.fence[PURGE]) == record.offset
    assert len(desk.said) == 1
    desk.board.close()


def test_a_refused_record_is_refused_in_one_life_only(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.log.append_raw(RELEASES.name, b"m", b"junk")
    assert [str(r.refusal) for r in desk.boot()] == ["unsigned"]
    file = desk.board.file
    assert file is not None
    desk.board.publish(msgspec.structs.replace(file, positions=desk.control.positions))
    desk.another_life()
    assert desk.boot() == []
    desk.log.append_raw(RELEASES.name, b"m", b"junk again")
    assert [str(r.refusal) for r in desk.boot()] == ["unsigned"]  # the new one only
    desk.log.recreate(RELEASES.name)
    desk.log.append_raw(RELEASES.name, b"m", b"junk of another log")
    desk.another_life()
    assert [str(r.refusal) for r in desk.boot()] == ["unsigned"]
    desk.board.close()


def test_a_topic_made_again_begins_a_generation_and_plans_nothing_meanwhile(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for _ in range(5):
        desk.invalidate("a")
    desk.boot()
    before = desk.board.file
    high = desk.board.fence[PURGE]
    assert before is not None
    desk.log.recreate(INVALIDATIONS.name)
    desk.control.on_recreated(INVALIDATIONS.name)
    assert desk.desired[-1] is None
    desk.trust(INVALIDATIONS.name)
    record = desk.invalidate("b")
    for known in desk.log.read(INVALIDATIONS.name, 0):
        desk.feed(known)
    assert desk.desired[-1] is None
    desk.control.on_caught_up()
    after = desk.board.file
    assert after is not None
    assert after.generation == before.generation + 1
    assert after.log.namespace != before.log.namespace
    assert desk.board.fence[PURGE] > high
    assert position_of(desk.board.fence[PURGE]) == record.offset == 1
    assert desk.desired[-1] == Desired()
    desk.board.close()


def test_the_last_incarnation_heard_is_the_nodes_own(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert last_heard(desk.log, "n") == 0
    for node, incarnation in (("n", 4), ("other", 9), ("n", 3)):
        event = InvalidationApplied(node=node, region="r", worker=AGENT, incarnation=incarnation, position=1, ms=0)
        asyncio.run(desk.operator.append(event))
    desk.log.append_raw(FLEET.name, b"n", b"junk")
    assert last_heard(desk.log, "n") == 4
    desk.board.close()


# -- the driver, with fetches and trials in the test's hand


class Hand:
    """A fetcher and trials that do what the test says next."""

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self.away = 0
        self.at_once = self.most = 0
        self.fetched: list[str] = []

    async def fetch(self, wanted: Wanted, abandoned: threading.Event) -> dict[str, float]:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        if self.away:
            self.away -= 1
            raise Unreachable("S3", "there")
        self.fetched.append(wanted.model)
        self.files.verified |= {wanted.digest}
        return {"download": 1.0}

    async def trial(self, path: Path, sha256: str, *_: Any, **__: Any) -> TrialReport:
        from inference.datatypes import TensorSpec

        return TrialReport(
            ok=True,
            inputs=tuple(TensorSpec(t.name, t.datatype, t.shape) for t in INPUTS),
            outputs=tuple(TensorSpec(t.name, t.datatype, t.shape) for t in OUTPUTS),
        )


def a_wanted(model: str, sequence: int = 1) -> Wanted:
    from schemas.events import Artifact

    digest = models.sha256(f"{model} {sequence}".encode())
    released = ModelReleased(
        model=model,
        version="v",
        sequence=sequence,
        artifact=Artifact(
            sha256=digest,
            size_bytes=10,
            object_key=model_object_key(model, digest),
            chunk_size_bytes=65_536,
            chunk_sha256=(bytes(32),),
        ),
        inputs=INPUTS,
        outputs=OUTPUTS,
        created_at_ms=1,
        author="a",
    )
    return Wanted(model=model, version="v", sequence=sequence, position=sequence, cause="c", released=released)


def drive(
    directory: Path, prepare: Callable[[Hand, Desk], None], done: Callable[[BoardFile], bool]
) -> tuple[Hand, Desk]:
    desk = Desk(directory)
    desk.boot()
    files = ModelFiles(directory)
    hand = Hand(files)

    async def live() -> None:
        installer = Installer(
            desk.board,
            files,
            hand,
            hand,
            lambda event, causation_id=None: desk.said.append(event),
            Surroundings(
                runtime="r",
                fetch_concurrency=2,
                disk_bytes=10**9,
                fleet=lambda: {"node": "n", "region": "r", "worker": AGENT, "incarnation": 1},
                now_ms=lambda: time.time_ns() // 1_000_000,
                random=random.random,
            ),
        )
        prepare(hand, desk)
        installer.desire(desk.desired[-1], {})
        stop = asyncio.Event()
        task = asyncio.create_task(installer.run(stop))
        async with asyncio.timeout(10):
            while not done(desk.board.file or pytest.fail("no board")):  # noqa: ASYNC110 (a board tells nobody)
                await asyncio.sleep(0.01)
        stop.set()
        await task

    asyncio.run(live())
    return hand, desk


def test_a_storm_of_releases_is_fetched_a_few_at_a_time(tmp_path: Path) -> None:
    wants = {f"m{i}": a_wanted(f"m{i}") for i in range(20)}
    hand, desk = drive(
        tmp_path,
        lambda _, desk: desk.desired.append(Desired(seats={name: Seated(wanted=w) for name, w in wants.items()})),
        lambda file: file.models.keys() == wants.keys(),
    )
    assert hand.most == 2
    assert sorted(hand.fetched) == sorted(wants)
    assert desk.board.file is not None
    assert len({m.slot for m in desk.board.file.models.values()}) == 20
    desk.board.close()


def test_a_store_that_is_away_is_asked_again_and_complained_of_once(tmp_path: Path) -> None:
    def away(hand: Hand, desk: Desk) -> None:
        hand.away = 2
        desk.desired.append(Desired(seats={"m": Seated(wanted=a_wanted("m"))}))

    began = time.monotonic()
    hand, desk = drive(tmp_path, away, lambda file: "m" in file.models)
    assert time.monotonic() - began >= 0.7  # 250 ms and 500 ms at the least
    assert hand.fetched == ["m"]
    [rejected] = [e for e in desk.said if isinstance(e, ArtifactRejected)]
    assert (rejected.phase, rejected.retrying) == ("download", True)
    assert desk.board.file is not None
    assert not desk.board.file.errors
    desk.board.close()


# -- files


def test_a_name_from_an_earlier_life_is_believed_after_its_bytes_were(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path)
    good, bad = models.sha256(b"good"), models.sha256(b"bad")
    files.path(good, "onnx").write_bytes(b"good")
    files.path(bad, "onnx").write_bytes(b"rot")
    assert files.verified == frozenset()
    assert files.holds(good, "onnx")
    assert not files.holds(bad, "onnx")
    assert not files.path(bad, "onnx").exists()
    assert files.verified == {good}


def test_proofs_outlive_a_process_and_go_with_their_file(tmp_path: Path) -> None:
    digest = models.sha256(b"good")
    ModelFiles(tmp_path).write(digest, "onnx", b"good")
    proof = Proof(digest=digest, golden=None, rtol=0, atol=0, runtime="r")
    ModelFiles(tmp_path).prove(proof, digest)
    again = ModelFiles(tmp_path)
    assert again.proofs == {proof}
    # The same bytes, released again with a golden file.
    other = Proof(digest=digest, golden=models.sha256(b"golden"), rtol=0, atol=0, runtime="r")
    again.prove(other, digest)
    assert ModelFiles(tmp_path).proofs == {proof, other}
    assert again.remove((f"{digest}.onnx",)) == 4
    assert ModelFiles(tmp_path).proofs == frozenset()


def test_a_sweep_takes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    kept = [
        tmp_path / "board" / "purges-2.log",
        tmp_path / "board" / "models.json",
        tmp_path / "artifacts" / f"{models.sha256(b'a')}.onnx",
    ]
    resumable = tmp_path / "artifacts" / f".{models.sha256(b'b')}.onnx.part"
    gone = [
        tmp_path / "board" / "purges-1.log",
        tmp_path / "board" / "models.json.half",
        tmp_path / "artifacts" / ".x.onnx.part",
        tmp_path / "artifacts" / ".x.tried.half",
    ]
    for path in kept + gone:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"12345")
    assert sweep(tmp_path, "purges-2.log", time.time()) == 0  # all are young
    resumable.write_bytes(b"12345")
    assert sweep(tmp_path, "purges-2.log", time.time() + 1_000, {models.sha256(b"b")}) == 5 * len(gone)
    assert resumable.exists()
    assert sweep(tmp_path, "purges-2.log", time.time() + 1_000) == 5
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
