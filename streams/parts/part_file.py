"""The file that an artifact grows in, chunks in any order: its bytes, then one counter a chunk.

    .NAME.part    size_bytes, with holes  │ up to 7 bytes │ 8 bytes a chunk: how many of its bytes have arrived, in order;
                                                            the highest bit once its digest held

Laws:
- A counter is written after the bytes it counts, so a process that is killed loses one piece and no more. It is a hint:
  a power cut may leave it without its bytes, and only a digest says what holds.
- A file of another length has no counters. What an older program left, or a kill between the last two steps, counts as
  having arrived in order, up to its length.
- The whole artifact gets its name by rename, elsewhere. It must not know where bytes come from.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Final

from schemas.events import Artifact

# What a disk must have left after a fetch: the board, the logs and the caches write to it too.
ROOM_BYTES: Final = 64 * 2**20
_VERIFIED: Final = 1 << 63
_COUNTER: Final = struct.Struct("<Q")


def part_of(path: Path) -> Path:
    """Where the artifact grows that will be `path`."""
    return path.with_name(f".{path.name}.part")


def span(artifact: Artifact, number: int) -> tuple[int, int]:
    """First byte and length of a chunk."""
    first = number * artifact.chunk_size_bytes
    return first, min(artifact.chunk_size_bytes, artifact.size_bytes - first)


def holds_chunk(path: Path, artifact: Artifact, number: int) -> bool:
    """Whether a part file says that the chunk is there and was verified. For another process than the one that fills it."""
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != _length(artifact):
                return False
            said = os.pread(file.fileno(), _COUNTER.size, _counters_at(artifact) + _COUNTER.size * number)
    except FileNotFoundError:
        return False
    return len(said) == _COUNTER.size and _COUNTER.unpack(said)[0] == span(artifact, number)[1] | _VERIFIED


def arrived(path: Path, artifact: Artifact) -> int:
    """How many bytes of the artifact a part file says are there."""
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != _length(artifact):
                return 0
            return sum(counter & ~_VERIFIED for counter in _counters(file.fileno(), artifact))
    except FileNotFoundError:
        return 0


class PartFile:
    """Open for the one that fills it. Calls for different chunks may come from different threads."""

    def __init__(self, path: Path, artifact: Artifact) -> None:
        self._artifact = artifact
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._counters = self._found()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    @property
    def missing_bytes(self) -> int:
        """What the disk has not yet given to the file."""
        return max(0, _length(self._artifact) - os.fstat(self._descriptor).st_blocks * 512)

    def reserve(self) -> None:
        """All of its room, now: two fetches at once do not count on the same free bytes. OSError where there is none."""
        length = _length(self._artifact)
        if sys.platform == "linux":
            os.posix_fallocate(self._descriptor, 0, length)
        os.ftruncate(self._descriptor, length)
        os.pwrite(self._descriptor, b"".join(map(_COUNTER.pack, self._counters)), _counters_at(self._artifact))

    def arrived(self, number: int) -> int:
        """Bytes of the chunk that are there, whatever they are worth."""
        return min(self._counters[number] & ~_VERIFIED, span(self._artifact, number)[1])

    def write(self, number: int, data: bytes) -> None:
        """Appends to the chunk."""
        first, length = span(self._artifact, number)
        arrived = self.arrived(number)
        if arrived + len(data) > length:
            raise ValueError(f"chunk {number} has {length} bytes, not {arrived + len(data)}")
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, first + arrived)
            view, arrived = view[written:], arrived + written
        self._count(number, arrived)

    def read(self, number: int, offset: int, count: int) -> bytes:
        return os.pread(self._descriptor, count, span(self._artifact, number)[0] + offset)

    def verified(self, number: int) -> None:
        self._count(number, self.arrived(number) | _VERIFIED)

    def drop(self, number: int) -> None:
        """What arrived of the chunk is worth nothing."""
        self._count(number, 0)

    def finish(self) -> None:
        """The artifact's bytes and nothing else, durably."""
        os.ftruncate(self._descriptor, self._artifact.size_bytes)
        os.fsync(self._descriptor)

    def _found(self) -> list[int]:
        length, chunks = os.fstat(self._descriptor).st_size, range(len(self._artifact.chunk_sha256))
        if length == _length(self._artifact):
            return _counters(self._descriptor, self._artifact)
        spans = [span(self._artifact, number) for number in chunks]
        return [max(0, min(length - first, whole)) for first, whole in spans]

    def _count(self, number: int, counter: int) -> None:
        self._counters[number] = counter
        os.pwrite(self._descriptor, _COUNTER.pack(counter), _counters_at(self._artifact) + _COUNTER.size * number)


def _counters(descriptor: int, artifact: Artifact) -> list[int]:
    said = os.pread(descriptor, _COUNTER.size * len(artifact.chunk_sha256), _counters_at(artifact))
    return [counter for (counter,) in _COUNTER.iter_unpack(said)]


def _counters_at(artifact: Artifact) -> int:
    return -(-artifact.size_bytes // _COUNTER.size) * _COUNTER.size


def _length(artifact: Artifact) -> int:
    return _counters_at(artifact) + _COUNTER.size * len(artifact.chunk_sha256)
