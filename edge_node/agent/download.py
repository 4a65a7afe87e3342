"""Brings a release's files: what is on disk already is verified and kept, the rest comes from elsewhere.

Laws: nothing gets an artifact's name before its size, every chunk and the whole were verified; an error says whether
its cause can pass (`retryable`); a fetch that nobody waits for any more ends at its next piece; a file that two models
share is brought by one at a time. It must not know plans, boards or trials.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

import msgspec

from edge_node.agent.model_files import GOLDEN, MODEL, ModelFiles
from schemas.errors import ModelRefused, Unreachable
from schemas.events import Artifact
from streams.artifacts import FetchOptions, Source
from streams.folds.wanted import Wanted

MAX_GOLDEN_BYTES: Final = 64 * 2**20
# An artifact of gigabytes may take longer than a small one, and a store or a pace that does not give this much is slow.
SLOWEST_BYTES_S: Final = 2**20


class Store(Protocol):
    """What is needed of the object store; `streams.artifacts.ArtifactStore` is one."""

    def fetch(self, artifact: Artifact, destination: Path, options: FetchOptions) -> None: ...

    def get(self, key: str, max_bytes: int) -> bytes: ...


class Peers(Protocol):
    """What is needed of the region's other nodes; `edge_node.agent.peer_fetch.PeerFetches` is them."""

    def sources(self, artifact: Artifact) -> Callable[[int], Iterator[Source]]: ...


class Abandoned(Exception):
    """Nobody waits for this fetch any more."""


class Downloader:
    """`downloads` counts artifacts that were brought, not those found on disk. `options` are what all fetches share;
    `peers` is who is asked before the store."""

    def __init__(self, store: Store, files: ModelFiles, options: FetchOptions, peers: Peers | None = None) -> None:
        self._store, self._files, self._options, self._peers = store, files, options, peers
        self.downloads = 0
        self._lock = threading.Lock()
        self._held: dict[str, threading.Lock] = {}

    async def fetch(self, wanted: Wanted, abandoned: threading.Event) -> dict[str, float]:
        """Has the files of the release on disk, verified; milliseconds by phase. Raises MlcdnError or Abandoned."""
        return await asyncio.to_thread(self._fetch, wanted, abandoned)

    def _fetch(self, wanted: Wanted, abandoned: threading.Event) -> dict[str, float]:
        def going_on() -> None:
            if abandoned.is_set():
                raise Abandoned(wanted.model)

        artifact, golden = wanted.released.artifact, wanted.released.golden
        ms: dict[str, float] = {}
        with self._lock:
            alone = self._held.setdefault(artifact.sha256, threading.Lock())
        try:
            with alone:
                began = time.perf_counter()
                held = self._files.holds(artifact.sha256, MODEL)
                ms["verify"] = (time.perf_counter() - began) * 1e3
                if not held:
                    going_on()
                    began = time.perf_counter()
                    options = msgspec.structs.replace(
                        self._options,
                        deadline_s=self._deadline_s(artifact),
                        sources=self._peers.sources(artifact) if self._peers else self._options.sources,
                        going_on=going_on,
                    )
                    self._store.fetch(artifact, self._files.path(artifact.sha256, MODEL), options)
                    self._files.read_back(artifact.sha256)
                    ms["download"] = (time.perf_counter() - began) * 1e3
                    self.downloads += 1
                if golden is not None and not self._files.holds(golden.sha256, GOLDEN):
                    data = self._store.get(golden.object_key, MAX_GOLDEN_BYTES)
                    if hashlib.sha256(data).hexdigest() != golden.sha256:
                        raise ModelRefused(f"{golden.object_key} has another SHA-256 than the release names")
                    self._files.write(golden.sha256, GOLDEN, data)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                # What is half there must not keep the disk full; with room again it is fetched anew.
                self._files.part(artifact.sha256).unlink(missing_ok=True)
            raise Unreachable("the disk", str(self._files.folder.name), error.strerror or "") from error
        return ms

    def _deadline_s(self, artifact: Artifact) -> float:
        pace = min(self._options.pace.bytes_s or SLOWEST_BYTES_S, SLOWEST_BYTES_S)
        return self._options.deadline_s + artifact.size_bytes / pace
