"""What every model should be: the fold of ``mlcdn.releases``. PURE.

Laws: a model's sequence rises strictly over releases, rollbacks and retirements, and the lower position wins a tie, so
every reader picks the same winner; a rollback names only what a release brought; a refused record changes the position
and nothing else. `desired` is what a node is told; its digest is what a node reports back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from schemas.errors import EventRefused, Refusal
from schemas.events import Event, LogCheckpoint, ModelReleased, ModelRetired, ModelRolledBack, TrustChanged
from streams.folds import checkpoints
from streams.folds import trust as trusting
from streams.folds.step import Step
from streams.folds.trust import Trust
from streams.log.record import Record


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What should be served of one model, by the event at `position` (whose CloudEvents id is `cause`).

    `released` is the release that brought the artifact: the event itself, or what a rollback points back to.
    """

    model: str
    version: str
    sequence: int
    position: int
    cause: str
    released: ModelReleased

    @property
    def digest(self) -> str:
        return self.released.artifact.sha256


class ModelHistory(msgspec.Struct, frozen=True, kw_only=True):
    """`brought` has each artifact's newest release by digest; `wanted` is None once the model is retired."""

    sequence: int
    brought: dict[str, ModelReleased]
    wanted: Wanted | None


class Releases(msgspec.Struct, frozen=True, kw_only=True):
    """`position` is that of the last record folded; -1 before any."""

    trust: Trust
    position: int = -1
    models: dict[str, ModelHistory] = {}

    @classmethod
    def initial(cls, roots: tuple[bytes, ...]) -> Releases:
        return cls(trust=Trust.of(roots))


def fold(state: Releases, record: Record) -> Step[Releases]:
    """One record of ``mlcdn.releases``; a position at or below the state's own is dropped without a word."""
    if record.offset <= state.position:
        return Step(state)
    moved = msgspec.structs.replace(state, position=record.offset)
    try:
        envelope = trusting.admit(state.trust, record)
        return Step(_apply(moved, envelope.event, envelope.id), envelope=envelope)
    except EventRefused as refused:
        return Step(moved, refused=refused)


def _apply(state: Releases, event: Event, cause: str) -> Releases:
    wanted: Wanted | None
    match event:
        case TrustChanged():
            return msgspec.structs.replace(state, trust=trusting.changed(state.trust, event, state.position))
        case LogCheckpoint():
            checkpoints.stands(event, state.position)
            return state
        case ModelReleased():
            before = _next(state, event.model, event.sequence, event.artifact.sha256)
            brought = (before.brought if before else {}) | {event.artifact.sha256: event}
            wanted = _wanted(state, event, event, cause)
        case ModelRolledBack():
            before = _next(state, event.model, event.sequence, event.to_digest)
            if before is None:
                raise EventRefused(Refusal.UNKNOWN_MODEL, event.model)
            if event.to_digest not in before.brought:
                raise EventRefused(Refusal.UNKNOWN_DIGEST, f"no release of {event.model} brought {event.to_digest}")
            brought = before.brought
            wanted = _wanted(state, event, brought[event.to_digest], cause)
        case ModelRetired():
            before = _next(state, event.model, event.sequence, None)
            if before is None:
                raise EventRefused(Refusal.UNKNOWN_MODEL, event.model)
            brought, wanted = before.brought, None
        case _:
            raise EventRefused(Refusal.WRONG_TOPIC, event.kind)
    history = ModelHistory(sequence=event.sequence, brought=brought, wanted=wanted)
    return msgspec.structs.replace(state, models=state.models | {event.model: history})


def _next(state: Releases, model: str, sequence: int, digest: str | None) -> ModelHistory | None:
    before = state.models.get(model)
    if before is not None and sequence <= before.sequence:
        twin = sequence == before.sequence and (before.wanted.digest if before.wanted else None) != digest
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


def desired(state: Releases) -> dict[str, Wanted]:
    """What a node should serve, by model; retired models are not in it."""
    return {name: history.wanted for name, history in sorted(state.models.items()) if history.wanted is not None}


def desired_digest(wanted: Mapping[str, Wanted]) -> str:
    """SHA-256 of what should be served: the same for the same log, on every machine."""
    return hashlib.sha256(msgspec.json.encode(dict(wanted), order="deterministic")).hexdigest()


def state_digest(state: Releases) -> str:
    """SHA-256 of the whole folded state, position included."""
    return hashlib.sha256(msgspec.json.encode(state, order="deterministic")).hexdigest()


def find_version(state: Releases, model: str, version: str) -> ModelReleased | None:
    """The newest release of `model` that carries the label `version`."""
    history = state.models.get(model)
    found = [r for r in history.brought.values() if r.version == version] if history else []
    return max(found, key=lambda r: r.sequence, default=None)
