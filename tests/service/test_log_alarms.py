"""A node whose log is frozen, truncated, rewritten or made again: it says so, and serves what it served.

Its control path over the log in memory, its board on a real disk; what is broken is the log. And once the whole node, as
processes over a real log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client import REGISTRY

from edge_node.agent.control import TOPICS, Control
from edge_node.agent.reconcile import Desired
from edge_node.board import INCARNATION, PURGE, BoardFile, BoardModel, BoardReader, BoardWriter, position_of
from edge_node.board.log_memory import LogMemory, LogMemoryFile
from mlcdn.identities import ensure_identities
from mlcdn.local_stack.running import RunningStack
from processes.ports import free_port
from schemas import codec, signing
from schemas.errors import EventRefused, Refusal
from schemas.events import CacheInvalidated, TrustChanged
from schemas.names import Scope, ScopeKind
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds import trust
from streams.folds.checkpoints import Held
from streams.log.record import Record
from tests.core.test_chain import Scene
from tests.core.test_folds_control import DIGESTS, release
from tests.service.test_agent import Node, Publisher, until

LIFE_MS = 60_000


class Edge:
    """An agent's control on a board that serves the first release; `scene.log` is the log it reads."""

    def __init__(self, directory: Path) -> None:
        self.scene = Scene()
        self.memory = LogMemoryFile(directory)
        self.board = BoardWriter(directory)
        self.board.fence.raise_to(INCARNATION, 1)
        self.workers = BoardReader(directory)
        self.told: list[Desired | None] = []
        self.control = self.begin()

    def begin(self) -> Control:
        """Another life of the agent."""
        self._fed = dict.fromkeys(TOPICS, 0)
        self.told.clear()
        self.control = Control(
            self.board,
            "n",
            self.scene.roots,
            lambda event, causation_id=None: None,
            fleet=lambda: {"node": "n", "region": "r", "worker": -1, "incarnation": self.board.fence[INCARNATION]},
            topic_ids=lambda: {topic: self.scene.log.topic_id(topic) for topic in TOPICS},
            now_ms=lambda: self.scene.now_ms,
            on_desired=lambda desired, positions: self.told.append(desired),
            memory=self.memory.read(),
        )
        return self.control

    def read(self) -> list[Refusal]:
        """What the log has more, and what of it was refused."""
        refused = []
        for topic in TOPICS:
            for record in self.scene.log.read(topic, 0, self._fed[topic]):
                self._fed[topic] = record.offset + 1
                try:
                    self.control.on_record(record)
                except EventRefused as error:
                    refused.append(error.refusal)
        if not self.control.caught_up and not self.control.doubted:
            self.control.on_caught_up()
        self.look()
        return refused

    def look(self) -> None:
        self.control.look()
        memory = self.control.to_remember()
        if memory is not None:
            self.memory.write(memory)

    def boot(self) -> list[Refusal]:
        """Lives until one has caught up, as a parent would begin them."""
        refused: list[Refusal] = []
        for _ in range(2):
            self.begin()
            refused = self.read()
            if self.control.caught_up:
                return refused
        raise AssertionError("the second life doubts too")

    def recreated(self, topic: str) -> None:
        self._fed[topic] = 0
        self.control.on_recreated(topic)

    def release(self, sequence: int) -> Record:
        digest = DIGESTS[(sequence - 1) % len(DIGESTS)]
        return self.scene.say(release("digits", sequence, digest), self.scene.operator, RELEASES.name)

    def purge(self, tag: str = "t") -> Record:
        event = CacheInvalidated(scopes=(Scope(ScopeKind.TAG, tag),), author="op")
        return self.scene.say(event, self.scene.operator)

    def serve(self) -> None:
        """What an installer would do with what it was told last."""
        file, desired = self.file, self.told[-1]
        assert desired is not None
        models = {name: BoardModel(wanted=s.wanted, slot=8) for name, s in desired.seats.items()}
        self.board.publish(msgspec.structs.replace(file, desired=desired.seats, models=models))

    @property
    def file(self) -> BoardFile:
        assert self.board.file is not None
        return self.board.file

    @property
    def served(self) -> dict[str, int]:
        """The sequence of each model, as a worker sees it."""
        file = self.workers.load()
        assert file is not None
        return {name: model.wanted.sequence for name, model in file.models.items()}

    @property
    def wanted(self) -> int | None:
        """The sequence that the installer is to bring about; None where it is to do nothing."""
        desired = self.told[-1]
        return desired.seats["digits"].wanted.sequence if desired is not None else None

    @property
    def alarms(self) -> set[tuple[str, str]]:
        said = {(topic, reason) for topic, by in self.memory.read().alarms.items() for reason in by}
        metric = {
            (topic, reason)
            for topic in TOPICS
            for reason in ("frozen", "truncated", "rewritten")
            if REGISTRY.get_sample_value("mlcdn_log_alarm", {"topic": topic, "reason": reason})
        }
        assert said == metric
        return said

    def revoke(self) -> None:
        for topic in TOPICS:
            event = TrustChanged(grants=(), revoked=(self.scene.public(self.scene.key),), author="root")
            self.scene.say(event, self.scene.root, topic)


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    """It serves the second release, and remembers a checkpoint of each topic."""
    edge = Edge(tmp_path)
    edge.release(1)
    edge.purge()
    edge.release(2)
    for topic in TOPICS:
        edge.scene.checkpoint(topic=topic, expires_at_ms=edge.scene.now_ms + LIFE_MS)
    assert edge.read() == []
    edge.serve()
    assert (edge.wanted, edge.served, edge.alarms) == (2, {"digits": 2}, set())
    yield edge
    edge.workers.close()
    edge.board.close()


