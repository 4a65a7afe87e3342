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

from edge_node.agent.model_files import GOLDEN, MODEL, ModelFiles, files_of
from schemas.errors import ModelRefused, Unreachable
from schemas.events import Artifact, Golden
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

    def sources(self, artifact: Artifact, release: str) -> Callable[[int], Iterator[Source]]: ...


class Abandoned(Exception):
    """Nobody waits for this fetch any more."""


class Downloader:
    """`downloads` counts files that were brought, not those found on disk. `options` are what all fetches share;
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

        golden, ms = wanted.released.golden, {"verify": 0.0}
        files = files_of(wanted.released)
        try:
            for number, (artifact, kind) in enumerate(files):
                try:
                    self._bring(artifact, kind, wanted.digest, going_on, ms)
                except ModelRefused as refused:
                    if kind == MODEL:
                        raise
                    raise ModelRefused(f"file {wanted.released.files[number - 1].name}: {refused}") from refused
            if golden is not None:
                with self._alone(golden.sha256):
                    self._bring_golden(golden)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                # What is half there must not keep the disk full; with room again it is fetched anew.
                for artifact, kind in files:
                    self._files.part(artifact.sha256, kind).unlink(missing_ok=True)
            raise Unreachable("the disk", str(self._files.folder.name), error.strerror or "") from error
        return ms

    def _bring(
        self, artifact: Artifact, kind: str, release: str, going_on: Callable[[], None], ms: dict[str, float]
    ) -> None:
        with self._alone(artifact.sha256):
            began = time.perf_counter()
            held = self._files.holds(artifact.sha256, kind)
            ms["verify"] += (time.perf_counter() - began) * 1e3
            if held:
                return
            going_on()
            began = time.perf_counter()
            options = msgspec.structs.replace(
                self._options,
                deadline_s=self._deadline_s(artifact),
                sources=self._peers.sources(artifact, release) if self._peers else self._options.sources,
                going_on=going_on,
            )
            self._store.fetch(artifact, self._files.path(artifact.sha256, kind), options)
            self._files.read_back(artifact.sha256)
            ms["download"] = ms.get("download", 0.0) + (time.perf_counter() - began) * 1e3
            self.downloads += 1

    def _bring_golden(self, golden: Golden) -> None:
        if self._files.holds(golden.sha256, GOLDEN):
            return
        data = self._store.get(golden.object_key, MAX_GOLDEN_BYTES)
        if hashlib.sha256(data).hexdigest() != golden.sha256:
            raise ModelRefused(f"{golden.object_key} has another SHA-256 than the release names")
        self._files.write(golden.sha256, GOLDEN, data)

    def _alone(self, digest: str) -> threading.Lock:
        with self._lock:
            return self._held.setdefault(digest, threading.Lock())

    def _deadline_s(self, artifact: Artifact) -> float:
        pace = min(self._options.pace.bytes_s or SLOWEST_BYTES_S, SLOWEST_BYTES_S)
        return self._options.deadline_s + artifact.size_bytes / pace
