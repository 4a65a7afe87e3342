"""SIGTERM and SIGINT as one event.

Law: the first signal sets the event, every further one is noted and changes nothing, because a drain that was cut short
loses what it was draining. A drain has its own deadlines; who cannot wait for them sends SIGKILL.
"""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@asynccontextmanager
async def stop_on_signals() -> AsyncIterator[asyncio.Event]:
    """Yields an event that is set by SIGTERM or SIGINT. Only in the main thread."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def received(number: signal.Signals) -> None:
        log.info("stop_requested" if not stop.is_set() else "already_stopping", extra={"signal": number.name})
        stop.set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, received, number)
    try:
        yield stop
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