def test_a_frozen_log_is_said_and_obeyed(edge: Edge) -> None:
    edge.scene.now_ms += LIFE_MS + 10_000
    edge.look()
    assert edge.alarms == {(topic, "frozen") for topic in TOPICS}
    edge.release(3)
    edge.read()
    assert edge.wanted == 3
    for topic in TOPICS:
        edge.scene.checkpoint(topic=topic)
    edge.read()
    assert edge.alarms == set()


def test_a_truncated_log_takes_nothing_back_until_a_root_answers_for_it(edge: Edge) -> None:
    edge.scene.log = edge.scene.copy(topic=RELEASES.name, end=2)  # the second release is gone, the checkpoint with it
    edge.boot()
    assert edge.alarms == {(RELEASES.name, "truncated")}
    assert (edge.wanted, edge.served) == (None, {"digits": 2})
    for _ in range(2):  # nor does the next life forget, nor a checkpoint of a job that remembers nothing help
        edge.scene.checkpoint(topic=RELEASES.name)
        edge.boot()
        assert (edge.wanted, edge.served) == (None, {"digits": 2})
        assert {topic for topic, _ in edge.alarms} == {RELEASES.name}
    edge.revoke()
    edge.read()
    assert (edge.wanted, edge.alarms) == (1, set())
    edge.boot()
    assert (edge.wanted, edge.alarms) == (1, set())


def test_a_rewritten_log_brings_nothing_until_a_root_answers_for_it(edge: Edge) -> None:
    # The very same release, with another time of the broker: somebody wrote the log anew.
    edge.scene.log = edge.scene.copy()
    records = edge.scene.log._records[(RELEASES.name, 0)]
    records[2] = msgspec.structs.replace(records[2], timestamp_ms=records[2].timestamp_ms + 1)
    edge.release(3)
    edge.boot()
    assert edge.alarms == {(RELEASES.name, "rewritten")}
    assert (edge.wanted, edge.served) == (None, {"digits": 2})
    edge.revoke()
    edge.read()
    assert (edge.wanted, edge.alarms) == (3, set())


