"""Requests in columns, the routing table, and records that did not act. PURE.

`RequestBatch` columns are Avro ``bytes`` of little-endian values: 8 ns a row to write, where an Avro array of ints costs
358. Bytes carry no types, so the widths stand in `COLUMNS`, in the schema's doc, and are checked on construction.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from schemas import names
from schemas.errors import BadInput
from schemas.events.event import Event
from schemas.events.fleet import FleetEvent, Location

TIERS: Final = ("memory", "redis", "disk", "model", "origin", "none")
"""Where an answer came from; a row's `tier` indexes it. `none`: an error, or no model run."""

NO_MODEL: Final = 0xFFFF
COLUMNS: Final = {
    "start_offset_us": 4,
    "latency_us": 4,
    "tier": 1,
    "status": 2,
    "model": 2,
    "request_bytes": 4,
    "response_bytes": 4,
    "key_hash": 8,
}
"""Column name to width in bytes of its little-endian unsigned integers."""

MAX_ROWS: Final = 20_000


class ModelRef(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: str
    digest: str


class RequestBatch(FleetEvent, frozen=True, kw_only=True):
    """One row per request that a worker answered between two flushes. Columns: see `COLUMNS`."""

    started_at_ms: int
    rows: int
    models: tuple[ModelRef, ...]
    start_offset_us: bytes
    latency_us: bytes
    tier: bytes
    status: bytes
    model: bytes
    request_bytes: bytes
    response_bytes: bytes
    key_hash: bytes
    dropped: int

    def __post_init__(self) -> None:
        super().__post_init__()
        names.within(self.rows, 1, MAX_ROWS, "rows")
        for column, width in COLUMNS.items():
            if len(getattr(self, column)) != self.rows * width:
                raise BadInput(f"column {column} has not {self.rows} values of {width} bytes")
        if max(self.tier) >= len(TIERS):
            raise BadInput("column tier names no tier")


class Health(StrEnum):
    """What the beats say of a node; `left` said good-bye, `dead` did not."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    DRAINING = "draining"
    LEFT = "left"


class RoutedModel(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: str
    digest: str


class RoutedNode(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the routing table. Shares are 0 to 1, latencies milliseconds, `rate` requests a second."""

    node: str
    region: str
    url: str
    location: Location
    health: Health
    phi: float
    load: float
    hit_rate: float
    error_rate: float
    window_requests: int
    rate: float
    p50_ms: float
    p99_ms: float
    in_flight: int
    models: tuple[RoutedModel, ...]

    def __post_init__(self) -> None:
        names.name(self.node, "node")
        names.name(self.region, "region")
        for share in ("load", "hit_rate", "error_rate"):
            names.within(getattr(self, share), 0, 1, share)
        for figure in ("phi", "window_requests", "rate", "p50_ms", "p99_ms", "in_flight"):
            names.within(getattr(self, figure), 0, 1e12, figure)


class RoutesPublished(Event, frozen=True, kw_only=True):
    """The global routing table. A router refuses a (term, number) at or below the one it has."""

    term: int
    number: int
    derived_at_ms: int
    nodes: tuple[RoutedNode, ...]

    @property
    def key(self) -> str:
        return "global"


class Header(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    value: bytes | None


class EventRejected(Event, frozen=True, kw_only=True):
    """A record that did not act, with its original bytes (bounded), and why."""

    node: str
    region: str
    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    record_key: bytes | None = msgspec.field(name="key")
    value: bytes | None
    size_bytes: int
    headers: tuple[Header, ...]
    refusal: str
    detail: str

    @property
    def key(self) -> str:
        return self.topic
