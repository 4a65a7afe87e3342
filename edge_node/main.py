"""An edge node: ``python -m edge_node.main``. The parent of one agent and N workers; it answers nothing itself.

    1. the node's lock: one parent a directory
    2. the listening socket, which workers inherit, so that no connection is refused while one restarts
    3. the incarnation (slot 4 of the fence), before anything starts
    4. an agent that an earlier parent left is ended
    5. the agent and the workers
    6. on SIGTERM the workers drain, then the agent goes; a second one ends the drain
    SIGHUP restarts the workers, one after the other (`edge_node/rolling.py`)

    DIR/node.lock  DIR/pids.json {"agent": pid, "workers": [pid, …]}
    what the workers count together: `edge_node/metrics_folder.py`

Laws: a child that dies is started again for ever, with growing pauses; the agent may be gone and the workers serve; a
worker may be gone and the others serve. It must not know models, caches or the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import multiprocess

from edge_node import metrics_folder
from edge_node.board import INCARNATION, Fence, RealDisk
from edge_node.rolling import restarting_on_hangup
from processes import logs
from processes.ports import PortBusy, listen
from processes.signals import stop_on_signals
from processes.supervisor import Child, Supervisor
from processes.tls import CertificateRefused, certificate_of
from processes.worker_ready import is_ready
from schemas import settings as catalogue
from schemas.errors import Conflict, SettingsInvalid
from schemas.settings import Settings

AGENT_MODULE: Final = "edge_node.agent.main"
WORKER_MODULE: Final = "edge_node.serving.main"
AGENT_STOP_S: Final = 5.0
REAP_S: Final = 5.0
PIDS_S: Final = 0.1
PIDS_RETRY_S: Final = 1.0
_FOR_EVER: Final = 10**9

log = structlog.get_logger()


async def serve(settings: Settings) -> None:
    scheme = "https" if certificate_of(settings.tls_cert, settings.tls_key) else "http"
    directory = settings.dir.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    release = RealDisk().lock(directory / "node.lock")  # 1
    listener = listen(settings.host, settings.port)  # 2
    host, port = listener.getsockname()[:2]
    fence = Fence.open(directory / "board" / "fence", writable=True)
    fence.raise_to(INCARNATION, fence[INCARNATION] + 1)  # 3
    log.info("node_starts", node=settings.node, url=f"{scheme}://{host}:{port}", incarnation=fence[INCARNATION])
    fence.close()
    await end_old_agent(directory)  # 4
    metrics, give_back = metrics_folder.take(directory)

    def on_exit(name: str, pid: int, _: int) -> None:
        # Gauges of a dead process must not be summed up with those of the living.
        if name != "agent":
            multiprocess.mark_process_dead(pid, str(metrics))  # type: ignore[no-untyped-call]

    async with stop_on_signals() as stop, Supervisor(on_exit=on_exit) as supervisor:
        await supervisor.start(_children(settings, directory, metrics, listener.fileno()))  # 5
        watching = asyncio.create_task(_write_pids(supervisor, directory / "pids.json"))
        workers = [f"worker-{number}" for number in range(settings.workers)]
        try:
            async with restarting_on_hangup(
                supervisor, workers, lambda name, pid: is_ready(directory, _number(name), pid)
            ):
                await supervisor.run_until(stop)
        finally:
            watching.cancel()
        log.info("node_drains", node=settings.node)
        hurried = asyncio.create_task(_hurry(supervisor, workers, stop.again))
        await supervisor.stop()  # 6
        hurried.cancel()
    (directory / "pids.json").unlink(missing_ok=True)
    give_back()
    listener.close()
    release()


async def _hurry(supervisor: Supervisor, workers: list[str], again: asyncio.Event) -> None:
    """Who asks twice does not wait for clients: the second signal goes on to the workers."""
    await again.wait()
    running = supervisor.pids()
    for name in workers:
        if name in running:
            os.kill(running[name], signal.SIGTERM)


def _children(settings: Settings, directory: Path, metrics: Path, descriptor: int) -> list[Child]:
    shared = {"PROMETHEUS_MULTIPROC_DIR": str(metrics), "MLCDN_DIR": str(directory)}
    agent = Child(
        name="agent",
        argv=(sys.executable, "-m", AGENT_MODULE),
        env=shared,
        stop_timeout_s=AGENT_STOP_S,
        max_restarts=_FOR_EVER,
    )
    workers = [
        Child(
            name=f"worker-{number}",
            argv=(sys.executable, "-m", WORKER_MODULE),
            env=shared | {"MLCDN_LISTEN_FD": str(descriptor), "MLCDN_WORKER": str(number)},
            # Only for the order of stopping: a worker waits for nothing of the agent's.
            after=("agent",),
            pass_fds=(descriptor,),
            stop_timeout_s=settings.drain_s + 2,
            max_restarts=_FOR_EVER,
        )
        for number in range(settings.workers)
    ]
    return [agent, *workers]


async def end_old_agent(directory: Path) -> None:
    """Ends the agent that a killed parent left on the board. On Linux it is dying already."""
    path = directory / "board" / "lock"
    until = time.monotonic() + REAP_S
    asked: tuple[int, signal.Signals] | None = None
    while True:
        try:
            RealDisk().lock(path)()
            return
        except Conflict:
            pid = _holder(path)
        if time.monotonic() > until:
            raise Conflict(
                f"the board {path.parent} stays held by process {pid or 'unknown'}, which is not ours to end"
            )
        if pid is not None and _is_agent(pid):
            late = time.monotonic() > until - REAP_S / 2
            number = signal.SIGKILL if late else signal.SIGTERM
            if asked != (pid, number):
                asked = (pid, number)
                log.warning("old_agent_ended", child_pid=pid, signal=number.name)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        await asyncio.sleep(0.1)


def _holder(path: Path) -> int | None:
    text = path.read_text("ascii", "replace").strip()
    return int(text) if text.isdigit() else None


def _is_agent(pid: int) -> bool:
    """Whether the process is an agent: a pid in a file may be anybody's by now."""
    try:
        return AGENT_MODULE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


async def _write_pids(supervisor: Supervisor, path: Path) -> None:
    written = ""
    while True:
        pids = supervisor.pids()
        workers = [pids[name] for name in sorted(pids, key=_number) if name != "agent"]
        text = json.dumps({"agent": pids.get("agent"), "workers": workers})
        if text != written:
            half = path.with_suffix(".half")
            try:
                half.write_text(text)
                half.replace(path)
                written = text
            except OSError as error:
                # Whoever looks for the processes finds the old ones until the disk takes it.
                log.error("pids_not_written", cause=error.strerror)
                half.unlink(missing_ok=True)
                await asyncio.sleep(PIDS_RETRY_S)
        await asyncio.sleep(PIDS_S)


def _number(name: str) -> int:
    return int(name.rpartition("-")[2]) if name != "agent" else -1


def main() -> int:
    try:
        settings = catalogue.load()
        logs.configure(settings.log_level)
        asyncio.run(serve(settings))
    except (Conflict, SettingsInvalid, PortBusy, CertificateRefused) as error:
        sys.stderr.write(f"edge: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