def test_a_log_that_disputes_itself_brings_nothing_further_and_purges_act(edge: Edge) -> None:
    edge.scene.checkpoint(topic=RELEASES.name, chain_sha256="0" * 64)
    edge.release(3)
    purge = edge.purge()
    edge.read()
    assert edge.alarms == {(RELEASES.name, "rewritten")}
    assert (edge.wanted, edge.served) == (2, {"digits": 2})
    assert position_of(edge.board.fence[PURGE]) == purge.offset
    assert edge.control.positions[RELEASES.name] == 3  # what it says of itself is what it obeys
    edge.boot()
    assert edge.wanted == 2  # every node comes to the same, a new one too
    edge.revoke()
    edge.read()
    assert (edge.wanted, edge.alarms) == (3, set())


def test_a_topic_made_again_is_held_until_it_is_accepted(edge: Edge) -> None:
    edge.scene.log.recreate(RELEASES.name)
    edge.recreated(RELEASES.name)
    edge.scene.say(edge.scene.trust(), edge.scene.root, RELEASES.name)
    edge.read()
    assert edge.alarms == {(RELEASES.name, "truncated")}
    assert (edge.wanted, edge.served) == (None, {"digits": 2})
    edge.boot()
    assert (edge.wanted, edge.served) == (None, {"digits": 2})
    (edge.workers._folder / "log.json").unlink()  # an operator accepts it, on this node alone
    edge.release(1)
    edge.boot()
    assert (edge.wanted, edge.alarms) == (1, set())


def test_positions_that_are_used_again_purge_again(edge: Edge) -> None:
    for _ in range(3):
        edge.purge()
    edge.read()
    before = edge.file
    high = before.log.namespace, edge.board.fence[PURGE]
    edge.scene.log = edge.scene.copy(end=4)  # as after a power cut: what no checkpoint had vouched for is gone
    again = edge.purge("other")
    assert again.offset < position_of(high[1])
    edge.boot()
    assert edge.alarms == set()
    assert edge.file.log.namespace != high[0]  # nothing cached before counts
    assert edge.board.fence[PURGE] > high[1]
    assert position_of(edge.board.fence[PURGE]) == again.offset
    assert edge.served == {"digits": 2}
    kept = edge.file
    edge.boot()
    assert edge.file.log == kept.log  # it is that log from now on
    (edge.workers._folder / "log.json").unlink()
    edge.boot()
    assert edge.file.log == kept.log
    (edge.workers._folder / "log.json").unlink()
    edge.scene.log = edge.scene.copy(end=4)
    once_more = edge.purge("third")
    edge.boot()
    assert edge.file.log != kept.log
    assert position_of(edge.board.fence[PURGE]) == once_more.offset


def test_a_running_node_that_is_cut_short_purges_again_too(edge: Edge) -> None:
    for _ in range(3):
        edge.purge()
    edge.read()
    before = edge.file.log.namespace
    edge.scene.log = edge.scene.copy(end=4)
    edge.recreated(INVALIDATIONS.name)
    again = edge.purge("other")
    edge.read()
    assert edge.file.log.namespace != before
    assert position_of(edge.board.fence[PURGE]) == again.offset
    assert edge.wanted == 2


