"""Fetching one artifact: chunk by chunk into a part file, each chunk verified, the whole verified, then renamed.

Laws: what is not verified never gets the artifact's name; what arrived is kept, to the byte, so that a store that is slow
or breaks off costs no more than its own pace; bytes found in the part file are worth nothing until a digest holds.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, Final

from schemas.errors import ModelRefused, Unreachable
from schemas.events import Artifact
from streams.artifacts.bucket import Bucket, GivenUp

# What a disk must have left after a fetch: the board, the logs and the caches write to it too.
_ROOM_BYTES: Final = 64 * 2**20


class Fetch:
    """One fetch, run once. Only one at a time may have a `destination`."""

    def __init__(
        self,
        bucket: Bucket,
        artifact: Artifact,
        destination: Path,
        deadline_s: float,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._bucket, self._artifact, self._destination = bucket, artifact, destination
        self._deadline_s, self._until = deadline_s, time.monotonic() + deadline_s
        self._on_bytes = on_bytes
        self._part = destination.with_name(f".{destination.name}.part")

    def run(self) -> None:
        folder = self._destination.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Appending would not do: a chunk that does not hold is written over.
            with open(os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
                self._check_room(file)
                self._fill(file)
                file.flush()
                os.fsync(file.fileno())
            self._part.replace(self._destination)
            _sync_folder(folder)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                # What is half there must not keep the disk full.
                self._part.unlink(missing_ok=True)
            raise Unreachable("the disk", str(folder), error.strerror or type(error).__name__) from error

    def _check_room(self, file: BinaryIO) -> None:
        missing = self._artifact.size_bytes - os.fstat(file.fileno()).st_size
        if missing > 0 and shutil.disk_usage(self._destination.parent).free < missing + _ROOM_BYTES:
            raise Unreachable("the disk", str(self._destination.parent), "it is full; free some space")

    def _fill(self, file: BinaryIO) -> None:
        whole = hashlib.sha256()
        for number, wanted in enumerate(self._artifact.chunk_sha256):
            first = number * self._artifact.chunk_size_bytes
            length = min(self._artifact.chunk_size_bytes, self._artifact.size_bytes - first)
            file.seek(first)
            held = file.read(length)
            if hashlib.sha256(held).digest() == wanted:
                whole.update(held)
                continue
            begun = held if len(held) < length else b""
            held = self._receive(file, first, length, begun)
            if begun and hashlib.sha256(held).digest() != wanted:
                # The beginning was an earlier try's, and no better than the disk it lay on.
                held = self._receive(file, first, length, b"")
            if hashlib.sha256(held).digest() != wanted:
                file.truncate(first)
                raise ModelRefused(
                    f"chunk {number} of {self._artifact.object_key} has another SHA-256 than the release names"
                )
            whole.update(held)
            self._on_bytes(length)
        file.truncate(self._artifact.size_bytes)
        if whole.hexdigest() != self._artifact.sha256:
            file.truncate(0)
            raise ModelRefused("the chunks are those of the release, the whole file's SHA-256 is not")

    def _receive(self, file: BinaryIO, first: int, length: int, begun: bytes) -> bytes:
        """The chunk's bytes, of which `begun` are in the file already; a break goes on where it broke off."""
        key, held = self._artifact.object_key, bytearray(begun)
        file.seek(first + len(held))
        file.truncate()

        def more() -> None:
            self._check_time()
            with closing(self._bucket.pieces(key, first + len(held), first + length - 1)) as pieces:
                for piece in pieces:
                    held.extend(piece)
                    file.write(piece)
                    self._check_time()
            if len(held) < length:
                raise ModelRefused(
                    f"the store has {first + len(held)} bytes where the release names {self._artifact.size_bytes}"
                )

        self._bucket.call(more)
        return bytes(held)

    def _check_time(self) -> None:
        if time.monotonic() > self._until:
            hint = f"{self._artifact.object_key} took over {self._deadline_s:g} s; what arrived is kept"
            raise GivenUp("S3", self._bucket.endpoint, hint)


def _sync_folder(folder: Path) -> None:
    """A rename is durable once its directory is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
