"""What the node knows of the log's past: ``board/log.json``, so that a restart does not forget it.

For each signed topic: the last checkpoint that held, how far this node has checked signatures itself and what the chain
was there, and which of them were bad. Beside it the alarms in force, for whoever is asked how the node is.

Laws: the agent writes it, rarely and whole (file, fsync, rename, fsync of the folder); workers only read it; a file that
cannot be read is no file, and then everything is checked anew. Deleting it while the agent is down is an operator's way to
accept the log as it is (docs/audit.md). It must not know the log, folds or how an alarm comes about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import structlog

from edge_node.board.disk import Disk, RealDisk
from streams.folds.checkpoints import Held

FORMAT: Final = 1
_NAME: Final = "log.json"

log = structlog.get_logger()


class TopicMemory(msgspec.Struct, frozen=True, kw_only=True):
    """`topic_id` is Kafka's. `life` tells apart what was read under one id: empty until the topic was found to have lost
    records that this node had read, then the chain where that was noticed.

    Every signature up to `position`, where the chain is `chain_sha256`, was checked here, and `bad_signatures` failed.
    """

    topic_id: str
    life: str = ""
    position: int = -1
    chain_sha256: str = ""
    bad_signatures: tuple[int, ...] = ()
    vouched: Held | None = None

    @property
    def identity(self) -> str:
        """What the board knows the topic by: positions of one life mean nothing in another."""
        return f"{self.topic_id}.{self.life}" if self.life else self.topic_id


class LogMemory(msgspec.Struct, frozen=True, kw_only=True):
    """`alarms` are by topic, then by reason."""

    format: int = FORMAT
    topics: dict[str, TopicMemory] = {}
    alarms: dict[str, dict[str, str]] = {}

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this program reads {FORMAT}")


def read(disk: Disk, folder: Path) -> LogMemory:
    """`folder` is the board's."""
    data = disk.read(folder / _NAME)
    if data is None:
        return LogMemory()
    try:
        return msgspec.json.decode(data, type=LogMemory)
    except ValueError as error:
        log.error("log_memory_unreadable", error=str(error))
        return LogMemory()


class LogMemoryFile:
    """`directory` is the node's."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self._folder = directory / "board"
        self._disk: Disk = disk if disk is not None else RealDisk()

    def read(self) -> LogMemory:
        return read(self._disk, self._folder)

    def write(self, memory: LogMemory) -> None:
        """Raises OSError where the disk takes none; what stood there stays."""
        half, whole = self._folder / f"{_NAME}.half", self._folder / _NAME
        try:
            self._disk.write(half, msgspec.json.encode(memory, order="deterministic"))
            self._disk.sync(half)
        except OSError:
            # A full disk: what it took of the file must not keep it full.
            self._disk.truncate(half, 0)
            raise
        self._disk.rename(half, whole)
        self._disk.sync_folder(self._folder)
