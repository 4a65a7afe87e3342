"""The board as the agent writes it.

Publishing, in this order (the numbers mark the code): 1. the whole file under another name; 2. fsync; 3. rename;
4. fsync of the folder; 5. the slots of the models that changed; 6. slot 1. Purging: 1. append the lines; 2. slot 0. The
purge log is not synced: what a power cut takes from it, the next boot read of the log brings back before slot 3 says
caught up.

Opening repairs what a crash left: a torn purge log is cut, and the fence is raised to what the files say.
It must not know the log, artifacts or workers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import structlog

from edge_node.board import models_file, purge_log
from edge_node.board.disk import Disk, RealDisk
from edge_node.board.fence import FIRST_MODEL, POLICY, PURGE, SLOTS, Fence, generation_of, stamp
from edge_node.board.models_file import BoardFile, LogIdentity
from schemas.errors import Overloaded
from streams.folds.invalidations import Purge

log = structlog.get_logger()


class BoardWriter:
    """`directory` is the node's. `file` is what models.json says, None before `begin` on an empty board."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        self._folder = directory / "board"
        self._disk: Disk = disk if disk is not None else RealDisk()
        self._release = self._disk.lock(self._folder / "lock")
        self.fence = Fence.open(self._folder / "fence", writable=True)
        self._last_purge, self._last_cause, self._purge_bytes = -1, "", 0
        # `publish` may run in a thread, since it waits for the disk.
        self._replacing = threading.Lock()
        self.file = self._read()
        if self.file is not None:
            self._repair(self.file)

    @property
    def last_purge(self) -> int:
        """Position of the last purge in the log; -1 before any."""
        return self._last_purge

    @property
    def last_cause(self) -> str:
        """Id of the event that it was; empty where that is not known."""
        return self._last_cause

    @property
    def purge_bytes(self) -> int:
        return self._purge_bytes

    def begin(self, node: str, identity: LogIdentity) -> BoardFile:
        """Goes on with the board if it is of this log and these schemas; otherwise begins a new generation.

        Models keep being served over a change of generation: what is on disk was verified, whatever log asked for it.
        """
        with self._replacing:
            before = self.file
            if before is not None and before.log == identity and before.node == node:
                return before
            generation = max(before.generation if before else 0, generation_of(self.fence[PURGE])) + 1
            name = f"purges-{generation}.log"
            self._start_purge_log(name, ())
            file = self._publish(
                BoardFile(
                    node=node,
                    generation=generation,
                    log=identity,
                    purges=name,
                    models=before.models if before else {},
                    desired=before.desired if before else {},
                )
            )
            self._last_purge, self._last_cause, self._purge_bytes = -1, "", 0
            self.fence.raise_to(PURGE, stamp(generation, -1))
        if before is not None:
            log.warning("board_generation_begun", generation=generation, before=before.generation)
        return file

    def publish(self, file: BoardFile) -> BoardFile:
        """Replaces models.json, then moves the fence. Returns the file with its version.

        Which log, generation and purge log it goes with is the board's to say: `begin` may have come in between.
        """
        with self._replacing:
            now = self._begun()
            return self._publish(
                msgspec.structs.replace(file, node=now.node, log=now.log, generation=now.generation, purges=now.purges)
            )

    def append_purges(self, purges: Iterable[Purge]) -> list[Purge]:
        """Appends those that the log does not have yet and moves slot 0. Returns what it appended."""
        file = self._begun()
        new = [purge for purge in purges if purge.position > self._last_purge]
        if not new:
            return []
        path = self._folder / file.purges
        data = purge_log.encode(new)
        try:
            self._disk.append(path, data)  # 1
        except OSError:
            # A full disk may have taken half a line, and what came after it would never be read.
            self._disk.truncate(path, self._purge_bytes)
            raise
        self._purge_bytes += len(data)
        self._last_purge, self._last_cause = new[-1].position, new[-1].cause
        self.fence.raise_to(PURGE, stamp(file.generation, self._last_purge))  # 2
        return new

    def compact_purges(self, purges: Sequence[Purge]) -> None:
        """Goes on in a new log that begins with `purges`, which say no less than the old one, which stays a while."""
        with self._replacing:
            file = self._begun()
            name = f"purges-{file.generation}-{file.policy + 1}.log"
            size = self._start_purge_log(name, purges)
            self._publish(msgspec.structs.replace(file, purges=name))
            self._purge_bytes = size

    def free_slot(self, taken: Iterable[int]) -> int:
        """A slot for a model that has none; `Overloaded` when the fence is full."""
        used = set(taken)
        for slot in range(FIRST_MODEL, SLOTS):
            if slot not in used:
                return slot
        raise Overloaded(f"a node serves at most {SLOTS - FIRST_MODEL} models", retry_after_s=60)

    def close(self) -> None:
        self.fence.close()
        self._release()

    def _begun(self) -> BoardFile:
        if self.file is None:
            raise RuntimeError("`begin` comes before anything else is written")
        return self.file

    def _publish(self, file: BoardFile) -> BoardFile:
        before = self.file.models if self.file else {}
        policy = max(self.file.policy if self.file else 0, self.fence[POLICY]) + 1
        file = msgspec.structs.replace(file, policy=policy)
        half, whole = self._folder / "models.json.half", self._folder / "models.json"
        try:
            self._disk.write(half, models_file.encode(file))  # 1
            self._disk.sync(half)  # 2
        except OSError:
            # A full disk: what it took of the file must not keep it full.
            self._disk.truncate(half, 0)
            raise
        self._disk.rename(half, whole)  # 3
        self.file = file
        self._disk.sync_folder(self._folder)  # 4
        for name in file.models.keys() | before.keys():  # 5
            old, new = before.get(name), file.models.get(name)
            for model in (old, new):
                if model is not None and old != new:
                    self.fence.raise_to(model.slot, policy)
        self.fence.raise_to(POLICY, policy)  # 6
        return file

    def _read(self) -> BoardFile | None:
        data = self._disk.read(self._folder / "models.json")
        if data is None:
            return None
        try:
            return models_file.decode(data)
        except ValueError as error:
            # Everything in it is in the log too; artifacts on disk are found by their digests.
            log.error("board_unreadable", error=str(error))
            return None

    def _repair(self, file: BoardFile) -> None:
        path = self._folder / file.purges
        data = self._disk.read(path)
        if data is None:
            log.error("purge_log_missing", name=file.purges)
            self._disk.write(path, b"")
            data = b""
        purges, whole = purge_log.decode(data)
        if whole < len(data):
            log.warning("purge_log_cut", bytes=len(data) - whole)
            self._disk.truncate(path, whole)
        self._purge_bytes = whole
        last = max(purges, key=lambda purge: purge.position, default=None)
        self._last_purge, self._last_cause = (last.position, last.cause) if last is not None else (-1, "")
        for model in file.models.values():
            if self.fence[POLICY] < file.policy:
                self.fence.raise_to(model.slot, file.policy)
        self.fence.raise_to(POLICY, file.policy)
        self.fence.raise_to(PURGE, stamp(file.generation, self._last_purge))

    def _start_purge_log(self, name: str, purges: Sequence[Purge]) -> int:
        path = self._folder / name
        data = purge_log.encode(purges)
        self._disk.write(path, data)
        self._disk.sync(path)
        self._disk.sync_folder(self._folder)
        return len(data)
