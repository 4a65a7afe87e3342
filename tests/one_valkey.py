"""One real Valkey for a test: started, hurt and healed inside the test's own event loop."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mlcdn.local_stack import valkey
from processes.ports import LOOPBACK, free_port
from processes.supervisor import StartFailed, Supervisor

NAME = "valkey"


class Valkey:
    def __init__(self, supervisor: Supervisor, port: int) -> None:
        self._supervisor = supervisor
        self.url = f"redis://{LOOPBACK}:{port}/0"

    def pause(self) -> None:
        self._supervisor.signal_child(NAME, signal.SIGSTOP)

    def resume(self) -> None:
        self._supervisor.signal_child(NAME, signal.SIGCONT)

    async def stop(self) -> None:
        await self._supervisor.stop_child(NAME)

    async def start(self) -> None:
        await self._supervisor.start_child(NAME)


@asynccontextmanager
async def one_valkey(directory: Path) -> AsyncIterator[Valkey]:
    async with Supervisor() as supervisor:
        for left in (3, 2, 1, 0):
            # Somebody may take the port between the choice and the start.
            port = free_port()
            try:
                await supervisor.add(valkey.child(NAME, directory / "valkey", port, directory / "valkey.log"))
                break
            except StartFailed:
                if not left:
                    raise
        yield Valkey(supervisor, port)
