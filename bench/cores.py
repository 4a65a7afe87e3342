"""Processes and the cores they run on, out of /proc: a server with its children, what it used, where it may run.

Laws: a process is known by pid *and* start time, so that a pid that was given out again is never touched.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    started: int
    parent: int
    ticks: int
    """User and system time of the process and of its children that ended."""


def two_cores() -> tuple[int, int]:
    """For the server, and for what asks it."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RuntimeError("missing: a second core, for the client")
    return cores[0], cores[1]


def tree(root: int) -> list[Process]:
    """`root` and all below it; empty when it is gone."""
    everyone = {p.pid: p for p in _everyone()}
    found = [everyone[root]] if root in everyone else []
    for process in found:
        found.extend(p for p in everyone.values() if p.parent == process.pid)
    return found


def cpu_s(root: int) -> float:
    return sum(p.ticks for p in tree(root)) / TICKS


def rss_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024


def pin(pids: Collection[int], cores: Collection[int]) -> None:
    """Every thread of them; threads and children that come later inherit it."""
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(task.name), cores)


@contextlib.contextmanager
def pinned(root: int, core: int) -> Iterator[None]:
    """A tree on one core, and afterwards on all of ours again."""
    everywhere = os.sched_getaffinity(0)
    pin([p.pid for p in tree(root)], {core})
    try:
        yield
    finally:
        pin([p.pid for p in tree(root)], everywhere)


def kill(processes: Collection[Process]) -> None:
    """Ends those of them that still live."""
    alive = {(p.pid, p.started) for p in _everyone()}
    for process in processes:
        if (process.pid, process.started) in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def _everyone() -> Iterator[Process]:
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                yield Process(int(path.name), int(fields[19]), int(fields[1]), sum(map(int, fields[11:15])))
