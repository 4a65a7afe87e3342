"""SIGTERM and SIGINT as one event.

Law: the first signal sets the event. A further one is noted, and sets `again`, for those who drain what a client can ask
once more; everybody else ignores it, because what is said to the log is lost if its drain is cut short.
"""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop(asyncio.Event):
    """Set by the first signal; `again` by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.again = asyncio.Event()


@asynccontextmanager
async def stop_on_signals() -> AsyncIterator[Stop]:
    """Yields an event that is set by SIGTERM or SIGINT. Only in the main thread."""
    stop = Stop()
    loop = asyncio.get_running_loop()

    def received(number: signal.Signals) -> None:
        log.info("stop_requested" if not stop.is_set() else "already_stopping", extra={"signal": number.name})
        if stop.is_set():
            stop.again.set()
        stop.set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, received, number)
    try:
        yield stop
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
