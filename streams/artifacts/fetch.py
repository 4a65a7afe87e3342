"""Fetching one artifact: several chunks at once into a part file, each verified, the whole read back, then renamed.

    missing chunks, in order → N threads → a source's pieces → part file → digest of the chunk → … → digest of the whole

Laws:
- What is not verified never gets the artifact's name; what arrived is kept, to the piece, so that a store that is slow
  or breaks off costs no more than its own pace; bytes found in the part file are worth nothing until a digest holds.
- No chunk is held in memory: a piece is written and hashed as it comes, however large chunks are.
- A request that brings next to nothing is given up and asked anew from where it was; one that brings something is not
  counted as a failed try; the deadline bounds all of it.

It must not know who else has the artifact: `sources` says whom to ask before the store.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Final, Protocol

import msgspec

from schemas.errors import ModelRefused, Unreachable
from schemas.events import Artifact
from schemas.metrics import counter
from streams.artifacts.bucket import Bucket, GivenUp
from streams.parts.pace import Pace
from streams.parts.part_file import ROOM_BYTES, PartFile, part_of, span

# Tries in a row that bring no byte.
_TRIES: Final = 3
_PAUSE_S: Final = 1.0
# A request this slow for so long is on a bad connection, or at a sick store: another may do better.
_SLOW_S: Final = 15.0
_SLOW_BYTES_S: Final = 8_192
_READ_BYTES: Final = 2**20


class Source(Protocol):
    """Somebody who may have the artifact; `kind` is for the count."""

    kind: str

    def pieces(self, first: int, last: int) -> Generator[bytes]:
        """Bytes `first` to `last`, or less; Unreachable where there are none."""

    def wrong(self) -> None:
        """A whole chunk of its own did not hold."""


class FetchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to fetch. `sources` gives whom to ask for a chunk before the store, one after the other; it may take its time.

    `going_on` is asked at each piece, `on_bytes` is told each verified chunk; what they raise ends the fetch.
    """

    deadline_s: float
    chunks_at_once: int = 4
    pace: Pace = Pace(0, time.monotonic)
    sources: Callable[[int], Iterator[Source]] = lambda _: iter(())
    on_bytes: Callable[[int], None] = lambda _: None
    going_on: Callable[[], None] = lambda: None


