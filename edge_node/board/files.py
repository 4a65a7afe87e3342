"""models.json and the purge logs: written by the one agent, read by every worker.

`desired` is what the log says; `models` is what workers should serve now: the old release stays there while a new artifact
is on its way, or is rejected. Both hold whole `Wanted` entries, so a worker needs nothing but this directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Final

import msgspec

from edge_node.board.disk import Disk, RealDisk
from edge_node.board.fence import POLICY, PURGES, Fence, stamp
from schemas.errors import Conflict
from streams.folds.invalidations import Purge
from streams.folds.releases import Wanted

FORMAT: Final = 1
MODELS: Final = "models.json"


class LogIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which log, read with which schemas: a board of another one is folded anew."""

    releases_id: str
    invalidations_id: str
    catalogue: str

    @property
    def namespace(self) -> str:
        """In front of every shared cache key: entries of another log are never even looked at."""
        return hashlib.sha256(f"{self.releases_id} {self.invalidations_id}".encode()).hexdigest()[:16]


class BoardModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker should serve of one model. Paths are relative to the node's directory; `ms` are the agent's phases."""

    wanted: Wanted
    channel: str = "stable"
    path: str | None = None
    golden_path: str | None = None
    slot: int
    ms: dict[str, float] = {}
    forwarded: bool = False


class BoardFile(msgspec.Struct, frozen=True, kw_only=True):
    """`generation` counts logs, `policy` counts writes; `positions` are the last folded, by topic."""

    format: int = FORMAT
    node: str
    generation: int
    log: LogIdentity
    positions: dict[str, int]
    policy: int
    purges: str
    desired: dict[str, Wanted]
    models: dict[str, BoardModel]
    errors: dict[str, str] = {}


class BoardReader:
    """Never raises for what it finds: a board that cannot be read is no board, and what is known stays."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self._directory, self._disk = directory, disk or RealDisk()
        self._purges: str | None = None

    def load(self) -> BoardFile | None:
        """The board as it stands, or None when there is none that this program understands."""
        try:
            found = msgspec.json.decode(self._disk.read(self._directory / MODELS), type=BoardFile)
        except (FileNotFoundError, msgspec.DecodeError, msgspec.ValidationError):
            return None
        if found.format != FORMAT:
            return None
        self._purges = found.purges
        return found

    def signature(self) -> tuple[int, int, int] | None:
        """Changes whenever models.json was replaced or edited: inode, size, modification time."""
        try:
            found = (self._directory / MODELS).stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def read_purges(self, since: int) -> tuple[list[Purge], int]:
        """Purges after byte `since` of the log that the last loaded board names, and where to go on.

        A last line that is still being written is left for the next call. OSError when the log is not there.
        """
        if self._purges is None:
            return [], since
        data = self._disk.read(self._directory / self._purges, since)
        whole = data[: data.rfind(b"\n") + 1]
        return [msgspec.json.decode(line, type=Purge) for line in whole.splitlines()], since + len(whole)


class BoardWriter:
    """The agent's hand on the board. `Conflict` when another agent holds it."""

    def __init__(self, directory: Path, fence: Fence, disk: Disk | None = None) -> None:
        self._directory, self._fence, self._disk = directory, fence, disk or RealDisk()
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise Conflict(f"another agent holds the board {directory}") from None
        self._purges: str | None = None

    def write(self, board: BoardFile) -> None:
        """1. the file, durably and whole; 2. the fence: from here on workers load it."""
        self._disk.replace(self._directory / MODELS, msgspec.json.format(msgspec.json.encode(board), indent=1))
        self._purges = board.purges
        self._fence.raise_to(POLICY, board.policy)

    def start_purge_log(self, number: int, purges: list[Purge]) -> str:
        """A new purge log that begins with `purges`; named by no board until `write`."""
        name = f"purges-{number}.log"
        self._disk.replace(self._directory / name, b"".join(_line(p) for p in purges))
        return name

    def forget_purge_logs(self, but: tuple[str, ...]) -> None:
        """Removes older logs; a worker that still reads one finds it gone and loads the board again."""
        for path in self._directory.glob("purges-*.log"):
            if path.name not in but:
                self._disk.remove(path)

    def purge(self, purge: Purge, generation: int, model_slots: tuple[int, ...]) -> None:
        """1. the line; 2. the fence: the very next answer of every worker obeys it."""
        if self._purges is None:
            raise Conflict("no board was written yet")
        self._disk.append(self._directory / self._purges, _line(purge))
        moved = stamp(generation, purge.position)
        for slot in model_slots:
            self._fence.raise_to(slot, moved)
        self._fence.raise_to(PURGES, moved)

    def close(self) -> None:
        os.close(self._lock)


def _line(purge: Purge) -> bytes:
    return msgspec.json.encode(purge) + b"\n"
