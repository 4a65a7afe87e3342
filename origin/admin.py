"""The admin API: what the command line does, for automation. Its own port, loopback by default, off without a token.

    POST /admin/publish?model=&version=&placement=&reason=&allow_signature_change=&wait=&timeout_s=
                           body: the ONNX file, or a form of it, a golden file and settings (`uploads.py`)
    POST /admin/rollback   {"model", "to"?, "reason"?, "wait"?, "timeout_s"?}
    POST /admin/retire     {"model", "reason"?}
    POST /admin/invalidate {"scopes": [{"kind", "value"}], "soft"?, "reason"?, "wait"?}
    GET  /openapi.json     this, as OpenAPI 3.1 (`openapi.py`)

Laws: the token is compared in constant time, for every path; a request that a browser made across origins is refused,
token or not; the file is written to the origin's own disk under a name of ours and tried before anything is uploaded; so
many uploads are held at once, and no more. A release that not every node serves is done all the same: 200, and `nodes`
says which.
"""

from __future__ import annotations

import hmac
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inference.onnx_scan import MAX_PROTOBUF_BYTES
from origin import openapi, release_settings
from origin.invalidate import Invalidator
from origin.outcome import outcome
from origin.publish import Publisher
from origin.receipts import FleetWatch, wait_applied
from origin.routes import answer, body_of, refused
from origin.uploads import receive
from schemas import names
from schemas.errors import BadInput, MlcdnError, NotReady, Overloaded
from schemas.events import Placement
from schemas.names import Scope
from streams.log.record import LogReader

MAX_WORDS_BYTES: Final = 1_048_576
MAX_UPLOADS: Final = 4
WAIT_S: Final = 30.0
LONGEST_WAIT_S: Final = 600.0
UPLOAD_S: Final = 900.0
"""For so long a body may come: the largest model at 2.4 MB/s."""
T = TypeVar("T")


class NotAllowed(MlcdnError):
    """No token, the wrong one, or a browser from elsewhere."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class PublishWords(msgspec.Struct, forbid_unknown_fields=True):
    """The query. What it says of the release wins over the settings; None is what it does not say."""

    model: str
    version: str | None = None
    placement: Placement | None = None
    reason: str | None = None
    allow_signature_change: bool | None = None
    wait: bool = False
    timeout_s: float = WAIT_S


class RollbackWords(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    reason: str = ""
    to: str | None = None
    wait: bool = False
    timeout_s: float = WAIT_S


class RetireWords(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    reason: str = ""


class InvalidateWords(msgspec.Struct, forbid_unknown_fields=True):
    scopes: tuple[Scope, ...]
    soft: bool = False
    reason: str = ""
    wait: bool = False


class Admin:
    """`author` stands in the events; the writer's own key signs them."""

    def __init__(
        self,
        publisher: Publisher,
        invalidator: Invalidator,
        reader: LogReader,
        token: SecretStr,
        author: str,
        directory: Path,
    ) -> None:
        self._publisher, self._invalidator, self._reader = publisher, invalidator, reader
        self._token, self._author, self._directory = token, author, directory
        self._uploads = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/admin/publish", self._publish, methods=["POST"]),
                Route("/admin/rollback", self._rollback, methods=["POST"]),
                Route("/admin/retire", self._retire, methods=["POST"]),
                Route("/admin/invalidate", self._invalidate, methods=["POST"]),
                Route("/openapi.json", self._openapi),
            ],
            exception_handlers={MlcdnError: refused},
        )

    def _allow(self, request: Request) -> None:
        origin = request.headers.get("origin")
        if origin is not None and origin != f"{request.url.scheme}://{request.url.netloc}":
            raise NotAllowed("no requests from other sites", 403)
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise NotAllowed("no requests from other sites", 403)
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not given:
            raise NotAllowed("a bearer token is needed", 401)
        if not hmac.compare_digest(given, self._token.get_secret_value().encode()):
            raise NotAllowed("wrong token", 403)

    async def _publish(self, request: Request) -> Response:
        self._allow(request)
        words = _query(request, PublishWords)
        names.name(words.model, "model")
        _patience(words.timeout_s)
        if self._uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} releases are being made")
        self._uploads += 1
        try:
            return await self._release(request, words)
        finally:
            self._uploads -= 1

    async def _release(self, request: Request, words: PublishWords) -> Response:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(dir=self._directory)
        except OSError as error:
            raise NotReady(f"the origin's disk takes no upload: {error.strerror}") from None
        with folder as name:
            kind = request.headers.get("content-type")
            upload = await receive(request.stream(), kind, Path(name), MAX_PROTOBUF_BYTES)
            document = release_settings.checked(upload.settings, "settings")
            if document.get("golden") is not None:
                raise BadInput("settings: golden is a part of the form, not a path")
            said = {
                "version": words.version,
                "placement": words.placement,
                "reason": words.reason,
                "allow_signature_change": words.allow_signature_change,
                "golden": str(upload.golden) if upload.golden is not None else None,
            }
            document |= {name: value for name, value in said.items() if value is not None}
            asked = release_settings.request(document, model=words.model, path=upload.file, author=self._author)
            done = await outcome(
                lambda: self._publisher.publish(asked),
                self._watch(words.wait),
                self._publisher.roots,
                words.timeout_s,
            )
        return answer(done.document())

    async def _rollback(self, request: Request) -> Response:
        words = await self._words(request, RollbackWords)
        _patience(words.timeout_s)
        done = await outcome(
            lambda: self._publisher.rollback(words.model, words.to, author=self._author, reason=words.reason),
            self._watch(words.wait),
            self._publisher.roots,
            words.timeout_s,
        )
        return answer(done.document())

    async def _retire(self, request: Request) -> Response:
        words = await self._words(request, RetireWords)
        done = await outcome(
            lambda: self._publisher.retire(words.model, author=self._author, reason=words.reason), None, (), 0
        )
        return answer(done.document())

    async def _openapi(self, request: Request) -> Response:
        self._allow(request)
        return answer(openapi.document(version("mlcdn")))

    def _watch(self, wait: bool) -> FleetWatch | None:
        return FleetWatch(self._reader) if wait else None

    async def _invalidate(self, request: Request) -> Response:
        words = await self._words(request, InvalidateWords)
        watch = FleetWatch(self._reader)
        if words.wait:
            await watch.look()
        done = await self._invalidator.invalidate(
            words.scopes,
            soft=words.soft,
            author=self._author,
            reason=words.reason,
        )
        said: dict[str, Any] = {"position": done.position, "event_id": done.event_id}
        if words.wait:
            receipts, missing = await wait_applied(watch, done.position, done.appended_ms, timeout_s=WAIT_S)
            said |= {"receipts": receipts, "missing": missing}
        return answer(said)

    async def _words(self, request: Request, kind: type[T]) -> T:
        self._allow(request)
        try:
            return msgspec.json.decode(await body_of(request, MAX_WORDS_BYTES), type=kind)
        except msgspec.DecodeError as error:
            raise BadInput(f"the body: {error}") from None


def _query(request: Request, kind: type[T]) -> T:
    """The query as words; a name or value that is none is refused like one of a body."""
    asked = dict(request.query_params)
    if len(asked) != len(request.query_params.multi_items()):
        raise BadInput("the query: a name stands there twice")
    try:
        return msgspec.convert(asked, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BadInput(f"the query: {error}") from None


def _patience(timeout_s: float) -> None:
    names.within(timeout_s, 0, LONGEST_WAIT_S, "timeout_s")
