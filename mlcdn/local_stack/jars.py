"""Kafka's jars: named with their digests by `kafka-jars.lock`, fetched once a user.

Laws:
1. What runs is what the lock says: every file's SHA-256 is checked before any of them can be seen, because the Maven
   client only warns about a wrong checksum.
2. The set appears by one rename, under a name that holds the lock's own digest: there is never half a set, and a new
   lock never meets an old set.
3. One process fetches, the others wait for it (two at once break the Maven client).

`python -m mlcdn.local_stack.jars` writes the lock anew. It must not know how Kafka is run.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from mlcdn.local_stack.errors import StackError, disk_errors, disk_full, missing_wheel
from mlcdn.local_stack.file_lock import waited_for

LOCK = Path(__file__).with_name("kafka-jars.lock")
WANTED = "org.apache.kafka:kafka_2.13:4.3.1+org.slf4j:slf4j-simple:1.7.36"
_THREADS = 8
_TRIES = 3
_ROOM_BYTES = 256 << 20  # 45 MB of jars, a 60 MB AOT cache, and the same again while they are made

Download = Callable[[str, Path], Path]
"""Brings `group:artifact:version` into a folder and returns the file."""


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlcdn"


def kafka_jars(
    progress: Callable[[str], None],
    *,
    lock: str | None = None,
    cache: Path | None = None,
    download: Download | None = None,
) -> tuple[Path, ...]:
    """The verified jars, sorted (the AOT cache is bound to the class path). Fetches them if they are not there."""
    lock = LOCK.read_text() if lock is None else lock
    cache = cache or cache_directory()
    final = cache / f"kafka-{hashlib.sha256(lock.encode()).hexdigest()[:16]}"
    if not final.is_dir():
        with disk_errors(cache), waited_for(cache / "fetch.lock"):
            if not final.is_dir():
                _fetch(lock, final, download or _maven(), progress)
    return tuple(sorted(final.glob("*.jar")))


def _fetch(lock: str, final: Path, download: Download, progress: Callable[[str], None]) -> None:
    if shutil.disk_usage(final.parent).free < _ROOM_BYTES:
        raise disk_full(final.parent)
    for abandoned in final.parent.glob("fetch-*/"):  # we hold the lock: whoever made it is gone
        shutil.rmtree(abandoned, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="fetch-", dir=final.parent))
    try:
        library = work / "lib"
        library.mkdir()
        lines = lock.splitlines()
        progress(f"fetching Kafka: {len(lines)} jars")
        with ThreadPoolExecutor(_THREADS) as pool:
            fetches = [pool.submit(_fetch_one, line, download, work, library) for line in lines]
            try:
                for done, fetched in enumerate(as_completed(fetches), 1):
                    fetched.result()
                    if done % 10 == 0 or done == len(lines):
                        progress(f"fetching Kafka: {done} of {len(lines)} jars")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        library.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_one(line: str, download: Download, work: Path, library: Path) -> None:
    coordinate, wanted = line.split()
    for attempt in range(1, _TRIES + 1):
        # A folder for each attempt, because what a broken download left in place would be taken for the file.
        folder = work / f"{coordinate.replace(':', '-')}-{attempt}"
        try:
            file = download(coordinate, folder)
        except Exception as error:  # the client raises anything from requests' errors to assertions
            if attempt == _TRIES:
                raise StackError(
                    f"could not fetch {coordinate}: {type(error).__name__}: {error}",
                    "Kafka is fetched from Maven Central the first time: connect to the network and try again. "
                    f"Or copy {library.parent.parent} from a machine that has it.",
                ) from error
            continue
        found = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
        if found == wanted:
            file.rename(library / file.name)
            return
    raise StackError(
        f"{coordinate} is not the file that was locked: {found} instead of {wanted}",
        "Something between here and Maven Central changes files. Nothing of it was kept.",
    )


def _maven() -> Download:
    try:
        from jgo.maven import MavenContext
    except ImportError:
        raise missing_wheel("jgo") from None

    def download(coordinate: str, folder: Path) -> Path:
        group, artifact, version = coordinate.split(":")
        # The context is given its folder, because its default is the user's own Maven repository.
        context = MavenContext(repo_cache=folder)
        return Path(context.project(group, artifact).at_version(version).artifact().resolve())

    return download


def locked(wanted: str = WANTED) -> str:
    """The text of a lock for what `wanted` needs at run time, resolved and hashed now."""
    from dataclasses import replace

    from jgo.maven import MavenContext
    from jgo.parse import Endpoint

    with tempfile.TemporaryDirectory() as folder:
        context = MavenContext(repo_cache=Path(folder))
        roots = [
            context.create_dependency(replace(coordinate, scope="compile"))
            for coordinate in Endpoint.parse(wanted).coordinates
        ]
        top, rest = context.resolver.resolve(roots)
        names = {
            f"{a.groupId}:{a.artifactId}:{a.version}"
            for a in (each.artifact for each in [*top, *rest] if each.scope in ("compile", "runtime"))
        }
        download = _maven()

        def line(name: str) -> str:
            file = download(name, Path(folder) / name.replace(":", "-"))
            return f"{name} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}\n"

        with ThreadPoolExecutor(_THREADS) as pool:
            return "".join(sorted(pool.map(line, names)))


if __name__ == "__main__":
    LOCK.write_text(locked())
