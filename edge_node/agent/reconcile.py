"""What to do next so that the node serves what the log says. PURE.

Laws:
- Level, not edge: a plan follows from what is and what is wanted, never from an event; so a replay of 200 releases is
  one fetch, a redelivery none, and a crash between any two steps is repaired by the next plan.
- A seat (a model's stable one, or its candidate's) takes one step at a time: Fetch → Trial → Activate. The old release
  stays until the last of them; but a candidate that is none any more leaves at once, or, when it has become the stable
  release, in the very plan that seats it there: no request goes back to what it had left. Where it is all that answers,
  as a first release in waves is, it stays until its successor has a seat.
- Only the log takes a model away. One that it does not know (the topic was made again) serves on.
- Files are removed for two reasons, the budget and a disk that has no room for what is wanted; what is served, wanted, or
  what a rollback would go back to, is never removed.
- What was refused for good waits for another release; what may pass is tried again when its pause is over.

It must not know how a step is done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import msgspec

from edge_node.board import BoardModel
from schemas.events import Placement
from streams.folds.releases import ModelHistory, Releases, desired
from streams.folds.wanted import Channel, Seated, Wanted

FIRST_PAUSE_MS: Final = 500
# A release that waited for the object store is to be served within 5 s of its return.
LAST_PAUSE_MS: Final = 4_000


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """What the log says to a region: `seats` by name; `known` are the models it has spoken of; `previous` are the digests
    that a rollback would most likely go back to, by model."""

    seats: dict[str, Seated] = {}
    known: frozenset[str] = frozenset()
    previous: dict[str, frozenset[str]] = {}

    @classmethod
    def of(cls, state: Releases, region: str) -> Desired:
        return cls(
            seats=desired(state, region),
            known=frozenset(state.models),
            previous={name: _before(history) for name, history in state.models.items() if history.stable is not None},
        )


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """That what a release serves passed its trial, against these golden outputs, on this runtime."""

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
    """Why `wanted` is not served yet on its seat. `retry_at_ms` is None when only another release can help."""

    wanted: Wanted
    phase: str
    cause: str
    attempts: int = 1
    retry_at_ms: int | None = None
    reported: frozenset[tuple[str, str]] = frozenset()


class Actual(msgspec.Struct, frozen=True, kw_only=True):
    """What is. `models` and `failures` are by seat; `verified` are digests of files whose bytes this life has checked; `busy`
    are digests of releases with a step under way; `begun` is the room that parts have taken, by file; `free_bytes` may
    be filled."""

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
    """Have its files, and its golden file, on disk, verified."""

    seated: Seated


class Trial(msgspec.Struct, frozen=True, tag=True):
    """Load and run it where it can do no harm."""

    seated: Seated


class Activate(msgspec.Struct, frozen=True, tag=True):
    """Put it on the board."""

    seated: Seated


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Put it on the board as a model that the origin runs."""

    seated: Seated


class Retire(msgspec.Struct, frozen=True, tag=True):
    """Take the seat off the board."""

    seat: str


class Collect(msgspec.Struct, frozen=True, tag=True):
    """Remove files: the least recently used ones that nothing needs, until the budget holds and there is room."""

    names: tuple[str, ...]


Step = Fetch | Trial | Activate | Forward | Retire | Collect


def plan(actual: Actual, desired: Desired) -> tuple[Step, ...]:
    """What may be removed, for the room it makes; seats that are none any more; the next step of every other."""
    steps: list[Step] = [Collect(names)] if (names := _collectable(actual, desired)) else []
    ahead: dict[str, Step] = {}
    for name, seated in sorted(desired.seats.items()):
        # One digest is fetched and tried once, whatever seats it is wanted on.
        if seated.digest not in actual.busy and (step := _next(actual, seated)) is not None:
            ahead[name] = step
    for name, model in sorted(actual.models.items()):
        if _leaves(name, model, actual, desired, ahead):
            steps.append(Retire(name))
    return (*steps, *ahead.values())


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
    found = {artifact.sha256 for artifact in wanted.released.artifacts}
    return frozenset(found | {golden.sha256} if golden else found)


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


def next_retry_ms(failures: Mapping[str, Failure], busy: Collection[str]) -> int | None:
    """When the first pause is over; None when nothing waits for one."""
    return min(
        (f.retry_at_ms for m, f in failures.items() if f.retry_at_ms is not None and m not in busy), default=None
    )


def errors(failures: Mapping[str, Failure], desired: Desired) -> dict[str, str]:
    """By seat, for the board: why what is wanted is not served."""
    wanted = {name: seated.wanted for name, seated in desired.seats.items()}
    return {name: f"{f.phase}: {f.cause}" for name, f in sorted(failures.items()) if wanted.get(name) == f.wanted}


def _next(actual: Actual, seated: Seated) -> Step | None:
    wanted = seated.wanted
    current = actual.models.get(seated.seat)
    failure = actual.failures.get(seated.seat)
    held = failure is not None and failure.wanted == wanted
    if held and failure is not None and (failure.retry_at_ms is None or failure.retry_at_ms > actual.now_ms):
        return None
    served = current is not None and (current.wanted, current.percent) == (wanted, seated.percent)
    if wanted.released.placement is Placement.ORIGIN:
        return None if served else Forward(seated)
    if not needs(wanted) <= actual.verified:
        return Fetch(seated)
    if served:
        return None
    return Activate(seated) if proof_of(wanted, actual.runtime) in actual.proofs else Trial(seated)


def _leaves(name: str, model: BoardModel, actual: Actual, desired: Desired, ahead: Mapping[str, Step]) -> bool:
    """Whether a seat on the board is to be given up now."""
    if model.wanted.model not in desired.known:
        return False
    told = desired.seats.get(name)
    if model.channel is Channel.STABLE:
        return told is None
    if told is not None and told.wanted == model.wanted:
        return False
    stable = desired.seats.get(model.wanted.model)
    seated = actual.models.get(model.wanted.model)
    comes = stable is not None and isinstance(ahead.get(stable.seat), Activate | Forward)
    if seated is None and (told is not None or stable is not None):
        return comes
    if stable is None or stable.digest != model.wanted.digest:
        return True
    return (seated is not None and seated.wanted == stable.wanted) or comes


def _collectable(actual: Actual, desired: Desired) -> tuple[str, ...]:
    active = [model.wanted for model in actual.models.values()]
    told = [seated.wanted for seated in desired.seats.values()]
    pinned = {digest for wanted in (*active, *told) for digest in needs(wanted)}
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
        artifact.sha256: max(0, artifact.size_bytes - actual.begun.get(artifact.sha256, 0))
        for wanted in (seated.wanted for seated in desired.seats.values())
        for artifact in wanted.released.artifacts
        if artifact.sha256 in needs(wanted) - there
    }
    return sum(sizes.values())


def _before(history: ModelHistory) -> frozenset[str]:
    """The files of what a halt would go back to, and of the newest release with another artifact."""
    stable, rollout = history.stable, history.rollout
    assert stable is not None
    kept = needs(rollout.before) if rollout is not None and rollout.before is not None else frozenset()
    others = [released for released in history.brought.values() if released.digest != stable.digest]
    newest = max(others, key=lambda released: released.sequence, default=None)
    return kept | needs(msgspec.structs.replace(stable, released=newest)) if newest is not None else kept


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
