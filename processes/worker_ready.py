"""How a parent learns that one worker accepts, where all of them share a port: DIR/ready/NUMBER holds its pid.

Law: a file of a process that is gone says nothing, because the parent knows the pid that it waits for.
"""

from __future__ import annotations

import os
from pathlib import Path

import structlog

log = structlog.get_logger()


def say_ready(directory: Path, number: int) -> None:
    """This process accepts connections from here on."""
    path = directory / "ready" / str(number)
    half = path.with_suffix(".half")
    try:
        path.parent.mkdir(exist_ok=True)
        half.write_text(str(os.getpid()), "ascii")
        half.replace(path)
    except OSError as error:
        # A full disk: the parent waits in vain and restarts no other worker, while this one serves.
        log.error("readiness_not_written", cause=error.strerror)


def is_ready(directory: Path, number: int, pid: int) -> bool:
    """Whether that process said so."""
    try:
        return (directory / "ready" / str(number)).read_text("ascii") == str(pid)
    except OSError:
        return False
