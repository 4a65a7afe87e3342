"""How a release reaches its requests, and what is said on the way: plans, verdicts, and an operator's words. PURE.

A *plan* is an ordered list of waves; a *gate* is what every wave is held to; a *verdict* on (model, sequence, step) is
signed with the evidence that it rests on.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from schemas import names
from schemas.errors import BadInput
from schemas.events.event import Event

MAX_WAVES: Final = 64
MAX_REGIONS: Final = 256
MAX_OBJECTIONS: Final = 16
MAX_RANGES: Final = 256
LONGEST_S: Final = 90 * 86_400.0
MAX_SEQUENCE: Final = 2**53


class OnFailure(StrEnum):
    """What a gate that fails does."""

    ROLLBACK = "rollback"
    KEEP = "keep"


class Verdict(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


class Compare(StrEnum):
    """What makes two answers differ: another largest output (where an answer has scores), or any value."""

    TOP1 = "top1"
    VALUES = "values"


class Wave(msgspec.Struct, frozen=True, kw_only=True):
    """`percent` of the requests of `regions` (none named: every region) go to the candidate; at 0 it is seated there, for
    its shadow alone.

    Its gate passes once the candidate has answered `min_samples` requests and `hold_s` seconds are over; it halts the
    rollout when it cannot be judged within `max_wait_s` seconds, 0 being never.
    """

    regions: tuple[str, ...] = ()
    percent: float = 100.0
    min_samples: int = 0
    hold_s: float = 0.0
    max_wait_s: float = 0.0

    def __post_init__(self) -> None:
        for region in self.regions:
            names.name(region, "region")
        names.within(len(self.regions), 0, MAX_REGIONS, "number of regions of a wave")
        names.within(self.percent, 0, 100, "percent of a wave")
        names.within(self.min_samples, 0, 10**12, "min_samples")
        names.within(self.hold_s, 0, LONGEST_S, "hold_s")
        names.within(self.max_wait_s, 0, LONGEST_S, "max_wait_s")
        if 0 < self.max_wait_s < self.hold_s:
            raise BadInput(f"a wave that holds for {self.hold_s:g} s cannot be judged within {self.max_wait_s:g} s")

    def reaches(self, region: str) -> bool:
        return not self.regions or region in self.regions


class Gates(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate may do worse than the stable release over the same time and regions.

    A share of failed requests, or of refused ones, that is `max_error_rise` higher; a 99th percentile of latency
    `max_p99_ratio` times as long, or `p99_slack_ms` longer; a share of compared answers that differ of
    `max_disagreement`, judged from `min_compared` answers on. A model that was trained anew gives other scores to all
    that it is asked, so what is compared is the largest of them, unless `compare` says otherwise.
    """

    max_error_rise: float = 0.01
    max_p99_ratio: float = 1.5
    p99_slack_ms: float = 5.0
    compare: Compare = Compare.TOP1
    max_disagreement: float = 0.01
    min_compared: int = 100

    def __post_init__(self) -> None:
        names.within(self.max_error_rise, 0, 1, "max_error_rise")
        names.within(self.max_p99_ratio, 1, 1e6, "max_p99_ratio")
        names.within(self.p99_slack_ms, 0, 1e9, "p99_slack_ms")
        names.within(self.max_disagreement, 0, 1, "max_disagreement")
        names.within(self.min_compared, 1, 10**12, "min_compared")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`waves` in order; none is everything at once. The last one reaches every request of every region."""

    waves: tuple[Wave, ...] = ()
    gates: Gates = Gates()

    def __post_init__(self) -> None:
        names.within(len(self.waves), 0, MAX_WAVES, "number of waves")
        if self.waves and (self.waves[-1].regions or self.waves[-1].percent != 100):
            raise BadInput("the last wave of a plan is 100 percent of all regions: anything less never ends")


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """`fraction` of the requests are recorded, without the values of the inputs in `redacted`."""

    fraction: float = 0.0
    redacted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names.within(self.fraction, 0, 1, "record.fraction")
        names.within(len(self.redacted), 0, 256, "number of redacted inputs")


class Range(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """The records from `start` to before `end` of one partition."""

    topic: str
    partition: int
    start: int
    end: int

    def __post_init__(self) -> None:
        names.within(self.start, 0, self.end, "start of a range")


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """How one release answered. Errors are answers of status 429, and of 500 and above; `refused` those of another status
    of 400 and above; latencies are milliseconds, of answers that were computed."""

    digest: str = ""
    requests: int = 0
    errors: int = 0
    refused: int = 0
    p50_ms: float = 0.0
    p99_ms: float = 0.0

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    @property
    def refused_rate(self) -> float:
        return self.refused / self.requests if self.requests else 0.0


class Objection(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A worker (or its node's agent, worker -1) that does not serve the candidate, and says why."""

    region: str
    node: str
    worker: int
    cause: str


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What a verdict rests on: the same ranges, read again, lead to the same verdict.

    Records count whose broker time is above `since_ms`, when the wave began, and at most `until_ms`. `archive` is the
    SHA-256 of the compared rows in the object store, since requests are kept for a day only.
    """

    ranges: tuple[Range, ...] = ()
    since_ms: int
    until_ms: int
    regions: tuple[str, ...] = ()
    stable: Side = Side()
    candidate: Side = Side()
    compared: int = 0
    disagreements: int = 0
    workers: int = 0
    live: int = 0
    objections: tuple[Objection, ...] = ()
    archive: str = ""

    def __post_init__(self) -> None:
        names.within(len(self.ranges), 0, MAX_RANGES, "number of ranges")
        names.within(len(self.objections), 0, MAX_OBJECTIONS, "number of objections")
        names.within(self.since_ms, 0, MAX_SEQUENCE, "since_ms")
        names.within(self.until_ms, 0, MAX_SEQUENCE, "until_ms")
        if self.archive:
            names.digest(self.archive, "archive")


class RolloutEvent(Event, frozen=True, kw_only=True):
    """About the rollout of the release `sequence` of `model`."""

    model: str
    sequence: int

    def __post_init__(self) -> None:
        names.name(self.model, "model")
        names.within(self.sequence, 1, MAX_SEQUENCE, "sequence")

    @property
    def key(self) -> str:
        return self.model


class Judged(RolloutEvent, frozen=True, kw_only=True):
    """A verdict on wave `step`, counted from 0."""

    step: int
    verdict: Verdict
    reason: str
    evidence: Evidence

    def __post_init__(self) -> None:
        super().__post_init__()
        names.within(self.step, 0, MAX_WAVES - 1, "step")
        names.text(self.reason, "reason")


class RolloutAdvanced(Judged, frozen=True, kw_only=True):
    """Wave `step` passed its gate: the next begins, or the rollout is complete."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verdict is not Verdict.PASS:
            raise BadInput(f"a rollout does not advance on the verdict {self.verdict}")


class RolloutHalted(Judged, frozen=True, kw_only=True):
    """Wave `step` failed, or could not be judged in time. `rollback`: every node goes back to the stable release."""

    rollback: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verdict is Verdict.PASS:
            raise BadInput("a rollout is not halted by a gate that passed")


class Operated(RolloutEvent, frozen=True, kw_only=True):
    """What an operator said of a rollout."""

    author: str
    reason: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        names.label(self.author, "author")
        names.text(self.reason, "reason")


class RolloutPaused(Operated, frozen=True, kw_only=True):
    """It stays at its wave until it is resumed; a gate that fails still halts it."""


class RolloutResumed(Operated, frozen=True, kw_only=True):
    """A paused or halted rollout goes on: its wave begins anew."""


class RolloutAborted(Operated, frozen=True, kw_only=True):
    """It is over: every node goes back to the stable release."""
