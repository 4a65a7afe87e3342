"""What the log came to: its releases read on from a state, and whether the last record acted. Who appends reads back."""

from __future__ import annotations

from schemas.errors import EventRefused
from schemas.topics import RELEASES
from streams.folds import releases
from streams.folds.releases import Releases
from streams.log.record import LogReader


def read_on(reader: LogReader, state: Releases, end: int | None = None) -> tuple[Releases, EventRefused | None]:
    """The state up to, not including, `end`, and why the last record did not act, if it did not."""
    refused = None
    for record in reader.read(RELEASES.name, 0, state.position + 1, end):
        step = releases.fold(state, record)
        state, refused = step.state, step.refused
    return state, refused
