"""The client library: predictions through the router, with fail-over. Needs nothing of ours but this file, and httpx.

    with Client("http://router:8080") as client:
        client.predict("digits", [[0.0, ...]])          # /v2 tensors: list of rows in, outputs by name

Laws: the router is asked for a ranked list of edges, kept for `ranking_s`; a broken connection, a 429 or a 5xx moves on to
the next edge and then asks the router again, until `timeout_s`; `Retry-After` is honoured within that time; an answer in
the 400s but 429 is the caller's own fault and is raised at once. Predictions have no side effects, so asking twice is safe.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

import httpx

UNKNOWN_ROUNDS = 5


class PredictionFailed(Exception):
    """No edge answered in time, or an edge said no. `status` is the last HTTP status, None when nothing answered."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Prediction:
    """`outputs` by name, `shape` and nested data as the edge said; the rest says where the answer came from."""

    outputs: dict[str, Any]
    model: str
    version: str
    digest: str
    region: str
    node: str
    cache_status: str
    headers: Mapping[str, str] = field(repr=False)


def _request(model: str, inputs: Mapping[str, Any] | Sequence[Sequence[float]], datatype: str) -> dict[str, Any]:
    if isinstance(inputs, Mapping):
        return {"inputs": [{"name": name, **tensor} for name, tensor in inputs.items()]}
    rows = [list(row) for row in inputs]
    shape = [len(rows), len(rows[0]) if rows else 0]
    return {"inputs": [{"name": "", "datatype": datatype, "shape": shape, "data": [v for row in rows for v in row]}]}


def _prediction(model: str, answer: httpx.Response) -> Prediction:
    body = answer.json()
    name, _, rest = answer.headers.get("mlcdn-model", model).partition(";")
    return Prediction(
        outputs={o["name"]: o for o in body["outputs"]},
        model=name,
        version=body.get("model_version", rest.partition(";")[0]),
        digest=answer.headers.get("mlcdn-digest", ""),
        region=answer.headers.get("mlcdn-region", ""),
        node=answer.headers.get("mlcdn-node", ""),
        cache_status=answer.headers.get("cache-status", ""),
        headers=answer.headers,
    )


def _retry_after(answer: httpx.Response) -> float:
    said = answer.headers.get("retry-after", "")
    return min(float(said), 5.0) if said.replace(".", "", 1).isdigit() else 0.1


def _what(outcome: _Outcome) -> str:
    """An answer that is no prediction, or an error, in one line."""
    if isinstance(outcome, httpx.Response):
        try:
            said = str(outcome.json()["error"])
        except (ValueError, KeyError, TypeError):
            said = outcome.text[:200]
        return f"{outcome.status_code} {said}"
    return type(outcome).__name__


@dataclass(frozen=True, slots=True)
class _Ask:
    """To be sent: a GET with `parameters`, or a POST of `body`."""

    url: str
    parameters: dict[str, str] | None = None
    body: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)


_Outcome = httpx.Response | httpx.HTTPError | None
_Asking = Generator["_Ask | float", _Outcome, Prediction]
"""Yields what to send, or how many seconds to wait; is given the answer or the error; returns the prediction."""


