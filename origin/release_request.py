"""What is asked of a publisher and what it answers: a request, the event that is made of it, and what the log took.

Law: a field that is not given has the default of the event, so a release says the same whichever way it came in. It must
not know stores, logs or trials: they are handed in as what they found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from inference.datatypes import TensorSpec
from inference.golden import ATOL, RTOL
from inference.trial_report import TrialReport
from origin.signature import Change
from schemas import names
from schemas.errors import BadInput
from schemas.events import (
    Artifact,
    Batching,
    CachePolicy,
    File,
    Golden,
    Limits,
    ModelReleased,
    ModelRetired,
    ModelRolledBack,
    OnFailure,
    Placement,
    Plan,
    Recording,
    Tensor,
)
from streams.log.writer import Appended, wall_clock_ms

GOLDEN_MAX_BYTES: Final = 64 * 2**20
ReleaseEvent = ModelReleased | ModelRolledBack | ModelRetired


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """What to release, with the defaults of the command line.

    `path` is an ONNX file of at most 2 GiB; `golden` an ``.npz`` of arrays `input.<name>` and `output.<name>`, shaped as
    the model takes and gives them, at most 64 MiB, compared within `atol + rtol * |wanted|`. `version` defaults to the
    first 12 characters of the digest. With `files`, files of weights that the model names are released too; they lie beside
    `path`, of any size. Times are seconds where a name ends in `_s`, milliseconds in `_ms`, microseconds
    in `_us`; `max_batch` counts rows. What breaks clients of the version served now is refused unless
    `allow_signature_change`. `BadInput` when it is made of values that no release can have.
    """

    model: str
    path: Path
    version: str | None = None
    files: bool = False
    golden: Path | None = None
    rtol: float = RTOL
    atol: float = ATOL
    placement: Placement = Placement.EDGE
    cache: CachePolicy = field(default_factory=CachePolicy)
    limits: Limits = field(default_factory=Limits)
    max_batch: int = 64
    max_delay_us: int = 0
    plan: Plan = field(default_factory=Plan)
    on_failure: OnFailure = OnFailure.ROLLBACK
    shadow_percent: float = 0.0
    record: Recording = field(default_factory=Recording)
    allow_signature_change: bool = False
    author: str
    reason: str = ""

    def __post_init__(self) -> None:
        names.name(self.model, "model")
        names.label(self.author, "author")
        names.text(self.reason, "reason")
        if self.version is not None:
            names.label(self.version, "version")
        # As the event will have them: found out before the trial, which takes longer.
        Batching(max_size=self.max_batch, max_delay_us=self.max_delay_us)
        names.within(self.shadow_percent, 0, 100, "shadow_percent")
        if self.shadow_percent and self.placement is Placement.ORIGIN:
            raise BadInput("a candidate at the origin has no shadow, and its drift could never be judged")
        Golden(object_key="golden/any", sha256="0" * 64, rtol=self.rtol, atol=self.atol)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The log took it. `position` is the event's offset, `appended_ms` the broker's time of it.

    `waves` is the number of its plan's, 0 where it goes everywhere at once; `trial` has the figures of a new artifact's
    trial, `changes` what clients of the version before can trip over.
    """

    model: str
    version: str
    sequence: int
    digest: str
    event_id: str
    position: int
    appended_ms: int
    waves: int = 0
    trial: TrialReport | None = None
    changes: tuple[Change, ...] = ()


def released(
    request: ReleaseRequest,
    artifact: Artifact,
    report: TrialReport,
    golden: Golden | None,
    files: tuple[File, ...] = (),
) -> ModelReleased:
    """The event but for its sequence. `BadInput` if it cannot be one."""
    event = ModelReleased(
        model=request.model,
        version=request.version or artifact.sha256[:12],
        sequence=1,
        artifact=artifact,
        inputs=_tensors(report.inputs),
        outputs=_tensors(report.outputs),
        placement=request.placement,
        memory_bytes=report.model_rss_bytes,
        cache=request.cache,
        batching=Batching(batchable=report.batchable, max_size=request.max_batch, max_delay_us=request.max_delay_us),
        limits=request.limits,
        golden=golden,
        plan=request.plan,
        on_failure=request.on_failure,
        shadow_percent=request.shadow_percent,
        record=request.record,
        files=files,
        created_at_ms=wall_clock_ms(),
        author=request.author,
        reason=request.reason,
    )
    return event if request.version else msgspec.structs.replace(event, version=event.digest[:12])


def published(event: ReleaseEvent, appended: Appended) -> Published:
    match event:
        case ModelReleased():
            version, digest = event.version, event.digest
        case ModelRolledBack():
            version, digest = event.version, event.to_digest
        case ModelRetired():
            version, digest = "", ""
    return Published(
        model=event.model,
        version=version,
        sequence=event.sequence,
        digest=digest,
        event_id=appended.id,
        position=appended.record.offset,
        appended_ms=appended.record.timestamp_ms,
        waves=len(event.plan.waves) if isinstance(event, ModelReleased) else 0,
    )


def _tensors(specs: tuple[TensorSpec, ...]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            name=s.name,
            datatype=s.datatype,
            shape=tuple(s.shape),
            labels=tuple(map(str, s.labels or ())),
            optional=s.optional,
            ranked=s.ranked,
        )
        for s in specs
    )
