"""What nodes report of themselves. PURE.

Every one names node, region, worker and incarnation. Worker -1 is the node's agent. An incarnation is a counter, never a
clock: it rises each time the node's parent starts, so a late report of an earlier life is recognised.
"""

from __future__ import annotations

from typing import Final

import msgspec

from schemas import names
from schemas.events.event import Event

AGENT: Final = -1


class Location(msgspec.Struct, frozen=True, kw_only=True):
    lat: float
    lon: float

    def __post_init__(self) -> None:
        names.within(self.lat, -90, 90, "lat")
        names.within(self.lon, -180, 180, "lon")


class FleetEvent(Event, frozen=True, kw_only=True):
    node: str
    region: str
    worker: int
    incarnation: int

    def __post_init__(self) -> None:
        names.name(self.node, "node")
        names.name(self.region, "region")
        names.within(self.worker, AGENT, 1_023, "worker")
        names.within(self.incarnation, 0, 2**53, "incarnation")

    @property
    def key(self) -> str:
        return self.node


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """`state`: live, loading, failed (an older digest, or none, serves), forwarded (placed at the origin), pending."""

    name: str
    version: str
    digest: str
    sequence: int
    channel: str
    state: str
    error: str = ""


class NodeBeat(FleetEvent, frozen=True, kw_only=True):
    """A worker is alive, and how it does. Figures are of the interval since its last beat."""

    beat: int
    url: str
    location: Location
    capacity: float
    load: float
    in_flight: int
    queue: int
    requests: int
    errors: int
    p50_ms: float
    p99_ms: float
    hits: dict[str, int]
    positions: dict[str, int]
    models: tuple[ServedModel, ...]
    desired_digest: str
    draining: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        names.within(self.beat, 0, 2**53, "beat")
        names.within(self.load, 0, 1, "load")
        for field in ("capacity", "in_flight", "queue", "requests", "errors", "p50_ms", "p99_ms"):
            names.within(getattr(self, field), 0, 1e12, field)
        names.within(len(self.url), 1, 256, "length of url")


class ReleaseReport(FleetEvent, frozen=True, kw_only=True):
    """About one release; `position` is the offset on ``mlcdn.releases`` of the event that asked for it."""

    model: str
    version: str
    sequence: int
    digest: str
    position: int

    def __post_init__(self) -> None:
        super().__post_init__()
        names.name(self.model, "model")
        names.label(self.version, "version")
        names.digest(self.digest)


class ModelSwapped(ReleaseReport, frozen=True, kw_only=True):
    """The worker serves the release. `ms` by phase: download, verify, trial, load, warm, swap."""

    previous_digest: str
    channel: str
    ms: dict[str, float]


class SwapFailed(ReleaseReport, frozen=True, kw_only=True):
    """The worker could not take the release over; what it served before, it serves on."""

    phase: str
    cause: str


class ArtifactRejected(ReleaseReport, frozen=True, kw_only=True):
    """The node will not activate the artifact; `retrying` says whether the cause may pass."""

    phase: str
    cause: str
    retrying: bool


class InvalidationApplied(FleetEvent, frozen=True, kw_only=True):
    """From here on no answer of this node disobeys the invalidation at `position`."""

    position: int
    ms: float


class NodeLeft(FleetEvent, frozen=True, kw_only=True):
    cause: str
