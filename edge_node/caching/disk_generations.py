"""A few LMDB files, oldest first out: the disk tier's storage. Synchronous; one thread owns it.

    lock           held by the one process that has the directory open
    state          `clean`, or the boot during which the files were last written to
    g-00000007/    a generation; the highest number is written to, the others are only read

Laws:
- Eviction is O(1): when the newest generation is full, the oldest directory is removed and a new one begun.
- Nothing is synced while it runs, so what stands here after a power cut may be torn: unless it was closed cleanly or
  the host has not booted since, it is removed unread. A file that is shorter than it says is removed too, since reading
  it would end the process (SIGBUS).
- What LMDB calls corrupt costs its generation and no more.
- A write never replaces a frame of a higher `as_of`, whichever generation holds it.

It must not know event loops, keys' meaning or whether an entry may answer.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec
import structlog

from edge_node.caching.entry import as_of_in, is_whole
from schemas.errors import Conflict

GENERATIONS: Final = 4
LEAST_BYTES: Final = 2**20
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

log = structlog.get_logger()


class DiskReport(msgspec.Struct, frozen=True, kw_only=True):
    generations: int
    entries: int
    bytes: int
    broken: int


class Generations:
    """Conflict if another process has the directory open."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._map_size = max(LEAST_BYTES, max_bytes // GENERATIONS)
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._open: list[tuple[Path, Any]] = []  # oldest first
            self._load()
        except BlockingIOError:
            os.close(self._lock)
            raise Conflict(f"{directory} is open in another process") from None
        except BaseException:
            os.close(self._lock)
            raise

    def get(self, key: bytes) -> tuple[bytes, bool] | None:
        """The frame, and whether it stands in the oldest generation, about to go."""
        for path, environment in reversed(self._open):
            try:
                with environment.begin() as transaction:
                    data = transaction.get(key)
            except lmdb.Error as error:
                self._abandon(path, error)
                continue
            if data is not None:
                return bytes(data), len(self._open) >= GENERATIONS and path == self._open[0][0]
        return None

    def put_many(self, frames: Iterable[tuple[bytes, bytes]]) -> int:
        """In one transaction; how many were written. lmdb.Error if none could be."""
        wanted = [(key, frame) for key, frame in frames if not self._has_newer(key, frame)]
        try:
            self._put(wanted)
        except lmdb.MapFullError:
            self._begin()
            try:
                self._put(wanted)
            except lmdb.MapFullError:
                # More than a whole generation at once.
                return 0
        except lmdb.DiskError:
            # No space: give some back.
            if len(self._open) > 1:
                self._remove(*self._open.pop(0))
            raise
        except lmdb.Error as error:
            self._abandon(self._open[-1][0], error)
            raise
        return len(wanted)

    def remove(self, key: bytes) -> None:
        for path, environment in list(self._open):
            try:
                with environment.begin(write=True) as transaction:
                    transaction.delete(key)
            except lmdb.Error as error:
                self._abandon(path, error)

    def used_bytes(self) -> int:
        return sum(_used(environment) for _, environment in self._open)

    def check(self) -> DiskReport:
        """Reads everything."""
        entries = broken = 0
        for path, environment in list(self._open):
            try:
                with environment.begin() as transaction:
                    for _, data in transaction.cursor():
                        entries += 1
                        broken += not is_whole(bytes(data))
            except lmdb.Error as error:
                broken += 1
                self._abandon(path, error)
        return DiskReport(generations=len(self._open), entries=entries, bytes=self.used_bytes(), broken=broken)

    def close(self) -> None:
        try:
            for _, environment in self._open:
                environment.sync(True)
                environment.close()
            self._open.clear()
            self._say("clean")
        finally:
            os.close(self._lock)

    def _load(self) -> None:
        state = self._directory / "state"
        boot = _boot()
        said = state.read_text() if state.exists() else ""
        trusted = said == "clean" or (boot != "" and said == boot)
        self._say(boot)
        for path in sorted(self._directory.glob("g-*")):
            environment = _open_sound(path, self._map_size) if trusted else None
            if environment is None:
                log.warning("cache_generation_removed", path=path.name, cause="corrupt" if trusted else "not closed")
                shutil.rmtree(path, ignore_errors=True)
            else:
                self._open.append((path, environment))
        if not self._open:
            self._begin()

    def _begin(self) -> None:
        number = int(self._open[-1][0].name[2:]) + 1 if self._open else 1
        path = self._directory / f"g-{number:08d}"
        shutil.rmtree(path, ignore_errors=True)
        self._open.append((path, _environment(path, self._map_size)))
        while len(self._open) > GENERATIONS:
            self._remove(*self._open.pop(0))

    def _put(self, frames: Iterable[tuple[bytes, bytes]]) -> None:
        with self._open[-1][1].begin(write=True) as transaction:
            for key, frame in frames:
                transaction.put(key, frame)

    def _has_newer(self, key: bytes, frame: bytes) -> bool:
        found = self.get(key)
        held, new = (as_of_in(found[0]) if found is not None else None), as_of_in(frame)
        return held is not None and new is not None and held > new

    def _abandon(self, path: Path, error: Exception) -> None:
        log.warning("cache_generation_removed", path=path.name, cause=type(error).__name__)
        left = [(p, e) for p, e in self._open if p != path]
        gone = [(p, e) for p, e in self._open if p == path]
        newest = bool(self._open) and self._open[-1][0] == path
        if newest:
            # The next number is taken from it before it goes: its folder may outlive a failed removal.
            self._begin()
            left.append(self._open[-1])
        self._open = left
        for one in gone:
            self._remove(*one)

    def _remove(self, path: Path, environment: Any) -> None:
        environment.close()
        shutil.rmtree(path, ignore_errors=True)

    def _say(self, state: str) -> None:
        (self._directory / "state").write_text(state)


def _environment(path: Path, map_size: int) -> Any:
    return lmdb.open(str(path), map_size=map_size, sync=False, metasync=False, readahead=False, max_readers=8)


def _used(environment: Any) -> int:
    return int((environment.info()["last_pgno"] + 1) * environment.stat()["psize"])


def _open_sound(path: Path, map_size: int) -> Any | None:
    """None for a file that must not be read."""
    try:
        data = path / "data.mdb"
        environment = _environment(path, max(map_size, data.stat().st_size))
    except (lmdb.Error, OSError):
        return None
    try:
        if data.stat().st_size >= _used(environment):
            return environment
    except (lmdb.Error, OSError) as error:
        log.warning("cache_generation_unreadable", path=path.name, cause=type(error).__name__)
    environment.close()
    return None


def _boot() -> str:
    """Empty where the system does not tell: then only what was closed cleanly is taken over."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
