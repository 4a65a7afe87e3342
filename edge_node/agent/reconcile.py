"""What to do next so that the node serves what the log says. PURE.

Laws:
- Level, not edge: a plan follows from what is and what is wanted, never from an event; so a replay of 200 releases is
  one fetch, a redelivery none, and a crash between any two steps is repaired by the next plan.
- A model takes one step at a time: Fetch → Trial → Activate. Its old release stays until the last of them.
- Only a retirement takes a model away. One that the log does not know (the topic was made again) serves on.
- Files are removed for two reasons, the budget and a disk that has no room for what is wanted; what is served, wanted, or
  what a rollback would go back to, is never removed.
- What was refused for good waits for another release; what may pass is tried again when its pause is over.

It must not know how a step is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from edge_node.board import BoardModel
from schemas.events import ModelReleased, Placement
from streams.folds.releases import Releases, Wanted, desired

FIRST_PAUSE_MS: Final = 500
# A release that waited for the object store is to be served within 5 s of its return.
LAST_PAUSE_MS: Final = 4_000


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """What the log says: `wanted` by model; `retired` are the models it took away; `previous` are the digests that a
    rollback would most likely go back to, by model."""

    wanted: dict[str, Wanted] = {}
    retired: frozenset[str] = frozenset()
    previous: dict[str, frozenset[str]] = {}

    @classmethod
    def of(cls, state: Releases) -> Desired:
        retired = frozenset(name for name, history in state.models.items() if history.wanted is None)
        wanted = desired(state)
        previous = {name: _before(wanted[name], state.models[name].brought.values()) for name in wanted}
        return cls(wanted=wanted, retired=retired, previous=previous)


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """That an artifact passed its trial, against these golden outputs, on this runtime."""

    digest: str
    golden: str | None
    rtol: float
    atol: float
    runtime: str


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file in the artifact folder; `digest` is the SHA-256 that its name promises."""

    name: str
    digest: str
    size: int
    used_ms: int


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why `wanted` is not served yet. `retry_at_ms` is None when only another release can help."""

    wanted: Wanted
    phase: str
    cause: str
    attempts: int = 1
    retry_at_ms: int | None = None
    reported: frozenset[tuple[str, str]] = frozenset()


class Actual(msgspec.Struct, frozen=True, kw_only=True):
    """What is. `verified` are digests whose bytes this life has checked; `busy` are models with a step under way;
    `begun` is the room that parts have taken, by digest; `free_bytes` may be filled."""

    models: Mapping[str, BoardModel] = {}
    verified: frozenset[str] = frozenset()
    proofs: frozenset[Proof] = frozenset()
    failures: Mapping[str, Failure] = {}
    busy: frozenset[str] = frozenset()
    stored: tuple[StoredFile, ...] = ()
    previous: Mapping[str, frozenset[str]] = {}
    runtime: str = ""
    begun: Mapping[str, int] = {}
    disk_bytes: int = 0
    free_bytes: int = 2**62
    now_ms: int = 0


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Have the artifact and its golden file on disk, verified."""

    wanted: Wanted


class Trial(msgspec.Struct, frozen=True, tag=True):
    """Load and run it where it can do no harm."""

    wanted: Wanted


