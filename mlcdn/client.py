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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx


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


@dataclass(slots=True)
class _Ranking:
    urls: list[str]
    until: float


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


def _error(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


class _Plan:
    """What both clients decide alike: whom to ask next, when to give up. It makes no call itself."""

    def __init__(self, router: str, timeout_s: float, ranking_s: float, place: Mapping[str, str]) -> None:
        self.router, self.timeout_s, self.ranking_s, self.place = router.rstrip("/"), timeout_s, ranking_s, dict(place)
        self._rankings: dict[str, _Ranking] = {}

    def ranked(self, model: str) -> list[str] | None:
        known = self._rankings.get(model)
        return list(known.urls) if known and known.until > time.monotonic() else None

    def learn(self, model: str, answer: httpx.Response) -> list[str]:
        answer.raise_for_status()
        urls = [edge["url"] for edge in answer.json()["edges"]]
        self._rankings[model] = _Ranking(urls, time.monotonic() + self.ranking_s)
        return list(urls)

    def forget(self, model: str) -> None:
        self._rankings.pop(model, None)

    def route_parameters(self, model: str) -> dict[str, str]:
        return {"model": model, **self.place}


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
        self._plan = _Plan(router, timeout_s, ranking_s, place or {})
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
        body, until, last = _request(model, inputs, datatype), time.monotonic() + self._plan.timeout_s, "no edge known"
        status: int | None = None
        while time.monotonic() < until:
            try:
                urls = self._plan.ranked(model) or self._plan.learn(
                    model,
                    self._http.get(f"{self._plan.router}/route", params=self._plan.route_parameters(model)),
                )
            except httpx.HTTPError as error:
                urls, last = [], f"router: {error}"
            for url in urls:
                try:
                    answer = self._http.post(f"{url}/v2/models/{model}/infer", json=body, headers=dict(headers or {}))
                except httpx.HTTPError as error:
                    last = f"{url}: {type(error).__name__}"
                    continue
                if answer.status_code == 200:
                    return _prediction(model, answer)
                last, status = f"{url}: {answer.status_code} {_error(answer)}", answer.status_code
                if answer.status_code < 500 and answer.status_code not in (404, 429):
                    raise PredictionFailed(last, status)
                if answer.status_code == 429:
                    time.sleep(min(_retry_after(answer), max(0.0, until - time.monotonic())))
            self._plan.forget(model)
            time.sleep(min(0.1, max(0.0, until - time.monotonic())))
        raise PredictionFailed(f"no edge answered within {self._plan.timeout_s:g} s; last: {last}", status)


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
        self._plan = _Plan(router, timeout_s, ranking_s, place or {})
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
        body, until, last = _request(model, inputs, datatype), time.monotonic() + self._plan.timeout_s, "no edge known"
        status: int | None = None
        while time.monotonic() < until:
            try:
                urls = self._plan.ranked(model) or self._plan.learn(
                    model,
                    await self._http.get(f"{self._plan.router}/route", params=self._plan.route_parameters(model)),
                )
            except httpx.HTTPError as error:
                urls, last = [], f"router: {error}"
            for url in urls:
                try:
                    answer = await self._http.post(
                        f"{url}/v2/models/{model}/infer", json=body, headers=dict(headers or {}),
                    )  # fmt: skip
                except httpx.HTTPError as error:
                    last = f"{url}: {type(error).__name__}"
                    continue
                if answer.status_code == 200:
                    return _prediction(model, answer)
                last, status = f"{url}: {answer.status_code} {_error(answer)}", answer.status_code
                if answer.status_code < 500 and answer.status_code not in (404, 429):
                    raise PredictionFailed(last, status)
                if answer.status_code == 429:
                    await asyncio.sleep(min(_retry_after(answer), max(0.0, until - time.monotonic())))
            self._plan.forget(model)
            await asyncio.sleep(min(0.1, max(0.0, until - time.monotonic())))
        raise PredictionFailed(f"no edge answered within {self._plan.timeout_s:g} s; last: {last}", status)
