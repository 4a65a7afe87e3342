"""How a parent learns that one worker accepts, where all of them share a port: DIR/ready/NUMBER holds its pid.

Law: a file of a process that is gone says nothing, because the parent knows the pid that it waits for.
"""

from __future__ import annotations

import os
from pathlib import Path


def say_ready(directory: Path, number: int) -> None:
    """This process accepts connections from here on."""
    path = directory / "ready" / str(number)
    path.parent.mkdir(exist_ok=True)
    half = path.with_suffix(".half")
    half.write_text(str(os.getpid()), "ascii")
    half.replace(path)


def is_ready(directory: Path, number: int, pid: int) -> bool:
    """Whether that process said so."""
    try:
        return (directory / "ready" / str(number)).read_text("ascii") == str(pid)
    except OSError:
        return False
