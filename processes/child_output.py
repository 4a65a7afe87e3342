"""What a child prints: to a file that does not grow for ever, or to our stderr behind its name.

It must not know how the child is started or ends.
"""

import asyncio
import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

# A restart begins a new file above this, and keeps one old one: a crash loop cannot fill the disk.
LOG_LIMIT_BYTES = 16 << 20
_TAIL_BYTES = 4096
_LINE_LIMIT_BYTES = 1 << 16


def to_stderr(name: str, line: str) -> None:
    sys.stderr.write(f"{name:>12} | {line}\n")


def open_log(path: Path) -> int:
    """A descriptor that appends to the file, made with its folders; the caller closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_LIMIT_BYTES:
        path.rename(path.with_name(path.name + ".1"))
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def last_lines(path: Path, count: int = 20) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


async def pump(stream: asyncio.StreamReader, tail: deque[str], write: Callable[[str], None]) -> None:
    """Hands on line by line until the stream ends; a line without an end is cut, not collected for ever."""
    rest = b""
    while chunk := await stream.read(_LINE_LIMIT_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LINE_LIMIT_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            write = _hand_on(line, tail, write)
    if rest:
        _hand_on(rest, tail, write)


def _hand_on(line: bytes, tail: deque[str], write: Callable[[str], None]) -> Callable[[str], None]:
    """Writes one line and returns what writes the next: nothing, once our own output is gone.

    Reading goes on then, because a child that nobody reads from stops at a full pipe.
    """
    text = line.decode(errors="replace")
    tail.append(text)
    try:
        write(text)
    except OSError:
        return lambda _: None
    return write
