"""How a child dies with its parent, however the parent dies.

Laws:
1. Linux: the kernel sends SIGKILL when the *thread* that forked the child ends (PR_SET_PDEATHSIG), so children are
   spawned from a thread that lives as long as they should: the main thread, or a thread that runs an event loop.
2. The signal is asked for after the fork, so a parent that died in between is noticed by comparing getppid.
3. What runs between fork and exec allocates nothing new, imports nothing and takes no lock: the function of libc is
   bound when this module is imported.
4. Elsewhere (macOS has no such signal) one small watcher process a supervisor reads a pipe that only the parent can
   write to, and kills the process groups it was told of when the pipe ends.

It must not know what the children are.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None)

_WATCHER = """
import os, signal, sys
alive = set()
for line in sys.stdin:
    verb, pid = line.split()
    (alive.add if verb == "add" else alive.discard)(int(pid))
for pid in alive:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def tied_to_parent() -> Callable[[], None] | None:
    """What a child runs between fork and exec so that it dies with the calling thread; None where no kernel does it."""
    if not _LINUX:
        return None
    prctl, getppid, parent, sigkill = _libc.prctl, os.getppid, os.getpid(), int(signal.SIGKILL)

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, sigkill, 0, 0, 0)
        if getppid() != parent:
            os._exit(127)

    return tie


class GroupWatcher:
    """Kills the process groups it was told of when the process that holds it is gone. For systems without law 1."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _WATCHER], stdin=subprocess.PIPE, start_new_session=True, text=True
        )

    def add(self, group: int) -> None:
        self._tell("add", group)

    def remove(self, group: int) -> None:
        self._tell("remove", group)

    def close(self) -> None:
        """Ends the watcher; call it when every group it knew is gone."""
        self._process.communicate(timeout=5)

    def _tell(self, verb: str, group: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{verb} {group}\n")
        self._process.stdin.flush()


def group_watcher() -> GroupWatcher | None:
    """The watcher a supervisor needs on this system, None where the kernel does it."""
    return None if _LINUX else GroupWatcher()
