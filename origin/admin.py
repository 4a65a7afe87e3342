"""The admin API: what the command line does, for automation. Its own port, loopback by default, off without a token.

    POST /admin/publish?model=&version=&placement=&reason=     body: the ONNX file
    POST /admin/rollback   {"model", "to"?, "reason"}
    POST /admin/retire     {"model", "reason"}
    POST /admin/invalidate {"scopes": [{"kind", "value"}], "soft"?, "reason"?, "wait"?}

Laws: the token is compared in constant time; a request that a browser made across origins is refused, token or not; the
file is written to the origin's own disk under a name of ours and tried before anything is uploaded.
"""

from __future__ import annotations

import hmac
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from origin.invalidate import Invalidator
from origin.publish import Published, Publisher, ReleaseRequest
from origin.receipts import FleetWatch, wait_applied
from origin.routes import answer, body_of, refused
from schemas.errors import BadInput, MlcdnError
from schemas.events import Placement
from schemas.names import Scope
from streams.log.record import LogReader

MAX_MODEL_BYTES = 2 * 2**30
MAX_WORDS_BYTES = 1_048_576
WAIT_S = 30.0
T = TypeVar("T")


class NotAllowed(MlcdnError):
    """No token, the wrong one, or a browser from elsewhere."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RollbackWords(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    reason: str = ""
    to: str | None = None


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
        asked = request.query_params
        if "model" not in asked:
            raise BadInput("say which model: ?model=")
        self._directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._directory, suffix=".onnx") as file:
            size = 0
            async for part in request.stream():
                size += len(part)
                if size > MAX_MODEL_BYTES:
                    raise BadInput(f"the file is over {MAX_MODEL_BYTES} bytes")
                file.write(part)
            file.flush()
            published = await self._publisher.publish(
                ReleaseRequest(
                    model=asked["model"],
                    path=Path(file.name),
                    version=asked.get("version"),
                    placement=_placement(asked.get("placement", Placement.EDGE)),
                    author=self._author,
                    reason=asked.get("reason", ""),
                ),
            )
        return answer(_published(published))

    async def _rollback(self, request: Request) -> Response:
        words = await self._words(request, RollbackWords)
        return answer(
            _published(
                await self._publisher.rollback(words.model, words.to, author=self._author, reason=words.reason),
            ),
        )

    async def _retire(self, request: Request) -> Response:
        words = await self._words(request, RetireWords)
        return answer(
            _published(await self._publisher.retire(words.model, author=self._author, reason=words.reason)),
        )

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
