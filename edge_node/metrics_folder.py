"""Where the workers of a node count together: a folder in memory, where the system has one, else in the node's own.

The metrics library maps its files with holes, and a store into a hole of a full disk is a SIGBUS: on the disk every worker
would die of it as it starts. Memory outlives processes, so a folder is held by a lock of its parent's, which the kernel
lets go however the parent ends; the next node on the machine removes what nobody holds.

Laws: a folder of another user, or behind a link, is never used; one that is held is never emptied. It must not know what
is counted.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

MEMORY: Final = Path("/dev/shm")
_PREFIX: Final = "mlcdn-metrics-"
_TRIES: Final = 3


def take(directory: Path, memory: Path = MEMORY) -> tuple[Path, Callable[[], None]]:
    """An empty folder for the node of `directory`, and what gives it back."""
    folder = memory / f"{_PREFIX}{hashlib.blake2b(os.fsencode(directory), digest_size=8).hexdigest()}"
    for left in memory.glob(f"{_PREFIX}*"):
        _remove_unheld(left)
    for _ in range(_TRIES):  # a sweep may come between the making and the holding
        descriptor = _held(folder, make=True)
        if descriptor is not None and _is_at(descriptor, folder):
            return folder, partial(_give_back, folder, descriptor)
        if descriptor is not None:
            os.close(descriptor)
    folder = directory / "metrics"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.db"):
        path.unlink()  # files of processes that are gone would be counted for ever
    return folder, lambda: None


def _held(folder: Path, *, make: bool = False) -> int | None:
    """Holds the folder for as long as the descriptor is open; None where it is not ours to hold."""
    try:
        if make:
            folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except BlockingIOError:
        pass  # its node lives
    os.close(descriptor)
    return None


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(folder))
    except FileNotFoundError:
        return False


def _remove_unheld(folder: Path) -> None:
    if (descriptor := _held(folder)) is not None:
        _give_back(folder, descriptor)


def _give_back(folder: Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
