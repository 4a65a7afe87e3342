"""uvicorn under our own signal handling: served until told to stop, then drained, its connections swept all the while.

    drain     every answer closes its connection from here on
    shutdown  nothing more is accepted; what is in flight is finished, within the config's graceful time
    end_at    until somebody cannot wait for that

Law: one sweep a second for all connections, in slices that do not hold up a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Final, cast

import uvicorn

from processes.http_connection import GuardedProtocol
from processes.http_limits import Limits, Reason, Shared
from processes.tls import Certificate

log = logging.getLogger(__name__)

SWEEP_S: Final = 1.0
DRAIN_SWEEP_S: Final = 0.1
_SLICE: Final = 256


class Server(uvicorn.Server):
    """Leaves signals alone: `processes.signals` has them, since more than HTTP must end on SIGTERM.

    Its config says `http=GuardedProtocol`, or a subclass.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        limits: Limits | None = None,
        on_cut: Callable[[Reason], None] = lambda _: None,
        certificate: Certificate | None = None,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._certificate, self._on_start = certificate, on_start
        self.shared = Shared(limits or Limits(), on_cut)
        self.server_state = self.shared
        self._beside: list[asyncio.Task[None]] = []

    def drain(self) -> None:
        if self.shared.drains_since is None:
            self.shared.drains_since = asyncio.get_running_loop().time()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, for sockets that listen already, with a bound on a handshake, which it leaves at a minute."""
        if self._certificate is None:
            await super().startup(sockets)
        else:
            await self.lifespan.startup()
            loop, limits = asyncio.get_running_loop(), self.shared.limits
            self.servers = [
                await loop.create_server(
                    self._protocol,
                    sock=listening,
                    backlog=self.config.backlog,
                    ssl=self._certificate.context,
                    ssl_handshake_timeout=limits.head_timeout_s,
                    ssl_shutdown_timeout=limits.linger_s,
                )
                for listening in sockets or ()
            ]
            self.started = True
            self._beside.append(asyncio.create_task(self._certificate.watch(), name="certificate:watch"))
        self._beside.append(asyncio.create_task(self._sweep(), name="connections:sweep"))
        self._on_start()

    async def end_at(self, again: asyncio.Event) -> None:
        """Cuts the drain short: what is still in flight is lost."""
        await again.wait()
        self.force_exit = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.drain()
        try:
            await super().shutdown(sockets)
        finally:
            # Whoever is left learns it now, not when the process has said its last word to the log.
            for connection in [*self._connections(), *self.shared.lingering]:
                connection.transport.abort()
            for task in self._beside:
                task.cancel()
            await asyncio.gather(*self._beside, return_exceptions=True)

    def _connections(self) -> set[GuardedProtocol]:
        return cast("set[GuardedProtocol]", self.shared.connections)

    def _protocol(self) -> asyncio.Protocol:
        make = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        return make(config=self.config, server_state=self.shared, app_state=self.lifespan.state)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S if self.shared.drains_since is None else DRAIN_SWEEP_S)
            swept = iter([*self._connections(), *self.shared.lingering])
            while part := list(itertools.islice(swept, _SLICE)):
                now = loop.time()
                for connection in part:
                    try:
                        connection.tend(now)
                    except Exception:
                        # One connection's bug must not leave the others unswept.
                        log.exception("connection_not_tended")
                        connection.transport.abort()
                await asyncio.sleep(0)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_until(server: Server, sockets: Sequence[socket.socket], stop: asyncio.Event) -> None:
    """Serves until `stop`, then finishes what is in flight within the config's graceful time.

    Ends early, with the server's own error, if it cannot start.
    """
    serving = asyncio.create_task(server.serve(list(sockets)))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.should_exit = True
    await serving
