"""The priority of one thread, below that of its process. Elsewhere than on Linux a thread has none of its own."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Final

_LOWEST: Final = 19
_SCHEDSTAT: Final = Path("/proc/thread-self/schedstat")


def lower_priority(niceness: int) -> None:
    """Of the calling thread, 0 to 19."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def only_spare_time() -> None:
    """The calling thread runs where nobody else wants the core, which counts as idle while it does: whoever wakes up has
    it at once, where even a thread of niceness 19 may finish its slice first (3 ms).

    Not for what holds the interpreter for long: on a machine without spare time it would hold it for longer.
    """
    if sys.platform == "linux":
        try:
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        except OSError:
            # A sandbox may forbid the call; the next best is allowed everywhere.
            lower_priority(_LOWEST)


def waited_s() -> float:
    """For how long the calling thread was ready to run and had no core, since it began; 0 where the system does not say."""
    try:
        return int(_SCHEDSTAT.read_bytes().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
