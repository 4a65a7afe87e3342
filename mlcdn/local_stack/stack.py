"""The stack: the parts of the local network's infrastructure, composed in one directory.

    DIR/stack.lock    held while the stack runs
    DIR/kafka  DIR/s3  DIR/redis-REGION    each part's data
    DIR/logs/PART.log

Laws:
1. A directory belongs to one running stack; the lock is the kernel's, so a killed one leaves nothing to clean by hand.
2. A second start on a directory finds all of Kafka's and S3's data, whatever ports it gets.
3. A port once chosen stays for the life of the stack, so a part that is stopped and started again is found where it
   was. A port lost between the choice and the start is chosen again, unless it was asked for by name.
4. A failure leaves nothing running that this start began.

It must not know what the network does with its parts.
"""

import asyncio
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlcdn.local_stack import kafka, s3, valkey
from mlcdn.local_stack.errors import StackError, disk_errors, disk_full
from mlcdn.local_stack.file_lock import FileLock, HeldByAnother
from mlcdn.local_stack.runtime import prepare
from processes.ports import LOOPBACK, free_ports, is_free
from processes.supervisor import Child, StartFailed, Supervisor

KAFKA = "kafka"
S3 = "s3"

Progress = Callable[[str], None]

_ROOM_BYTES = 1 << 30
_TRIES = 3
_PAUSE_S = 0.3


@dataclass(frozen=True, slots=True)
class StackAddresses:
    kafka: str
    s3_endpoint: str
    s3_bucket: str
    s3_access_key: str
    s3_secret_key: str
    redis: dict[str, str]
    """The URL of each region's cache."""


def redis_part(region: str) -> str:
    """The name under which the supervisor knows a region's cache."""
    return f"redis-{region}"


async def start_stack(
    supervisor: Supervisor,
    directory: Path,
    regions: Sequence[str],
    progress: Progress,
    *,
    kafka_port: int | None = None,
) -> StackAddresses:
    """Starts all parts in parallel under `supervisor` and returns when all are ready. Raises StackError.

    The directory is released when the supervisor has stopped.
    """
    with disk_errors(directory):
        directory, lock = _claim(directory)
        names = [KAFKA, S3, *map(redis_part, regions)]
        try:
            if kafka_port is not None and not is_free(kafka_port):
                raise _port_busy(kafka_port)
            java = await prepare(progress)
            keys = s3.credentials(directory / S3)
            if lock.left_by is not None:
                await s3.old_server_gone(directory / S3)
            start = _Start(supervisor, progress, again=lock.left_by is not None)
            found = await _all_or_first_error(
                [
                    start.part(KAFKA, partial(_kafka, directory, java, kafka_port), retry=kafka_port is None),
                    start.part(S3, partial(_s3, directory, keys)),
                    *(start.part(name, partial(_redis, directory, name)) for name in names[2:]),
                ]
            )
        except BaseException:
            for name in names:
                if name in supervisor.names():
                    await supervisor.remove(name)
            lock.release()
            raise
    supervisor.at_stop(lock.release)
    supervisor.at_stop(partial(s3.sweep_sockets, s3.Ports(*found[1])))
    return StackAddresses(
        kafka=f"{LOOPBACK}:{found[0][0]}",
        s3_endpoint=f"http://{LOOPBACK}:{s3.Ports(*found[1]).s3}",
        s3_bucket=s3.BUCKET,
        s3_access_key=keys.access_key,
        s3_secret_key=keys.secret_key,
        redis={region: f"redis://{LOOPBACK}:{ports[0]}/0" for region, ports in zip(regions, found[2:], strict=True)},
    )


# -- the parts: each chooses its ports and says what to run

Plan = Callable[[], tuple[tuple[int, ...], Child]]


def _kafka(directory: Path, java: kafka.Java, configured: int | None) -> tuple[tuple[int, ...], Child]:
    port, controller_port = free_ports(2)
    port = configured or port
    child = kafka.child(KAFKA, directory / KAFKA, java, port, controller_port, _log(directory, KAFKA))
    return (port, controller_port), child


def _s3(directory: Path, keys: s3.Credentials) -> tuple[tuple[int, ...], Child]:
    ports = s3.choose_ports(directory / S3)
    return ports.all(), s3.child(S3, directory / S3, ports, keys, _log(directory, S3))


def _redis(directory: Path, name: str) -> tuple[tuple[int, ...], Child]:
    [port] = free_ports(1)
    return (port,), valkey.child(name, directory / name, port, _log(directory, name))


def _log(directory: Path, name: str) -> Path:
    return directory / "logs" / f"{name}.log"


@dataclass(frozen=True, slots=True)
class _Start:
    """One start of the stack. `again`: an earlier one on this directory was killed, its parts may be dying still."""

    supervisor: Supervisor
    progress: Progress
    again: bool

    async def part(self, name: str, plan: Plan, *, retry: bool = True) -> tuple[int, ...]:
        """Starts one part and returns its ports."""
        began = time.monotonic()
        for attempt in range(1, _TRIES + 1):
            ports, child = plan()
            try:
                await self.supervisor.add(child)
            except StartFailed as error:
                lost = [port for port in ports if not is_free(port)]
                if not retry and ports[0] in lost:
                    raise _port_busy(ports[0]) from error
                if attempt == _TRIES or not (lost or self.again):
                    raise _did_not_start(error, child) from error
                await asyncio.sleep(_PAUSE_S)
            else:
                self.progress(f"{name} is ready ({time.monotonic() - began:.1f} s)")
                return ports
        raise AssertionError("the last attempt returns or raises")


async def _all_or_first_error(starts: Sequence[Coroutine[None, None, tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """As gather, but the others have been cancelled and awaited before the first error is raised."""
    tasks = [asyncio.ensure_future(start) for start in starts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _claim(directory: Path) -> tuple[Path, FileLock]:
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    if shutil.disk_usage(directory).free < _ROOM_BYTES:
        raise disk_full(directory)
    try:
        return directory, FileLock.take(directory / "stack.lock")
    except HeldByAnother as error:
        raise StackError(
            f"{directory} is in use by the running process {error.pid or '(unknown)'}",
            "Stop that network first (mlcdn down), or choose another directory.",
        ) from error


def _port_busy(port: int) -> StackError:
    return StackError(
        f"Kafka's configured port {port} is in use", "Stop what listens there, or leave the port to be chosen."
    )


def _did_not_start(error: StartFailed, child: Child) -> StackError:
    last = "\n    ".join(error.lines[-5:])
    if "No space left on device" in last:
        return disk_full(Path(str(child.log)))
    return StackError(f"{child.name} {error.reason}", f"Its log is {child.log}; the last lines:\n    {last}")
