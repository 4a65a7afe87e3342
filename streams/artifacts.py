"""The object store: immutable, content-addressed files; written once and read back, fetched chunk by chunk and verified.

Laws: the store's word is never enough: our own SHA-256 decides, after an upload, for every chunk and for the whole; what is
not verified never gets the name of an artifact; every call ends, within its timeouts or its deadline. Synchronous: callers
use threads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from schemas.errors import BadInput, MlcdnError, ModelRefused, NotFound, Unreachable
from schemas.events import Artifact

CHUNK_BYTES: Final = 8 * 2**20
_ROOM_BYTES: Final = 64 * 2**20


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
        self._endpoint, self._bucket = endpoint, bucket
        self.replaced = 0
        self._s3: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name=region,
            config=Config(
                connect_timeout=connect_timeout_s,
                read_timeout=read_timeout_s,
                # boto3's own retries multiply its timeouts; ours are bounded and know which causes can pass.
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                proxies={},
                max_pool_connections=16,
            ),
        )

    def put(self, artifact: Artifact, path: Path, progress: Callable[[int], None] = lambda _: None) -> bool:
        """Stores the file under its key; False if it was there already. Returns only once the stored bytes are verified.

        An object that is there but is not what its key says (cut short, or spoilt) is replaced and counted.
        """
        created = self._upload(artifact, path, only_if_absent=True, progress=progress)
        if self._matches(artifact):
            return created
        self.replaced += 1
        self._upload(artifact, path, only_if_absent=False, progress=progress)
        if not self._matches(artifact):
            raise Unreachable(
                "S3", self._endpoint, f"{artifact.object_key} reads back as other bytes than were written"
            )
        return True

    def _upload(
        self,
        artifact: Artifact,
        path: Path,
        *,
        only_if_absent: bool,
        progress: Callable[[int], None],
    ) -> bool:
        """True if this call made the object. Small files in one request, larger ones in parts."""
        condition = {"IfNoneMatch": "*"} if only_if_absent else {}
        target = {"Bucket": self._bucket, "Key": artifact.object_key}
        if only_if_absent and self._exists(artifact.object_key):
            return False
        if artifact.size_bytes <= CHUNK_BYTES:
            data = path.read_bytes()
            return self._created(
                lambda: self._s3.put_object(
                    **target, **condition, Body=data, ServerSideEncryption="AES256", ContentLength=len(data),
                ),
            )  # fmt: skip
        upload = self._call(lambda: self._s3.create_multipart_upload(**target, ServerSideEncryption="AES256"))
        upload_id = upload["UploadId"]
        try:
            parts = []
            with path.open("rb") as file:
                for number in range(1, len(artifact.chunk_sha256) + 1):
                    chunk = file.read(CHUNK_BYTES)
                    part = self._call(
                        partial(self._s3.upload_part, **target, UploadId=upload_id, PartNumber=number, Body=chunk)
                    )
                    parts.append({"ETag": part["ETag"], "PartNumber": number})
                    progress(len(chunk))
            return self._created(
                lambda: self._s3.complete_multipart_upload(
                    **target, **condition, UploadId=upload_id, MultipartUpload={"Parts": parts},
                ),
            )  # fmt: skip
        except BaseException:
            # Parts of an upload that was given up cost storage for ever.
            self._s3.abort_multipart_upload(**target, UploadId=upload_id)
            raise

    def _exists(self, key: str) -> bool:
        try:
            self._call(lambda: self._s3.head_object(Bucket=self._bucket, Key=key))
        except NotFound:
            return False
        return True

    def _created(self, call: Callable[[], Any]) -> bool:
        try:
            self._call(call)
        except _AlreadyThere:
            return False
        return True

    def _matches(self, artifact: Artifact) -> bool:
        """Reads the object back and compares every byte by digest."""
        whole, size = hashlib.sha256(), 0
        body = self._call(lambda: self._s3.get_object(Bucket=self._bucket, Key=artifact.object_key))["Body"]
        try:
            for chunk in body.iter_chunks(CHUNK_BYTES):
                whole.update(chunk)
                size += len(chunk)
        except (BotoCoreError, OSError) as error:
            raise Unreachable("S3", self._endpoint, str(error)) from error
        return size == artifact.size_bytes and whole.hexdigest() == artifact.sha256

    def get(self, key: str, max_bytes: int) -> bytes:
        """A small object whole; `ModelRefused` above `max_bytes`."""
        answer = self._call(lambda: self._s3.get_object(Bucket=self._bucket, Key=key))
        if answer["ContentLength"] > max_bytes:
            raise ModelRefused(f"{key} has {answer['ContentLength']} bytes, at most {max_bytes}")
        try:
            return bytes(answer["Body"].read())
        except (BotoCoreError, OSError) as error:
            raise Unreachable("S3", self._endpoint, str(error)) from error

    def put_bytes(self, key: str, data: bytes) -> None:
        """A small content-addressed object; the same bytes may be there already."""
        self._call(
            lambda: self._s3.put_object(Bucket=self._bucket, Key=key, Body=data, ServerSideEncryption="AES256"),
        )
        if self.get(key, len(data)) != data:
            raise Unreachable("S3", self._endpoint, f"{key} reads back as other bytes than were written")

    def fetch(
        self,
        artifact: Artifact,
        destination: Path,
        *,
        deadline_s: float,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        """The artifact at `destination`, verified and durable; resumed from ``.part`` where an earlier try stopped.

        `ModelRefused` when the store has other bytes than the release names, `Unreachable` when it gives none.
        """
        destination.parent.mkdir(parents=True, exist_ok=True)
        part = destination.with_name(f".{destination.name}.part")
        if shutil.disk_usage(destination.parent).free < artifact.size_bytes + _ROOM_BYTES:
            raise Unreachable("the disk", str(destination.parent), "it is full; free some space")
        until = time.monotonic() + deadline_s
        whole = hashlib.sha256()
        with part.open("a+b") as file:
            start = self._verified_chunks(artifact, file, whole)
            # The last chunk is short: a whole file must not be padded to full chunks with zeros.
            file.truncate(min(start * artifact.chunk_size_bytes, artifact.size_bytes))
            for number in range(start, len(artifact.chunk_sha256)):
                if time.monotonic() > until:
                    raise Unreachable("S3", self._endpoint, f"{artifact.object_key} took over {deadline_s:g} s")
                chunk = self._chunk(artifact, number)
                file.write(chunk)
                whole.update(chunk)
                on_bytes(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        if whole.hexdigest() != artifact.sha256:
            part.unlink()
            raise ModelRefused("the chunks are those of the release, the whole file's SHA-256 is not")
        part.replace(destination)

    def _verified_chunks(self, artifact: Artifact, file: Any, whole: Any) -> int:
        """How many leading chunks of an earlier try hold; the digest so far goes into `whole`."""
        file.seek(0)
        for number, wanted in enumerate(artifact.chunk_sha256):
            chunk = file.read(artifact.chunk_size_bytes)
            if hashlib.sha256(chunk).digest() != wanted:
                return number
            whole.update(chunk)
        return len(artifact.chunk_sha256)

    def _chunk(self, artifact: Artifact, number: int) -> bytes:
        first = number * artifact.chunk_size_bytes
        last = min(first + artifact.chunk_size_bytes, artifact.size_bytes) - 1
        wanted = artifact.chunk_sha256[number]
        chunk = self._call(lambda: self._range(artifact.object_key, first, last))
        if len(chunk) != last - first + 1:
            raise ModelRefused(
                f"the store has {first + len(chunk)} bytes where the release names {artifact.size_bytes}"
            )
        if hashlib.sha256(chunk).digest() != wanted:
            raise ModelRefused(f"chunk {number} of {artifact.object_key} has another SHA-256 than the release names")
        return bytes(chunk)

    def _range(self, key: str, first: int, last: int) -> bytes:
        answer = self._s3.get_object(Bucket=self._bucket, Key=key, Range=f"bytes={first}-{last}")
        return bytes(answer["Body"].read(last - first + 2))

    def _call(self, call: Callable[[], Any]) -> Any:
        """Up to three tries, with jitter, where the cause can pass."""
        for attempt in Retrying(
            stop=stop_after_attempt(3),
            wait=wait_random_exponential(multiplier=0.1, max=1.0),
            retry=retry_if_exception(lambda e: isinstance(e, MlcdnError) and e.retryable),
            reraise=True,
        ):
            with attempt:
                try:
                    return call()
                except ClientError as error:
                    raise self._translated(error) from error
                except (BotoCoreError, OSError) as error:
                    raise Unreachable("S3", self._endpoint, f"{type(error).__name__}") from error
        raise AssertionError("tenacity returned without an outcome")

    def _translated(self, error: ClientError) -> MlcdnError:
        code = error.response["Error"].get("Code", "")
        status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        if code == "PreconditionFailed" or status == 412:
            return _AlreadyThere("an object of that key is there")
        if status == 404:
            return NotFound(f"the store has no such object ({code})")
        if status == 416:
            return ModelRefused("the stored object is shorter than the release says")
        return Unreachable("S3", self._endpoint, f"{status} {code}")


class _AlreadyThere(MlcdnError):
    """The condition `If-None-Match: *` did not hold."""

    status = 412
