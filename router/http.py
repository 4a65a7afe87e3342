"""The router's HTTP: which edge, why, and the way there.

    GET /route?model=&ip=&lat=&lon=   edges ranked, with every term, and why the others are out
    GET /health                       200 while there is a node to name
    GET /metrics
    anything else                     307 to the best edge, method, path, query and body kept

The model is taken from ``/v2/models/MODEL/…``, ``?model=`` or the header ``mlcdn-model``; the client's place from
``lat`` and ``lon``, ``ip``, or the address it comes from. A client that asks with a body gets 307 before it was read:
it sends it once.

Laws: no answer waits for anything but this process; an error is ``{"error": "…"}``; what a table holds is data, so a
node's URL stands in a header only after `choose` has found it usable.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote

import msgspec
import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from router.choose import Asked, Candidate, ChoicePolicy, Ranking, rank
from router.geo import Locations, Place
from router.probe import Prober
from router.table import Table
from schemas import names
from schemas.errors import BadInput
from schemas.metrics import counter

MODEL_PATH: Final = re.compile(r"/v2/models/([^/]+)(?:/|$)")
# Beyond this a table is old enough to say so: several of its longest intervals.
STALE_S: Final = 10.0

log = structlog.get_logger(__name__)


class Doors:
    """The endpoints. `below(n)` draws a whole number from 0 to n - 1."""

    def __init__(
        self,
        table: Table,
        prober: Prober,
        locations: Locations,
        policy: ChoicePolicy,
        below: Callable[[int], int],
    ) -> None:
        self._table, self._prober, self._locations = table, prober, locations
        self._policy, self._below = policy, below

    async def route(self, request: Request) -> Response:
        try:
            model = self._model(request.scope, strict=True)
            place = self._place(request.scope)
        except BadInput as error:
            return _json({"error": str(error)}, error.status)
        ranking = self._rank(model, place)
        _count("ranked" if ranking.edges else "none")
        document = {
            "model": model,
            "model_known": ranking.model_known,
            "place": place,
            "panic": ranking.panic,
            "table": self._described(),
            "edges": [_edge(candidate) for candidate in ranking.edges],
            "out": [
                {"node": left.node.node, "region": left.node.region, "url": left.node.url, "why": "; ".join(left.why)}
                for left in ranking.out
            ],
        }
        if not ranking.edges:
            return _json(document | {"error": "no edge is known"}, 503, {"retry-after": "1"})
        return _json(document)

    def redirect(self, scope: Scope) -> Response:
        ranking = self._rank(self._model(scope, strict=False), self._place(scope))
        if not ranking.edges:
            _count("none")
            return _json({"error": "no edge is known"}, 503, {"retry-after": "1"})
        _count("redirected")
        best = ranking.edges[0].node
        headers = {
            "location": best.url.rstrip("/") + _target(scope),
            "mlcdn-node": best.node,
            "mlcdn-region": best.region,
            "cache-control": "no-store",
        }
        return Response(status_code=307, headers=headers)

    async def health(self, _: Request) -> Response:
        age = self._table.age_s()
        there = self._rank(None, self._locations.default).edges
        degraded = [
            *([] if self._table.connected else ["the log is not read"]),
            *(
                []
                if age is not None and age <= STALE_S
                else ["the table is old" if age is not None else "no table yet"]
            ),
        ]
        status = "unavailable" if not there else "degraded" if degraded else "ok"
        document = {"status": status, "degraded": degraded, "edges": len(there), "table": self._described()}
        return _json(document, 200 if there else 503)

    async def metrics(self, _: Request) -> Response:
        self._table.show()
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    def _rank(self, model: str | None, place: Place) -> Ranking:
        asked = Asked(model=model, lat=place.lat, lon=place.lon)
        ranking = rank(self._table.nodes, asked, self._prober.outcomes, self._policy, self._below)
        if ranking.panic:
            counter("mlcdn_router_panics_total").inc()
        return ranking

    def _described(self) -> dict[str, Any] | None:
        published, age = self._table.published, self._table.age_s()
        if published is None or age is None:
            return None
        return {
            "term": published.term,
            "number": published.number,
            "nodes": len(published.nodes),
            "age_s": round(age, 3),
            "connected": self._table.connected,
        }

    def _model(self, scope: Scope, *, strict: bool) -> str | None:
        """What the edge will be asked for. A name that cannot be one is the edge's to refuse, unless `strict`."""
        in_path = MODEL_PATH.match(scope["path"])
        said = (
            in_path[1]
            if in_path
            else QueryParams(scope["query_string"]).get("model") or Headers(scope=scope).get("mlcdn-model")
        )
        if not said:
            return None
        try:
            return names.name(said, "model")
        except BadInput:
            if strict:
                raise
            return None

    def _place(self, scope: Scope) -> Place:
        said = QueryParams(scope["query_string"])
        try:
            asked = self._asked_place(said)
        except BadInput:
            # On any other path the query is the edge's: what is no place to us may mean something there.
            if scope["path"] == "/route":
                raise
            asked = None
        if asked is not None:
            return asked
        try:
            return self._locations.of(scope["client"][0])
        except (BadInput, TypeError):
            # No peer address, as over a Unix socket, or whatever a proxy before us wrote in its place.
            return self._locations.default

    def _asked_place(self, said: QueryParams) -> Place | None:
        lat, lon, ip = said.get("lat"), said.get("lon"), said.get("ip")
        if lat is not None and lon is not None:
            try:
                return Place(lat=float(lat), lon=float(lon), source="asked")
            except ValueError:
                raise BadInput("lat and lon are degrees, as decimal numbers") from None
        if lat is not None or lon is not None:
            raise BadInput("lat and lon go together")
        return self._locations.of(ip) if ip is not None else None


def build(doors: Doors) -> Starlette:
    return Starlette(
        routes=[
            Route("/route", doors.route, methods=["GET"]),
            Route("/health", doors.health, methods=["GET"]),
            Route("/metrics", doors.metrics, methods=["GET"]),
            # An ASGI application, not a function: a route of it takes every method.
            Route("/{path:path}", _Redirect(doors)),
        ],
    )


class _Redirect:
    def __init__(self, doors: Doors) -> None:
        self._doors = doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._doors.redirect(scope)(scope, receive, send)


def _target(scope: Scope) -> str:
    """Path and query as they were sent, with nothing in them that could end a header."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    path = quote(raw, safe="/%:@!$&'()*+,;=~-._")
    query = quote(scope["query_string"], safe="/%:@!$&'()*+,;=~-._?[]|")
    return f"{path}?{query}" if query else path


def _edge(candidate: Candidate) -> dict[str, Any]:
    node = candidate.node
    return {
        "node": node.node,
        "region": node.region,
        "url": node.url,
        "score": candidate.score,
        "terms": candidate.terms,
        "km": round(candidate.km, 1),
        "health": node.health,
        "phi": node.phi,
        "load": node.load,
        "hit_rate": node.hit_rate,
        "error_rate": node.error_rate,
        "in_flight": node.in_flight,
        "p50_ms": node.p50_ms,
        "p99_ms": node.p99_ms,
        "doubts": [*candidate.doubts, *(why for why in candidate.out if why not in candidate.doubts)],
    }


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(document),
        status_code=status,
        headers={"cache-control": "no-store", **(headers or {})},
        media_type="application/json",
    )


def _count(answer: str) -> None:
    counter("mlcdn_router_answers_total").labels(answer).inc()
