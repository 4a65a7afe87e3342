"""Sessions that there is no room for: let go, and loaded again for the next request that needs them.

    too much in memory → residency.py says who → let go → the engine has work for it → loaded again, and who waits is told

Laws: what a request may need is never let go under it; a session that does not come back is an error for who waits, and
not a wait; one that nobody needs any more when it comes is closed.

It must not know the board, or which release should be served.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

import structlog

from edge_node.serving.engine import Engine
from edge_node.serving.model_slot import Slots
from edge_node.serving.preparing import PhaseFailed, Preparing
from edge_node.serving.residency import to_let_go
from edge_node.serving.served import Served
from schemas.errors import NotReady

LOOK_AT_MEMORY_S: Final = 1.0

log = structlog.get_logger()


class Sleeping:
    """One event loop owns it. `memory_bytes` of 0 is no limit."""

    def __init__(self, slots: Slots, directory: Path, preparing: Preparing, memory_bytes: int) -> None:
        self._slots, self._directory, self._preparing = slots, directory, preparing
        self._memory_bytes = memory_bytes
        self._waking: dict[Served, asyncio.Task[None]] = {}
        self._next_look = 0.0
        slots.wake = self.wake

    def tend(self) -> None:
        """Lets go what there is no room for, once a second."""
        now = time.monotonic()
        if not self._memory_bytes or now < self._next_look:
            return
        self._next_look = now + LOOK_AT_MEMORY_S
        for name, which in to_let_go([slot.resident(now) for slot in self._slots], self._memory_bytes):
            slot = self._slots.find(name)
            if slot is not None:
                log.info("session_let_go", model=name, which=which)
                slot.let_go(which)

    async def close(self) -> None:
        tasks = list(self._waking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self, served: Served) -> None:
        """The engine has work for a session that was let go."""
        if served not in self._waking and served.engine is not None:
            task = asyncio.get_running_loop().create_task(self._wake(served, served.engine))
            self._waking[served] = task
            task.add_done_callback(lambda _: self._waking.pop(served, None))

    async def _wake(self, served: Served, engine: Engine) -> None:
        assert served.model is not None
        path = self._directory / served.path
        try:
            model = await self._preparing.wake(served.wanted, path)
        except PhaseFailed as failed:
            log.error("session_not_loaded_again", model=served.name, cause=failed.cause)
            engine.woken(served, NotReady(f"model {served.name} could not be loaded again"))
            return
        slot = self._slots.find(served.name)
        if not served.in_flight and (slot is None or not slot.has(served.model)):
            # It left its seat meanwhile, and so did who waited for it.
            model.close()
            return
        served.model.reopen(model)
        log.info("session_loaded_again", model=served.name, digest=served.digest[:12])
        engine.woken(served)
