"""What every model should be: the fold of ``mlcdn.releases``. PURE.

Laws: a model's sequence rises strictly over releases, rollbacks and retirements, and the lower position wins a tie, so
every reader picks the same winner; a rollback names only what a release brought; a new release, a rollback or a
retirement ends the rollout before it, and what was stable stays so; a refused record changes the position and nothing
else. `desired` is what a region's nodes are told; its digest is what a node reports back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from schemas.errors import EventRefused, Refusal
from schemas.events import (
    Event,
    LogCheckpoint,
    ModelReleased,
    ModelRetired,
    ModelRolledBack,
    RolloutEvent,
    TrustChanged,
)
from streams.folds import checkpoints, rollouts
from streams.folds import trust as trusting
from streams.folds.rollouts import Rollout
from streams.folds.step import Step
from streams.folds.trust import Trust
from streams.folds.wanted import Channel, Seated, Wanted
from streams.log.record import Record


class ModelHistory(msgspec.Struct, frozen=True, kw_only=True):
    """`brought` has each artifact's newest release by digest; `stable` is None before a first release has come through,
    and once the model is retired; `rollout` is that of the newest release, None after a rollback or a retirement."""

    sequence: int
    brought: dict[str, ModelReleased]
    stable: Wanted | None = None
    rollout: Rollout | None = None

    @property
    def newest(self) -> Wanted | None:
        """What was asked for last: it serves, or is on its way, or was taken back."""
        return self.rollout.wanted if self.rollout is not None else self.stable

    @property
    def retired(self) -> bool:
        return self.stable is None and self.rollout is None


class Releases(msgspec.Struct, frozen=True, kw_only=True):
    """`position` is that of the last record folded; -1 before any."""

    trust: Trust
    position: int = -1
    models: dict[str, ModelHistory] = {}

    @classmethod
    def initial(cls, roots: tuple[bytes, ...]) -> Releases:
        return cls(trust=Trust.of(roots))


def fold(state: Releases, record: Record, signature: bool | None = None) -> Step[Releases]:
    """One record of ``mlcdn.releases``; a position at or below the state's own is dropped without a word.

    `signature` is what an earlier check of it found (`trust.admit`)."""
    if record.offset <= state.position:
        return Step(state)
    moved = msgspec.structs.replace(state, position=record.offset)
    try:
        envelope = trusting.admit(state.trust, record, signature)
        return Step(_apply(moved, envelope.event, envelope.id, record.timestamp_ms), envelope=envelope)
    except EventRefused as refused:
        return Step(moved, refused=refused)


def _apply(state: Releases, event: Event, cause: str, at_ms: int) -> Releases:
    match event:
        case TrustChanged():
            return msgspec.structs.replace(state, trust=trusting.changed(state.trust, event, state.position, cause))
        case LogCheckpoint():
            checkpoints.stands(event, state.position)
            return state
        case ModelReleased():
            before = _next(state, event.model, event.sequence, event.digest)
            brought = (before.brought if before else {}) | {event.digest: event}
            wanted = _wanted(state, event, event, cause)
            rollout = rollouts.begun(wanted, before.stable if before else None, at_ms)
            history = ModelHistory(sequence=event.sequence, brought=brought, stable=rollout.stable, rollout=rollout)
        case ModelRolledBack():
            before = _known(_next(state, event.model, event.sequence, event.to_digest), event.model)
            if event.to_digest not in before.brought:
                raise EventRefused(Refusal.UNKNOWN_DIGEST, f"no release of {event.model} brought {event.to_digest}")
            wanted = _wanted(state, event, before.brought[event.to_digest], cause)
            history = ModelHistory(sequence=event.sequence, brought=before.brought, stable=wanted)
        case ModelRetired():
            before = _known(_next(state, event.model, event.sequence, None), event.model)
            history = ModelHistory(sequence=event.sequence, brought=before.brought)
        case RolloutEvent():
            before = _known(state.models.get(event.model), event.model)
            rollout = rollouts.moved(before.rollout, event, state.position, at_ms)
            history = msgspec.structs.replace(before, stable=rollout.stable, rollout=rollout)
        case _:
            raise EventRefused(Refusal.WRONG_TOPIC, event.kind)
    return msgspec.structs.replace(state, models=state.models | {event.model: history})


def _known(history: ModelHistory | None, model: str) -> ModelHistory:
    if history is None:
        raise EventRefused(Refusal.UNKNOWN_MODEL, model)
    return history


def _next(state: Releases, model: str, sequence: int, digest: str | None) -> ModelHistory | None:
    before = state.models.get(model)
    if before is not None and sequence <= before.sequence:
        newest = before.newest
        twin = sequence == before.sequence and (newest.digest if newest else None) != digest
        refusal = Refusal.SEQUENCE_CONFLICT if twin else Refusal.SEQUENCE_NOT_HIGHER
        raise EventRefused(refusal, f"{model}: {sequence} after {before.sequence}")
    return before


def _wanted(
    state: Releases,
    event: ModelReleased | ModelRolledBack,
    released: ModelReleased,
    cause: str,
) -> Wanted:
    return Wanted(
        model=event.model,
        version=event.version,
        sequence=event.sequence,
        position=state.position,
        cause=cause,
        released=released,
    )


def desired(state: Releases, region: str | None) -> dict[str, Seated]:
    """What a node of the region should serve, by seat; retired models are not in it. None: what any region may serve."""
    seats: dict[str, Seated] = {}
    for _, history in sorted(state.models.items()):
        if history.stable is not None:
            stable = Seated(wanted=history.stable)
            seats[stable.seat] = stable
        share = history.rollout.share(region) if history.rollout is not None else None
        if history.rollout is not None and share is not None:
            candidate = Seated(wanted=history.rollout.wanted, channel=Channel.CANDIDATE, percent=share)
            seats[candidate.seat] = candidate
    return seats


def desired_digest(seats: Mapping[str, Seated]) -> str:
    """SHA-256 of what should be served: the same for the same log, on every machine of a region."""
    return hashlib.sha256(msgspec.json.encode(dict(seats), order="deterministic")).hexdigest()


def state_digest(state: Releases) -> str:
    """SHA-256 of the whole folded state, position included."""
    return hashlib.sha256(msgspec.json.encode(state, order="deterministic")).hexdigest()


def find_version(state: Releases, model: str, version: str) -> ModelReleased | None:
    """The newest release of `model` that carries the label `version`."""
    history = state.models.get(model)
    found = [r for r in history.brought.values() if r.version == version] if history else []
    return max(found, key=lambda r: r.sequence, default=None)