class Fetch:
    """One fetch, run once. Only one at a time may have a `destination`."""

    def __init__(self, bucket: Bucket, artifact: Artifact, destination: Path, options: FetchOptions) -> None:
        self._bucket, self._artifact, self._destination, self._options = bucket, artifact, destination, options
        self._until = time.monotonic() + options.deadline_s
        self._store = _Stored(bucket, artifact.object_key)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def run(self) -> None:
        folder, part = self._destination.parent, part_of(self._destination)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with closing(PartFile(part, self._artifact)) as file:
                self._check_room(file)
                file.reserve()
                self._fill(file)
                self._read_back(file)
                file.finish()
            part.replace(self._destination)
            _sync_folder(folder)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                # What is half there must not keep the disk full.
                part.unlink(missing_ok=True)
            raise Unreachable("the disk", str(folder), error.strerror or type(error).__name__) from error

    def _check_room(self, file: PartFile) -> None:
        missing = file.missing_bytes
        if missing and shutil.disk_usage(self._destination.parent).free < missing + ROOM_BYTES:
            hint = (
                f"it has no room for {self._artifact.size_bytes} bytes and {ROOM_BYTES} to spare; "
                "free some space, or lower model_disk_bytes"
            )
            raise Unreachable("the disk", str(self._destination.parent), hint)

    # -- chunks

    def _fill(self, file: PartFile) -> None:
        missing = [number for number in range(len(self._artifact.chunk_sha256)) if not self._held(file, number)]
        numbers = iter(missing)

        def bring_some() -> None:
            try:
                while not self._over.is_set():
                    with self._lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    self._bring(file, number)
            # Whatever it is, the fetch ends with it, in the thread that began it.
            except BaseException as error:  # noqa: BLE001
                with self._lock:
                    self._error = self._error or error
                self._over.set()

        others = [
            threading.Thread(target=bring_some, name=f"chunks-{self._artifact.sha256[:8]}", daemon=True)
            for _ in range(min(self._options.chunks_at_once, len(missing)) - 1)
        ]
        for thread in others:
            thread.start()
        bring_some()
        for thread in others:
            thread.join()
        if self._error is not None:
            raise self._error

    def _held(self, file: PartFile, number: int) -> bool:
        """Whether an earlier try left the whole chunk; if not quite, what it left is kept for the next request."""
        length = span(self._artifact, number)[1]
        if file.arrived(number) < length:
            return False
        self._check()
        if self._digest(file, number).digest() == self._artifact.chunk_sha256[number]:
            file.verified(number)
            return True
        file.drop(number)
        return False

    def _digest(self, file: PartFile, number: int) -> hashlib._Hash:
        """Of what has arrived of the chunk."""
        digest, offset = hashlib.sha256(), 0
        while offset < (arrived := file.arrived(number)):
            data = file.read(number, offset, min(_READ_BYTES, arrived - offset))
            digest.update(data)
            offset += len(data) or arrived
        return digest

    def _bring(self, file: PartFile, number: int) -> None:
        for source in self._options.sources(number):
            self._check()
            own = not file.arrived(number)
            try:
                held = self._receive(file, number, source)
            except Unreachable:
                continue
            if held:
                return
            file.drop(number)
            if own:
                source.wrong()
        own = not file.arrived(number)
        if self._from_store(file, number):
            return
        file.drop(number)
        # The beginning may have been another's, or an earlier try's, and no better than the disk it lay on.
        if own or not self._from_store(file, number):
            file.drop(number)
            counter("mlcdn_fetch_chunks_refused_total").labels(self._store.kind).inc()
            raise ModelRefused(
                f"chunk {number} of {self._artifact.object_key} has another SHA-256 than the release names"
            )

    def _from_store(self, file: PartFile, number: int) -> bool:
        vain = 0
        while True:
            before = file.arrived(number)
            try:
                return self._receive(file, number, self._store)
            except GivenUp:
                raise
            except Unreachable:
                vain = 0 if file.arrived(number) > before else vain + 1
                if vain == _TRIES:
                    raise
                # Spread, so that chunks that broke off together do not come back as one.
                self._wait(random.uniform(0.1, _PAUSE_S))

    def _receive(self, file: PartFile, number: int, source: Source) -> bool:
        """The rest of the chunk; whether the whole of it holds."""
        first, length = span(self._artifact, number)
        digest = self._digest(file, number)
        received = counter("mlcdn_fetch_bytes_total").labels(source.kind)
        since, had, waited = time.monotonic(), file.arrived(number), 0.0
        if had < length:
            with closing(source.pieces(first + had, first + length - 1)) as pieces:
                for piece in pieces:
                    self._check()
                    received.inc(len(piece))
                    file.write(number, piece)
                    digest.update(piece)
                    waited += self._wait(self._options.pace.moved(len(piece)))
                    taken = time.monotonic() - since - waited
                    if taken > _SLOW_S and file.arrived(number) < length:
                        if file.arrived(number) - had < _SLOW_BYTES_S * taken:
                            raise Unreachable("S3" if source is self._store else "a peer", "its address", "it is slow")
                        since, had, waited = time.monotonic(), file.arrived(number), 0.0
        if file.arrived(number) < length:
            self._short(source, first + file.arrived(number))
        if digest.digest() != self._artifact.chunk_sha256[number]:
            return False
        file.verified(number)
        self._options.on_bytes(length)
        return True

    def _short(self, source: Source, end: int) -> None:
        if source is not self._store:
            raise Unreachable("a peer", "its address", "it ended before the chunk did")
        raise ModelRefused(f"the store has {end} bytes where the release names {self._artifact.size_bytes}")

    # -- the whole

    def _read_back(self, file: PartFile) -> None:
        """What passed by was verified; what stands on the disk is another matter, and it is what gets the name."""
        whole = hashlib.sha256()
        chunks = range(len(self._artifact.chunk_sha256))
        for number in chunks:
            length, offset = span(self._artifact, number)[1], 0
            while offset < length:
                self._check()
                data = file.read(number, offset, min(_READ_BYTES, length - offset))
                whole.update(data)
                offset += len(data) or length
        if whole.hexdigest() == self._artifact.sha256:
            return
        if [number for number in chunks if not self._held(file, number)]:
            raise Unreachable("the disk", self._destination.parent.name, "it reads back other bytes than it got")
        for number in chunks:
            file.drop(number)
        raise ModelRefused("the chunks are those of the release, the whole file's SHA-256 is not")

    def _wait(self, seconds: float) -> float:
        """In short steps: a fetch that is over keeps nobody waiting."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._over.wait(min(left, 0.2))
            self._check()
        return seconds

    def _check(self) -> None:
        if self._over.is_set():
            raise _Ended
        self._options.going_on()
        if time.monotonic() > self._until:
            hint = f"{self._artifact.object_key} took over {self._options.deadline_s:g} s; what arrived is kept"
            raise GivenUp("S3", self._bucket.endpoint, hint)


class _Ended(Exception):
    """Another thread of the fetch has met its end."""


class _Stored:
    """The object store, as a source."""

    kind = "s3"

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket, self._key = bucket, key

    def pieces(self, first: int, last: int) -> Generator[bytes]:
        return self._bucket.pieces(self._key, first, last)

    def wrong(self) -> None:
        """The release is refused: nobody else can have it right."""


def _sync_folder(folder: Path) -> None:
    """A rename is durable once its directory is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
