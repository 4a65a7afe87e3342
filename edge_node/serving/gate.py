"""The first and last thing a request meets: what no route should have to refuse, and the row of what was answered.

Laws:
- Host, path and header limits are checked here for every route, because the HTTP parser below lets all of them through:
  no Host or two, `..`, encoded slashes and NULs, 200 kB of headers.
- A row is written for each request that a route marked with `note`, whatever its status, and never delays the answer.
- While draining every answer closes its connection, so that the client's next request goes elsewhere.
- Who sends `mlcdn-server-timing` is told in `Server-Timing` how long it took to the head of the answer, and which tier it
  came from. The fast lane takes no request with that header, so nobody else pays for it.

It must not know what a request asks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Final

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_node.serving.rows import Rows
from schemas.events import ModelRef

MAX_HEADERS: Final = 100
MAX_HEADER_BYTES: Final = 32 * 1024
MAX_PATH_BYTES: Final = 1_024
HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
# Empty and dot segments; encoded dot, slash, backslash, NUL and percent; anything that is not printable ASCII.
_UNSAFE: Final = re.compile(rb"//|/\.\.?(?:/|$)|%(?:2[efEF]|5[cC]|00|25)|[^!-~]")
_NOTE: Final = "mlcdn.note"
TIMING: Final = b"mlcdn-server-timing"


class Note(msgspec.Struct):
    """What a route knows of its request, for the row."""

    tier: str = "none"
    model: ModelRef | None = None
    key: bytes = b""
    request_bytes: int = 0


def note(scope: Scope) -> Note:
    """Marks the request as one that counts."""
    made = Note()
    scope[_NOTE] = made
    return made


class Gate:
    def __init__(
        self,
        app: ASGIApp,
        *,
        rows: Rows,
        draining: Callable[[], bool],
        headers: tuple[tuple[bytes, bytes], ...],
    ) -> None:
        self._app, self._rows, self._draining, self._headers = app, rows, draining, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter_ns()
        status, sent = 500, 0

        async def watched(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self._headers]
                if self._draining():
                    message["headers"].append((b"connection", b"close"))
                if any(name == TIMING for name, _ in scope["headers"]):
                    message["headers"].append((b"server-timing", _timing(scope.get(_NOTE), started)))
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        refusal = _refusal(scope)
        if refusal is not None:
            await _refuse(watched, *refusal)
            return
        try:
            await self._app(scope, receive, watched)
        finally:
            made: Note | None = scope.get(_NOTE)
            if made is not None:
                latency = time.perf_counter_ns() - started
                cells = self._rows.cells(
                    made.tier, status, self._rows.index_of(made.model), made.request_bytes, sent, made.key
                )
                self._rows.extend((started, latency, cells))


def _timing(made: Note | None, started: int) -> bytes:
    tier = made.tier if made is not None else "none"
    return f'edge;desc="{tier}";dur={(time.perf_counter_ns() - started) / 1e6:.3f}'.encode()


def _refusal(scope: Scope) -> tuple[int, str] | None:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    size, hosts = 0, []
    for name, value in headers:
        size += len(name) + len(value)
        if name == b"host":
            hosts.append(value)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        return 431, f"more than {MAX_HEADERS} headers, or {MAX_HEADER_BYTES} bytes of them"
    if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
        return 400, "a request has exactly one valid Host header"
    path = (scope.get("raw_path") or scope["path"].encode()).partition(b"?")[0]
    if len(path) > MAX_PATH_BYTES:
        return 414, f"the path is longer than {MAX_PATH_BYTES} bytes"
    if not path.startswith(b"/") or _UNSAFE.search(path):
        return 400, "the path is not a plain path"
    return None


async def _refuse(send: Send, status: int, message: str) -> None:
    body = msgspec.json.encode({"error": message})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # What is left of the request is not read.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
