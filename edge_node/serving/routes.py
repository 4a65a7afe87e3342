"""The worker's HTTP: which path leads to which door, and the one place where an error becomes an answer.

    POST /predict  /batch_predict                                            plain doors
    GET  /v2  /v2/health/live|ready  /v2/models/stats                        Open Inference Protocol v2
    GET  /v2/models/M[/versions/V]  …/ready  …/config  …/stats
    POST /v2/models/M[/versions/V]/infer  /v2/repository/index  …/models/M/load|unload
    GET  /health  /metrics  /openapi.json  /docs
    GET  /artifacts/DIGEST                                                    for other nodes

Laws: an error is `{"error": "…"}` with the status that its class says, without traces, paths or addresses; what is not
ready is 503; every path is in openapi.py, and nothing else is.

It must not know tiers, sessions or the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed_version
from typing import Any, Protocol

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edge_node.serving import answers, repository
from edge_node.serving.asking import Asking
from edge_node.serving.bodies import read_body, smaller, whole
from edge_node.serving.chunks import ChunkDoor
from edge_node.serving.docs_page import POLICY, page
from edge_node.serving.doors import Limits, PredictionDoors
from edge_node.serving.gate import Gate
from edge_node.serving.model_slot import ModelSlot, Slots
from edge_node.serving.openapi import document
from edge_node.serving.predict import Predictor
from edge_node.serving.reporter import Identity
from edge_node.serving.rows import Rows
from edge_node.serving.served import Served
from edge_node.serving.statistics import Statistics
from inference import protocol as oip
from schemas.errors import Conflict, MlcdnError

__all__ = ["Doors", "Limits", "build_app"]

Endpoint = Callable[[Request], Awaitable[Response]]
log = structlog.get_logger()


class State(Protocol):
    """What the routes ask of the worker."""

    @property
    def ready(self) -> bool: ...

    @property
    def draining(self) -> bool: ...

    async def health(self) -> dict[str, Any]: ...

    def metrics(self) -> tuple[bytes, str]: ...


class _IndexRequest(msgspec.Struct, frozen=True):
    ready: bool = False


_INDEX = msgspec.json.Decoder(_IndexRequest)


class Doors(PredictionDoors):
    """The endpoints: predictions, and what is said of models and of the worker."""

    def __init__(
        self,
        state: State,
        slots: Slots,
        predictor: Predictor,
        identity: Identity,
        limits: Limits,
        statistics: Statistics,
        chunks: ChunkDoor,
    ) -> None:
        super().__init__(slots, Asking(predictor), identity, limits)
        self._predictor, self._chunks = predictor, chunks
        self._state, self.statistics = state, statistics

    async def model(self, request: Request) -> Response:
        slot, served = self._at(request)
        return _json(repository.metadata(slot, served), headers=answers.model_headers(served))

    async def model_ready(self, request: Request) -> Response:
        _, served = self._at(request)
        return _json({"name": served.name, "ready": True}, headers=answers.model_headers(served))

    async def model_config(self, request: Request) -> Response:
        slot, served = self._at(request)
        said = repository.config(
            slot, served, self._predictor.tiers_of(served), self._limits.batch_rows, self._limits.body_bytes
        )
        return _json(said, headers=answers.model_headers(served))

    async def model_stats(self, request: Request) -> Response:
        slot, served = self._at(request)
        asked = [served] if "version" in request.path_params else repository.versions(slot)
        return _json({"model_stats": [self.statistics.said(repository.ref_of(each)) for each in asked]})

    async def all_stats(self, _: Request) -> Response:
        there = [each for slot in self._slots if slot.usual for each in repository.versions(slot)]
        return _json({"model_stats": [self.statistics.said(repository.ref_of(each)) for each in there]})

    async def index(self, request: Request) -> Response:
        body = await read_body(request, self._limits.body_bytes)
        asked = oip.parse(body, _INDEX) if body.strip() else _IndexRequest()
        return _json(repository.index(self._slots, asked.ready))

    async def load(self, _: Request) -> Response:
        raise Conflict(repository.LOG_DECIDES)

    async def server(self, _: Request) -> Response:
        said = {"name": "mlcdn", "version": installed_version("mlcdn"), "extensions": repository.EXTENSIONS}
        return _json(said)

    async def openapi(self, _: Request) -> Response:
        return _json(document(installed_version("mlcdn")))

    async def docs(self, _: Request) -> Response:
        body = page(document(installed_version("mlcdn"))).encode()
        policy = (b"content-security-policy", POLICY.encode())
        return whole(body, [policy, *answers.body_headers(len(body), b"text/html; charset=utf-8")])

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        ready = self._state.ready and not self._state.draining
        return _json({"ready": ready}, 200 if ready else 503)

    async def artifact(self, request: Request) -> Response:
        return await self._chunks.give(request)

    async def health(self, _: Request) -> Response:
        return _json(await self._state.health())

    async def metrics(self, _: Request) -> Response:
        # Merging the files of several workers reads each of them.
        text, media_type = await asyncio.to_thread(self._state.metrics)
        return whole(text, answers.body_headers(len(text), media_type.encode()))

    def _at(self, request: Request) -> tuple[ModelSlot, Served]:
        return self._slots.get(request.path_params["model"]), repository.named(self._slots, request)


def paths(doors: Doors) -> list[tuple[str, str, Endpoint]]:
    """Method, path, door."""
    # Those in the order of how often they are asked for: they are tried one after the other.
    found: list[tuple[str, str, Endpoint]] = [
        ("POST", "/v2/models/{model}/infer", doors.infer),
        ("POST", "/predict", doors.predict),
        ("POST", "/batch_predict", doors.batch_predict),
        ("GET", "/v2", doors.server),
        ("GET", "/v2/health/live", doors.live),
        ("GET", "/v2/health/ready", doors.ready),
        ("GET", "/v2/models/stats", doors.all_stats),
        ("POST", "/v2/repository/index", doors.index),
        ("POST", "/v2/repository/models/{model}/load", doors.load),
        ("POST", "/v2/repository/models/{model}/unload", doors.load),
        ("GET", "/health", doors.health),
        ("GET", "/metrics", doors.metrics),
        ("GET", "/openapi.json", doors.openapi),
        ("GET", "/docs", doors.docs),
        ("GET", "/artifacts/{digest}", doors.artifact),
    ]
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        found += [
            ("GET", prefix, doors.model),
            ("GET", f"{prefix}/ready", doors.model_ready),
            ("GET", f"{prefix}/config", doors.model_config),
            ("GET", f"{prefix}/stats", doors.model_stats),
        ]
    return [*found, ("POST", "/v2/models/{model}/versions/{version}/infer", doors.infer)]


def build_app(doors: Doors, state: State, rows: Rows, identity: Identity) -> Starlette:
    always = ((b"mlcdn-region", identity.region.encode()), (b"mlcdn-node", identity.node.encode()))
    app = Starlette(
        routes=[Route(path, Answered(endpoint), methods=[method]) for method, path, endpoint in paths(doors)],
        middleware=[Middleware(Gate, rows=rows, draining=lambda: state.draining, headers=always)],
        exception_handlers={HTTPException: _on_http, Exception: _on_bug},
    )
    app.router.redirect_slashes = False
    return app


class Answered:
    """An endpoint as an ASGI app: its answer, or its error's. Starlette's own wrapping of functions takes 15 us."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await smaller(request, await self._endpoint(request))
        except MlcdnError as error:
            response = _on_ours(error)
        except HTTPException as error:
            response = await _on_http(request, error)
        except ClientDisconnect:
            response = _json({"error": "the client closed the connection before its body was whole"}, 400)
        await response(scope, receive, send)


def _on_ours(error: MlcdnError) -> Response:
    status, headers, body = answers.error_answer(error)
    if status >= 500:
        log.warning("request_failed", status=status, cause=str(error))
    return whole(body, headers, status)


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = "no such path; /openapi.json lists them" if error.detail == "Not Found" else error.detail
    body = answers.error_body(detail)
    said = [(name.lower().encode(), value.encode("latin-1")) for name, value in (error.headers or {}).items()]
    return whole(body, said + answers.body_headers(len(body)), error.status_code)


async def _on_bug(_: Request, __: Exception) -> Response:
    # Starlette raises it again after this, and uvicorn logs the trace.
    return _json({"error": "internal error"}, 500)


def _json(value: Any, status: int = 200, headers: answers.Headers | None = None) -> Response:
    body = msgspec.json.encode(value)
    return whole(body, [*(headers or ()), *answers.body_headers(len(body))], status)
