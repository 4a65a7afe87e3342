"""models.json: what the log says should be served, and what workers should serve now. PURE.

The two differ while an artifact is on its way, or was refused: the old release stays in `models` until the new one is
verified and tried. It must not know how it gets to the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from schemas.errors import MlcdnError
from streams.folds.wanted import Channel, Seated, Wanted

FORMAT: Final = 2


class LogIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which log was folded, with which schemas. A topic made again has another id, and nothing known of it holds."""

    releases_id: str
    invalidations_id: str
    catalogue: str

    @property
    def namespace(self) -> str:
        """Part of every key in Redis and on disk: entries of another log are never found."""
        return hashlib.sha256((self.releases_id + self.invalidations_id).encode()).hexdigest()[:16]


class BoardModel(msgspec.Struct, frozen=True, kw_only=True):
    """What workers serve on one seat of a model; `percent` of its requests are a candidate's.

    `path` and `golden_path` are relative to the node's directory; `path` is None where the model is `forwarded` to the
    origin. `slot` is its slot of the fence; `ms` are the agent's phases: download, verify, trial.
    """

    wanted: Wanted
    channel: Channel = Channel.STABLE
    percent: float = 100.0
    path: str | None = None
    golden_path: str | None = None
    slot: int
    ms: dict[str, float] = {}
    forwarded: bool = False


class BoardFile(msgspec.Struct, frozen=True, kw_only=True):
    """`policy` is the file's own version and rises with every write; `purges` names the purge log that goes with it.

    `positions` are the last folded ones by topic; `desired` is what the log says, by seat; `errors` says why a seat
    of `desired` is not yet, or not so, in `models`.
    """

    format: int = FORMAT
    node: str
    generation: int
    log: LogIdentity
    positions: dict[str, int] = {}
    policy: int = 0
    purges: str
    desired: dict[str, Seated] = {}
    models: dict[str, BoardModel] = {}
    errors: dict[str, str] = {}

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, this program reads {FORMAT}")


def encode(file: BoardFile) -> bytes:
    return msgspec.json.encode(file, order="deterministic")


def decode(data: bytes) -> BoardFile:
    """Raises `ValueError` for what is not a whole board file."""
    with refused():
        return msgspec.json.decode(data, type=BoardFile)


@contextmanager
def refused() -> Iterator[None]:
    """What an event may not say is no board either: a ValueError, as all that is damaged."""
    try:
        yield
    except MlcdnError as error:
        raise ValueError(str(error)) from error
