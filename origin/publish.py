"""Publishing: a file becomes an artifact, an artifact becomes a signed release that the log took.

A release, numbered as the code is marked:
 1. the file is tried in a limited child, its golden test included, and the event is made: what cannot be released leaves
    nothing behind;
 2. the artifact (and the golden file) are uploaded, read back and verified;
 3. the log is read and folded, and the next sequence chosen;
 4. the signed event is appended;
 5. the log is read back: did the fold take it? The loser of a race signs again with a higher sequence.

Laws: facts are written last, so whoever reads the event can get what it names; a publish that dies leaves nothing, or an
unreferenced object, or a complete release; a retry after a lost race means what the first try meant.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from inference.datatypes import TensorSpec
from inference.golden import ATOL, RTOL
from inference.trial import run_trial
from inference.trial_report import TrialReport
from schemas import names
from schemas.errors import BadInput, Conflict, EventRefused, ModelRefused, NotFound, Refusal
from schemas.events import (
    Artifact,
    Batching,
    CachePolicy,
    Golden,
    Limits,
    ModelReleased,
    ModelRetired,
    ModelRolledBack,
    Placement,
    Tensor,
)
from schemas.topics import RELEASES
from streams.artifacts import ArtifactStore, describe
from streams.folds import releases
from streams.folds.releases import Releases
from streams.log.record import LogReader
from streams.log.writer import Appended, Writer, wall_clock_ms

TRIES: Final = 8
GOLDEN_MAX_BYTES: Final = 64 * 2**20
LOST_RACE: Final = (Refusal.SEQUENCE_NOT_HIGHER, Refusal.SEQUENCE_CONFLICT)
ReleaseEvent = ModelReleased | ModelRolledBack | ModelRetired
Progress = Callable[[str, int, int], None]
"""What, how much of it, out of how much; bytes."""


def _silent(_what: str, _done: int, _total: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """What to release. `version` defaults to the first 12 characters of the digest; `golden` is an ``.npz`` file."""

    model: str
    path: Path
    version: str | None = None
    golden: Path | None = None
    rtol: float = RTOL
    atol: float = ATOL
    placement: Placement = Placement.EDGE
    cache: CachePolicy = field(default_factory=CachePolicy)
    limits: Limits = field(default_factory=Limits)
    max_batch: int = 64
    author: str
    reason: str = ""

    def __post_init__(self) -> None:
        names.name(self.model, "model")
        names.label(self.author, "author")
        names.text(self.reason, "reason")
        if self.version is not None:
            names.label(self.version, "version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The log took it. `position` is the event's offset, `appended_ms` the broker's time of it."""

    model: str
    version: str
    sequence: int
    digest: str
    event_id: str
    position: int
    appended_ms: int


