"""The board as a worker sees it.

Laws: reading takes no lock and changes nothing; a call belongs on a request's path only when the fence says that
something moved. It must not know who writes.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from edge_node.board import log_memory, purge_log
from edge_node.board.decoder import BoardDecoder
from edge_node.board.disk import Disk, RealDisk
from edge_node.board.fence import POLICY, Fence
from edge_node.board.models_file import BoardFile
from streams.folds.invalidations import Purge

log = structlog.get_logger()


class BoardReader:
    """`directory` is the node's. The fence must be there: the parent makes it before it starts anything."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self._folder = directory / "board"
        self._disk: Disk = disk if disk is not None else RealDisk()
        self.fence = Fence.open(self._folder / "fence", writable=False)
        self._file: BoardFile | None = None
        self._decoder = BoardDecoder()
        self._purges = ""

    def load(self) -> BoardFile | None:
        """What the board says now; None before the agent first wrote, or when the file cannot be read (logged)."""
        data = self._disk.read(self._folder / "models.json")
        try:
            self._file = self._decoder.decode(data) if data is not None else None
        except ValueError as error:
            log.error("board_unreadable", error=str(error))
            self._file = None
        return self._file

    def read_purges(self, since_offset: int) -> tuple[list[Purge], int]:
        """Purges after `since_offset`, and the offset to go on from; 0 is the start.

        When the agent has begun another purge log (a compaction, or a new generation, which `BoardFile.generation`
        tells), that one is read from its start, whatever the offset.
        """
        if self._file is None or self.fence[POLICY] > self._file.policy:
            self.load()
        if self._file is None:
            return [], 0
        if self._file.purges != self._purges:
            self._purges, since_offset = self._file.purges, 0
        data = self._disk.read(self._folder / self._purges, since_offset)
        purges, taken = purge_log.decode(data or b"")
        return purges, since_offset + taken

    def log_alarms(self) -> dict[str, dict[str, str]]:
        """What the agent last found wrong with the log itself, by topic and reason."""
        return log_memory.read(self._disk, self._folder).alarms

    def close(self) -> None:
        self.fence.close()
