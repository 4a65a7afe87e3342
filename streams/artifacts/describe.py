"""What an artifact is: its digest, its size and the digests of its chunks, taken from the file itself.

It must not know the object store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from schemas.errors import BadInput, ModelRefused
from schemas.events import Artifact

CHUNK_BYTES: Final = 8 * 2**20


def describe(path: Path, object_key: Callable[[str], str]) -> Artifact:
    """The artifact that the file is; `object_key` makes its key of its digest."""
    whole, chunks, size = hashlib.sha256(), [], 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                whole.update(chunk)
                chunks.append(hashlib.sha256(chunk).digest())
                size += len(chunk)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    if not size:
        raise ModelRefused("the file is empty")
    digest = whole.hexdigest()
    return Artifact(
        sha256=digest,
        size_bytes=size,
        object_key=object_key(digest),
        chunk_size_bytes=CHUNK_BYTES,
        chunk_sha256=tuple(chunks),
    )
