"""An edge node whose disk is full: during a download, during the board's write, during a purge's. The old release serves
all the while, nothing half-written keeps the room, and with room again the node does what it could not, by itself.

The node lives on a small file system of its own, and a real one says that it is full. What fills it is a ballast.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mlcdn.identities import ensure_identities
from mlcdn.local_stack.running import RunningStack
from processes.ports import LOOPBACK
from schemas.events import CacheInvalidated
from schemas.names import Scope, ScopeKind
from tests import models
from tests.edge_node_process import EdgeNode, Load, Operator, node_settings, until
from tests.tcp_faults import TcpFaults

# A fetch leaves 64 MiB for the board, the logs and the caches.
DISK_MIB, BIG_BYTES = 128, 8 * 2**20
SLOW_BYTES_S = 4 * 2**20
RECOVERED_S, CAUGHT_UP_S = 8.0, 5.0
START_S = 30.0
MODEL, OTHER = "crowded", "roommate"
# So that models.json is longer than a page.
EXTRA = tuple(f"lodger-{number}" for number in range(4))


@dataclass(slots=True)
class Scene:
    """A node that serves two models from a disk of its own, and has S3 behind a proxy."""

    operator: Operator
    node: EdgeNode
    s3: TcpFaults
    disk: Path
    digests: dict[str, str]

    @property
    def ballast(self) -> Path:
        return self.disk / "ballast"

    def fill(self, but: int = 0) -> None:
        """To the last page, or but for some bytes."""
        with self.ballast.open("ab") as file:
            size = 2**20
            while size >= 4096:
                try:
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
                except OSError:
                    size //= 2
            file.truncate(file.seek(0, os.SEEK_END) - but)

    def make_room(self) -> None:
        self.ballast.unlink(missing_ok=True)

    def up(self) -> bool:
        return all(self.node.serves(model, digest) for model, digest in self.digests.items())

    def well(self) -> bool:
        return self.up() and set(self.node.standing().values()) == {"ok"}

    def held_by_leftovers(self) -> int:
        """Bytes of the disk that what was begun and not ended takes."""
        found = [path for path in self.node.directory.rglob("*") if path.name.endswith((".part", ".half"))]
        return sum(path.stat().st_blocks * 512 for path in found)

    def recovers(self, model: str, digest: str) -> bool:
        """Whether the release is served soon after there is room again."""
        self.make_room()
        self.digests[model] = digest
        until(self.up, RECOVERED_S)
        return self.held_by_leftovers() == 0

    def purges(self) -> Path:
        board = self.node.board()
        try:
            found = board.load()
            assert found is not None
            return self.node.directory / "board" / found.purges
        finally:
            board.close()

    def error(self, model: str) -> str:
        """Why the board says that what is wanted is not served; empty when it does not."""
        board = self.node.board()
        try:
            found = board.load()
            return found.errors.get(model, "") if found is not None else ""
        finally:
            board.close()

    def obeyed(self) -> int:
        """Up to which invalidation the node's answers are true."""
        return int(self.node.predict(OTHER, 1).headers["mlcdn-position"].partition("/")[2])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("small-disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a file system of its own takes the right to mount: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def built(stack: RunningStack, disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("disk-faults")
    identities = asyncio.run(ensure_identities(directory / "keys", stack.addresses.kafka, lambda _: None))
    with TcpFaults(int(stack.addresses.s3_endpoint.rpartition(":")[2])) as s3:
        through = replace(stack.addresses, s3_endpoint=f"http://{LOOPBACK}:{s3.port}")
        settings = node_settings(through, identities, disk / "node", "crowded-1")
        node = EdgeNode(settings | {"MLCDN_DISK_CACHE_BYTES": "0"})
        scene = Scene(Operator(stack.addresses, identities, directory), node, s3, disk, {})
        for number, model in enumerate((MODEL, OTHER, *EXTRA)):
            scene.digests[model] = scene.operator.release(model, models.mlp_bytes(6_000 + number))
        node.start()
        try:
            yield scene
        finally:
            scene.make_room()
            node.end()


@pytest.fixture
def scene(built: Scene) -> Iterator[Scene]:
    until(built.well, START_S)
    yield built
    built.make_room()
    built.s3.heal()


def test_no_room_for_a_download(scene: Scene) -> None:
    """Room for the board and not for the artifact: the board says so, and what is wanted waits."""
    release = scene.operator.prepare(MODEL, models.big_model_bytes(BIG_BYTES, 61))
    scene.fill(but=24 * 2**20)
    with Load(scene.node, scene.digests) as load:
        scene.operator.append(release)
        until(lambda: "disk" in scene.error(MODEL), START_S)
        time.sleep(1.5)  # it tries again
        held = scene.held_by_leftovers()
    assert not load.wrong
    assert load.answered == load.sent > 50
    assert held == 0
    assert scene.recovers(MODEL, release.artifact.sha256)
    assert scene.error(MODEL) == ""


def test_full_during_a_download(scene: Scene) -> None:
    release = scene.operator.prepare(MODEL, models.big_model_bytes(BIG_BYTES, 62))
    scene.s3.bytes_s = SLOW_BYTES_S
    received = scene.s3.carried
    with Load(scene.node, scene.digests) as load:
        scene.operator.append(release)
        until(lambda: scene.s3.carried > received + BIG_BYTES // 8, START_S)
        scene.fill()
        time.sleep(2 * BIG_BYTES / SLOW_BYTES_S)
        scene.s3.heal()
        # Nothing that was begun keeps the room: neither what broke off nor what could not be tried.
        until(lambda: scene.held_by_leftovers() == 0, RECOVERED_S)
        time.sleep(0.5)
    assert not load.wrong
    assert load.answered == load.sent > 50
    assert scene.recovers(MODEL, release.artifact.sha256)


def test_full_when_the_board_is_written(scene: Scene) -> None:
    """The artifact of a release is on the disk already: all that it takes is a new models.json."""
    pages = [scene.operator.release(MODEL, models.mlp_bytes(seed)) for seed in (6_100, 6_101)]
    scene.digests[MODEL] = pages[-1]
    until(scene.up, START_S)
    again = scene.operator.prepare(MODEL, models.mlp_bytes(6_100))
    board = scene.node.directory / "board" / "models.json"
    # A page is left: what is longer is written in part.
    scene.fill(but=4096)
    before = board.read_bytes()
    assert len(before) > 4096
    with Load(scene.node, scene.digests) as load:
        scene.operator.append(again)
        time.sleep(3)
        after, held = board.read_bytes(), scene.held_by_leftovers()
    assert not load.wrong
    assert load.answered == load.sent > 50
    assert after == before
    assert held == 0
    assert scene.recovers(MODEL, again.artifact.sha256)


def test_full_when_a_purge_is_written(scene: Scene) -> None:
    purges = scene.purges()
    before = purges.read_bytes()
    keys = (Scope(ScopeKind.KEY, f"prediction:{OTHER}:{number:064x}") for number in range(60))
    purge = CacheInvalidated(scopes=(Scope(ScopeKind.MODEL, OTHER), *keys), author="test")
    assert not scene.node.predict(OTHER, 7).json()["cached"]
    # A page is left, and the line is longer.
    scene.fill(but=4096)
    with Load(scene.node, scene.digests) as load:
        position = scene.operator.append(purge)
        time.sleep(2)
        obeyed, during = scene.obeyed(), purges.read_bytes()
    assert not load.wrong
    assert load.answered == load.sent > 50
    assert obeyed < position, "the disk was not full"
    # No half of a line is left, after which nothing would be read.
    assert during == before
    scene.make_room()
    until(lambda: scene.obeyed() == position, CAUGHT_UP_S)
    assert not scene.node.predict(OTHER, 7).json()["cached"]
    assert len(purges.read_bytes()) > len(before) + 4096


def test_a_worker_and_a_node_that_start_on_a_full_disk(scene: Scene) -> None:
    node = scene.node
    scene.fill()
    worker = node.worker()
    with Load(node, scene.digests, retry_s=START_S) as load:
        os.kill(worker, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{worker}").exists(), START_S)
        until(scene.up, START_S)
        time.sleep(0.5)
    assert not load.wrong
    assert load.answered == load.sent > 10
    node.kill()
    node.start()
    until(scene.up, START_S)
    with Load(node, scene.digests) as load:
        time.sleep(0.5)
    assert not load.wrong
    scene.make_room()
    until(scene.well, START_S)
