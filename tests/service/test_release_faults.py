"""The release path under faults: a broker that refuses, artifacts that break at the node alone, two releases of one sequence,
a kill at every step, clocks that are wrong, a region that is cut off, events that only a later version knows.

Two whole nodes in two regions, one with its clock ten minutes slow and the other ten minutes fast; Kafka, S3 and the
clients' way to the second one pass through proxies. What is live is asked all the while.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from confluent_kafka.cimpl import Producer

from inference.golden import write_golden
from inference.onnx_model import OnnxModel
from mlcdn.identities import Identities, ensure_identities
from mlcdn.local_stack.running import RunningStack
from mlcdn.local_stack.stack import KAFKA
from processes.parent_death import tied_to_parent
from processes.ports import LOOPBACK, free_port
from schemas import codec, signing
from schemas.errors import MlcdnError
from schemas.events import (
    ArtifactRejected,
    CacheInvalidated,
    Event,
    EventRejected,
    Golden,
    Health,
    ModelReleased,
    ModelRolledBack,
    ModelSwapped,
    Placement,
    Plan,
    RoutesPublished,
    Wave,
)
from schemas.events.rollouts import Gates
from schemas.names import Scope, ScopeKind, golden_object_key
from schemas.topics import INVALIDATIONS, RELEASES, TOPICS
from streams.artifacts import ArtifactStore
from streams.audit.control import At, fold_releases
from streams.folds.rollouts import Status
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer
from tests import models
from tests.edge_node_process import EdgeNode, Load, Operator, node_settings, question, until
from tests.rigged import KillAt, arm, rig, went_off
from tests.service.test_agent import Node, Publisher
from tests.service.test_network_faults import told_at
from tests.tcp_faults import TcpFaults

AGENT, WORKER = "edge_node.agent.main", "edge_node.serving.main"
START_S = 30.0
LIVE_S = 15.0
RESTART_S = 3.0
# Two cores shared with whatever else runs.
SLACK = 1.5
BEATS_S = 3.0
# The promise is for a partition of 60 s. How long this one is, nothing rests on.
PARTITION_S = float(os.environ.get("TEST_PARTITION_S", "3"))
MODEL, SIBLING = "hurt", "unhurt"
NEAR, FAR = "tokyo-slow", "london-fast"
# Region, degrees north and east, and how wrong the clock is.
NODES = {NEAR: ("tokyo", 35.68, 139.69, -600), FAR: ("london", 51.51, -0.13, 600)}
LONDON = NODES[FAR][1:3]


class Reached(EdgeNode):
    """A node that clients reach by another port than its own."""

    def reached_by(self, port: int) -> None:
        self._settings |= {"MLCDN_URL": f"http://{LOOPBACK}:{port}"}


@dataclass(slots=True)
class Scene:
    """Two nodes that serve two models, and the digests of what was released last."""

    stack: RunningStack
    identities: Identities
    operator: Operator
    store: ArtifactStore
    reader: KafkaReader
    nodes: dict[str, Reached]
    rigs: dict[str, Path]
    lines: dict[str, TcpFaults]
    digests: dict[str, str]
    seed: int = 60_000

    @property
    def near(self) -> Reached:
        return self.nodes[NEAR]

    @property
    def far(self) -> Reached:
        return self.nodes[FAR]

    def fresh(self) -> bytes:
        self.seed += 1
        return models.mlp_bytes(self.seed)

    def prepare(self) -> ModelReleased:
        return self.operator.prepare(MODEL, self.fresh())

    def release(self, release: ModelReleased) -> int:
        self.digests[release.model] = release.artifact.sha256
        return self.operator.append(release)

    def up(self) -> bool:
        return all(node.serves(model, digest) for node in self.nodes.values() for model, digest in self.digests.items())

    def said(self, topic: str, kind: type[Event], node: str | None = None) -> list[Any]:
        found: list[Any] = []
        for partition in range(TOPICS[topic].partitions):
            for r in self.reader.read(topic, partition):
                try:
                    event = codec.decode(r.topic, r.key, r.value, r.headers).event
                except MlcdnError:
                    continue  # another test's poison
                if isinstance(event, kind) and node in (None, getattr(event, "node", None)):
                    found.append(event)
        return found

    def rejections(self, sequence: int) -> list[tuple[str, str, str]]:
        said = self.said("mlcdn.fleet", ArtifactRejected)
        return sorted((e.node, e.phase, e.cause) for e in said if (e.model, e.sequence) == (MODEL, sequence))

    def letters(self, position: int) -> Counter[tuple[str, str]]:
        """Node and reason of whoever could not obey the record there."""
        said = self.said("mlcdn.dead_letters", EventRejected)
        return Counter((e.node, e.refusal) for e in said if (e.topic, e.offset) == (RELEASES.name, position))

    def loads(self, also: ModelReleased | None = None) -> ExitStack:
        """Both nodes asked for what is live, `also` may come to be; what was wrong fails the test at the block's end."""
        stack = ExitStack()
        for node in self.nodes.values():
            load = Load(node, self.digests, rate=25)

            def judged(load: Load = load) -> None:
                new = f"{MODEL}: {also.artifact.sha256}" if also is not None else ""
                wrong = [what for what in load.wrong if what != new]
                assert not wrong
                assert load.answered + len(load.wrong) == load.sent > 10

            stack.callback(judged)
            stack.enter_context(load)
        return stack


