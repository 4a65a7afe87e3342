"""One HTTP connection that cannot be abused: uvicorn's httptools protocol with a clock, a scale and a strict reading.

    head   whole within `head_timeout_s` and `max_head_bytes`, and read by everyone in one way, else 408, 431, 400
    body   at its end within `body_timeout_s`, else 408
    answer taken by the client within `write_timeout_s`, else aborted
    idle   closed after `keep_alive_s`, and never with a request in flight

Laws:
- No timer a request: `tend` is called once a second for each connection, by the server's one sweep.
- What a client can make us hold is bounded before it is parsed.
- A refusal is written where an answer belongs: after the answers of the requests before it, and never into one that began.
- While the server drains every answer closes its connection.

A subclass that answers requests itself keeps three things up to date, which this class otherwise keeps:
`last_active` (loop time of the last bytes read or answer ended), `mid_message` (the parser stands inside a message; False
means at a boundary) and `busy()` (a request is being answered). It feeds the parser nothing while it is busy by itself,
asks `shared.drains_since` before it keeps a connection open, and reads nothing once `left_at` is set.

It must not know what a request asks.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from processes.http_limits import Limits, Reason, Refused, Shared, answer_of, refusal

log = logging.getLogger(__name__)

# A client that takes less than this in `write_timeout_s` does not read.
_TAKEN_BYTES: Final = 64 * 1024


class _Out:
    """What uvicorn's request cycle sees of the transport: `close` waits for the client, and a cut one swallows writes."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, connection: GuardedProtocol) -> None:
        self.is_closing = connection.transport.is_closing
        self.write, self.close = connection.write, connection.end


