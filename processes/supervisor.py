"""Supervisor: starts children in order, knows when each is ready, restarts what dies, stops all in reverse.

Laws:
1. One task a child owns its whole life: wait for what it comes `after`, spawn, poll `ready`, watch, restart. Whoever
   wants the child gone cancels that task first, so nothing can bring it back.
2. An exit nobody asked for is followed by a restart after 0.1 s, doubled each time up to 5 s. After `max_restarts` the
   supervisor gives up, and `run_until` raises. A life of 30 s forgives the count.
3. Children are stopped after everything that comes `after` them.

It must not know what its children do, only how they start, answer and end.
"""

import asyncio
import graphlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from processes.child import Child, GaveUp, StartFailed, SupervisorError
from processes.child_output import to_stderr
from processes.child_process import ChildProcess, OnExit
from processes.parent_death import GroupWatcher, group_watcher

log = logging.getLogger(__name__)

__all__ = ["Child", "GaveUp", "StartFailed", "Supervisor", "SupervisorError"]

FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 5.0
FORGIVEN_AFTER_S = 30.0


class Supervisor:
    """Use it as `async with Supervisor() as supervisor:`; leaving the block stops every child."""

    def __init__(self, *, on_exit: OnExit | None = None, write_line: Callable[[str, str], None] = to_stderr) -> None:
        self._on_exit = on_exit
        self._write_line = write_line
        self._kept: dict[str, _Kept] = {}
        self._failure: GaveUp | None = None
        self._failed = asyncio.Event()
        self._at_stop: list[Callable[[], None]] = []
        self._watcher: GroupWatcher | None = None

    async def start(self, children: Iterable[Child]) -> None:
        """Starts all in parallel, each once what it comes `after` is ready. If one fails, all are stopped again."""
        kept = [self._register(child) for child in children]
        try:
            self._generations()
            for one in kept:
                self._begin(one)
            await asyncio.gather(*(asyncio.shield(one.up) for one in kept))
        except BaseException:
            await self.stop()
            raise

    async def add(self, child: Child) -> None:
        """Starts one more. If it fails it is forgotten, and the others go on."""
        kept = self._register(child)
        try:
            self._generations()
            self._begin(kept)
            await asyncio.shield(kept.up)
        except BaseException:
            if self._kept.get(child.name) is kept:  # else a `stop` came in between
                await self.remove(child.name)
            raise

    async def remove(self, name: str) -> None:
        """Stops one and forgets it."""
        await self.stop_child(name)
        self._kept.pop(name, None)

    async def stop_child(self, name: str, *, with_signal: signal.Signals = signal.SIGTERM) -> None:
        """Stops one and leaves it stopped; nothing happens to what comes after it. SIGKILL spares the waiting."""
        kept = self._kept[name]
        if kept.keeper is not None:
            kept.keeper.cancel()
            await asyncio.wait({kept.keeper})
        await kept.process.end(with_signal)

    async def start_child(self, name: str) -> None:
        """Starts one that was stopped, and returns when it is ready. The same argv, so the same ports and data."""
        kept = self._kept[name]
        if kept.keeper is not None and not kept.keeper.done():
            raise ValueError(f"{name} is running already")
        kept.restarts = 0
        self._begin(kept)
        await asyncio.shield(kept.up)

    async def restart_child(self, name: str) -> None:
        await self.stop_child(name)
        await self.start_child(name)

    def signal_child(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to the whole group of a running child; KeyError if it is not running."""
        os.killpg(self.pids()[name], number)

    def names(self) -> set[str]:
        """Every child it keeps, running or not."""
        return set(self._kept)

    def pids(self) -> dict[str, int]:
        """The running children."""
        return {name: pid for name, kept in self._kept.items() if (pid := kept.process.pid) is not None}

    def at_stop(self, callback: Callable[[], None]) -> None:
        """Registers what is to be released after the last child has gone; latest first."""
        self._at_stop.append(callback)

    async def run_until(self, stop: asyncio.Event) -> None:
        """Returns when `stop` is set; raises GaveUp when a child died too often. Stops nothing by itself."""
        waits = [asyncio.ensure_future(stop.wait()), asyncio.ensure_future(self._failed.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Stops every child, dependents first, and forgets them."""
        keepers = {kept.keeper for kept in self._kept.values() if kept.keeper is not None}
        for keeper in keepers:
            keeper.cancel()
        if keepers:
            await asyncio.wait(keepers)
        for generation in reversed(self._generations(check=False)):
            await asyncio.gather(*(self._kept[name].process.end(signal.SIGTERM) for name in generation))
        self._kept.clear()
        while self._at_stop:
            self._at_stop.pop()()
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- one child

    def _register(self, child: Child) -> "_Kept":
        if child.name in self._kept:
            raise ValueError(f"two children named {child.name}")
        kept = self._kept[child.name] = _Kept(
            ChildProcess(child, on_exit=self._on_exit, write_line=self._write_line, watcher=self._group_watcher)
        )
        return kept

    def _generations(self, *, check: bool = True) -> list[tuple[str, ...]]:
        """Names in start order; those of one tuple do not depend on each other."""
        if check:
            for kept in self._kept.values():
                for name in kept.child.after:
                    if name not in self._kept:
                        raise ValueError(f"{kept.child.name} comes after {name}, which nobody started")
        sorter = graphlib.TopologicalSorter(
            {name: [a for a in kept.child.after if a in self._kept] for name, kept in self._kept.items()}
        )
        try:
            sorter.prepare()
        except graphlib.CycleError:
            if check:
                raise
            return [tuple(self._kept)]
        generations = []
        while sorter.is_active():
            ready = sorter.get_ready()
            generations.append(ready)
            sorter.done(*ready)
        return generations

    def _begin(self, kept: "_Kept") -> None:
        kept.up = asyncio.get_running_loop().create_future()
        kept.keeper = asyncio.create_task(self._live(kept), name=f"supervisor:{kept.child.name}")

    async def _live(self, kept: "_Kept") -> None:
        failure = StartFailed(kept.child.name, "was stopped before it was ready")
        try:
            for name in kept.child.after:
                try:
                    await asyncio.shield(self._kept[name].up)
                except StartFailed as error:
                    raise StartFailed(kept.child.name, f"needs {name}: {error}") from error
            await kept.process.launch()
            kept.up.set_result(None)
        except StartFailed as error:
            failure = error
            return
        finally:
            if not kept.up.done():
                kept.up.set_exception(failure)
                kept.up.exception()  # who waits for it gets it; nobody may be waiting
        await self._restart_for_ever(kept)

    async def _restart_for_ever(self, kept: "_Kept") -> None:
        child = kept.child
        while True:
            if kept.process.exit is not None:
                await asyncio.wait({kept.process.exit})
                if kept.process.ready_at is not None and time.monotonic() - kept.process.ready_at >= FORGIVEN_AFTER_S:
                    kept.restarts = 0
            if not child.restart or kept.restarts >= child.max_restarts:
                self._failure = GaveUp(child.name, f"died after {kept.restarts} restarts", kept.process.last_lines())
                log.error("child_given_up", extra={"child": child.name, "restarts": kept.restarts})
                self._failed.set()
                return
            delay = min(FIRST_BACKOFF_S * 2**kept.restarts, LAST_BACKOFF_S)
            kept.restarts += 1
            log.warning("child_restarting", extra={"child": child.name, "restart": kept.restarts, "after_s": delay})
            await asyncio.sleep(delay)
            try:
                await kept.process.launch()
            except StartFailed as error:
                log.warning("child_restart_failed", extra={"child": child.name, "error": str(error)})

    def _group_watcher(self) -> GroupWatcher | None:
        if self._watcher is None:
            self._watcher = group_watcher()
        return self._watcher


class _Kept:
    """What the supervisor knows of one child."""

    def __init__(self, process: ChildProcess) -> None:
        self.process, self.child = process, process.child
        self.up: asyncio.Future[None]
        self.keeper: asyncio.Task[None] | None = None
        self.restarts = 0