class Publisher:
    """The library call behind the command line and the admin API. `writer` signs with a key that may release."""

    def __init__(self, store: ArtifactStore, writer: Writer, reader: LogReader, roots: tuple[bytes, ...]) -> None:
        self._store, self._writer, self._reader, self._roots = store, writer, reader, roots

    async def publish(self, request: ReleaseRequest, progress: Progress = _silent) -> Published:
        """`ModelRefused` when the artifact must not be served, with nothing uploaded; `Conflict` when races were lost."""
        artifact = await asyncio.to_thread(
            describe, request.path, lambda digest: names.model_object_key(request.model, digest),
        )  # fmt: skip
        proof = await asyncio.to_thread(_read_golden, request)
        report = await asyncio.to_thread(self._try, request, artifact)  # 1
        template = released(request, artifact, report, None if proof is None else proof[0])
        await self._upload(request, artifact, proof, progress)  # 2
        return await self._append(
            request.model,
            lambda sequence, _: msgspec.structs.replace(template, sequence=sequence, created_at_ms=wall_clock_ms()),
        )

    async def rollback(self, model: str, to_version: str | None, *, author: str, reason: str) -> Published:
        """Back to the artifact of `to_version`, or of the release before the one that is wanted now."""
        target: ModelReleased | None = None

        def event(sequence: int, state: Releases) -> ModelRolledBack:
            nonlocal target
            # Chosen once: "the one before", asked again after a lost race, would be the one before the winner. Two
            # operators who roll back at once would go back two releases.
            target = target or _rollback_target(state, model, to_version)
            return ModelRolledBack(
                model=model,
                version=target.version,
                sequence=sequence,
                to_digest=target.artifact.sha256,
                author=author,
                reason=reason,
            )

        return await self._append(model, event)

    async def retire(self, model: str, *, author: str, reason: str) -> Published:
        def event(sequence: int, state: Releases) -> ModelRetired:
            history = state.models.get(model)
            if history is None or history.wanted is None:
                raise NotFound(f"no model {model} is served")
            return ModelRetired(model=model, sequence=sequence, author=author, reason=reason)

        return await self._append(model, event)

    def _try(self, request: ReleaseRequest, artifact: Artifact) -> TrialReport:
        report = run_trial(request.path, artifact.sha256, request.golden, request.rtol, request.atol)
        if not report.ok:
            raise ModelRefused(report.reason)
        return report

    async def _upload(
        self, request: ReleaseRequest, artifact: Artifact, proof: tuple[Golden, bytes] | None, progress: Progress
    ) -> None:
        done = 0

        def sent(count: int) -> None:
            nonlocal done
            done += count
            progress("upload", done, artifact.size_bytes)

        await asyncio.to_thread(self._store.put, artifact, request.path, sent)
        if proof is not None:
            golden, data = proof
            await asyncio.to_thread(self._store.put_bytes, golden.object_key, data)

    async def _append(self, model: str, make: Callable[[int, Releases], ReleaseEvent]) -> Published:
        state = Releases.initial(self._roots)
        for _ in range(TRIES):
            state, _ = await asyncio.to_thread(self._fold_on, state, None)  # 3
            history = state.models.get(model)
            event = make((history.sequence if history else 0) + 1, state)
            appended = await self._writer.append(event)  # 4
            position = appended.record.offset
            state, refused = await asyncio.to_thread(self._fold_on, state, position + 1)  # 5
            if state.position != position:
                raise Conflict(f"position {position} is not in the log that acknowledged it: was the topic made again?")
            if refused is None:
                return _published(event, appended)
            if refused.refusal not in LOST_RACE:
                raise Conflict(f"the log holds the event at position {position}, refused: {refused}")
        raise Conflict(f"{TRIES} times another release of {model} came first")

    def _fold_on(self, state: Releases, end: int | None) -> tuple[Releases, EventRefused | None]:
        """The state up to, not including, `end`, and why the last record did not act, if it did not."""
        refused = None
        for record in self._reader.read(RELEASES.name, 0, state.position + 1, end):
            step = releases.fold(state, record)
            state, refused = step.state, step.refused
        return state, refused


def _read_golden(request: ReleaseRequest) -> tuple[Golden, bytes] | None:
    if request.golden is None:
        return None
    try:
        size = request.golden.stat().st_size
        if size > GOLDEN_MAX_BYTES:
            raise BadInput(f"the golden file has {size} bytes, at most {GOLDEN_MAX_BYTES}")
        data = request.golden.read_bytes()
    except OSError as error:
        raise BadInput(f"{request.golden}: {error.strerror}") from None
    digest = hashlib.sha256(data).hexdigest()
    key = names.golden_object_key(request.model, digest)
    return Golden(object_key=key, sha256=digest, rtol=request.rtol, atol=request.atol), data


def released(request: ReleaseRequest, artifact: Artifact, report: TrialReport, golden: Golden | None) -> ModelReleased:
    """The event but for its sequence. `BadInput` if it cannot be one."""
    return ModelReleased(
        model=request.model,
        version=request.version or artifact.sha256[:12],
        sequence=1,
        artifact=artifact,
        inputs=_tensors(report.inputs),
        outputs=_tensors(report.outputs),
        placement=request.placement,
        memory_bytes=report.model_rss_bytes,
        cache=request.cache,
        batching=Batching(batchable=report.batchable, max_size=request.max_batch),
        limits=request.limits,
        golden=golden,
        created_at_ms=wall_clock_ms(),
        author=request.author,
        reason=request.reason,
    )


def _published(event: ReleaseEvent, appended: Appended) -> Published:
    match event:
        case ModelReleased():
            version, digest = event.version, event.artifact.sha256
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
    )


def _rollback_target(state: Releases, model: str, to_version: str | None) -> ModelReleased:
    history = state.models.get(model)
    if history is None:
        raise NotFound(f"no model {model} was ever released")
    if to_version is not None:
        found = releases.find_version(state, model, to_version)
        if found is None:
            known = ", ".join(sorted({r.version for r in history.brought.values()}))
            raise NotFound(f"no release of {model} carries the version {to_version!r}; there are {known}")
        return found
    if history.wanted is None:
        raise Conflict(f"{model} is retired, so nothing is before what is served: say which version")
    now = history.wanted.released.sequence
    earlier = [r for r in history.brought.values() if r.sequence < now]
    if not earlier:
        raise NotFound(f"{model} has no release before the one that is served")
    return max(earlier, key=lambda r: r.sequence)


def _tensors(specs: tuple[TensorSpec, ...]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name=s.name, datatype=s.datatype, shape=tuple(s.shape), labels=tuple(map(str, s.labels or ())))
        for s in specs
    )
