"""Supervisor: starts children in order, knows when each is ready, restarts what dies, stops all in reverse.

Laws:
1. One task a child owns its whole life: wait for what it comes `after`, spawn, poll `ready`, watch, restart. Whoever
   wants the child gone cancels that task first, so nothing can bring it back.
2. A child that exits before it is ready fails at once, with its exit code and its last log lines; only a silent
   one costs the timeout.
3. An exit nobody asked for is followed by a restart after 0.1 s, doubled each time up to 5 s. After `max_restarts` the
   supervisor gives up, and `run_until` raises. A life of 30 s forgives the count.
4. Every process that was started is reported to `on_exit` exactly once, after it was reaped.
5. Children are stopped after everything that comes `after` them: SIGTERM (and SIGCONT, a paused child must hear
   it), then SIGKILL to the whole group. They have a session of their own, so Ctrl-C reaches only the parent, and they
   die with it (see parent_death for the thread that must stay alive).

It must not know what its children do, only how they start, answer and end.
"""

import asyncio
import contextlib
import graphlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from processes.child import Child, GaveUp, StartFailed, SupervisorError
from processes.child_output import last_lines, open_log, pump, to_stderr
from processes.parent_death import GroupWatcher, group_watcher, tied_to_parent

log = logging.getLogger(__name__)

__all__ = ["Child", "GaveUp", "StartFailed", "Supervisor", "SupervisorError"]

POLL_S = 0.05
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 5.0
FORGIVEN_AFTER_S = 30.0


OnExit = Callable[[str, int, int], None]


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
        await self._end(kept, with_signal)

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
        return {name: kept.pid for name, kept in self._kept.items() if kept.pid is not None}

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
            await asyncio.gather(*(self._end(self._kept[name], signal.SIGTERM) for name in generation))
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
        kept = self._kept[child.name] = _Kept(child)
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
            await self._launch(kept)
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
            if kept.exit is not None:
                await asyncio.wait({kept.exit})
                if kept.ready_at is not None and time.monotonic() - kept.ready_at >= FORGIVEN_AFTER_S:
                    kept.restarts = 0
            if not child.restart or kept.restarts >= child.max_restarts:
                self._failure = GaveUp(child.name, f"died after {kept.restarts} restarts", kept.last_lines())
                log.error("child_given_up", extra={"child": child.name, "restarts": kept.restarts})
                self._failed.set()
                return
            delay = min(FIRST_BACKOFF_S * 2**kept.restarts, LAST_BACKOFF_S)
            kept.restarts += 1
            log.warning("child_restarting", extra={"child": child.name, "restart": kept.restarts, "after_s": delay})
            await asyncio.sleep(delay)
            try:
                await self._launch(kept)
            except StartFailed as error:
                log.warning("child_restart_failed", extra={"child": child.name, "error": str(error)})

    async def _launch(self, kept: "_Kept") -> None:
        kept.ready_at = None
        await self._spawn(kept)
        try:
            await self._until_ready(kept)
            kept.ready_at = time.monotonic()
        except StartFailed:
            await self._end(kept, signal.SIGKILL)
            raise

    async def _spawn(self, kept: "_Kept") -> None:
        child = kept.child
        kept.tail.clear()
        kept.exit = None
        output: int | None = None
        try:
            if self._watcher is None:
                self._watcher = group_watcher()
            match child.log:
                case Path():
                    output = open_log(child.log)
                case "prefix":
                    output = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                *child.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else asyncio.subprocess.STDOUT,
                cwd=child.cwd,
                env={**os.environ, **child.env},
                start_new_session=True,
                pass_fds=child.pass_fds,
                preexec_fn=tied_to_parent(),
            )
        except OSError as error:
            raise StartFailed(child.name, f"could not be started: {error}") from error
        finally:
            if output is not None and output >= 0:
                os.close(output)
        if self._watcher is not None:
            self._watcher.add(process.pid)
        kept.pid = process.pid
        kept.exit = asyncio.create_task(self._reap(kept, process), name=f"reap:{child.name}")
        log.debug("child_started", extra={"child": child.name, "child_pid": process.pid})

    async def _reap(self, kept: "_Kept", process: asyncio.subprocess.Process) -> int:
        name = kept.child.name
        if process.stdout is not None:
            await pump(process.stdout, kept.tail, lambda line: self._write_line(name, line))
        code = await process.wait()
        kept.pid = None
        if self._watcher is not None:
            self._watcher.remove(process.pid)
        log.info("child_exited", extra={"child": name, "child_pid": process.pid, "returncode": code})
        if self._on_exit is not None:
            self._on_exit(name, process.pid, code)
        return code

    async def _until_ready(self, kept: "_Kept") -> None:
        child = kept.child
        if child.ready is None:
            return
        assert kept.exit is not None
        polling = asyncio.ensure_future(_poll(child.name, child.ready, child.ready_timeout_s))
        try:
            await asyncio.wait({kept.exit, polling}, return_when=asyncio.FIRST_COMPLETED)
            if kept.exit.done():
                code = kept.exit.result()
                raise StartFailed(child.name, f"exited with {code} before it was ready", kept.last_lines())
            try:
                polling.result()
            except TimeoutError as error:
                raise StartFailed(child.name, str(error), kept.last_lines()) from error
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)

    async def _end(self, kept: "_Kept", with_signal: signal.Signals) -> None:
        if kept.exit is None or kept.pid is None:
            return
        # The group exists as long as its leader was not reaped, and `pid` is None from then on.
        with contextlib.suppress(ProcessLookupError):
            if with_signal is signal.SIGKILL:
                os.killpg(kept.pid, signal.SIGKILL)
            else:
                os.kill(kept.pid, with_signal)
                os.kill(kept.pid, signal.SIGCONT)
        done, _ = await asyncio.wait({kept.exit}, timeout=kept.child.stop_timeout_s)
        if not done:
            log.warning("child_killed", extra={"child": kept.child.name, "after_s": kept.child.stop_timeout_s})
            with contextlib.suppress(ProcessLookupError):
                os.killpg(kept.pid, signal.SIGKILL)
            await asyncio.wait({kept.exit})


class _Kept:
    """What the supervisor knows of one child."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.up: asyncio.Future[None]
        self.keeper: asyncio.Task[None] | None = None
        self.exit: asyncio.Task[int] | None = None
        self.pid: int | None = None
        self.ready_at: float | None = None
        self.restarts = 0
        self.tail: deque[str] = deque(maxlen=20)

    def last_lines(self) -> list[str]:
        return last_lines(self.child.log) if isinstance(self.child.log, Path) else list(self.tail)


async def _poll(name: str, ready: Callable[[], Awaitable[None]], timeout_s: float) -> None:
    last = "no answer"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    return await ready()
                except Exception as error:  # noqa: BLE001 (any refusal means "not yet"; the last one is reported)
                    last = f"{type(error).__name__}: {error}"
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise TimeoutError(f"was not ready within {timeout_s:g} s ({last})") from None
