"""The stack from a synchronous program, such as a test suite: started by a `with`, its parts stopped and hurt by name.

Laws:
1. The supervisor runs in an event loop of a thread of its own. The parts live as long as that thread (see
   processes.parent_death): they end with the `with` block, or with the process, however it ends.
2. A part that was stopped, killed or paused stays so until it is started or resumed; nothing restarts it behind the
   caller's back. It comes back on the same ports with the same data.

It must not know what is tested.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from mlcdn.local_stack.stack import StackAddresses, start_stack
from processes.supervisor import Supervisor

T = TypeVar("T")


class RunningStack:
    def __init__(self, supervisor: Supervisor, addresses: StackAddresses, loop: asyncio.AbstractEventLoop) -> None:
        self.addresses = addresses
        self._supervisor = supervisor
        self._loop = loop

    def pids(self) -> dict[str, int]:
        return self._supervisor.pids()

    def stop_part(self, name: str) -> None:
        """SIGTERM, and waits for the end."""
        self._call(self._supervisor.stop_child(name))

    def kill_part(self, name: str) -> None:
        """SIGKILL, and waits for the end."""
        self._call(self._supervisor.stop_child(name, with_signal=signal.SIGKILL))

    def start_part(self, name: str) -> None:
        """Starts a stopped or killed part, and waits until it is ready."""
        self._call(self._supervisor.start_child(name))

    def pause_part(self, name: str) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self._supervisor.signal_child(name, signal.SIGSTOP)

    def resume_part(self, name: str) -> None:
        self._supervisor.signal_child(name, signal.SIGCONT)

    def _call(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


@contextmanager
def running_stack(
    directory: Path,
    regions: Sequence[str],
    *,
    progress: Callable[[str], None] = lambda _: None,
    kafka_port: int | None = None,
) -> Iterator[RunningStack]:
    """Runs the stack inside the block. StackError if it cannot start; GaveUp at the end if a part died for good."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    started: Future[RunningStack] = Future()

    async def live() -> None:
        async with Supervisor() as supervisor:
            addresses = await start_stack(supervisor, directory, regions, progress, kafka_port=kafka_port)
            started.set_result(RunningStack(supervisor, addresses, loop))
            await supervisor.run_until(stop)

    ended: Future[None] = Future()
    main = loop.create_task(live())

    def run() -> None:
        try:
            loop.run_until_complete(main)
            ended.set_result(None)
        except BaseException as error:  # noqa: BLE001 (handed to the thread that waits)
            if not started.done():
                started.set_exception(error)
            ended.set_exception(error)
        finally:
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=run, name="local-stack")
    thread.start()
    try:
        running = started.result()
    except BaseException:
        _unless_closed(loop, main.cancel)
        thread.join()
        raise
    try:
        yield running
    finally:
        _unless_closed(loop, stop.set)
        thread.join()
    ended.result()


def _unless_closed(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop is closed: the thread has ended already
        loop.call_soon_threadsafe(callback)
