"""The store: puts what is described, and only says so once it has read it back.

Laws: the store's word is never enough: our own SHA-256 decides, after an upload and for what was there already; what is
uploaded is what was described, even if the file changes meanwhile; every call ends, within its timeouts or its deadline.
Synchronous: callers use threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from enum import Enum, auto
from pathlib import Path

import structlog

from schemas.errors import BadInput, ModelRefused, NotFound, Unreachable
from schemas.events import Artifact
from streams.artifacts.bucket import Bucket
from streams.artifacts.fetch import Fetch, FetchOptions

log = structlog.get_logger(__name__)


class _Stored(Enum):
    SAME = auto()
    OTHER = auto()
    NOTHING = auto()


class ArtifactStore:
    """One bucket. `replaced` counts stored objects that were not what their key says."""

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        access_key: str,
        secret_key: str,
        region: str,
        *,
        connect_timeout_s: float = 2.0,
        read_timeout_s: float = 10.0,
    ) -> None:
        self._bucket = Bucket(
            endpoint,
            bucket,
            access_key,
            secret_key,
            region,
            connect_timeout_s=connect_timeout_s,
            read_timeout_s=read_timeout_s,
        )
        self.replaced = 0

    def put(self, artifact: Artifact, path: Path, progress: Callable[[int], None] = lambda _: None) -> bool:
        """Stores the file under its key; False if it was there already. Returns only once the stored bytes are verified.

        An object that is there but is not what its key says (cut short, or spoilt) is replaced and counted.
        """

        def upload(only_if_absent: bool) -> bool:
            key = artifact.object_key
            if only_if_absent and self._bucket.has(key):
                return False
            chunks = _chunks(artifact, path, progress)
            if len(artifact.chunk_sha256) == 1:
                return self._bucket.put(key, next(chunks), only_if_absent=only_if_absent)
            return self._bucket.put_parts(key, chunks, only_if_absent=only_if_absent)

        return self._put(artifact.object_key, artifact.size_bytes, artifact.sha256, upload)

    def put_bytes(self, key: str, data: bytes) -> bool:
        """A small object whose key is made of its digest; otherwise as `put`."""
        digest = hashlib.sha256(data).hexdigest()
        return self._put(
            key, len(data), digest, lambda only_if_absent: self._bucket.put(key, data, only_if_absent=only_if_absent)
        )

    def get(self, key: str, max_bytes: int) -> bytes:
        """A small object whole; `ModelRefused` above `max_bytes`."""

        def read() -> bytes:
            data = bytearray()
            with closing(self._bucket.pieces(key)) as pieces:
                for piece in pieces:
                    data += piece
                    if len(data) > max_bytes:
                        raise ModelRefused(f"{key} has more than {max_bytes} bytes")
            return bytes(data)

        return self._bucket.call(read)

    def fetch(
        self,
        artifact: Artifact,
        destination: Path,
        options: FetchOptions,
    ) -> None:
        """The artifact at `destination`, verified and durable; resumed from ``.part`` where an earlier try stopped.

        `ModelRefused` when the store has other bytes than the release names, `Unreachable` when it gives none in time or
        the disk has no room.
        """
        Fetch(self._bucket, artifact, destination, options).run()

    def _put(self, key: str, size: int, digest: str, upload: Callable[[bool], bool]) -> bool:
        created = upload(True)
        stored = self._stored(key, size, digest)
        if stored is _Stored.SAME:
            return created
        if stored is _Stored.OTHER:
            self.replaced += 1
            log.warning("a stored object was not what its key says: replaced", key=key)
        upload(False)
        if self._stored(key, size, digest) is not _Stored.SAME:
            raise Unreachable("S3", self._bucket.endpoint, f"{key} reads back as other bytes than were written")
        return True

    def _stored(self, key: str, size: int, digest: str) -> _Stored:
        """Reads the object back and compares every byte by digest."""
        try:
            return self._bucket.call(lambda: self._compare(key, size, digest))
        except NotFound:
            return _Stored.NOTHING

    def _compare(self, key: str, size: int, digest: str) -> _Stored:
        whole, read = hashlib.sha256(), 0
        with closing(self._bucket.pieces(key)) as pieces:
            for piece in pieces:
                whole.update(piece)
                read += len(piece)
                if read > size:
                    return _Stored.OTHER
        return _Stored.SAME if read == size and whole.hexdigest() == digest else _Stored.OTHER


def _chunks(artifact: Artifact, path: Path, progress: Callable[[int], None]) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for wanted in artifact.chunk_sha256:
                chunk = file.read(artifact.chunk_size_bytes)
                if hashlib.sha256(chunk).digest() != wanted:
                    raise BadInput(f"{path} changed while it was being published")
                yield chunk
                progress(len(chunk))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
