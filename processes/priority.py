"""The priority of one thread, below that of its process."""

from __future__ import annotations

import os
import sys
import threading


def lower_priority(niceness: int) -> None:
    """Of the calling thread, 0 to 19. Elsewhere than on Linux a thread has no priority of its own, and nothing happens."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
