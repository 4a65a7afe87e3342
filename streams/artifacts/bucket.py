"""One bucket, as requests: each bounded in time, tried again where the cause can pass, its errors in our words.

Laws: boto3 retries nothing by itself; a request that is tried again is safe to repeat; no error of boto3 or urllib3
leaves this room. It must not know artifacts or digests.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, Final, TypeVar

import boto3
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential
from urllib3.exceptions import HTTPError

from schemas.errors import MlcdnError, ModelRefused, NotFound, Unreachable

log = structlog.get_logger(__name__)

# At 6 kB/s one piece takes as long as the read timeout: how late a deadline may be noticed.
PIECE_BYTES: Final = 65_536
_FOREIGN: Final = (BotoCoreError, HTTPError)
T = TypeVar("T")


class GivenUp(Unreachable):
    """Trying again at once would not help; later it may."""


class AlreadyThere(MlcdnError):
    """The condition `If-None-Match: *` did not hold, or another upload of the key is under way."""

    status = 412


class Bucket:
    """Its calls may come from any thread; they block."""

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        access_key: str,
        secret_key: str,
        region: str,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
    ) -> None:
        self.endpoint, self._bucket = endpoint, bucket
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

    def has(self, key: str) -> bool:
        try:
            self.call(lambda: self._s3.head_object(**self._at(key)))
        except NotFound:
            return False
        return True

    def size(self, key: str) -> int:
        """In bytes; `NotFound` where there is no such object."""
        return int(self.call(lambda: self._s3.head_object(**self._at(key)))["ContentLength"])

    def put(self, key: str, data: bytes, *, only_if_absent: bool) -> bool:
        """In one request. False if an object of that key was there, or is on its way."""
        return self._created(
            lambda: self._s3.put_object(
                **self._at(key), **_condition(only_if_absent), Body=data, ServerSideEncryption="AES256"
            )
        )

    def put_parts(self, key: str, parts: Iterator[bytes], *, only_if_absent: bool) -> bool:
        """In parts of at least 5 MiB, but for the last. False as in `put`."""
        begun = self.call(lambda: self._s3.create_multipart_upload(**self._at(key), ServerSideEncryption="AES256"))
        upload = self._at(key) | {"UploadId": begun["UploadId"]}
        made = False
        try:
            sent = [self._put_part(upload, number, part) for number, part in enumerate(parts, 1)]
            made = self._created(
                lambda: self._s3.complete_multipart_upload(
                    **upload, **_condition(only_if_absent), MultipartUpload={"Parts": sent}
                )
            )
        except NotFound:
            # The upload itself is gone: an earlier try to complete it succeeded and its answer was lost, or somebody
            # cleans up. Whoever reads back will see which.
            return False
        finally:
            if not made:
                self._abort(upload)
        return made

    def _put_part(self, upload: dict[str, Any], number: int, part: bytes) -> dict[str, Any]:
        answer = self.call(lambda: self._s3.upload_part(**upload, PartNumber=number, Body=part))
        return {"ETag": answer["ETag"], "PartNumber": number}

    def _abort(self, upload: dict[str, Any]) -> None:
        """Parts of an upload that was given up cost storage for ever."""
        try:
            self._s3.abort_multipart_upload(**upload)
        except (*_FOREIGN, ClientError) as error:
            if isinstance(error, ClientError) and error.response["Error"].get("Code") == "NoSuchUpload":
                return
            log.warning("parts of an upload left behind", key=upload["Key"], error=type(error).__name__)

    def pieces(self, key: str, first: int = 0, last: int | None = None) -> Generator[bytes]:
        """One answer as it comes, from byte `first` on; up to and with `last`, or less if the object ends before.

        Close it if it is not read to its end: it holds a connection.
        """
        ranged = {} if last is None else {"Range": f"bytes={first}-{last}"}
        with self._translating():
            answer = self._s3.get_object(**self._at(key), **ranged)
            if ranged and not answer.get("ContentRange", "").startswith(f"bytes {first}-"):
                raise GivenUp("S3", self.endpoint, "it answers other bytes than the Range that was asked for")
            body = answer["Body"]
            try:
                yield from iter(lambda: body.read(PIECE_BYTES), b"")
            finally:
                # What is left unread may be long: the connection is given up with it.
                body.close()

    def call(self, call: Callable[[], T]) -> T:
        """Up to three tries, with jitter, where the cause can pass within a second."""
        for attempt in Retrying(
            stop=stop_after_attempt(3),
            wait=wait_random_exponential(multiplier=0.1, max=1.0),
            retry=retry_if_exception(lambda e: isinstance(e, Unreachable) and not isinstance(e, GivenUp)),
            reraise=True,
        ):
            with attempt, self._translating():
                return call()
        raise AssertionError("tenacity returned without an outcome")

    def _created(self, call: Callable[[], Any]) -> bool:
        try:
            self.call(call)
        except AlreadyThere:
            return False
        return True

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": key}

    def _translating(self) -> _Translating:
        return _Translating(self.endpoint, self._bucket)


class _Translating:
    """A context in which foreign errors become ours."""

    def __init__(self, endpoint: str, bucket: str) -> None:
        self._endpoint, self._bucket = endpoint, bucket

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, ClientError):
            raise self._said(error) from error
        if isinstance(error, _FOREIGN):
            raise Unreachable("S3", self._endpoint, type(error).__name__) from error

    def _said(self, error: ClientError) -> MlcdnError:
        code = error.response["Error"].get("Code", "")
        status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
        if status == 412 or code in ("PreconditionFailed", "ConditionalRequestConflict"):
            return AlreadyThere("an object of that key is there")
        if code == "NoSuchBucket":
            return GivenUp("S3", self._endpoint, f"it has no bucket {self._bucket}")
        if status == 404:
            return NotFound(f"the store has no such object ({code})")
        if status == 416:
            return ModelRefused("the stored object is shorter than the release says")
        passing = status >= 500 or status in (408, 429)
        return (Unreachable if passing else GivenUp)("S3", self._endpoint, f"{status} {code}")


def _condition(only_if_absent: bool) -> dict[str, str]:
    return {"IfNoneMatch": "*"} if only_if_absent else {}
