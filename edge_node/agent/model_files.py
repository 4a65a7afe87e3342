"""The artifact folder: verified files under the names of their digests, and the proofs of their trials.

    artifacts/<sha256>.onnx   a model      artifacts/<sha256>.data   weights that it keeps in a file of their own
    artifacts/<sha256>.npz    a golden file
    artifacts/<sha256>.tried  JSON proofs of what the ONNX file is part of, written after a passed trial

Laws: a file gets its name by rename once its bytes are verified and synced; a name from an earlier life is believed
only after its bytes were hashed again; the folder is the agent's alone, workers only read. It must not know where files
come from or who needs them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Final

import msgspec

from edge_node.agent.reconcile import Proof, StoredFile
from inference.external_data import DATA
from schemas.events import Artifact, ModelReleased
from streams.parts.part_file import ROOM_BYTES, part_of

FOLDER: Final = "artifacts"
MODEL: Final = "onnx"
GOLDEN: Final = "npz"
_NAME: Final = re.compile(rf"([0-9a-f]{{64}})\.({MODEL}|{DATA}|{GOLDEN})")
_PART: Final = re.compile(rf"\.([0-9a-f]{{64}})\.({MODEL}|{DATA})\.part")
_PROOFS: Final = msgspec.json.Decoder(frozenset[Proof])


class ModelFiles:
    """`directory` is the node's. Calls block; callers use threads, one at a time for each digest."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.folder = directory / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()  # fetches run in threads
        self.verified: frozenset[str] = frozenset()
        self.proofs: frozenset[Proof] = frozenset().union(*(self._proofs(p) for p in self.folder.glob("*.tried")))

    def path(self, digest: str, kind: str) -> Path:
        return self.folder / f"{digest}.{kind}"

    def part(self, digest: str, kind: str) -> Path:
        """Where the file grows while it is fetched."""
        return part_of(self.path(digest, kind))

    def relative(self, digest: str, kind: str) -> str:
        """As the board names it."""
        return str(self.path(digest, kind).relative_to(self._directory))

    def on_disk(self) -> tuple[tuple[StoredFile, ...], dict[str, int], int]:
        """What is there, the room that parts have taken, by digest, and the bytes that more may take."""
        files, begun = [], {}
        for path in self.folder.iterdir():
            try:
                found = path.stat()
            except FileNotFoundError:
                continue  # a fetch that has just ended
            if (match := _PART.fullmatch(path.name)) is not None:
                begun[match[1]] = found.st_blocks * 512
            elif (match := _NAME.fullmatch(path.name)) is not None:
                used_ms = found.st_mtime_ns // 1_000_000
                files.append(StoredFile(name=path.name, digest=match[1], size=found.st_size, used_ms=used_ms))
        return tuple(files), begun, shutil.disk_usage(self.folder).free - ROOM_BYTES

    def holds(self, digest: str, kind: str) -> bool:
        """Whether the file is there and its bytes are what its name says; one that is not is removed."""
        path = self.path(digest, kind)
        if digest in self.verified and path.exists():
            return True
        self._set_verified(digest, False)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return False
        if found != digest:
            path.unlink()
            return False
        sync_folder(self.folder)  # the name is believed from here on: it is to outlive a power cut
        self._set_verified(digest, True)
        return True

    def read_back(self, digest: str) -> None:
        """The file was read back from the disk whole, by whoever gave it its name."""
        self._set_verified(digest, True)

    def write(self, digest: str, kind: str, data: bytes) -> None:
        """Verified bytes under their name, durably."""
        write_durably(self.path(digest, kind), data)
        sync_folder(self.folder)
        self._set_verified(digest, True)

    def prove(self, proof: Proof, model: str) -> None:
        """`model` is the digest of the ONNX file, with which proofs go."""
        path = self.folder / f"{model}.tried"
        # Proofs of another runtime say nothing any more.
        proofs = {p for p in self._proofs(path) if p.runtime == proof.runtime} | {proof}
        write_durably(path, msgspec.json.encode(sorted(proofs, key=msgspec.json.encode)))
        with self._lock:
            self.proofs |= {proof}

    def used(self, released: ModelReleased) -> None:
        """Its files count as used now, for whoever is removed first."""
        for artifact, kind in files_of(released):
            path = self.path(artifact.sha256, kind)
            if path.exists():
                os.utime(path)

    def remove(self, names: tuple[str, ...]) -> int:
        """Removes files, with their proofs; returns the bytes freed."""
        freed = 0
        for name in names:
            path = self.folder / name
            self._set_verified(path.stem, False)
            if path.exists():
                freed += path.stat().st_size
                path.unlink()
            if path.suffix == f".{MODEL}":
                tried = path.with_suffix(".tried")
                with self._lock:
                    self.proofs -= self._proofs(tried)
                tried.unlink(missing_ok=True)
        return freed

    def _set_verified(self, digest: str, verified: bool) -> None:
        with self._lock:
            self.verified = self.verified | {digest} if verified else self.verified - {digest}

    def _proofs(self, path: Path) -> frozenset[Proof]:
        try:
            return _PROOFS.decode(path.read_bytes())
        except (FileNotFoundError, msgspec.MsgspecError):
            # Without a proof there is one more trial, and nothing else.
            return frozenset()


def files_of(released: ModelReleased) -> tuple[tuple[Artifact, str], ...]:
    """What is fetched for it, and of which kind each is; but for its golden file."""
    return tuple((a, DATA if number else MODEL) for number, a in enumerate(released.artifacts))


def write_durably(path: Path, data: bytes) -> None:
    """1. all bytes under another name, 2. fsync, 3. rename. The caller's folder is synced by whoever needs it."""
    half = path.with_name(f".{path.name}.half")
    try:
        with half.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except BaseException:
        # A full disk: what is half there must not keep it full.
        half.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
