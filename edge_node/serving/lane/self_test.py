"""Whether the HTTP server below is still the one that the lane was made for.

The lane leans on what uvicorn does not promise: names of its protocol class, and when they are called. At start one
request is answered twice over a transport in memory, the second time by a head that the first made known; what was to
happen must have happened. It takes 1 ms.

Law: `why_not` never raises: whatever goes wrong in here is a reason to serve without the lane, and not to serve worse.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from edge_node.serving.lane.heads import Head, admitted, candidate
from processes.http_connection import GuardedProtocol
from processes.http_limits import Limits, Shared

_BODY: Final = b"{}"
_RAW: Final = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n"
_ANSWER: Final = b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 2\r\n\r\n{}"


class _Memory(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _Probe(GuardedProtocol):
    """Sees what the lane's connection would see."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.raw: bytes | None = None
        self.head: Head | None = None
        self.seen: list[str] = []

    def data_received(self, data: bytes) -> None:
        self.raw = candidate(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        self.seen.append("begin")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self.seen.append("head")
        parser = self.parser
        usual = parser.get_method() == b"POST" and parser.get_http_version() == "1.1" and parser.should_keep_alive()
        if self.raw is not None and usual and not parser.should_upgrade():
            self.head = admitted(self.raw, self.url, self.headers)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.seen.append("whole")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.seen.append("answered")


def why_not() -> str | None:
    """None where the lane may be used, else what has moved. For the start of a process: it runs a loop of its own."""
    try:
        return asyncio.run(_exchange())
    except Exception as error:  # noqa: BLE001 (it is the reason)
        return f"{type(error).__name__}: {error}"


async def _exchange() -> str | None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": message["body"]})

    config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False)
    config.load()
    state = Shared(Limits(), lambda _: None)
    state.default_headers = [(b"date", b"now")]
    connection = _Probe(config, state, {}, asyncio.get_running_loop())
    transport = _Memory()
    connection.connection_made(transport)
    for _ in range(2):
        transport.written, connection.seen = b"", []
        connection.data_received(_RAW + _BODY)
        if connection.cycle.response_complete or connection.mid_message or connection.pipeline:
            return "a request is not in flight where it should be"
        await asyncio.wait_for(asyncio.gather(*state.tasks), 5)
        await asyncio.sleep(0)
        cycle: Any = connection.cycle
        if connection.seen != ["begin", "head", "whole", "answered"]:
            return f"a request went by {connection.seen}"
        if not cycle.response_complete or connection.flow.write_paused or connection.left_at is not None:
            return "a request is in flight when it was answered"
        if transport.written != _ANSWER or STATUS_LINE[200] != b"HTTP/1.1 200 OK\r\n":
            return "an answer has other bytes"
    if connection.head != Head("predict", None, None, 2, None):
        return "a usual head is not seen as one"
    connection.connection_lost(None)
    return None
