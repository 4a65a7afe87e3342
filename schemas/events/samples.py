"""What workers say of single requests: a candidate's answers beside the stable ones, and recorded inputs. PURE."""

from __future__ import annotations

from typing import Final

import msgspec

from schemas import names
from schemas.events.fleet import FleetEvent

MAX_RECORDED_BYTES: Final = 262_144
"""Of one recorded request, its inputs and outputs together."""


class ShadowCompared(FleetEvent, frozen=True, kw_only=True):
    """What the candidate answered to `rows` requests that the stable release answered for clients.

    `disagreements` are those that differ by more than the release's tolerances; `failed` were not answered by the
    candidate, and `skipped` not asked for want of room.
    """

    model: str
    sequence: int
    stable_digest: str
    candidate_digest: str
    started_at_ms: int
    rows: int
    disagreements: int
    max_difference: float
    top1_rows: int
    top1_agreements: int
    failed: int
    skipped: int

    def __post_init__(self) -> None:
        super().__post_init__()
        names.name(self.model, "model")
        names.within(self.sequence, 1, 2**53, "sequence")
        names.digest(self.stable_digest)
        names.digest(self.candidate_digest)
        names.within(self.disagreements, 0, self.rows, "disagreements")
        names.within(self.top1_agreements, 0, self.top1_rows, "top1_agreements")
        for field in ("rows", "failed", "skipped", "top1_rows"):
            names.within(getattr(self, field), 0, 10**12, field)


class RecordedTensor(msgspec.Struct, frozen=True, kw_only=True):
    """`data` is little-endian, row-major; BYTES have a 4-byte length before each. Empty where `redacted`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes
    redacted: bool = False


class RequestRecorded(FleetEvent, frozen=True, kw_only=True):
    """A sampled request and its answer (`outputs`, packed as caches keep it). It never leaves its region."""

    model: str
    sequence: int
    digest: str
    recorded_at_ms: int
    inputs: tuple[RecordedTensor, ...]
    outputs: bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        names.name(self.model, "model")
        names.digest(self.digest)
        names.within(len(self.outputs) + sum(len(t.data) for t in self.inputs), 0, MAX_RECORDED_BYTES, "recorded bytes")

    @property
    def key(self) -> str:
        return self.model
