"""Where the model to release comes from: a file, an object in S3, or an MLflow model, each as a file on this disk.

Laws: how large it is is asked before a byte is read, and what is read never exceeds it; what was brought here is gone when
the release is done, whichever way that ended. It must not know the log, trials or releases.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from inference.onnx_scan import MAX_PROTOBUF_BYTES
from origin import mlflow_models
from schemas.errors import BadInput, ModelRefused, NotFound, Unreachable
from schemas.settings import Settings
from streams.artifacts.bucket import Bucket

_S3: Final = "s3://"


@dataclass(frozen=True, slots=True)
class Source:
    """A file, and the label that stands for it where it comes from, if there is one."""

    path: Path
    version: str | None = None


@contextmanager
def opened(source: str, given: Settings, max_bytes: int = MAX_PROTOBUF_BYTES) -> Iterator[Source]:
    """The model at `source` as a file, for as long as the context lasts.

    A path; ``s3://bucket/key``, or a key in the configured bucket, with the configured store's keys; an MLflow model.
    `NotFound`, or `BadInput` when it is no source at all; `ModelRefused` above `max_bytes`; `Unreachable`.
    """
    path = Path(source)
    if source.startswith(mlflow_models.SCHEMES):
        with _folder() as folder:
            yield Source(*mlflow_models.fetch(source, folder, max_bytes))
    elif source.startswith(_S3):
        bucket, _, key = source.removeprefix(_S3).partition("/")
        if not bucket or not key:
            raise BadInput(f"{source} is not of the form s3://BUCKET/KEY")
        with _folder() as folder:
            yield _object(bucket, key, given, folder, max_bytes)
    elif path.is_file():
        yield Source(path)
    elif path.is_absolute() or path.exists() or source.startswith((".", "~")) or "://" in source:
        raise BadInput(f"{source} is no file")
    else:
        with _folder() as folder:
            try:
                found = _object(given.s3_bucket, source, given, folder, max_bytes)
            except NotFound:
                raise BadInput(f"{source} is no file, and no key in the bucket {given.s3_bucket}") from None
            yield found


def _object(bucket: str, key: str, given: Settings, folder: Path, max_bytes: int) -> Source:
    store = Bucket(
        given.s3_endpoint,
        bucket,
        given.s3_access_key,
        given.s3_secret_key.get_secret_value(),
        given.s3_region,
        connect_timeout_s=2.0,
        read_timeout_s=10.0,
    )
    try:
        size = store.size(key)
    except NotFound:
        raise NotFound(f"there is no s3://{bucket}/{key}") from None
    if size > max_bytes:
        raise ModelRefused(f"s3://{bucket}/{key} has {size} bytes, at most {max_bytes} are taken")
    if (free := shutil.disk_usage(folder).free) < size:
        raise Unreachable("the disk", str(folder), f"{size} bytes are needed, {free} are free")
    path = folder / "model.onnx"
    store.call(lambda: _download(store, key, path, size))
    return Source(path)


def _download(store: Bucket, key: str, path: Path, size: int) -> None:
    read = 0
    with path.open("wb") as file, closing(store.pieces(key)) as pieces:
        for piece in pieces:
            read += len(piece)
            if read > size:
                break
            file.write(piece)
    if read != size:
        raise ModelRefused(f"{key} gave {read} bytes and not the {size} it said it has: was it replaced meanwhile?")


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mlcdn-source-") as folder:
        yield Path(folder)