class _Plan:
    """Whom to ask next, and when to give up: decided here for both clients, without a call."""

    def __init__(self, router: str, timeout_s: float, ranking_s: float, place: Mapping[str, str] | None) -> None:
        self._router, self._timeout_s, self._ranking_s = router.rstrip("/"), timeout_s, ranking_s
        self._place = dict(place or {})
        self._rankings: dict[str, tuple[list[str], float]] = {}

    def asking(
        self,
        model: str,
        inputs: Mapping[str, Any] | Sequence[Sequence[float]],
        datatype: str,
        headers: Mapping[str, str] | None,
    ) -> _Asking:
        body, until = _request(model, inputs, datatype), time.monotonic() + self._timeout_s
        last, status = "no edge is known", None
        unknown_rounds = 0
        while time.monotonic() < until:
            urls, until_known = self._rankings.get(model, ([], 0.0))
            if until_known < time.monotonic():
                asked = yield _Ask(f"{self._router}/route", parameters={"model": model, **self._place})
                urls = self._ranked(model, asked)
                if not urls:
                    last = f"router: {_what(asked)}"
            for url in urls:
                answer = yield _Ask(f"{url}/v2/models/{model}/infer", body=body, headers=dict(headers or {}))
                if not isinstance(answer, httpx.Response):
                    last = f"{url}: {_what(answer)}"
                    continue
                if answer.status_code == 200:
                    return _prediction(model, answer)
                last, status = f"{url}: {_what(answer)}", answer.status_code
                if status < 500 and status not in (404, 429):
                    raise PredictionFailed(last, status)
                if status == 429:
                    yield min(_retry_after(answer), max(0.0, until - time.monotonic()))
            unknown_rounds += status == 404
            if unknown_rounds > UNKNOWN_ROUNDS:
                # A release may be newer than the edges' answer for a moment; for longer, there is no such model.
                raise PredictionFailed(last, status)
            self._rankings.pop(model, None)
            yield min(0.1, max(0.0, until - time.monotonic()))
        raise PredictionFailed(f"no edge answered within {self._timeout_s:g} s; last: {last}", status)

    def _ranked(self, model: str, answer: _Outcome) -> list[str]:
        if not isinstance(answer, httpx.Response) or answer.status_code != 200:
            return []
        urls = [edge["url"] for edge in answer.json()["edges"]]
        self._rankings[model] = (urls, time.monotonic() + self._ranking_s)
        return urls


class Client:
    """Synchronous. `place` tells the router where the client is: ``{"lat": …, "lon": …}`` or ``{"ip": …}``."""

    def __init__(
        self,
        router: str,
        *,
        timeout_s: float = 10.0,
        ranking_s: float = 2.0,
        place: Mapping[str, str] | None = None,
    ) -> None:
        self._plan = _Plan(router, timeout_s, ranking_s, place)
        self._http = httpx.Client(timeout=timeout_s, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def predict(
        self,
        model: str,
        inputs: Mapping[str, Any] | Sequence[Sequence[float]],
        *,
        datatype: str = "FP32",
        headers: Mapping[str, str] | None = None,
    ) -> Prediction:
        """`inputs`: rows of the model's only input, or Open Inference Protocol tensors by name."""
        asking = self._plan.asking(model, inputs, datatype, headers)
        outcome: _Outcome = None
        while True:
            try:
                step = asking.send(outcome)
            except StopIteration as done:
                return cast(Prediction, done.value)
            outcome = None
            if isinstance(step, float):
                time.sleep(step)
                continue
            try:
                outcome = self._http.send(_build(self._http, step))
            except httpx.HTTPError as error:
                outcome = error


class AsyncClient:
    """The same over asyncio."""

    def __init__(
        self,
        router: str,
        *,
        timeout_s: float = 10.0,
        ranking_s: float = 2.0,
        place: Mapping[str, str] | None = None,
    ) -> None:
        self._plan = _Plan(router, timeout_s, ranking_s, place)
        self._http = httpx.AsyncClient(timeout=timeout_s, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def predict(
        self,
        model: str,
        inputs: Mapping[str, Any] | Sequence[Sequence[float]],
        *,
        datatype: str = "FP32",
        headers: Mapping[str, str] | None = None,
    ) -> Prediction:
        """As `Client.predict`."""
        asking = self._plan.asking(model, inputs, datatype, headers)
        outcome: _Outcome = None
        while True:
            try:
                step = asking.send(outcome)
            except StopIteration as done:
                return cast(Prediction, done.value)
            outcome = None
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            try:
                outcome = await self._http.send(_build(self._http, step))
            except httpx.HTTPError as error:
                outcome = error


def _build(http: httpx.Client | httpx.AsyncClient, ask: _Ask) -> httpx.Request:
    if ask.body is None:
        return http.build_request("GET", ask.url, params=ask.parameters)
    return http.build_request("POST", ask.url, json=ask.body, headers=ask.headers)
