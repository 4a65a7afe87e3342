"""A rolling restart: on SIGHUP the node's workers are replaced one after the other, while the others serve.

    drain one (its sibling, or the open port, takes what comes) → start it again → it accepts → the next one

Laws:
- At most one worker is away. A new one that does not accept in time ends the restart: the others stay as they are.
- A SIGHUP during a restart asks for one more, and ten of them for no more than one.

It must not know what a worker serves.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import structlog

from processes.supervisor import Supervisor

ACCEPTS_S: Final = 60.0
_POLL_S: Final = 0.05

log = structlog.get_logger()


@asynccontextmanager
async def restarting_on_hangup(
    supervisor: Supervisor, workers: Sequence[str], accepts: Callable[[str, int], bool]
) -> AsyncIterator[None]:
    """`accepts` says of a worker's name and pid whether it takes connections."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, asked.set)
    rolling = asyncio.create_task(_roll_on(supervisor, workers, accepts, asked), name="rolling")
    try:
        yield
    finally:
        # Ignored rather than given back: its default would kill a parent that drains.
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        rolling.cancel()
        await asyncio.gather(rolling, return_exceptions=True)


async def _roll_on(
    supervisor: Supervisor, workers: Sequence[str], accepts: Callable[[str, int], bool], asked: asyncio.Event
) -> None:
    while True:
        await asked.wait()
        asked.clear()
        log.info("rolling_restart", workers=len(workers))
        for name in workers:
            await supervisor.restart_child(name)
            if not await _accepts(supervisor, name, accepts):
                log.error("rolling_restart_ended", worker=name, after_s=ACCEPTS_S)
                break
        else:
            log.info("rolling_restart_done", workers=len(workers))


async def _accepts(supervisor: Supervisor, name: str, accepts: Callable[[str, int], bool]) -> bool:
    loop = asyncio.get_running_loop()
    end = loop.time() + ACCEPTS_S
    while loop.time() < end:
        pid = supervisor.pids().get(name)
        if pid is not None and accepts(name, pid):
            return True
        await asyncio.sleep(_POLL_S)
    return False
