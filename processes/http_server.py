"""uvicorn under our own signal handling: served until told to stop, then drained."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence

import uvicorn


class Server(uvicorn.Server):
    """Leaves signals alone: `processes.signals` has them, since more than HTTP must end on SIGTERM."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_until(config: uvicorn.Config, sockets: Sequence[socket.socket], stop: asyncio.Event) -> None:
    """Serves until `stop`, then finishes what is in flight within the config's graceful time.

    Ends early, with the server's own error, if it cannot start.
    """
    server = Server(config)
    serving = asyncio.create_task(server.serve(list(sockets)))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.should_exit = True
    await serving