class GuardedProtocol(HttpToolsProtocol):
    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # Under a server that is not ours, as in a test of uvicorn's own, nobody sweeps and nobody counts.
        self.shared = server_state if isinstance(server_state, Shared) else Shared(Limits(), lambda _: None)
        self.last_active = self.loop.time()
        self.mid_message = False
        self.left_at: float | None = None
        """When this side was done with the connection: nothing more is parsed."""
        self._in_body = False
        self._since = self.last_active  # the head's or the body's first byte
        self._upgrades = self._framing = False  # see `_feed`
        self._head = b""  # of the answer that begins
        self._held = 0  # bytes read since the parser last gave something away
        self._refusal: Refused | None = None  # waits for the answers before it
        self._waiting: tuple[float, int] | None = None  # since when, and how many bytes, the client leaves unread

    def busy(self) -> bool:
        """Whether a request is being answered, or waits behind one."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    # -- bytes in

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.shared.limits.max_connections:
            self._refuse(Refused(503, "too many connections", "connections"))

    def data_received(self, data: bytes) -> None:
        now = self.last_active = self.loop.time()
        if self.left_at is not None or self._refusal is not None:
            return
        if not self.mid_message:
            self.mid_message, self._in_body, self._since = True, False, now
        self._held += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(
                cause if isinstance(cause, Refused) else Refused(400, "this is not an HTTP request", "malformed")
            )
            return
        if self.mid_message and self._held > self.shared.limits.max_head_bytes:
            self._refuse(
                Refused(400, "chunk extensions or trailers without end", "body_stuffed")
                if self._in_body
                else Refused(431, f"a request head has at most {self.shared.limits.max_head_bytes} bytes", "head_large")
            )

    def _feed(self, data: bytes) -> None:
        """To the parser. It stops behind the head of a request that asks for an upgrade and takes that head for the whole
        message: read on from there, a body would be the next request. None is upgraded here, so its body is read by a
        parser that knows only how long it is.
        """
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                if self._in_body:
                    self.parser = httptools.HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                    self._framing = True
                    length = [n + b": " + v for n, v in self.headers if n in (b"content-length", b"transfer-encoding")]
                    self.parser.feed_data(b"POST / HTTP/1.1\r\n" + length[0] + b"\r\n\r\n")
            else:
                return

    def on_message_begin(self) -> None:
        if self._framing:
            return
        super().on_message_begin()
        self.mid_message, self._in_body, self._since = True, False, self.last_active

    def on_url(self, url: bytes) -> None:
        if not self._framing:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Fields behind a chunked body would join a head that was checked already.
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._framing:
            self._framing = False
            return
        limits = self.shared.limits
        refused = refusal(
            self.parser.get_method(), self.parser.get_http_version(), self.headers, self.url, self.shared.limits
        )
        if refused is None and len(self.pipeline) >= limits.max_pipelined:
            refused = Refused(429, f"more than {limits.max_pipelined} requests wait for their answers", "pipelined")
        if refused is not None:
            raise refused
        super().on_headers_complete()
        self._in_body, self._since, self._held = True, self.last_active, 0
        self.cycle.transport = cast("asyncio.Transport", _Out(self))
        self._upgrades = self.parser.should_upgrade() and any(
            name == b"transfer-encoding" or (name == b"content-length" and int(value)) for name, value in self.headers
        )
        if self.shared.drains_since is not None:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrades:
            self._upgrades = False
            return  # the body follows
        super().on_message_complete()
        self.mid_message = self._in_body = False
        self._held = 0

    # -- answers out

    def on_response_complete(self) -> None:
        # As uvicorn's, but for its timer.
        self.server_state.total_requests += 1
        self.last_active = self.loop.time()
        if self.left_at is not None or self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._refusal is not None:
            self._leave(answer_of(self._refusal))

    def _refuse(self, refused: Refused) -> None:
        self.shared.cut(refused.reason)
        log.debug("refused", extra={"reason": refused.reason, "status": refused.status})
        if not self.busy():
            # Of a request that was answered before its body ended there is nothing more to say.
            self._leave(b"" if self._in_body else answer_of(refused))
        elif not self._in_body:
            self._refusal = refused
        elif self.pipeline or self.cycle.response_started:
            self.transport.abort()
        else:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._leave(answer_of(refused))

    def write(self, data: bytes) -> None:
        """An answer's head waits for its body until this turn of the loop ends: a system call less for each answer."""
        if self._head:
            head, self._head = self._head, b""
            self._send(head + data)
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self.loop.call_soon(self._send_head)
        else:
            self._send(data)

    def _send_head(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._send(head)

    def _send(self, data: bytes) -> None:
        # uvloop's transport raises once it was aborted, some time before the protocol is told.
        if not self.transport.is_closing():
            self.transport.write(data)

    def end(self) -> None:
        """Closes behind an answer, when the client can have read it."""
        self._send_head()
        if self.mid_message:
            self._leave(b"")
        else:
            self.transport.close()

    def _leave(self, last: bytes) -> None:
        """Writes what there is to say, and waits a moment for the client to read it and go."""
        self._send_head()
        self.left_at = self.loop.time()
        self.transport.write(last)
        if not self.transport.can_write_eof() or len(self.shared.lingering) >= self.shared.limits.max_lingering:
            self.transport.close()
            return
        self.connections.discard(self)
        self.shared.lingering.add(self)
        self.transport.write_eof()
        self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.shared.lingering.discard(self)
        super().connection_lost(exc)

    # -- the sweep

    def tend(self, now: float) -> None:
        """Cuts what took too long."""
        limits = self.shared.limits
        if self.left_at is not None:
            if now - self.left_at >= limits.linger_s:
                self.transport.abort()
            return
        if (self.flow.write_paused or self.transport.is_closing()) and self._unread(now):
            self._cut("unread")
        elif self.transport.is_closing():
            return
        elif self.mid_message:
            if self.flow.read_paused or (self.busy() and not self._in_body):
                self._since = now  # it is us who wait
            elif self._in_body and now - self._since >= limits.body_timeout_s:
                self._refuse(Refused(408, f"the body did not end in {limits.body_timeout_s:g} s", "body_slow"))
            elif not self._in_body and now - self._since >= limits.head_timeout_s:
                self._refuse(Refused(408, f"the head did not end in {limits.head_timeout_s:g} s", "head_slow"))
        elif not self.busy():
            drains = self.shared.drains_since
            if drains is not None and now - max(drains, self.last_active) >= limits.drain_idle_s:
                self.transport.close()
            elif now - self.last_active >= limits.keep_alive_s:
                self.shared.cut("idle")
                self.transport.close()

    def shutdown(self) -> None:
        """The drain begins: what is in flight is answered, and an idle connection has a moment for a last request."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.keep_alive = False

    def _unread(self, now: float) -> bool:
        """Whether the client left `write_timeout_s` pass without taking a fair part of what waits for it."""
        size = self.transport.get_write_buffer_size()
        if self._waiting is None or size <= self._waiting[1] - _TAKEN_BYTES:
            self._waiting = now, size
        return now - self._waiting[0] >= self.shared.limits.write_timeout_s

    def resume_writing(self) -> None:
        self._waiting = None
        super().resume_writing()

    def _cut(self, reason: Reason) -> None:
        self.shared.cut(reason)
        self.transport.abort()
