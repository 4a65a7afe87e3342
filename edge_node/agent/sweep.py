"""Frees what nothing names any more. Never on a request's path; losing a sweep loses nothing.

Purge logs that models.json has left stay a while for a worker that still reads them. Halves and parts are what a kill
or a full disk left; a part takes the room of its whole artifact, and is kept for as long as a fetch may resume it: a day, and
a minute where no release wants it any more. Entries in Redis and on disk need no sweep: no
key of another release or another log is ever asked for, and age and eviction take them. It must not know plans.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from edge_node.agent.model_files import FOLDER, MODEL
from inference.external_data import DATA

LATE_READER_S: Final = 60.0
RESUMABLE_S: Final = 86_400.0
UNWANTED_S: Final = 60.0
HALF_S: Final = 600.0


def sweep(directory: Path, purges: str, now_s: float, wanted: Collection[str] = ()) -> int:
    """Removes leftovers of the node's `directory`; `purges` is the purge log in use, `wanted` are the digests of files that may
    be fetched. Returns the bytes freed."""
    freed = 0
    for path, kept_s in _leftovers(
        directory, purges, {f".{digest}.{kind}.part" for digest in wanted for kind in (MODEL, DATA)}
    ):
        try:
            found = path.stat()
            if now_s - found.st_mtime > kept_s:
                path.unlink()
                freed += found.st_size
        except FileNotFoundError:
            continue
    return freed


def _leftovers(directory: Path, purges: str, resumable: set[str]) -> Iterator[tuple[Path, float]]:
    for path in (directory / "board").glob("purges-*.log"):
        if path.name != purges:
            yield path, LATE_READER_S
    for path in (directory / FOLDER).glob(".*.part"):
        yield path, RESUMABLE_S if path.name in resumable else UNWANTED_S
    for folder in (directory / "board", directory / FOLDER):
        for path in folder.glob("*.half"):
            yield path, HALF_S
        for path in folder.glob(".*.half"):
            yield path, HALF_S
