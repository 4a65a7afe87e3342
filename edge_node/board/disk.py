"""The disk as the board needs it: a small port, so that a test can lose exactly what was not synced.

Laws: `write` and `append` reach other processes at once and survive a kill of this one; only `sync` and `sync_folder`
make them survive a power cut. It must not know what it stores.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from schemas.errors import Conflict


class Disk(Protocol):
    def lock(self, path: Path) -> Callable[[], None]:
        """Takes the lock or raises `Conflict`; returns what releases it. The kernel does too, when the holder dies."""

    def read(self, path: Path, offset: int = 0) -> bytes | None:
        """From `offset` to the end; None where there is no such file."""

    def write(self, path: Path, data: bytes) -> None:
        """The whole content of the file."""

    def append(self, path: Path, data: bytes) -> None: ...

    def truncate(self, path: Path, size: int) -> None: ...

    def sync(self, path: Path) -> None: ...

    def rename(self, old: Path, new: Path) -> None: ...

    def sync_folder(self, folder: Path) -> None: ...


class RealDisk:
    def lock(self, path: Path) -> Callable[[], None]:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise Conflict(f"{path} is held by process {holder or 'unknown'}") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return lambda: os.close(descriptor)

    def read(self, path: Path, offset: int = 0) -> bytes | None:
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read()
        except FileNotFoundError:
            return None

    def write(self, path: Path, data: bytes) -> None:
        self._put(path, data, os.O_TRUNC)

    def append(self, path: Path, data: bytes) -> None:
        self._put(path, data, os.O_APPEND)

    def truncate(self, path: Path, size: int) -> None:
        os.truncate(path, size)

    def sync(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        old.replace(new)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _put(self, path: Path, data: bytes, flag: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o644)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)
