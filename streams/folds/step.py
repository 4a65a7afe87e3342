"""What folding one record came to. PURE."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from schemas.codec import Envelope
from schemas.errors import EventRefused

S = TypeVar("S")


class Step(msgspec.Struct, Generic[S], frozen=True):
    """The state after the record; the event if it was taken, else why not. A refused record moves the position only."""

    state: S
    envelope: Envelope | None = None
    refused: EventRefused | None = None
