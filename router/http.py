"""The router over HTTP.

    GET /route?model=&ip=&lat=&lon=   edges ranked, every term of every score, who is out and why, the table's age
    GET /health                       200 while there is a table with a node in it
    any other path                    307 to the best edge, method and body kept (RFC 9110 section 15.4.8)

The model is taken from ``/v2/models/<model>/…``, from ``?model=`` or from the header ``mlcdn-model``.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from router.choose import Choice, Weights, choose
from router.geo import Networks, Place
from router.probe import Probes
from router.table import Table
from schemas import names
from schemas.errors import BadInput, MlcdnError, NotReady

_MODEL_PATH = re.compile(r"/v2/models/([^/]+)(?:/.*)?")
_NO_STORE = {"cache-control": "no-store"}


class Router:
    """What the routes need: the table, the probes, the places of clients."""

    def __init__(
        self,
        table: Table,
        probes: Probes,
        networks: Networks,
        default: Place,
        weights: Weights,
        *,
        draw: Callable[[], float] = random.random,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table, self._probes, self._networks = table, probes, networks
        self._default, self._weights = default, weights
        self._draw, self._monotonic = draw, monotonic

    def app(self) -> Starlette:
        methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        return Starlette(
            routes=[
                Route("/route", self._route, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/{path:path}", self._redirect, methods=methods),
            ],
            exception_handlers={MlcdnError: _refused},
        )

    async def _route(self, request: Request) -> Response:
        client, choice = self._choice(request)
        routes = self._table.routes
        document = {
            "edges": choice.edges,
            "out": choice.out,
            "panic": choice.panic,
            "client": client,
            "table": {
                "age_s": self._table.age_s(self._monotonic()),
                "term": routes.term if routes else None,
                "number": routes.number if routes else None,
            },
        }
        return Response(msgspec.json.encode(document), 200 if choice.edges else 503, _NO_STORE, "application/json")

    async def _health(self, _: Request) -> Response:
        age = self._table.age_s(self._monotonic())
        status = {"ready": True, "nodes": len(self._table.nodes), "table_age_s": age}
        return Response(msgspec.json.encode(status), 200, _NO_STORE, "application/json")

    async def _redirect(self, request: Request) -> Response:
        _, choice = self._choice(request)
        if not choice.edges:
            raise NotReady("; ".join(f"{o.node} {o.why}" for o in choice.out) or "no edge is known yet")
        query = f"?{request.url.query}" if request.url.query else ""
        # As it was sent, still encoded: decoding `%2f` here would make another path of it.
        path = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1")
        return RedirectResponse(f"{choice.edges[0].url}{path}{query}", 307, _NO_STORE)

    def _choice(self, request: Request) -> tuple[Place, Choice]:
        client = self._place(request)
        model = _model(request)
        return client, choose(
            self._table.nodes,
            self._probes.answered,
            client,
            model,
            self._weights,
            self._draw,
        )

    def _place(self, request: Request) -> Place:
        lat, lon = request.query_params.get("lat"), request.query_params.get("lon")
        if (lat is None) != (lon is None):
            raise BadInput("lat and lon go together")
        if lat is not None and lon is not None:
            try:
                return Place(float(lat), float(lon))
            except ValueError:
                raise BadInput(f"lat {lat[:32]!r} and lon {lon[:32]!r} are not numbers") from None
        asked = request.query_params.get("ip")
        if asked is not None:
            return self._networks.find(asked) or self._default
        if request.client is not None:
            return self._networks.find(request.client.host) or self._default
        return self._default


def _model(request: Request) -> str | None:
    found = _MODEL_PATH.fullmatch(request.url.path)
    said = found.group(1) if found else request.query_params.get("model") or request.headers.get("mlcdn-model")
    return names.name(said, "model") if said else None


async def _refused(_: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, MlcdnError) else 500
    headers = _NO_STORE | ({"retry-after": "1"} if status == 503 else {})
    return Response(msgspec.json.encode({"error": str(error)}), status, headers, "application/json")
