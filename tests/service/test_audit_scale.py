"""The audit as commands over a real log of many events: the same bytes each time, no trace, and a kill in the middle."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient
from rich.console import Console

from bench.audit_log import write
from mlcdn.cli import app, output
from mlcdn.local_stack.running import running_stack
from schemas.topics import RELEASES, TOPICS
from streams.audit.verify import FRESH_MS
from streams.log.admin import TopicAdmin
from streams.log.reader import KafkaReader

EVENTS = 12_000
COMMANDS = (
    ("state", "--json"),
    ("state", "--at", "3", "--region", "tokyo"),
    ("story", "model-1"),
    ("story", "3/40", "--json"),
    ("verify", "--json"),
)


@dataclass
class Log:
    kafka: str
    roots: Path
    written: float

    def environment(self) -> dict[str, str]:
        return {"MLCDN_KAFKA": self.kafka, "MLCDN_ROOT_KEYS": str(self.roots)}

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "mlcdn", "audit", *command],
            env=os.environ | self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *command: str) -> bytes:
        said, complained = self.start(*command).communicate(timeout=100)
        assert not complained or command[0] == "export", complained.decode()
        return said

    def traces(self) -> tuple[object, ...]:
        """All that a reader could leave on a cluster: groups, topics, and records in them, offsets among those."""
        admin = AdminClient({"bootstrap.servers": self.kafka})
        groups = admin.list_consumer_groups(request_timeout=10).result()
        assert not groups.errors
        topics = {name: len(topic.partitions) for name, topic in admin.list_topics(timeout=10).topics.items()}
        reader = KafkaReader(self.kafka)
        ends = {(t, p): reader.watermarks(t, p) for t, n in sorted(topics.items()) for p in range(n)}
        return sorted(group.group_id for group in groups.valid), topics, ends


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    """A cluster of its own: the log of other tests' topics would grow beneath it."""
    directory = tmp_path_factory.mktemp("audited")
    with running_stack(directory / "stack", ()) as stack:
        kafka = stack.addresses.kafka
        TopicAdmin(kafka).apply()
        roots = write(kafka, EVENTS, directory / "keys")
        producer = Producer({"bootstrap.servers": kafka})
        producer.produce(RELEASES.name, b"garbage", b"model-1")
        assert producer.flush(10) == 0
        yield Log(kafka, roots, time.time())


@pytest.fixture(scope="module")
def exported(log: Log) -> bytes:
    return log.run("export")


def test_every_replay_gives_the_same_bytes_and_leaves_no_trace(
    log: Log, exported: bytes, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    before = log.traces()
    for name, value in log.environment().items():
        monkeypatch.setenv(name, value)
    # Other processes: another seed for hashes, another time.
    # `verify` speaks of now, and a last beat is fresh for 10 s.
    time.sleep(max(0.0, log.written + FRESH_MS / 1_000 + 1 - time.time()))
    with ThreadPoolExecutor() as elsewhere:
        there = {command: elsewhere.submit(log.run, *command) for command in COMMANDS}
        for command in (*COMMANDS, ("export",)):
            assert app.run(["audit", *command]) == 0
            here = capfdbinary.readouterr().out
            said = there[command].result() if command in there else exported
            assert here and said == here, command
    assert log.traces() == before


def test_an_export_has_the_whole_log(log: Log, exported: bytes) -> None:
    lines = [json.loads(one) for one in exported.splitlines()]
    assert len(lines) == EVENTS + 3
    places = [(said["timestamp_ms"], said["topic"], said["partition"], said["position"]) for said in lines]
    assert places == sorted(places)
    reader = KafkaReader(log.kafka)
    for topic in TOPICS.values():
        ends = [reader.watermarks(topic.name, p)[1] for p in range(topic.partitions)]
        assert len([said for said in lines if said["topic"] == topic.name]) == sum(ends)
    assert [said["refused"]["reason"] for said in lines if "refused" in said] == ["unsigned"]


def test_an_export_that_is_killed_goes_on_to_the_same_bytes(log: Log, exported: bytes, tmp_path: Path) -> None:
    out = tmp_path / "log.jsonl"
    first = log.start("export", "--out", str(out))
    give_up = time.monotonic() + 60
    while not out.exists() or out.stat().st_size < 1_000_000:
        assert first.poll() is None and time.monotonic() < give_up
        time.sleep(0.005)
    # Its lock is held while it writes: a second one would write the same lines between its own.
    first.send_signal(signal.SIGSTOP)
    second = log.start("export", "--resume", "--out", str(out))
    complaint = second.communicate(timeout=60)[1]
    first.kill()
    first.communicate()
    assert second.returncode == 1 and b"another process writes" in complaint
    assert 0 < out.stat().st_size < len(exported)
    left = len(exported) - out.stat().st_size
    assert log.run("export", "--out", str(out)) == b"", "without --resume what is there stays"
    assert len(exported) - out.stat().st_size == left
    log.run("export", "--resume", "--out", str(out))
    assert out.read_bytes() == exported
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(("command", "shown"), [(("state",), True), (("state", "--json"), False)])
def test_a_bar_is_shown_on_a_terminal_and_only_to_people(
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    shown: bool,
) -> None:
    for name, value in log.environment().items():
        monkeypatch.setenv(name, value)
    drawn = io.StringIO()
    monkeypatch.setattr(output, "err", Console(file=drawn, force_terminal=True, width=100))
    monkeypatch.setattr(output, "BAR_AFTER_S", 0)
    assert app.run(["audit", *command]) == 0
    assert ("records" in drawn.getvalue()) == shown
    assert "records" not in capfd.readouterr().out