# -- what was checked before


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The topic of each signature check."""
    asked: list[str] = []
    verify = signing.verify

    def counted(public_key: bytes, topic: str, *rest: object) -> None:
        asked.append(topic)
        verify(public_key, topic, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(trust.signing, "verify", counted)
    return asked


def test_a_boot_checks_what_is_new_and_every_root(edge: Edge, checks: list[str]) -> None:
    good = edge.purge()
    edge.scene.log.append_raw(good.topic, good.key, (good.value or b"")[:-1] + b"!", good.headers)
    for _ in range(50):
        edge.purge()
    edge.scene.checkpoint()
    assert edge.read() == [Refusal.BAD_SIGNATURE]
    checks.clear()
    edge.purge()
    edge.boot()
    assert checks == [RELEASES.name, INVALIDATIONS.name, INVALIDATIONS.name]  # a root in each, and the new purge
    assert edge.wanted == 2
    # What was bad is bad without being checked: the fold comes to the same state.
    assert edge.control._invalidations.position == position_of(edge.board.fence[PURGE])
    assert edge.memory.read().topics[INVALIDATIONS.name].bad_signatures == (good.offset + 1,)


def test_a_forged_release_is_not_believed_on_a_checkpoints_word(edge: Edge, checks: list[str]) -> None:
    """A stolen checkpoint key, and the broker in the same hands."""
    log = edge.scene.log
    [true] = [r for r in log.read(RELEASES.name, 0) if r.offset == 2]
    event = release("digits", 3, DIGESTS[2])
    message = codec.encode(event, topic=RELEASES.name, id="x", source="/operators/x", now_ms=1)
    signature = [h for h in true.headers if h[0] in (signing.KEYID_HEADER, signing.SIGNATURE_HEADER)]
    log.append_raw(RELEASES.name, message.key, message.value, [*message.headers, *signature])
    edge.scene.checkpoint(topic=RELEASES.name, bad_signatures=())
    assert edge.read() == [Refusal.BAD_SIGNATURE]
    assert edge.wanted == 2
    edge.boot()
    assert edge.wanted == 2
    # In the place of a record that was checked, it makes another log: nothing read of it acts, and all is checked.
    edge.scene.log = edge.scene.copy()
    records = edge.scene.log._records[(RELEASES.name, 0)]
    records[2] = msgspec.structs.replace(records[4], offset=2)
    edge.begin()
    edge.read()
    assert edge.control.doubted
    assert not edge.told
    assert edge.served == {"digits": 2}
    checks.clear()
    assert Refusal.BAD_SIGNATURE in edge.boot()
    assert checks.count(RELEASES.name) > 3
    assert (edge.wanted, edge.served) == (None, {"digits": 2})
    assert edge.alarms == {(RELEASES.name, "rewritten")}


def test_a_memory_that_cannot_be_read_is_none(edge: Edge, checks: list[str]) -> None:
    (edge.workers._folder / "log.json").write_bytes(b'{"format": 7}')
    assert edge.memory.read() == LogMemory()
    edge.boot()
    assert checks.count(RELEASES.name) == 4
    assert edge.wanted == 2


# -- a whole node


def test_a_node_that_doubts_reads_again_and_says_what_is_wrong(stack: RunningStack, tmp_path: Path) -> None:
    identities = asyncio.run(ensure_identities(tmp_path / "keys", stack.addresses.kafka, lambda _: None))
    publisher = Publisher(stack.addresses, identities, tmp_path)
    port = free_port()
    settings = publisher.settings(tmp_path / "n", "alarms-1") | {"MLCDN_PORT": str(port)}
    parent = Node(settings, module="edge_node.main")
    remembered = LogMemoryFile(tmp_path / "n")
    parent.start()
    try:
        until(lambda: remembered.read().topics or None, 30)
        parent.kill()
        topics = remembered.read().topics
        # What an earlier life checked is not what stands there, and a checkpoint held further on than the log goes.
        held = Held(position=10**6, chain_sha256="0" * 64, expires_at_ms=2**52, signer="0" * 32)
        changed = {
            RELEASES.name: msgspec.structs.replace(topics[RELEASES.name], vouched=held),
            INVALIDATIONS.name: msgspec.structs.replace(topics[INVALIDATIONS.name], chain_sha256="0" * 64),
        }
        remembered.write(LogMemory(topics=changed))
        parent.start()
        until(lambda: remembered.read().alarms or None, 30)
        assert parent.log().count("not_the_log_that_was_checked") == 1
        assert remembered.read().topics[INVALIDATIONS.name].life
        assert remembered.read().topics[RELEASES.name].vouched == held

        def says() -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{port}/health", timeout=1, trust_env=False).json()
            except httpx.HTTPError:
                return None
            return found if found["dependencies"].get("log") else None

        health = until(says)
        assert health["degraded"].count("log") == 1
        assert health["log_alarms"][RELEASES.name].keys() == {"truncated"}
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert f'mlcdn_log_alarm{{reason="truncated",topic="{RELEASES.name}"}} 1.0' in metrics
    finally:
        parent.kill()  # its children die with it
        parent.reader.close()
