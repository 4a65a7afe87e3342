"""Ends and restarts: what is in flight is answered, nothing new is taken, and clients of a node whose workers are replaced
or killed see no failure beyond what was on a killed worker's connections."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import pytest

from edge_node import rolling
from mlcdn.identities import ensure_identities
from mlcdn.local_stack.running import RunningStack
from processes.http_limits import KEPT_DESCRIPTORS, affordable
from processes.supervisor import Child, Supervisor
from tests import models
from tests.edge_node_process import EdgeNode, Operator, node_settings, question, until
from tests.service.test_worker import ROW
from tests.worker_process import WorkerProcess

MODEL = "restarted"
BODY = json.dumps({"features": ROW}).encode()
HEAD = b"POST /predict HTTP/1.1\r\nHost: edge\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(
    BODY
)
START_S = 30.0
ROLLED_S = 45.0
# Without a Kafka to say good-bye to, a worker tries for some seconds.
EXIT_S = 20.0


def answer_on(client: socket.socket) -> bytes:
    got = b""
    while b"\r\n\r\n" not in got:
        part = client.recv(65536)
        if not part:
            return got
        got += part
    found = re.search(rb"content-length: (\d+)", got)
    assert found
    while len(got) < got.index(b"\r\n\r\n") + 4 + int(found[1]):
        got += client.recv(65536)
    return got


# -- one worker


def test_what_is_in_flight_at_sigterm_is_answered_and_nothing_new_is_taken(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path / "node", drain_s=5) as worker:
        with worker.connect() as half_body, worker.connect() as half_head, worker.connect() as idle:
            half_body.sendall(HEAD + BODY[:10])
            half_head.sendall(HEAD[:20])
            idle.sendall(HEAD + BODY)
            assert b"connection: close" not in answer_on(idle)
            worker.stop()
            time.sleep(0.1)
            # Not ready from the first moment, and every answer says that it was the last.
            with worker.connect() as asking:
                asking.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: edge\r\n\r\n")
                answer = answer_on(asking)
                assert answer.startswith(b"HTTP/1.1 503 ") and b"connection: close" in answer
            idle.sendall(HEAD + BODY)
            assert b"connection: close" in answer_on(idle)
            time.sleep(0.6)
            # The port is shared: it stays open for a sibling, and this worker takes nothing from it.
            with worker.connect() as late:
                late.sendall(HEAD + BODY)
                late.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    late.recv(1)
            half_body.sendall(BODY[10:])
            half_head.sendall(HEAD[20:] + BODY)
            for client in (half_body, half_head):
                answer = answer_on(client)
                assert answer.startswith(b"HTTP/1.1 200 ") and b"connection: close" in answer
                assert client.recv(1) == b""
        assert worker.process.wait(EXIT_S) == 0
        assert "Traceback" not in worker.log(), worker.log()


def cut_at(client: socket.socket) -> float:
    """When the connection ended without an answer."""
    try:
        assert client.recv(1) == b""
    except ConnectionResetError:
        pass
    return time.monotonic()


def test_a_drain_ends_at_its_deadline_or_at_a_second_sigterm(tmp_path: Path) -> None:
    with WorkerProcess(tmp_path / "node", drain_s=3) as worker, worker.connect() as stuck:
        stuck.sendall(HEAD + BODY[:10])
        began = time.monotonic()
        worker.stop()
        assert 2.5 < cut_at(stuck) - began < 5
        assert worker.process.wait(EXIT_S) == 0
    with WorkerProcess(tmp_path / "other", drain_s=30) as worker, worker.connect() as stuck:
        stuck.sendall(HEAD + BODY[:10])
        worker.stop()
        time.sleep(0.8)
        assert worker.lives()
        began = time.monotonic()
        worker.stop()
        assert cut_at(stuck) - began < 1
        assert worker.process.wait(EXIT_S) == 0


def test_a_worker_of_64_descriptors_serves_what_it_can_says_so_and_recovers(tmp_path: Path) -> None:
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    with WorkerProcess(tmp_path / "node", before=few) as worker:
        assert '"few_file_descriptors"' in worker.log()
        clients = [worker.connect() for _ in range(100)]
        served = refused = 0
        for client in clients:
            try:
                client.sendall(HEAD + BODY)
                answer = answer_on(client)
            except ConnectionError:
                answer = b""
            served += answer.startswith(b"HTTP/1.1 200 ")
            refused += not answer or answer.startswith(b"HTTP/1.1 503 ")
        assert served >= 8 and served + refused == 100
        # Those that were let in go on.
        clients[0].sendall(HEAD + BODY)
        assert answer_on(clients[0]).startswith(b"HTTP/1.1 200 ")
        for client in clients:
            client.close()
        assert until(lambda: worker.predict().status_code == 200, 5)
        assert worker.cut()["connections"] >= 1
        assert "Traceback" not in worker.log(), worker.log()


def test_connections_are_what_descriptors_allow() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd")) + KEPT_DESCRIPTORS
    try:
        assert affordable(10, 10) == (10, 10)
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
        connections, lingering = affordable(100, 10)
        assert (connections, lingering) == (100, 10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= used + 109
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- rolling


@pytest.mark.parametrize("ends", ["comes-back", "never-accepts", "is-stopped"])
def test_a_restart_goes_on_only_behind_a_worker_that_accepts(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "ACCEPTS_S", 0.5)
    names = ["worker-0", "worker-1"]

    async def scenario() -> None:
        async with Supervisor() as supervisor:
            await supervisor.start(Child(name=name, argv=("sleep", "60")) for name in names)
            before = supervisor.pids()
            async with rolling.restarting_on_hangup(supervisor, names, lambda *_: ends == "comes-back"):
                os.kill(os.getpid(), signal.SIGHUP)
                await asyncio.sleep(0.1 if ends == "is-stopped" else 1.5)
            after = supervisor.pids()
            assert set(after) == set(names)
            assert after["worker-0"] != before["worker-0"]
            assert (after["worker-1"] != before["worker-1"]) == (ends == "comes-back")
            # A hangup while the node stops is not the end of it.
            os.kill(os.getpid(), signal.SIGHUP)

    hangup = signal.getsignal(signal.SIGHUP)
    try:
        asyncio.run(asyncio.wait_for(scenario(), 20))
    finally:
        signal.signal(signal.SIGHUP, hangup)


# -- a node of two workers


class OpenLoop:
    """`clients` connections, each asking `rate` times a second whatever became of the last answer; kept alive, closed when
    told to, and nothing is asked twice. A request late by the server's doing is late, never skipped."""

    def __init__(self, port: int, clients: int, rate: float) -> None:
        self._port, self._pause_s = port, 1 / rate
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), name=f"client-{n}") for n in range(clients)]
        self._lock = threading.Lock()
        self.failed: list[str] = []
        self.answered = self.connected = 0
        self.slowest_s = 0.0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        connection: http.client.HTTPConnection | None = None
        due, asked = time.monotonic(), 0
        while not self._stop.is_set():
            due, asked = due + self._pause_s, asked + 1
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=15)
                with self._lock:
                    self.connected += 1
            try:
                body = json.dumps(question(MODEL, number * 1_000_000 + asked))
                connection.request("POST", "/predict", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                text = answer.read()
                failure = None if answer.status == 200 else f"{answer.status} {text[:100]!r}"
                closes = answer.getheader("connection", "").lower() == "close"
            except (OSError, http.client.HTTPException) as error:
                failure, closes = repr(error), True
            with self._lock:
                self.slowest_s = max(self.slowest_s, time.monotonic() - due + self._pause_s)
                if failure is None:
                    self.answered += 1
                else:
                    self.failed.append(failure)
            if closes:
                connection.close()
                connection = None
            self._stop.wait(max(0.0, due - time.monotonic()))
        if connection is not None:
            connection.close()


@pytest.fixture(scope="module")
def node(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeNode]:
    directory = tmp_path_factory.mktemp("restart")
    identities = asyncio.run(ensure_identities(directory / "keys", stack.addresses.kafka, lambda _: None))
    settings = node_settings(stack.addresses, identities, directory / "node", "restart-1")
    made = EdgeNode(settings | {"MLCDN_WORKERS": "2", "MLCDN_DRAIN_S": "5"})
    digest = Operator(stack.addresses, identities, directory).release(MODEL, models.mlp_bytes(77))
    made.start()
    try:
        until(lambda: made.serves(MODEL, digest) and len(workers(made)) == 2, START_S)
        yield made
    finally:
        made.end()


def workers(node: EdgeNode) -> list[int]:
    found = node.pids()
    return found["workers"] if found else []


def parent(node: EdgeNode) -> int:
    return int((node.directory / "node.lock").read_text())


def accepting(node: EdgeNode) -> bool:
    """Whether both workers say that they accept."""
    ready = {(node.directory / "ready" / str(number)).read_text() for number in range(2)}
    return ready == {str(pid) for pid in workers(node)} and len(ready) == 2


def test_a_rolling_restart_fails_no_request(node: EdgeNode) -> None:
    until(lambda: accepting(node), START_S)
    before = workers(node)
    with OpenLoop(node.port, clients=4, rate=25) as load:
        time.sleep(1)
        os.kill(parent(node), signal.SIGHUP)
        until(lambda: node.log().count('"rolling_restart_done"') == 1, ROLLED_S)
        time.sleep(1)
    assert load.failed == []
    assert load.answered > 100
    # Each client was told at least once to come back, and came.
    assert load.connected > 4
    assert not set(before) & set(workers(node))
    assert accepting(node)
    print(f"rolling restart: {load.answered} answered, 0 failed, slowest {load.slowest_s:.2f} s")  # noqa: T201


def test_a_killed_worker_costs_no_more_than_what_was_on_its_connections(node: EdgeNode) -> None:
    until(lambda: accepting(node), START_S)
    first, second = workers(node)
    with OpenLoop(node.port, clients=6, rate=20) as load:
        time.sleep(1)
        os.kill(first, signal.SIGKILL)
        # The sibling alone, as soon as the killed one's clients have connected again.
        time.sleep(0.5)
        after_kill = len(load.failed)
        until(lambda: len(workers(node)) == 2 and first not in workers(node) and accepting(node), START_S)
        time.sleep(1)
    assert second in workers(node)
    assert after_kill <= 6
    assert len(load.failed) == after_kill, load.failed
    print(f"killed worker: {load.answered} answered, {after_kill} of 6 clients lost one")  # noqa: T201


def test_a_hangup_after_a_hangup_restarts_once_more(node: EdgeNode) -> None:
    until(lambda: accepting(node), START_S)
    done = node.log().count('"rolling_restart_done"')
    for _ in range(10):
        os.kill(parent(node), signal.SIGHUP)
        time.sleep(0.02)
    until(lambda: node.log().count('"rolling_restart_done"') == done + 2, 2 * ROLLED_S)
    until(lambda: accepting(node), START_S)
    time.sleep(0.5)
    assert node.log().count('"rolling_restart"') == done + 2


def second_parent(node: EdgeNode, **other: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLCDN_")}
    return subprocess.run(
        [sys.executable, "-m", "edge_node.main"],
        env=environment | {"MLCDN_NODE": node.name} | other,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_second_node_on_the_same_directory_is_refused(node: EdgeNode) -> None:
    done = second_parent(node, MLCDN_DIR=str(node.directory))
    assert done.returncode == 2
    assert str(parent(node)) in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert node.predict(MODEL, 1).status_code == 200


def test_a_port_that_is_taken_is_named(node: EdgeNode, tmp_path: Path) -> None:
    done = second_parent(node, MLCDN_DIR=str(tmp_path / "other"), MLCDN_PORT=str(node.port))
    assert done.returncode == 2
    assert f"port {node.port} of 127.0.0.1 is in use" in done.stderr and "Traceback" not in done.stderr
    # What it had taken it gave back.
    free = second_parent(node, MLCDN_DIR=str(tmp_path / "other"), MLCDN_PORT=str(node.port))
    assert "is in use" in free.stderr
    assert node.predict(MODEL, 2).status_code == 200


def test_sigterm_twice_ends_a_node_at_once(node: EdgeNode) -> None:
    """The last of this module's: the node is gone after it."""
    with socket.create_connection(("127.0.0.1", node.port)) as stuck:
        stuck.sendall(HEAD + BODY[:10])
        time.sleep(0.2)
        os.kill(parent(node), signal.SIGTERM)
        time.sleep(1.2)
        assert node.runs
        os.kill(parent(node), signal.SIGTERM)
        until(lambda: not node.runs, 4)
    assert not (node.directory / "pids.json").exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(node.url, trust_env=False)