@pytest.fixture(scope="module")
def scene(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory, a = tmp_path_factory.mktemp("release-faults"), stack.addresses
    identities = asyncio.run(ensure_identities(directory / "keys", a.kafka, lambda _: None))
    kafka = int(a.kafka.rpartition(":")[2])
    with ExitStack() as all_of_it:
        lines = {
            "kafka": all_of_it.enter_context(TcpFaults(kafka)),
            "s3": all_of_it.enter_context(TcpFaults(int(a.s3_endpoint.rpartition(":")[2]))),
        }
        lines["kafka"].instead = (told_at(kafka), told_at(lines["kafka"].port))
        through = replace(
            a, kafka=f"{LOOPBACK}:{lines['kafka'].port}", s3_endpoint=f"http://{LOOPBACK}:{lines['s3'].port}"
        )
        nodes, rigs = {}, {}
        for name, (region, lat, lon, skew_s) in NODES.items():
            rigs[name] = directory / f"rig-{name}"
            settings = node_settings(through if name == FAR else a, identities, directory / name, name)
            settings |= rig(rigs[name], skew_s=skew_s) | {
                "MLCDN_REGION": region,
                "MLCDN_LAT": str(lat),
                "MLCDN_LON": str(lon),
                "MLCDN_REDIS_URL": a.redis[region],
            }
            nodes[name] = Reached(settings)
        lines["clients"] = all_of_it.enter_context(TcpFaults(nodes[FAR].port))
        nodes[FAR].reached_by(lines["clients"].port)
        store = ArtifactStore(a.s3_endpoint, a.s3_bucket, a.s3_access_key, a.s3_secret_key, "us-east-1")
        operator = Operator(a, identities, directory)
        scene = Scene(stack, identities, operator, store, KafkaReader(a.kafka), nodes, rigs, lines, {})
        for model in (MODEL, SIBLING):
            scene.release(operator.prepare(model, scene.fresh()))
        for node in nodes.values():
            node.start()
            all_of_it.callback(node.kill)
        until(scene.up, START_S)
        yield scene


# -- what breaks at the node alone


def test_an_artifact_that_breaks_at_the_node_alone_is_rejected_once_and_serves_nobody(
    scene: Scene, tmp_path: Path
) -> None:
    data = scene.fresh()
    golden = golden_of(scene, data, 1.0, tmp_path)
    bad = {
        "golden": msgspec.structs.replace(scene.operator.prepare(MODEL, data), golden=golden),
        "short": scene.prepare(),
        "another": scene.prepare(),
        "lost": scene.prepare(),
    }
    s3 = Publisher(scene.stack.addresses, scene.identities, tmp_path).s3()
    bucket = scene.stack.addresses.s3_bucket
    for name, spoil in (("short", lambda b: b[:-1]), ("another", lambda _: scene.fresh()), ("lost", lambda b: b[:0])):
        key = bad[name].artifact.object_key
        s3.put_object(Bucket=bucket, Key=key, Body=spoil(s3.get_object(Bucket=bucket, Key=key)["Body"].read()))
    with scene.loads():
        for name, release in bad.items():
            scene.operator.append(release)
            until(lambda r=release: len(scene.rejections(r.sequence)) == 2, LIVE_S)
            phases = {phase for _, phase, _ in scene.rejections(release.sequence)}
            assert phases == {"golden" if name == "golden" else "verify"}, name
    good = scene.prepare()
    scene.release(good)
    until(scene.up, LIVE_S)
    assert all(len(scene.rejections(release.sequence)) == 2 for release in bad.values()), "once by each"
    brought = {e.digest for e in scene.said("mlcdn.fleet", ModelSwapped) if e.node in NODES}
    assert good.artifact.sha256 in brought
    assert not brought & {release.artifact.sha256 for release in bad.values()}


# -- one sequence, two releases


def test_two_releases_of_one_sequence_come_to_the_first_everywhere_and_the_other_is_named_once(scene: Scene) -> None:
    one = scene.prepare()
    other = msgspec.structs.replace(scene.prepare(), sequence=one.sequence)
    first, second = sorted(zip(scene.operator.append_all([one, other]), (one, other), strict=True))
    scene.digests[MODEL] = first[1].artifact.sha256
    until(scene.up, LIVE_S)
    said = Counter({(node, "sequence_conflict"): 1 for node in NODES})
    until(lambda: scene.letters(second[0]) == said, LIVE_S)
    # Whoever reads it all again comes to the same, and says nothing again.
    caught_up = scene.far.log().count("caught_up")
    os.kill(until(scene.far.pids, 5)["agent"], signal.SIGKILL)
    until(lambda: scene.far.log().count("caught_up") > caught_up, START_S)
    assert scene.up()
    assert scene.letters(second[0]) == said
    assert not scene.letters(first[0])


# -- the broker


def test_what_is_appended_while_the_broker_is_killed_and_comes_back_stands_in_the_log_once(scene: Scene) -> None:
    """What is on its way then is not taken, or taken and not acknowledged, or meets a broker that does not lead yet."""
    release, end = scene.prepare(), {t: scene.reader.watermarks(t, 0)[1] for t in (RELEASES.name, INVALIDATIONS.name)}
    keys = [f"prediction:restart:{number}" for number in range(300)]
    purges = [CacheInvalidated(scopes=(Scope(ScopeKind.KEY, key),), author="test") for key in keys]
    positions: list[int] = []
    writer_key = load_private(scene.identities.operator)

    async def append() -> None:
        appender = KafkaAppender(scene.stack.addresses.kafka, client_id="test")
        writer = Writer(appender, source="/operators/test", signing_key=writer_key)
        for at in range(0, len(purges), 5):
            some = [*purges[at : at + 5], *([release] if at == len(purges) // 2 else [])]
            positions.extend(done.record.offset for done in await asyncio.gather(*map(writer.append, some)))
            await asyncio.sleep(0.01)
        await writer.close()

    appending = threading.Thread(target=lambda: asyncio.run(append()))
    with scene.loads(also=release):
        appending.start()
        until(lambda: len(positions) > 100, LIVE_S)
        scene.stack.kill_part(KAFKA)
        taken = len(positions)
        scene.stack.start_part(KAFKA)
        appending.join(30)
        assert taken < len(positions) == len(purges) + 1, "all of it, some before the kill and some after"
        scene.digests[MODEL] = release.artifact.sha256
        until(scene.up, LIVE_S)
    found = [
        codec.decode(r.topic, r.key, r.value, r.headers).event
        for topic, first in end.items()
        for r in scene.reader.read(topic, 0, first)
    ]
    assert [s.value for e in found if isinstance(e, CacheInvalidated) for s in e.scopes] == keys
    assert [e.sequence for e in found if isinstance(e, ModelReleased)] == [release.sequence]


# -- a kill at every step


def steps(directory: Path, release: ModelReleased) -> dict[str, KillAt]:
    """Of a release at a node, in order; each is what the process was about to do. `test_agent.py` has kills after others."""
    digest, board = release.artifact.sha256, directory / "board"
    artifact, golden = f"artifacts/{digest}.onnx", f"artifacts/{release.golden.sha256 if release.golden else ''}.npz"
    return {
        "fetched and verified, not named": KillAt(AGENT, "os.rename", artifact),
        "the board written, not renamed": KillAt(
            AGENT, "os.rename", "board/models.json", board / "models.json.half", f'artifacts/{digest}.onnx"'
        ),
        "renamed, the fence not moved": KillAt(
            AGENT, "open", "/board", board / "models.json", f'artifacts/{digest}.onnx"'
        ),
        "the fence moved, nothing said": KillAt(AGENT, "os.utime", artifact, board / "models.json", digest),
        "the worker opens it": KillAt(WORKER, "open", artifact),
        "the worker has loaded it": KillAt(WORKER, "open", golden),
    }


def test_a_kill_at_every_step_leaves_old_or_new_whole_and_the_new_comes(scene: Scene, tmp_path: Path) -> None:
    took = {}
    for number, step in enumerate(steps(tmp_path, scene.operator.prepare("none", scene.fresh()))):
        # In turn: the pauses before a restart double.
        took[step] = _killed_at(step, (scene.near, scene.far)[number % 2], scene, tmp_path)
        until(scene.up, LIVE_S)
    print({step: f"{seconds:.2f} s" for step, seconds in took.items()})  # noqa: T201


def _killed_at(step: str, node: EdgeNode, scene: Scene, tmp_path: Path) -> float:
    """Seconds from the kill to the new release being served."""
    data, folder = scene.fresh(), scene.rigs[node.name]
    release = msgspec.structs.replace(scene.operator.prepare(MODEL, data), golden=golden_of(scene, data, 0, tmp_path))
    old, new = scene.digests[MODEL], release.artifact.sha256
    arm(folder, steps(node.directory, release)[step])
    stop, asked = threading.Event(), Asked()
    asking = threading.Thread(target=asked.ask, args=(node, stop))
    asking.start()
    try:
        scene.release(release)
        until(lambda: went_off(folder), LIVE_S)
        killed = time.monotonic()
        until(lambda: node.serves(MODEL, new), LIVE_S)
        took = time.monotonic() - killed
    finally:
        stop.set()
        asking.join()
    assert asked.digests <= {old, new}, step
    assert not asked.failed, step
    if "worker" in step:
        assert asked.longest_s < RESTART_S * SLACK, step
    else:
        assert not asked.broken, f"{step}: who serves was hurt"
    return took


def golden_of(scene: Scene, data: bytes, off_by: float, tmp_path: Path) -> Golden:
    """A golden file in the store, whose answer is `off_by` from the model's own."""
    model, file = OnnxModel.from_bytes(data, models.sha256(data)), tmp_path / "golden.npz"
    inputs = {"features": np.ones((2, 32), np.float32)}
    write_golden(file, inputs, {"scores": model.run(inputs)["scores"] + off_by})
    model.close()
    proof = models.sha256(file.read_bytes())
    scene.store.put_bytes(golden_object_key(MODEL, proof), file.read_bytes())
    return Golden(object_key=golden_object_key(MODEL, proof), sha256=proof)


class Asked:
    """One client that asks again where a connection breaks: what it got, and the longest time in which it got nothing."""

    def __init__(self) -> None:
        self.digests: set[str] = set()
        self.failed: list[str] = []
        self.broken = 0
        self.longest_s = 0.0

    def ask(self, node: EdgeNode, stop: threading.Event) -> None:
        number, last = time.monotonic_ns() // 1_000_000 % 10_000_000, time.monotonic()
        with httpx.Client(base_url=node.url, timeout=10, trust_env=False) as client:
            while not stop.is_set():
                number += 1
                try:
                    answer = client.post("/predict", json=question(MODEL, number))
                except httpx.TransportError:
                    self.broken += 1
                    time.sleep(0.02)
                    continue
                now = time.monotonic()
                self.longest_s, last = max(self.longest_s, now - last), now
                if answer.status_code == 200:
                    self.digests.add(answer.json()["digest"])
                else:
                    self.failed.append(f"{answer.status_code} {answer.text[:200]}")
                time.sleep(0.01)


# -- what only a later version knows


def test_an_event_that_only_a_later_version_knows_is_named_and_honoured_after_the_upgrade(
    scene: Scene, tmp_path: Path
) -> None:
    publisher = Publisher(scene.stack.addresses, scene.identities, tmp_path)
    name, model = "older-1", "rolled-back"
    older = rig(tmp_path / "rig", unknown=("ModelRolledBack",), process=AGENT)
    first = publisher.release(model, models.mlp_bytes(1))
    publisher.release(model, models.mlp_bytes(2))
    node = Node(publisher.settings(tmp_path / "node", name))
    node.start(**older)
    try:
        until(lambda: node.serves(model, 2), START_S)
        _, back = publisher.append(
            ModelRolledBack(
                model=model,
                version="v1",
                sequence=publisher.sequence(model),
                to_digest=first.artifact.sha256,
                author="test",
            )
        )
        refused = {back.offset: "unknown_schema"} | _nonsense(scene, publisher)
        # The next good one acts, and of the others nothing.
        publisher.release("after", models.mlp_bytes(3))
        until(lambda: node.serves("after", 1), LIVE_S)
        assert node.board().desired[model].wanted.sequence == 2
        assert node.serves(model, 2)
        for offset, reason in refused.items():
            until(lambda o=offset, r=reason: scene.letters(o)[name, r] == 1, LIVE_S)
        node.kill()

        node.start()
        until(lambda: node.serves(model, 3), START_S)
        assert node.path(model).read_bytes() == models.mlp_bytes(1)
        assert node.reader.fence.caught_up
        for offset, reason in refused.items():
            assert scene.letters(offset)[name, reason] == 1, "said again"
    finally:
        node.kill()
        node.reader.close()


def _nonsense(scene: Scene, publisher: Publisher) -> dict[int, str]:
    """A tombstone, a choice that does not exist and a schema of the future, the last two signed well; reasons by position."""
    key = load_private(scene.identities.operator)
    event = scene.operator.prepare("nonsense", scene.fresh())

    def encoded(event: ModelReleased) -> codec.Message:
        return codec.encode(event, topic=RELEASES.name, id="0", source="/operators/test", now_ms=0)

    at_edge, at_origin = (
        encoded(msgspec.structs.replace(event, placement=placement)) for placement in (Placement.EDGE, Placement.ORIGIN)
    )
    [differs] = [n for n, (a, b) in enumerate(zip(at_edge.value, at_origin.value, strict=True)) if a != b]
    nowhere = at_edge.value[:differs] + b"\x7e" + at_edge.value[differs + 1 :]
    future = b"\x00" + (9_999).to_bytes(4, "big") + at_edge.value[5:]
    sent: list[tuple[str, int]] = []
    producer = Producer({"bootstrap.servers": scene.stack.addresses.kafka, "linger.ms": 0})
    for reason, value in (("tombstone", None), ("malformed", nowhere), ("unknown_schema", future)):
        message = at_edge if value is None else signing.sign(msgspec.structs.replace(at_edge, value=value), key)
        producer.produce(
            RELEASES.name,
            value,
            message.key,
            headers=list(message.headers),
            on_delivery=lambda _, done, r=reason: sent.append((r, done.offset())),
        )
        assert producer.flush(10) == 0
    return {offset: reason for reason, offset in sent}


# -- clocks, and a region that is cut off


@pytest.fixture(scope="module")
def judged(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The stream jobs and a router beside the two nodes; the router's URL."""
    directory, a, port = tmp_path_factory.mktemp("judged"), scene.stack.addresses, free_port()
    shared = node_settings(a, scene.identities, directory, "jobs") | {
        "MLCDN_SIGNING_KEY": str(scene.identities.jobs),
        "MLCDN_PORT": str(port),
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLCDN_")} | shared
    running = []
    with (directory / "log").open("ab") as log:
        for module in ("streams.main", "router.main"):
            own = environment | {"MLCDN_DIR": str(directory / module)}
            (directory / module).mkdir()
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", module],
                    env=own,
                    stdout=log,
                    stderr=log,
                    preexec_fn=tied_to_parent(),  # noqa: PLW1509
                )
            )
    try:
        url = f"http://{LOOPBACK}:{port}"
        for name, (_, *place, _) in NODES.items():
            until(lambda n=name, p=place: first_choice(url, (p[0], p[1])) == n, START_S)
        # While it joins its group a job that starts hears nobody, and doubts them all.
        until(lambda: set(health(scene.said("mlcdn.routes", RoutesPublished)[-1]).values()) == {Health.ALIVE}, START_S)
        yield url
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(20)


def health(table: RoutesPublished) -> dict[str, Health]:
    return {node.node: node.health for node in table.nodes if node.node in NODES}


def first_choice(router: str, place: tuple[float, float]) -> str:
    """The node that a router sends a client to."""
    asked = {"model": MODEL, "lat": str(place[0]), "lon": str(place[1])}
    try:
        edges = httpx.get(f"{router}/route", params=asked, timeout=2, trust_env=False).json()["edges"]
    except httpx.TransportError:
        return ""
    return str(edges[0]["node"]) if edges else ""


def test_clocks_that_are_wrong_flip_no_health_and_no_gate(scene: Scene, judged: str) -> None:
    tables = len(scene.said("mlcdn.routes", RoutesPublished))
    waves = (Wave(regions=("london",), percent=50, min_samples=20, hold_s=0.5, max_wait_s=30), Wave(max_wait_s=30))
    plan = Plan(waves=waves, gates=Gates(p99_slack_ms=1_000))
    release = msgspec.structs.replace(scene.prepare(), plan=plan)
    old, new = scene.digests[MODEL], release.artifact.sha256
    scene.operator.append(release)
    seen: Counter[str] = Counter()
    give_up, number = time.monotonic() + 40, 0
    roots = load_roots(scene.identities.roots)
    while True:
        for _ in range(20):
            number += 1
            for node in scene.nodes.values():
                answer = node.predict(MODEL, number)
                assert answer.status_code == 200
                seen[answer.json()["digest"]] += 1
        rollout = fold_releases(scene.reader, roots, At())[0].models[MODEL].rollout
        assert rollout is not None
        if rollout.status is not Status.ROLLING:
            break
        assert time.monotonic() < give_up, rollout
    assert rollout.status is Status.DONE, rollout
    assert seen.keys() == {old, new}
    scene.digests[MODEL] = new
    until(scene.up, LIVE_S)
    for table in scene.said("mlcdn.routes", RoutesPublished)[tables:]:
        # A busy machine silences both for a moment, a clock that is believed one of them for good.
        found = health(table)
        assert found.keys() == NODES.keys()
        assert Health.DEAD not in found.values() or Health.ALIVE not in found.values(), found
    until(lambda: set(health(scene.said("mlcdn.routes", RoutesPublished)[-1]).values()) == {Health.ALIVE}, START_S)
    for name, (_, *place, _) in NODES.items():
        assert first_choice(judged, (place[0], place[1])) == name


def test_a_region_that_is_cut_off_serves_is_routed_around_and_comes_to_the_last_release_alone(
    scene: Scene, judged: str
) -> None:
    first, last, before = scene.prepare(), scene.prepare(), dict(scene.digests)
    with ExitStack() as healing, Load(scene.far, before, rate=25) as load:
        began = time.monotonic()
        for line in scene.lines.values():
            line.held = True
            healing.callback(line.heal)
        until(lambda: first_choice(judged, LONDON) == NEAR, BEATS_S * SLACK + 2)
        away = time.monotonic() - began
        for release in (first, last):
            scene.release(release)
            until(lambda r=release: scene.near.serves(MODEL, r.artifact.sha256), LIVE_S)
        position = scene.operator.invalidate(SIBLING)
        time.sleep(max(0.0, PARTITION_S - (time.monotonic() - began)))
        assert first_choice(judged, LONDON) == NEAR
        assert all(scene.far.serves(model, digest) for model, digest in before.items())
    healed = time.monotonic()
    until(scene.up, LIVE_S)
    until(lambda: int(scene.far.predict(SIBLING, 1).headers["mlcdn-position"].partition("/")[2]) >= position, LIVE_S)
    converged = time.monotonic() - healed
    assert not load.wrong
    assert load.answered == load.sent > PARTITION_S * 10
    until(lambda: first_choice(judged, LONDON) == FAR, START_S)
    swaps = {e.digest for e in scene.said("mlcdn.fleet", ModelSwapped, FAR)}
    assert last.artifact.sha256 in swaps
    assert first.artifact.sha256 not in swaps, "what was no longer wanted was activated"
    print(f"routed around after {away:.2f} s, converged {converged:.2f} s after the return")  # noqa: T201