class Activate(msgspec.Struct, frozen=True, tag=True):
    """Put it on the board."""

    wanted: Wanted


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Put it on the board as a model that the origin runs."""

    wanted: Wanted


class Retire(msgspec.Struct, frozen=True, tag=True):
    """Take the model off the board."""

    model: str


class Collect(msgspec.Struct, frozen=True, tag=True):
    """Remove files: the least recently used ones that nothing needs, until the budget holds and there is room."""

    names: tuple[str, ...]


Step = Fetch | Trial | Activate | Forward | Retire | Collect


def plan(actual: Actual, desired: Desired) -> tuple[Step, ...]:
    """What may be removed, for the room it makes; then the next step of every model that is not what it should be."""
    steps: list[Step] = [Collect(names)] if (names := _collectable(actual, desired)) else []
    steps += [Retire(name) for name in sorted(desired.retired) if name in actual.models]
    for name, wanted in sorted(desired.wanted.items()):
        if name not in actual.busy and (step := _next(actual, wanted)) is not None:
            steps.append(step)
    return tuple(steps)


def proof_of(wanted: Wanted, runtime: str) -> Proof:
    """What a passed trial of it proves."""
    golden = wanted.released.golden
    return Proof(
        digest=wanted.digest,
        golden=golden.sha256 if golden else None,
        rtol=golden.rtol if golden else 0.0,
        atol=golden.atol if golden else 0.0,
        runtime=runtime,
    )


def needs(wanted: Wanted) -> frozenset[str]:
    """The digests of the files it is served from."""
    if wanted.released.placement is Placement.ORIGIN:
        return frozenset()
    golden = wanted.released.golden
    return frozenset({wanted.digest, golden.sha256} if golden else {wanted.digest})


def failed(
    before: Failure | None, wanted: Wanted, phase: str, cause: str, *, retryable: bool, now_ms: int, random: float
) -> tuple[Failure, bool]:
    """The failure to remember, and whether it is news: one report a release and cause, not one an attempt.

    `random` is in [0, 1): pauses double and are spread over their upper half, so that a fleet does not come as one.
    """
    same = before if before is not None and before.wanted == wanted else None
    attempts = same.attempts + 1 if same else 1
    pause = min(FIRST_PAUSE_MS * 2 ** min(attempts - 1, 16), LAST_PAUSE_MS)
    reported = same.reported if same else frozenset()
    failure = Failure(
        wanted=wanted,
        phase=phase,
        cause=cause,
        attempts=attempts,
        retry_at_ms=now_ms + int(pause * (0.5 + random / 2)) if retryable else None,
        reported=reported | {(phase, cause)},
    )
    return failure, (phase, cause) not in reported


def next_retry_ms(failures: Mapping[str, Failure], busy: frozenset[str]) -> int | None:
    """When the first pause is over; None when nothing waits for one."""
    return min(
        (f.retry_at_ms for m, f in failures.items() if f.retry_at_ms is not None and m not in busy), default=None
    )


def errors(failures: Mapping[str, Failure], desired: Desired) -> dict[str, str]:
    """By model, for the board: why what is wanted is not served."""
    return {m: f"{f.phase}: {f.cause}" for m, f in sorted(failures.items()) if desired.wanted.get(m) == f.wanted}


def _next(actual: Actual, wanted: Wanted) -> Step | None:
    current = actual.models.get(wanted.model)
    failure = actual.failures.get(wanted.model)
    held = failure is not None and failure.wanted == wanted
    if held and failure is not None and (failure.retry_at_ms is None or failure.retry_at_ms > actual.now_ms):
        return None
    served = current is not None and current.wanted == wanted
    if wanted.released.placement is Placement.ORIGIN:
        return None if served else Forward(wanted)
    if not needs(wanted) <= actual.verified:
        return Fetch(wanted)
    if served:
        return None
    return Activate(wanted) if proof_of(wanted, actual.runtime) in actual.proofs else Trial(wanted)


def _collectable(actual: Actual, desired: Desired) -> tuple[str, ...]:
    active = (model.wanted for model in actual.models.values())
    pinned = {digest for wanted in (*active, *desired.wanted.values()) for digest in needs(wanted)}
    for digests in (*actual.previous.values(), *desired.previous.values()):
        pinned |= digests
    over_budget = sum(file.size for file in actual.stored) - actual.disk_bytes
    missing = _missing_bytes(actual, desired)
    # Where nothing is wanted, a full disk is not for the node to empty.
    return _oldest(actual.stored, pinned, max(over_budget, missing - actual.free_bytes if missing else 0))


def _missing_bytes(actual: Actual, desired: Desired) -> int:
    """What the disk has yet to take of what is wanted."""
    there = {file.digest for file in actual.stored}
    sizes = {
        wanted.digest: max(0, wanted.released.artifact.size_bytes - actual.begun.get(wanted.digest, 0))
        for wanted in desired.wanted.values()
        if wanted.digest in needs(wanted) - there
    }
    return sum(sizes.values())


def _before(wanted: Wanted, brought: Iterable[ModelReleased]) -> frozenset[str]:
    """The files of the newest release with another artifact."""
    others = [released for released in brought if released.artifact.sha256 != wanted.digest]
    newest = max(others, key=lambda released: released.sequence, default=None)
    return needs(msgspec.structs.replace(wanted, released=newest)) if newest is not None else frozenset()


def _oldest(stored: Iterable[StoredFile], pinned: set[str], over: int) -> tuple[str, ...]:
    """Files that nothing needs, the least recently used first, until they make up for the bytes that are `over`."""
    names = []
    for file in sorted(stored, key=lambda f: (f.used_ms, f.name)):
        if over <= 0:
            break
        if file.digest not in pinned:
            names.append(file.name)
            over -= file.size
    return tuple(names)
