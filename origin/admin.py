"""The admin API: what the command line does, for automation. Its own port, loopback by default, off without a token.

    POST /admin/publish?model=&version=&placement=&reason=&wait=     body: the ONNX file
    POST /admin/publish    {"path", "model", "golden"?, and what a release has}; application/json
    POST /admin/rollback   {"model", "to"?, "reason"?, "wait"?}
    POST /admin/retire     {"model", "reason"?}
    POST /admin/invalidate {"scopes": [{"kind", "value"}], "soft"?, "reason"?, "wait"?}

With `wait` the answer has what every node made of it. Laws: the token is compared in constant time; a request that a web
page made is refused, token or not; a sent file is written to the origin's own disk under a name of ours, a named one is
in its `uploads` folder and nowhere else, and both are tried before anything is uploaded; few files are sent at once.
"""

from __future__ import annotations

import hmac
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inference.golden import ATOL, RTOL
from origin.invalidate import Invalidator
from origin.publish import Published, Publisher, ReleaseRequest
from origin.receipts import FleetWatch, wait_applied
from origin.routes import answer, body_of, refused
from schemas.errors import BadInput, MlcdnError, Overloaded
from schemas.events import CachePolicy, Limits, Placement
from schemas.names import Scope
from streams.log.record import LogReader

MAX_MODEL_BYTES = 2 * 2**30
MAX_WORDS_BYTES = 1_048_576
MAX_PUBLISHING = 4
WAIT_S = 30.0
T = TypeVar("T")


class NotAllowed(MlcdnError):
    """No token, the wrong one, or a browser from elsewhere."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class PublishWords(msgspec.Struct, forbid_unknown_fields=True):
    """`path` and `golden` are relative to the uploads folder."""

    model: str
    path: str
    version: str | None = None
    golden: str | None = None
    rtol: float = RTOL
    atol: float = ATOL
    placement: Placement = Placement.EDGE
    cache: CachePolicy = CachePolicy()
    limits: Limits = Limits()
    max_batch: int = 64
    reason: str = ""
    wait: bool = False


class RollbackWords(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    reason: str = ""
    to: str | None = None
    wait: bool = False


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
        self._publishing = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/admin/publish", self._publish, methods=["POST"]),
                Route("/admin/rollback", self._rollback, methods=["POST"]),
                Route("/admin/retire", self._retire, methods=["POST"]),
                Route("/admin/invalidate", self._invalidate, methods=["POST"]),
            ],
            exception_handlers={MlcdnError: refused},
        )

    def _allow(self, request: Request) -> None:
        # No page of ours lives on this port. To compare the page's origin with Host would let in a name that an attacker
        # has pointed at this address.
        if "origin" in request.headers or request.headers.get("sec-fetch-site", "none") != "none":
            raise NotAllowed("no requests from web pages", 403)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise NotAllowed("a bearer token is needed", 401)
        if not hmac.compare_digest(given.encode(), self._token.get_secret_value().encode()):
            raise NotAllowed("wrong token", 403)

    async def _publish(self, request: Request) -> Response:
        self._allow(request)
        if self._publishing >= MAX_PUBLISHING:
            raise Overloaded(f"{MAX_PUBLISHING} models are being published", retry_after_s=5)
        self._publishing += 1
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
                return await self._publish_named(await self._words(request, PublishWords))
            return await self._publish_sent(request)
        finally:
            self._publishing -= 1

    async def _publish_named(self, words: PublishWords) -> Response:
        asked = ReleaseRequest(
            model=words.model,
            path=self._uploaded(words.path),
            version=words.version,
            golden=None if words.golden is None else self._uploaded(words.golden),
            rtol=words.rtol,
            atol=words.atol,
            placement=words.placement,
            cache=words.cache,
            limits=words.limits,
            max_batch=words.max_batch,
            author=self._author,
            reason=words.reason,
        )
        return await self._released(self._publisher.publish(asked), words.wait)

    async def _publish_sent(self, request: Request) -> Response:
        asked = request.query_params
        if "model" not in asked:
            raise BadInput("say which model: ?model=")
        with tempfile.NamedTemporaryFile(dir=self._directory, suffix=".onnx") as file:
            size = 0
            async for part in request.stream():
                size += len(part)
                if size > MAX_MODEL_BYTES:
                    raise BadInput(f"the file is over {MAX_MODEL_BYTES} bytes")
                file.write(part)
            file.flush()
            published = self._publisher.publish(
                ReleaseRequest(
                    model=asked["model"],
                    path=Path(file.name),
                    version=asked.get("version"),
                    placement=_placement(asked.get("placement", Placement.EDGE)),
                    author=self._author,
                    reason=asked.get("reason", ""),
                ),
            )
            return await self._released(published, asked.get("wait", "false") == "true")

    def _uploaded(self, said: str) -> Path:
        """The file of that name in the uploads folder, links followed."""
        folder = self._directory.resolve()
        try:
            path = (folder / said).resolve()
            if path.is_relative_to(folder) and path.is_file():
                return path
        except (OSError, ValueError):
            pass  # a name too long, or with a NUL: no such file either
        raise BadInput(f"no file {said[:80]!r} in the origin's uploads folder")

    async def _rollback(self, request: Request) -> Response:
        words = await self._words(request, RollbackWords)
        back = self._publisher.rollback(words.model, words.to, author=self._author, reason=words.reason)
        return await self._released(back, words.wait)

    async def _retire(self, request: Request) -> Response:
        words = await self._words(request, RetireWords)
        retired = self._publisher.retire(words.model, author=self._author, reason=words.reason)
        return await self._released(retired, wait=False)

    async def _released(self, act: Coroutine[Any, Any, Published], wait: bool) -> Response:
        published = await act
        said = _published(published)
        if wait:
            said["nodes"] = await wait_live(
                FleetWatch(self._reader), published.model, published.sequence, published.appended_ms, timeout_s=WAIT_S
            )
        return answer(said)

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


def _placement(said: str) -> Placement:
    try:
        return Placement(said)
    except ValueError:
        raise BadInput(f"placement is one of {', '.join(Placement)}") from None


def _published(published: Published) -> dict[str, Any]:
    return {
        "model": published.model,
        "version": published.version,
        "sequence": published.sequence,
        "digest": published.digest,
        "position": published.position,
        "event_id": published.event_id,
    }
