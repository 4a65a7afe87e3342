"""One child's process: spawned, read, watched until it is ready, ended, reaped.

Laws:
1. A child that exits before it is ready fails at once, with its exit code and its last log lines; only a silent
   one costs the timeout.
2. Every process that was started is reported to `on_exit` exactly once, after it was reaped.
3. It is ended by SIGTERM (and SIGCONT, a paused child must hear it), then SIGKILL to the whole group. It has a session of
   its own, so Ctrl-C reaches only the parent, and it dies with it (see parent_death for the thread that must stay alive).

It must not know other children, nor whether it will be started again.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

from processes.child import Child, StartFailed
from processes.child_output import last_lines, open_log, pump
from processes.parent_death import GroupWatcher, tied_to_parent

log = logging.getLogger(__name__)

POLL_S = 0.05

OnExit = Callable[[str, int, int], None]


class ChildProcess:
    def __init__(
        self,
        child: Child,
        *,
        on_exit: OnExit | None,
        write_line: Callable[[str, str], None],
        watcher: Callable[[], GroupWatcher | None],
    ) -> None:
        self.child = child
        self.exit: asyncio.Task[int] | None = None
        self.pid: int | None = None
        self.ready_at: float | None = None
        self._on_exit, self._write_line, self._watcher = on_exit, write_line, watcher
        self._tail: deque[str] = deque(maxlen=20)

    def last_lines(self) -> list[str]:
        return last_lines(self.child.log) if isinstance(self.child.log, Path) else list(self._tail)

    async def launch(self) -> None:
        """Returns when it is ready; `StartFailed` when it never was, and then it is gone again."""
        self.ready_at = None
        await self._spawn()
        try:
            await self._until_ready()
            self.ready_at = time.monotonic()
        except StartFailed:
            await self.end(signal.SIGKILL)
            raise

    async def _spawn(self) -> None:
        child = self.child
        self._tail.clear()
        self.exit = None
        output: int | None = None
        try:
            watcher = self._watcher()
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
        if watcher is not None:
            watcher.add(process.pid)
        self.pid = process.pid
        self.exit = asyncio.create_task(self._reap(process), name=f"reap:{child.name}")
        log.debug("child_started", extra={"child": child.name, "child_pid": process.pid})

    async def _reap(self, process: asyncio.subprocess.Process) -> int:
        name = self.child.name
        if process.stdout is not None:
            await pump(process.stdout, self._tail, lambda line: self._write_line(name, line))
        code = await process.wait()
        self.pid = None
        if (watcher := self._watcher()) is not None:
            watcher.remove(process.pid)
        log.info("child_exited", extra={"child": name, "child_pid": process.pid, "returncode": code})
        if self._on_exit is not None:
            self._on_exit(name, process.pid, code)
        return code

    async def _until_ready(self) -> None:
        child = self.child
        if child.ready is None:
            return
        assert self.exit is not None
        polling = asyncio.ensure_future(_poll(child.name, child.ready, child.ready_timeout_s))
        try:
            await asyncio.wait({self.exit, polling}, return_when=asyncio.FIRST_COMPLETED)
            if self.exit.done():
                code = self.exit.result()
                raise StartFailed(child.name, f"exited with {code} before it was ready", self.last_lines())
            try:
                polling.result()
            except TimeoutError as error:
                raise StartFailed(child.name, str(error), self.last_lines()) from error
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)

    async def end(self, with_signal: signal.Signals) -> None:
        """Returns when it is gone; at once when it does not run."""
        if self.exit is None or self.pid is None:
            return
        # The group exists as long as its leader was not reaped, and `pid` is None from then on.
        with contextlib.suppress(ProcessLookupError):
            if with_signal is signal.SIGKILL:
                os.killpg(self.pid, signal.SIGKILL)
            else:
                os.kill(self.pid, with_signal)
                os.kill(self.pid, signal.SIGCONT)
        done, _ = await asyncio.wait({self.exit}, timeout=self.child.stop_timeout_s)
        if not done:
            log.warning("child_killed", extra={"child": self.child.name, "after_s": self.child.stop_timeout_s})
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            await asyncio.wait({self.exit})


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
