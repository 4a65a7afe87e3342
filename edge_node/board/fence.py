"""The fence: one mapped file of 8,192 u64 slots, changed in place, never replaced.

    0  stamp of the last purge          3  the incarnation that has caught up
    1  version of models.json           4  the current incarnation
    2  agent's heartbeat, Unix ms       8… one a model: the version of models.json that last changed it

Laws: a value only rises, so a reader that saw one never sees an earlier one; a slot has one writer (4: the parent
before it starts its agent, the agent after); a read costs no system call, so every request can afford the two or three
it needs.

A *stamp* is a position on ``mlcdn.invalidations`` that keeps its order when the log was made again: the generation of
the board stands above it. It must not know what a purge is.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final, Self

from schemas.errors import NotFound

SLOTS: Final = 8_192
PURGE: Final = 0
POLICY: Final = 1
HEARTBEAT: Final = 2
CAUGHT_UP: Final = 3
INCARNATION: Final = 4
FIRST_MODEL: Final = 8

_SIZE: Final = SLOTS * 8
_POSITION_BITS: Final = 40
_POSITION_MASK: Final = (1 << _POSITION_BITS) - 1


def stamp(generation: int, position: int) -> int:
    """Of a position in a generation's log; -1 is the position before any record."""
    return generation << _POSITION_BITS | (position + 1)


def position_of(stamp: int) -> int:
    return (stamp & _POSITION_MASK) - 1


def generation_of(stamp: int) -> int:
    return stamp >> _POSITION_BITS


class Fence:
    """``fence[i]`` reads a slot; `raise_to` moves one up and never down."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        # Item access of an aligned "Q" view is one 8-byte load or store: no reader sees half a value.
        self._slots = memoryview(mapped).cast("Q")

    @property
    def slots(self) -> memoryview:
        """To read from without a call for each: for who looks at every request."""
        return self._slots

    @classmethod
    def open(cls, path: Path, writable: bool) -> Self:
        """Maps the file; a writer makes it first where there is none. A reader gets `NotFound`."""
        if writable and not path.exists():
            _make(path)
        try:
            descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound("the board has no fence yet: the node's parent makes it") from None
        try:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            return cls(mmap.mmap(descriptor, _SIZE, access=access))
        finally:
            os.close(descriptor)

    def __getitem__(self, slot: int) -> int:
        return self._slots[slot]

    def raise_to(self, slot: int, value: int) -> None:
        if value > self._slots[slot]:
            self._slots[slot] = value

    @property
    def caught_up(self) -> bool:
        """The agent of this very incarnation knows every invalidation that stood in the log when it started."""
        slots = self._slots
        return 0 < slots[INCARNATION] == slots[CAUGHT_UP]

    def close(self) -> None:
        self._slots.release()
        self._mapped.close()


def _make(path: Path) -> None:
    """Whole before it has its name, and with every block allocated: a store into a hole of a full disk is a SIGBUS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(half, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, bytes(_SIZE))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(half, path)  # unlike a rename it never replaces the fence of somebody faster
    except FileExistsError:
        pass
    finally:
        half.unlink()
