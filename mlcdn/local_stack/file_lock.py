"""File locks: one process at a time, and a lock that no dead process can hold.

Law: the kernel's lock decides, and it ends with its holder; the pid in the file is only there to be shown. It must not
know what is locked.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self


class HeldByAnother(Exception):
    """`pid` is what the holder wrote, None if it has not written yet."""

    def __init__(self, path: Path, pid: int | None) -> None:
        super().__init__(f"{path} is locked by process {pid or 'unknown'}")
        self.pid = pid


class FileLock:
    def __init__(self, descriptor: int, left_by: int | None) -> None:
        self._descriptor = descriptor
        self.left_by = left_by
        """The pid of a holder that died without releasing; what it started may need a moment to die too."""

    @classmethod
    def take(cls, path: Path) -> Self:
        """Takes the lock at once or raises HeldByAnother. What a dead holder left in the file is overwritten."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _written(descriptor)
            os.close(descriptor)
            raise HeldByAnother(path, holder) from None
        left_by = _written(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(descriptor, left_by)

    def release(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


def _written(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None


@contextmanager
def waited_for(path: Path) -> Iterator[None]:
    """Holds the lock inside the block, after waiting for whoever holds it now. Blocks the thread."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
