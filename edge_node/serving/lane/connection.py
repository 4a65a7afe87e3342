"""A connection with the fast lane in front of its HTTP parser.

Laws:
- The lane is tried only where the parser stands at a message's beginning, nothing is in flight, nothing is held, the
  client reads what it is given and no drain has begun.
- It takes bytes only if they are one known head and exactly the body that the head announces: everything else,
  pipelined or malformed, is the parser's, from its first byte.
- A body that comes in a second piece, as many clients send it, is waited for until the next sweep; one in more pieces is
  the parser's.
- While a request is in the lane nothing is fed to the parser: what comes is held, and reading is paused.
- What goes wrong in the lane before anything was started falls back to the parser, and is logged.

It must not know models, caches or what a request asks.
"""

from __future__ import annotations

import asyncio
from time import perf_counter_ns
from typing import Any

import structlog
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from edge_node.board import POLICY, PURGE
from edge_node.serving.lane.heads import admitted, candidate
from edge_node.serving.lane.lane import Lane, Wire
from processes.http_connection import GuardedProtocol
from processes.http_limits import Refused

log = structlog.get_logger()


class LaneProtocol(GuardedProtocol):
    def __init__(
        self,
        lane: Lane,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._lane = lane
        self._clear = False
        self._in_lane = False
        self._used = False  # since the last sweep
        self._held_data = b""
        self._half = b""  # a known head, whose body has not come whole
        self._candidate: bytes | None = None

    def busy(self) -> bool:
        return self._in_lane or super().busy()

    def _look(self) -> None:
        """The only place that opens the lane."""
        cycle: RequestResponseCycle | None = self.cycle
        self._clear = not (
            self.mid_message
            or self._in_lane
            or (cycle is not None and not cycle.response_complete)
            or self.pipeline
            or self.left_at is not None
            or self._refusal is not None
            or self.flow.write_paused
            or self.transport.is_closing()
        )

    # -- bytes in

    def data_received(self, data: bytes) -> None:
        may_wait = not self._half
        if not may_wait:
            data, self._half = self._half + data, b""
        if self._clear:
            t0 = perf_counter_ns()
            lane = self._lane
            end = data.find(b"\r\n\r\n") + 4
            known = lane.heads.get(data[:end])
            if known is None or self.shared.drains_since is not None:
                pass
            elif may_wait and len(data) - end < known.length:
                self._half, self._used = data, True
                return
            elif len(data) - end == known.length:
                self._used = True
                body = data[end:]
                repeat = known.repeats.get(body)
                if (
                    repeat is not None
                    and t0 < repeat.until_ns
                    and repeat.stamp == lane.fence[PURGE]
                    and repeat.policy == lane.fence[POLICY]
                    and repeat.slot.turn == repeat.turn
                    and repeat.place.entry is repeat.entry
                ):
                    self.transport.write(lane.start_of(200, self.server_state.default_headers) + repeat.wire)
                    lane.row((t0, perf_counter_ns() - t0, repeat.cells))
                    return
                if self._taken(known, body, t0):
                    return
        elif self._in_lane:
            self._held_data += data
            self.flow.pause_reading()
            return
        self._candidate = None if self.mid_message or self.busy() else candidate(data)
        super().data_received(data)

    def _taken(self, known: Any, body: bytes, t0: int) -> bool:
        try:
            answer = self._lane.ask(known, body, t0, self._wait)
        except Exception:
            log.exception("fast_lane_broke")
            return self._in_lane
        if isinstance(answer, Wire):
            self._write(answer)
            return True
        return answer

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        raw, self._candidate = self._candidate, None
        parser = self.parser
        if (
            raw is not None
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not parser.should_upgrade()
        ):
            head = admitted(raw, self.url, self.headers)
            # A head is known whatever its answer was: the full path's 413 must not become the lane's 200.
            if head is not None and head.length <= self._lane.max_body_bytes:
                self._lane.repeats.know(raw, head)

    # -- answers out

    def _wait(self) -> Any:
        self._in_lane, self._clear = True, False
        return self._land

    def _land(self, wire: Wire) -> None:
        self._in_lane = False
        if self.transport.is_closing():
            return
        self._used = True
        if self.shared.drains_since is not None:
            self.transport.write(self._lane.start_of(wire.status, self.server_state.default_headers) + wire.closing())
            self.transport.close()
            return
        self._write(wire)
        # All else that closes the lane was seen when the request entered it, or says so itself.
        self._clear = self.left_at is None and not self.flow.write_paused
        if self._held_data:
            data, self._held_data = self._held_data, b""
            self.flow.resume_reading()
            self.data_received(data)

    def _write(self, wire: Wire) -> None:
        self.transport.write(self._lane.start_of(wire.status, self.server_state.default_headers) + wire.rest)

    # -- where the lane opens and closes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def on_message_begin(self) -> None:
        self._clear = False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        self._clear = False
        super().pause_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def _refuse(self, refused: Refused) -> None:
        self._clear = False
        super()._refuse(refused)

    def _leave(self, last: bytes) -> None:
        self._clear = False
        super()._leave(last)

    def _give_up_waiting(self) -> None:
        """The parser has the clocks for a body that is slow to come."""
        if self._half:
            data, self._half = self._half, b""
            self._candidate = candidate(data)
            super().data_received(data)

    def tend(self, now: float) -> None:
        self._give_up_waiting()
        if self._used:
            self._used, self.last_active = False, now
        super().tend(now)

    def shutdown(self) -> None:
        self._give_up_waiting()
        if not self._in_lane:
            super().shutdown()
