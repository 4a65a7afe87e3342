"""Fetching an artifact of many chunks from the real object store, through a line that is slow, stands still or breaks, and
in a process that is killed: what arrived is kept, what does not hold is refused, and memory stays small."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlcdn.identities import ensure_identities
from mlcdn.local_stack.running import RunningStack
from schemas.errors import ModelRefused, Unreachable
from schemas.events import Artifact
from schemas.metrics import counter
from streams.artifacts import CHUNK_BYTES, ArtifactStore, FetchOptions, describe, fetch
from streams.parts.pace import Pace
from streams.parts.part_file import PartFile, holds_chunk, part_of, span
from tests import models
from tests.edge_node_process import EdgeNode, Load, Operator, node_settings
from tests.tcp_faults import TcpFaults

CHUNKS = 6
SIZE = CHUNKS * CHUNK_BYTES - 1_001
# Two cores shared with whatever else runs.
SLACK = 1.5


def store_at(stack: RunningStack, port: int | None = None, read_timeout_s: float = 1.0) -> ArtifactStore:
    a = stack.addresses
    endpoint = a.s3_endpoint if port is None else f"http://127.0.0.1:{port}"
    return ArtifactStore(
        endpoint, a.s3_bucket, a.s3_access_key, a.s3_secret_key, "us-east-1", read_timeout_s=read_timeout_s
    )


def port_of(stack: RunningStack) -> int:
    return int(stack.addresses.s3_endpoint.rpartition(":")[2])


@pytest.fixture(scope="module")
def whole() -> bytes:
    return random.Random(2).randbytes(SIZE)


@pytest.fixture(scope="module")
def artifact(stack: RunningStack, whole: bytes, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("whole") / "a"
    path.write_bytes(whole)
    made = describe(path, lambda digest: f"models/fetch/{digest}.onnx")
    store_at(stack).put(made, path)
    return made


@pytest.fixture
def line(stack: RunningStack) -> Iterator[TcpFaults]:
    with TcpFaults(port_of(stack)) as faults:
        yield faults


def received(source: str = "s3") -> float:
    return float(counter("mlcdn_fetch_bytes_total").labels(source)._value.get())


def until(what: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_chunks_come_side_by_side_and_each_once(
    stack: RunningStack, line: TcpFaults, artifact: Artifact, whole: bytes, tmp_path: Path
) -> None:
    line.bytes_s = 8 * CHUNK_BYTES
    most, before, told = 0, received(), []

    def look() -> None:
        nonlocal most
        most = max(most, line.connections)

    options = FetchOptions(deadline_s=60, chunks_at_once=3, going_on=look, on_bytes=told.append)
    store_at(stack, line.port).fetch(artifact, tmp_path / "got", options)
    assert (tmp_path / "got").read_bytes() == whole
    assert most == 3
    assert received() - before == SIZE == sum(told)
    assert [path.name for path in tmp_path.iterdir()] == ["got"]


def test_a_line_that_stands_still_is_left_and_taken_up_where_it_was(
    stack: RunningStack, line: TcpFaults, artifact: Artifact, whole: bytes, tmp_path: Path
) -> None:
    store, before = store_at(stack, line.port, read_timeout_s=0.3), received()
    line.bytes_s = CHUNK_BYTES

    def hold() -> None:
        if received() - before > CHUNK_BYTES:
            line.held = True

    began = time.monotonic()
    with pytest.raises(Unreachable):
        store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60, going_on=hold))
    assert time.monotonic() - began < 15
    assert not (tmp_path / "got").exists()
    line.reset()
    line.heal()
    store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60))
    assert (tmp_path / "got").read_bytes() == whole
    assert received() - before == SIZE, "no byte is asked for twice"


def test_a_line_that_breaks_again_and_again_costs_no_byte_twice(
    stack: RunningStack, line: TcpFaults, artifact: Artifact, whole: bytes, tmp_path: Path
) -> None:
    line.cut_after = 3 * 2**20
    before = received()
    store_at(stack, line.port).fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=90))
    assert (tmp_path / "got").read_bytes() == whole
    # What was in urllib3's hands when the line was cut is lost with it: less than a piece each time.
    assert SIZE <= received() - before < SIZE + CHUNK_BYTES
    assert line.carried < SIZE + CHUNKS * 3 * 2**20


def test_a_crawl_is_cut_and_asked_anew(
    stack: RunningStack,
    line: TcpFaults,
    artifact: Artifact,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "_SLOW_S", 0.5)
    monkeypatch.setattr(fetch, "_SLOW_BYTES_S", 2 * 2**20)
    line.bytes_s = 2**20
    healing = threading.Timer(2, lambda: setattr(line, "bytes_s", 0.0))
    healing.start()
    store, before = store_at(stack, line.port), received()
    asked: list[int] = []
    store._bucket._s3.meta.events.register("before-send.s3.GetObject", lambda **_: asked.append(1))
    store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60))
    healing.join()
    assert (tmp_path / "got").read_bytes() == whole
    assert len(asked) > CHUNKS
    assert received() - before < SIZE + CHUNK_BYTES


def test_a_deadline_ends_it_and_what_arrived_is_kept(
    stack: RunningStack, line: TcpFaults, artifact: Artifact, tmp_path: Path
) -> None:
    line.bytes_s = 2**20
    before = received()
    with pytest.raises(Unreachable, match="what arrived is kept"):
        store_at(stack, line.port).fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=1))
    part = part_of(tmp_path / "got")
    file = PartFile(part, artifact)
    assert sum(file.arrived(number) for number in range(CHUNKS)) == received() - before > 0
    file.close()


def test_a_pace_holds_for_all_of_it(stack: RunningStack, artifact: Artifact, tmp_path: Path) -> None:
    began = time.monotonic()
    options = FetchOptions(deadline_s=60, pace=Pace(SIZE // 2, time.monotonic))
    store_at(stack).fetch(artifact, tmp_path / "got", options)
    assert 1.7 < time.monotonic() - began < 5


def test_a_fetch_that_is_abandoned_ends_at_its_next_piece(
    stack: RunningStack, line: TcpFaults, artifact: Artifact, tmp_path: Path
) -> None:
    line.bytes_s = 2**20
    started = time.monotonic()

    def leave() -> None:
        if time.monotonic() > started + 0.5:
            raise KeyError("left")

    with pytest.raises(KeyError):
        store_at(stack, line.port).fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60, going_on=leave))
    assert time.monotonic() - started < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chunks-")]


def test_a_disk_without_room_is_said_before_a_byte_is_asked_for(
    stack: RunningStack, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = fetch.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=SIZE + fetch.ROOM_BYTES - 1))
    before = received()
    with pytest.raises(Unreachable, match=f"no room for {SIZE} bytes"):
        store_at(stack).fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60))
    assert received() == before
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    store_at(stack).fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60))


# -- a whole node


def test_a_node_serves_while_its_store_crawls_and_stands_still_and_goes_on_when_it_heals(
    stack: RunningStack, line: TcpFaults, tmp_path: Path
) -> None:
    identities = asyncio.run(ensure_identities(tmp_path / "keys", stack.addresses.kafka, lambda _: None))
    operator = Operator(stack.addresses, identities, tmp_path)
    old = operator.release("crawled", models.mlp_bytes(1))
    through = replace(stack.addresses, s3_endpoint=f"http://127.0.0.1:{line.port}")
    node = EdgeNode(node_settings(through, identities, tmp_path / "node", "crawled-1"))
    node.start()
    try:
        until(lambda: node.serves("crawled", old), 30)
        line.bytes_s = 10_000
        with Load(node, {"crawled": old}) as load:
            new = operator.release("crawled", models.big_model_bytes(2 * CHUNK_BYTES, seed=3))
            carried = line.carried
            until(lambda: line.carried > carried + 100_000, 30)
            line.held = True
            time.sleep(12)  # longer than the store's read timeout
        assert not load.wrong
        assert load.answered == load.sent > 300
        line.heal()
        healed = time.monotonic()
        until(lambda: node.serves("crawled", new), 15)
        assert time.monotonic() - healed < 5 * SLACK
        assert line.carried < carried + 2 * CHUNK_BYTES + 2**20
    finally:
        node.kill()


# -- in a process of its own

CHILD = """
import sys, time, msgspec, resource
from pathlib import Path
from schemas.events import Artifact
from streams.artifacts import ArtifactStore, FetchOptions
store = ArtifactStore(*sys.argv[1:5], "us-east-1")
artifact = msgspec.json.decode(Path(sys.argv[5]).read_bytes(), type=Artifact)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.fetch(artifact, Path(sys.argv[6]), FetchOptions(deadline_s=60))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def child(stack: RunningStack, artifact: Artifact, tmp_path: Path, port: int) -> subprocess.Popen[str]:
    a = stack.addresses
    (tmp_path / "artifact.json").write_bytes(msgspec.json.encode(artifact))
    arguments = [f"http://127.0.0.1:{port}", a.s3_bucket, a.s3_access_key, a.s3_secret_key]
    command = [sys.executable, "-c", CHILD, *arguments, str(tmp_path / "artifact.json"), str(tmp_path / "got")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def test_a_kill_costs_less_than_a_chunk(
    stack: RunningStack, line: TcpFaults, artifact: Artifact, whole: bytes, tmp_path: Path
) -> None:
    line.bytes_s = 2 * CHUNK_BYTES
    for life in range(1, 4):
        process = child(stack, artifact, tmp_path, line.port)
        until(lambda life=life: line.carried > life * CHUNK_BYTES * 1.5)
        process.kill()
        process.communicate()
    before = line.carried
    file = PartFile(part_of(tmp_path / "got"), artifact)
    arrived = sum(file.arrived(number) for number in range(CHUNKS))
    assert arrived > 3 * CHUNK_BYTES
    assert all(
        file.read(n, 0, file.arrived(n)) == whole[span(artifact, n)[0] : span(artifact, n)[0] + file.arrived(n)]
        for n in range(CHUNKS)
    )
    file.close()
    line.bytes_s = 0
    last = child(stack, artifact, tmp_path, line.port)
    last.communicate(timeout=30)
    assert last.returncode == 0
    assert (tmp_path / "got").read_bytes() == whole
    assert line.carried - before < SIZE - arrived + 2**20
    assert line.carried < SIZE + CHUNK_BYTES, "three kills fetched less than a chunk twice"


def test_chunks_of_any_length_take_no_memory(stack: RunningStack, tmp_path: Path) -> None:
    size = 200 * 2**20
    path = tmp_path / "a"
    with path.open("wb") as file:
        for _ in range(size // CHUNK_BYTES):
            file.write(os.urandom(CHUNK_BYTES))
    small = describe(path, lambda digest: f"models/fetch/{digest}.onnx")
    store_at(stack, read_timeout_s=10).put(small, path)
    with path.open("rb") as file:
        digests = tuple(hashlib.sha256(data).digest() for data in iter(lambda: file.read(64 * 2**20), b""))
    large = msgspec.structs.replace(small, chunk_size_bytes=64 * 2**20, chunk_sha256=digests)
    process = child(stack, large, tmp_path, port_of(stack))
    grown, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert int(grown) * 1024 < 32 * 2**20


# -- the part file


def test_a_part_tells_another_process_which_chunks_hold(artifact: Artifact, whole: bytes, tmp_path: Path) -> None:
    part = tmp_path / ".got.part"
    assert not holds_chunk(part, artifact, 0)
    file = PartFile(part, artifact)
    assert not holds_chunk(part, artifact, 0)
    file.reserve()
    file.write(1, whole[CHUNK_BYTES : 2 * CHUNK_BYTES])
    assert not holds_chunk(part, artifact, 1)
    file.verified(1)
    file.write(0, b"begun")
    assert [holds_chunk(part, artifact, n) for n in range(3)] == [False, True, False]
    with pytest.raises(ValueError, match="chunk 1"):
        file.write(1, b"more than it has")
    file.close()
    again = PartFile(part, artifact)
    assert [again.arrived(n) for n in range(3)] == [5, CHUNK_BYTES, 0]
    again.close()


def test_counters_without_their_bytes_are_found_out(
    stack: RunningStack, artifact: Artifact, whole: bytes, tmp_path: Path
) -> None:
    """As a power cut may leave them: the counters say that all is there and verified, and the bytes are holes."""
    part = part_of(tmp_path / "got")
    file = PartFile(part, artifact)
    file.reserve()
    for number in range(CHUNKS):
        file.write(number, bytes(span(artifact, number)[1] - (number == 2)))
        if number != 2:
            file.verified(number)
    file.close()
    store_at(stack).fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60))
    assert (tmp_path / "got").read_bytes() == whole


def test_a_digest_of_the_whole_that_no_chunks_can_have_is_refused(
    stack: RunningStack, artifact: Artifact, tmp_path: Path
) -> None:
    lie: Any = msgspec.structs.replace(artifact, sha256="0" * 64)
    with pytest.raises(ModelRefused, match="the whole file's"):
        store_at(stack).fetch(lie, tmp_path / "got", FetchOptions(deadline_s=60))
    assert not (tmp_path / "got").exists()
