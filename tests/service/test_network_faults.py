"""An edge node behind a sick network: its Kafka hears nothing, loses everything or is a second away; its clients hardly
read or write. It answers every request at its usual pace, and what was said meanwhile it obeys as soon as it can.

The node is whole, and so are Kafka, S3 and Valkey; between the node and Kafka stands a proxy. Every measure is against
the same node in the same run, before the fault.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mlcdn.identities import ensure_identities
from mlcdn.local_stack.running import RunningStack
from processes.ports import LOOPBACK
from schemas.errors import Unreachable
from schemas.topics import REQUESTS
from streams.log.reader import KafkaReader
from tests import models
from tests.edge_node_process import EdgeNode, Operator, node_settings, rss_bytes, until
from tests.open_loop import OpenLoop, Pace
from tests.tcp_faults import TcpFaults
from tests.worker_process import WorkerProcess

OUTAGE_S = 5.0
USUAL_S = 2.5
RATE = 100.0
CAUGHT_UP_S = 5.0
GROWTH_BYTES = 32 * 2**20
START_S = 30.0
PATIENCE_S = 3.0
PACE = 1.1
ONE_WAY_S = 1.0
MODEL, OTHER = "networked", "neighbour"


@dataclass(slots=True)
class Scene:
    """A node that serves two models and has Kafka behind a proxy."""

    kafka: TcpFaults
    operator: Operator
    node: EdgeNode
    digests: dict[str, str]
    seed: int = 5_000

    def fresh(self) -> bytes:
        self.seed += 1
        return models.mlp_bytes(self.seed)

    def up(self) -> bool:
        return all(self.node.serves(model, digest) for model, digest in self.digests.items())

    def well(self) -> bool:
        return self.up() and set(self.node.standing().values()) == {"ok"}

    def load(self) -> OpenLoop:
        return OpenLoop(self.node.port, self.digests, rate=RATE)

    def usual(self) -> Pace:
        """Without a fault."""
        with self.load() as usual:
            time.sleep(USUAL_S)
        assert not usual.wrong
        return Pace.of(usual)

    def told(self) -> tuple[int, int]:
        return self.operator.rows(self.node.name)

    def obeyed(self) -> int:
        """Up to which invalidation the node's answers are true."""
        return int(self.node.predict(OTHER, 1).headers["mlcdn-position"].partition("/")[2])


@pytest.fixture(scope="module")
def kafka(stack: RunningStack) -> Iterator[TcpFaults]:
    """Kafka's address for who is to have a sick network."""
    port = int(stack.addresses.kafka.rpartition(":")[2])
    with TcpFaults(port) as faults:
        # The broker says in its answers where it is to be found.
        faults.instead = (told_at(port), told_at(faults.port))
        yield faults


def told_at(port: int) -> bytes:
    """An address as Kafka's protocol has it: the end of a string, then a number of four bytes."""
    return LOOPBACK.encode() + port.to_bytes(4)


