"""An edge node whose models are the trouble: one that never ends, and a hundred at once. What is served already is served
at its pace, by the same worker.

The node is whole, and so are Kafka, S3 and Valkey. Every measure is against the same node in the same run.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest

from mlcdn.identities import ensure_identities
from mlcdn.local_stack.running import RunningStack
from schemas.events import Limits, ModelReleased, ModelRetired, Tensor
from tests import models
from tests.edge_node_process import EdgeNode, Operator, node_settings, until
from tests.open_loop import OpenLoop, Pace
from tests.service.test_worker import loop_bytes

START_S = 30.0
USUAL_S = 3.0
# What a neighbour's runs may make of a p99.
PACE = 2.0
LIVE, ENDLESS = "steady", "endless"

STORM, STORM_RATE, STORM_S = 100, 300.0, 40.0
FETCHES = 2
# The promise is twice the usual p99. What stands in its way on two cores is a hundred trials, 24 ms of a core each, beside
# the loop: before they gave way it was 20 to 60 ms beside 3 to 4, on a machine with little else to do. This is what holds.
STORM_ADDED_MS = 100.0

RATE = 100.0
DEADLINE_S = 1.0
# The run is told to stop at the deadline and does so between two operators; the answer does not wait for it.
LATE_S = 0.5
GONE_S = 5.0
# Of one core, over a second in which nothing is asked.
IDLE_SHARE = 0.25


@dataclass(slots=True)
class Scene:
    operator: Operator
    node: EdgeNode
    digests: dict[str, str]

    def load(self, rate: float) -> OpenLoop:
        return OpenLoop(self.node.port, self.digests, rate=rate)

    def usual(self, rate: float) -> Pace:
        with self.load(rate) as usual:
            time.sleep(USUAL_S)
        assert not usual.wrong
        return Pace.of(usual)

    def states(self) -> dict[str, str]:
        answer = self.node.get("/health")
        return {name: model["state"] for name, model in answer.json()["models"].items()} if answer is not None else {}

    def idles(self) -> bool:
        """Whether the worker hardly uses the processor."""
        worker = self.node.worker()
        before = cpu_s(worker)
        time.sleep(1)
        return cpu_s(worker) - before < IDLE_SHARE


@pytest.fixture(scope="module")
def scene(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("model-faults")
    identities = asyncio.run(ensure_identities(directory / "keys", stack.addresses.kafka, lambda _: None))
    settings = node_settings(stack.addresses, identities, directory / "node", "steady-1")
    node = EdgeNode(settings | {"MLCDN_FETCH_CONCURRENCY": str(FETCHES)})
    operator = Operator(stack.addresses, identities, directory)
    scene = Scene(operator, node, {LIVE: operator.release(LIVE, models.mlp_bytes(7_000))})
    node.start()
    try:
        until(lambda: node.serves(LIVE, scene.digests[LIVE]), START_S)
        yield scene
    finally:
        node.end()


@pytest.fixture
def http(scene: Scene) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=scene.node.url, timeout=10, trust_env=False) as client:
        yield client


def test_a_model_that_never_ends_is_stopped_and_keeps_nobody_else(scene: Scene, http: httpx.Client) -> None:
    node, operator, worker = scene.node, scene.operator, scene.node.worker()
    # It ends soon for what a trial asks, and never for what its clients will.
    release = msgspec.structs.replace(
        operator.prepare(ENDLESS, loop_bytes()),
        inputs=(Tensor(name="x", datatype="FP32", shape=(-1, 4)),),
        outputs=(Tensor(name="y", datatype="FP32", shape=(-1, 4)),),
        limits=Limits(deadline_ms=int(DEADLINE_S * 1e3)),
    )
    operator.append(release)
    until(lambda: node.serves(ENDLESS, release.artifact.sha256), START_S)
    usual = scene.usual(RATE)
    with scene.load(RATE) as load, ThreadPoolExecutor(8) as clients:
        asked = list(clients.map(lambda number: never_ends(http, number), range(24)))
    assert {status for status, _ in asked} == {504}
    assert min(s for _, s in asked) > DEADLINE_S * 0.9
    assert max(s for _, s in asked) < DEADLINE_S + LATE_S
    assert until(lambda: scene.idles() or None, GONE_S), "a thread is left that spins"
    # It serves who asks for what it can: no thread of its own was lost.
    assert asks(http, [1.0, 0.0, 0.0, 0.0]).status_code == 200
    with scene.load(RATE) as retiring, ThreadPoolExecutor(2) as clients:
        last = [clients.submit(never_ends, http, number) for number in (100, 101)]
        time.sleep(DEADLINE_S / 4)
        operator.append(ModelRetired(model=ENDLESS, sequence=release.sequence + 1, author="test"))
        until(lambda: asks(http, [1.0, 0.0, 0.0, 0.0]).status_code == 404, GONE_S)
        assert all(done.result()[0] in (503, 504) for done in last)
    assert until(lambda: scene.idles() or None, GONE_S), "a thread of a retired model is left that spins"
    for running in (load, retiring):
        assert not running.wrong
        assert running.answered == running.sent > RATE / 2
    assert Pace.of(load).keeps(usual, PACE)
    assert node.worker() == worker
    print(f"endless: {load.answered} answered, p99 {usual} → {Pace.of(load)}")  # noqa: T201


def test_a_storm_of_releases_slows_nobody_down_and_is_all_served(scene: Scene) -> None:
    node, operator, worker = scene.node, scene.operator, scene.node.worker()
    releases = [
        operator.prepare(f"storm-{number}", models.mlp_bytes(8_000 + number, (32, 8, 8))) for number in range(STORM)
    ]
    usual = scene.usual(STORM_RATE)
    with Watched(until(node.pids, 5)["agent"]) as agent, scene.load(STORM_RATE) as load:
        began = time.monotonic()
        operator.append_all(releases)
        until(lambda: _live(scene, releases), STORM_S)
        took = time.monotonic() - began
    print(  # noqa: T201
        f"storm: {STORM} live in {took:.1f} s, {load.answered} answered, p99 {usual} → {Pace.of(load)}, "
        f"{agent.most_children} processes of the agent at most"
    )
    assert not load.wrong
    assert load.answered == load.sent > STORM_RATE
    # The trials' server, and its children.
    assert 0 < agent.most_children <= 1 + FETCHES
    assert Pace.of(load).p99 < usual.p99 + STORM_ADDED_MS
    assert node.worker() == worker
    assert all(node.serves(release.model, release.artifact.sha256) for release in releases)
    operator.append_all([ModelRetired(model=r.model, sequence=r.sequence + 1, author="test") for r in releases])
    until(lambda: not scene.states().keys() & {r.model for r in releases}, START_S)
    assert node.serves(LIVE, scene.digests[LIVE])
    metrics = node.get("/metrics")
    assert metrics is not None and f'model="{LIVE}"' in metrics.text
    assert 'model="storm-' not in metrics.text, "a retired model is still told of"


class Watched:
    """How many processes a process has at most below it, while the block runs."""

    def __init__(self, pid: int) -> None:
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch")
        self.most_children = 0

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.most_children = max(self.most_children, len(below(self._pid)))


def below(pid: int) -> list[int]:
    """The processes that a process began, and those that they began."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    except OSError:
        return found  # it has ended
    return found + [grandchild for child in found for grandchild in below(child)]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def asks(http: httpx.Client, row: list[float]) -> httpx.Response:
    return http.post("/predict", json={"model": ENDLESS, "features": row})


def never_ends(http: httpx.Client, number: int) -> tuple[int, float]:
    """The status that an endless run is answered with, and after how long."""
    began = time.monotonic()
    answer = asks(http, [1e18, float(number), 0.0, 0.0])
    return answer.status_code, time.monotonic() - began


def _live(scene: Scene, releases: list[ModelReleased]) -> bool:
    time.sleep(0.2)  # the answer names a hundred models
    states = scene.states()
    return all(states.get(release.model) == "live" for release in releases)