@pytest.fixture(scope="module")
def built(stack: RunningStack, kafka: TcpFaults, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("network")
    identities = asyncio.run(ensure_identities(directory / "keys", stack.addresses.kafka, lambda _: None))
    through = replace(stack.addresses, kafka=f"{LOOPBACK}:{kafka.port}")
    patience = {f"MLCDN_{name}_TIMEOUT_S": f"{PATIENCE_S:g}" for name in ("HEADER", "BODY", "WRITE")}
    node = EdgeNode(node_settings(through, identities, directory / "node", "network-1") | patience)
    scene = Scene(kafka, Operator(stack.addresses, identities, directory), node, {})
    for model in (MODEL, OTHER):
        scene.digests[model] = scene.operator.release(model, scene.fresh())
    node.start()
    try:
        yield scene
    finally:
        node.end()


@pytest.fixture
def scene(built: Scene) -> Iterator[Scene]:
    built.kafka.heal()
    until(built.well, START_S)
    yield built
    built.kafka.heal()


@pytest.mark.parametrize("fault", ["held", "lost", "far"])
def test_kafka_hears_nothing_loses_everything_or_is_far(scene: Scene, fault: str) -> None:
    """`held`: what is sent arrives after the outage. `lost`: it never does. `far`: it takes a second, and so the answer."""
    node, operator, kafka = scene.node, scene.operator, scene.kafka
    usual = scene.usual()
    told, dropped = until(lambda: _settled(scene), CAUGHT_UP_S)
    release = operator.prepare(MODEL, scene.fresh())
    found = until(node.pids, 5)
    pids = [found["agent"], *found["workers"]]
    before = [rss_bytes(pid) for pid in pids]
    connections, carried = kafka.connections, kafka.carried
    with scene.load() as load:
        if fault == "far":
            kafka.latency_s = ONE_WAY_S
        else:
            setattr(kafka, fault, True)
        time.sleep(OUTAGE_S)
        grown = [rss_bytes(pid) - size for pid, size in zip(pids, before, strict=True)]
        noticed = node.standing()["kafka"]
        passed = kafka.carried - carried
        kafka.heal()
        returned = time.monotonic()
    # Every request stands in the log, once, or is counted as dropped.
    until(lambda: sum(scene.told()) == told + dropped + load.sent, CAUGHT_UP_S)
    position = operator.invalidate(OTHER)
    operator.append(release)
    scene.digests[MODEL] = release.artifact.sha256
    until(lambda: scene.obeyed() >= position, CAUGHT_UP_S)
    until(scene.up, CAUGHT_UP_S)
    took = time.monotonic() - returned
    assert connections > 2, "the node went past the proxy"
    assert not load.wrong
    assert load.answered == load.sent > OUTAGE_S * RATE * 0.9
    assert Pace.of(load).keeps(usual, PACE)
    assert max(grown) < GROWTH_BYTES
    assert (passed > 0) == (fault == "far")
    assert fault == "far" or noticed == "degraded"
    assert took < CAUGHT_UP_S
    assert node.pids() == found
    assert "ends below what was handled" not in node.log()
    print(  # noqa: T201
        f"{fault}: {load.answered} answered, p99 {usual} → {Pace.of(load)}, "
        f"grown {max(grown) / 2**20:.1f} MiB, caught up {took:.2f} s"
    )


def _settled(scene: Scene) -> tuple[int, int] | None:
    """What the log was told, once that does not change any more."""
    before = scene.told()
    time.sleep(0.5)
    return before if scene.told() == before else None


@pytest.mark.parametrize("fault", ["held", "lost"])
def test_an_end_of_the_log_that_was_not_told_is_none(kafka: TcpFaults, fault: str) -> None:
    """Otherwise a node that starts meanwhile would say that it has caught up, with nothing read."""
    reader = KafkaReader(f"{LOOPBACK}:{kafka.port}", timeout_s=0.5)
    assert reader.watermarks(REQUESTS.name, 0) >= (0, 0)
    setattr(kafka, fault, True)
    try:
        with pytest.raises(Unreachable):
            reader.watermarks(REQUESTS.name, 0)
    finally:
        kafka.heal()
    until(lambda: _answers(reader), CAUGHT_UP_S)


def test_rows_that_found_no_room_are_counted_one_by_one(scene: Scene, kafka: TcpFaults, tmp_path: Path) -> None:
    """A worker whose queue of unsent messages is full within the outage: here 20, where 10,000 take a quarter of an hour."""
    few = "from streams.log.producer import KafkaAppender as A; A.__init__.__kwdefaults__['queue_messages'] = 20"
    with WorkerProcess(
        tmp_path / "node", before=few, kafka=f"{LOOPBACK}:{kafka.port}", node="dropping-1", flush_s=0.05
    ) as worker:

        def told() -> tuple[int, int]:
            return scene.operator.rows("dropping-1")

        with OpenLoop(worker.port, {"digits": models.sha256(models.mlp_bytes(1))}, rate=RATE) as load:
            time.sleep(1)
            kafka.lost = True
            time.sleep(3)
            kafka.heal()
            # What was dropped is said by the next batch that finds room.
            until(lambda: told()[1] > 0, CAUGHT_UP_S)
        assert load.answered == load.sent
        until(lambda: sum(told()) == load.sent, CAUGHT_UP_S)
        time.sleep(0.3)
        rows, dropped = told()
        assert rows + dropped == load.sent and dropped > RATE


def test_clients_that_hardly_write_or_never_read_slow_nobody_down(scene: Scene) -> None:
    node = scene.node
    usual, worker = scene.usual(), node.worker()
    before = rss_bytes(worker)
    slow_cut, deaf_cut = _cut(node, "head_slow"), _cut(node, "unread", "pipelined")
    with ExitStack() as clients, scene.load() as load:
        slow = [clients.enter_context(_connected(node.port)) for _ in range(40)]
        deaf = [clients.enter_context(_connected(node.port)) for _ in range(10)]
        grown = 0
        # A byte a second from each of the slow ones; a request a turn from each of those that take no answer.
        for byte in b"POST /predict HTTP/1.1":
            for client in slow:
                _send(client, bytes([byte]))
            for _ in range(10):
                for client in deaf:
                    _send(client, b"GET /openapi.json HTTP/1.1\r\nHost: edge\r\n\r\n" * 5)
                time.sleep(0.1)
            grown = max(grown, rss_bytes(worker) - before)
            all_slow = _cut(node, "head_slow") >= slow_cut + len(slow)
            if all_slow and _cut(node, "unread", "pipelined") >= deaf_cut + len(deaf):
                break
        else:
            raise AssertionError("the node cuts none of them, or not all")
    assert not load.wrong
    assert load.answered == load.sent > RATE
    assert Pace.of(load).keeps(usual, 2)
    assert grown < GROWTH_BYTES
    assert node.worker() == worker
    print(f"slow clients: {load.answered} answered, p99 {usual} → {Pace.of(load)}")  # noqa: T201


def _answers(reader: KafkaReader) -> bool:
    try:
        return reader.watermarks(REQUESTS.name, 0) >= (0, 0)
    except Unreachable:
        return False


def _connected(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    made.connect((LOOPBACK, port))
    made.setblocking(False)
    return made


def _send(client: socket.socket, data: bytes) -> None:
    try:
        client.send(data)
    except (BlockingIOError, ConnectionError):
        return  # the sockets between are full, or it was cut: that is what the test waits for


def _cut(node: EdgeNode, *reasons: str) -> float:
    """How many connections the node counts as cut for these reasons."""
    answer = node.get("/metrics")
    lines = answer.text.splitlines() if answer is not None else []
    names = tuple(f'mlcdn_connections_cut_total{{reason="{reason}"}}' for reason in reasons)
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))
