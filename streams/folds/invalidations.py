"""What has been purged: the fold of ``mlcdn.invalidations``. PURE.

Laws: an entry is valid only if the position its inputs were read at (`as_of`) is not below the last purge of any scope it
is in; a record appended twice acts once (its id is remembered); the map of live scopes is bounded, and when the bound
bites, the oldest scopes collapse into `all`: more is purged, never less. `PurgeMap` is also what a worker looks things up
in, and it costs one comparison when nothing was purged since the entry was last found valid.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from enum import IntEnum
from fnmatch import translate

import msgspec

from schemas.errors import EventRefused, Refusal
from schemas.events import CacheInvalidated, LogCheckpoint, TrustChanged
from schemas.names import Scope, ScopeKind
from streams.folds import checkpoints
from streams.folds import trust as trusting
from streams.folds.step import Step
from streams.folds.trust import Trust
from streams.log.record import Record

MAX_SCOPES = 100_000
MAX_PATTERNS = 256
MAX_PREFIX_LENGTHS = 64
MAX_REMEMBERED_IDS = 200_000
MODEL_NAMESPACES = ("model", "prediction", "embedding")


class Standing(IntEnum):
    """How an entry stands against the purges: higher is worse."""

    VALID = 0
    SOFT = 1
    HARD = 2


class Purge(msgspec.Struct, frozen=True, kw_only=True):
    """One invalidation as the board's purge log carries it."""

    position: int
    scopes: tuple[Scope, ...]
    soft: bool
    cause: str


class PurgeMap:
    """Live scopes and the last hard and soft position of each. Mutable: one owner, one thread.

    ``standing(as_of, name, model, tags)`` costs a dict look-up per scope kind, per distinct prefix length and a match per
    live pattern; callers skip it when `last` has not moved since they asked.
    """

    def __init__(self, max_scopes: int = MAX_SCOPES, max_patterns: int = MAX_PATTERNS) -> None:
        self.last = -1
        self._max_scopes, self._max_patterns = max_scopes, max_patterns
        # scope -> [last hard, last soft], oldest touched first.
        self._live: dict[Scope, tuple[int, int]] = {}
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._prefix_lengths: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._live)

    def apply(self, purge: Purge) -> None:
        """Takes one purge over; a position at or below `last` is dropped."""
        if purge.position <= self.last:
            return
        self.last = purge.position
        for scope in purge.scopes:
            self._touch(scope, purge.position, purge.soft)
        self._bound()

    def standing(self, as_of: int, name: str, model: str | None, tags: Iterable[str]) -> Standing:
        """How an entry whose inputs were read at position `as_of` stands."""
        if as_of >= self.last:
            return Standing.VALID
        worst = Standing.VALID
        for scope in self._scopes_of(name, model, tags):
            hard, soft = self._live.get(scope, (-1, -1))
            if as_of < hard:
                return Standing.HARD
            if as_of < soft:
                worst = Standing.SOFT
        return worst

    def purges(self) -> list[Purge]:
        """The map as purges in position order: applying them to an empty map gives an equal one."""
        by_position: dict[tuple[int, bool], list[Scope]] = {}
        for scope, (hard, soft) in self._live.items():
            for position, is_soft in ((hard, False), (soft, True)):
                if position >= 0:
                    by_position.setdefault((position, is_soft), []).append(scope)
        return [
            Purge(position=position, scopes=tuple(sorted(scopes)), soft=is_soft, cause="")
            for (position, is_soft), scopes in sorted(by_position.items())
        ]

    def _scopes_of(self, name: str, model: str | None, tags: Iterable[str]) -> Iterable[Scope]:
        yield Scope(ScopeKind.ALL)
        if model is not None:
            yield Scope(ScopeKind.MODEL, model)
        yield Scope(ScopeKind.KEY, name)
        for tag in tags:
            yield Scope(ScopeKind.TAG, tag)
        for length in self._prefix_lengths:
            if length <= len(name):
                yield Scope(ScopeKind.PREFIX, name[:length])
        for glob, pattern in self._patterns.items():
            if pattern.match(name):
                yield Scope(ScopeKind.PATTERN, glob)

    def _touch(self, scope: Scope, position: int, soft: bool) -> None:
        hard_at, soft_at = self._live.pop(scope, (-1, -1))
        fresh = (hard_at, soft_at) == (-1, -1)
        self._live[scope] = (hard_at, position) if soft else (position, soft_at)
        if fresh and scope.kind is ScopeKind.PATTERN:
            self._patterns[scope.value] = re.compile(translate(scope.value))
        if fresh and scope.kind is ScopeKind.PREFIX:
            self._prefix_lengths[len(scope.value)] = self._prefix_lengths.get(len(scope.value), 0) + 1

    def _bound(self) -> None:
        while len(self._live) > self._max_scopes:
            self._collapse(next(s for s in self._live if s.kind is not ScopeKind.ALL))
        while len(self._patterns) > self._max_patterns:
            self._collapse(Scope(ScopeKind.PATTERN, next(iter(self._patterns))))
        while len(self._prefix_lengths) > MAX_PREFIX_LENGTHS:
            length = next(iter(self._prefix_lengths))
            for scope in [s for s in self._live if s.kind is ScopeKind.PREFIX and len(s.value) == length]:
                self._collapse(scope)

    def _collapse(self, scope: Scope) -> None:
        """The scope's positions become everything's."""
        hard, soft = self._live.pop(scope)
        if scope.kind is ScopeKind.PATTERN:
            del self._patterns[scope.value]
        if scope.kind is ScopeKind.PREFIX:
            left = self._prefix_lengths[len(scope.value)] - 1
            if left:
                self._prefix_lengths[len(scope.value)] = left
            else:
                del self._prefix_lengths[len(scope.value)]
        everything = Scope(ScopeKind.ALL)
        all_hard, all_soft = self._live.pop(everything, (-1, -1))
        self._live[everything] = (max(hard, all_hard), max(soft, all_soft))


class Invalidations(msgspec.Struct, frozen=True, kw_only=True):
    """`ids` remembers taken records by CloudEvents id, oldest first; `purges` are those taken, in order, not yet in a map."""

    trust: Trust
    position: int = -1
    ids: dict[str, int] = {}

    @classmethod
    def initial(cls, roots: tuple[bytes, ...]) -> Invalidations:
        return cls(trust=Trust.of(roots))


def fold(state: Invalidations, record: Record, signature: bool | None = None) -> Step[Invalidations]:
    """One record of ``mlcdn.invalidations``. The caller applies `purge_of` the step to its map.

    `signature` is what an earlier check of it found (`trust.admit`)."""
    if record.offset <= state.position:
        return Step(state)
    moved = msgspec.structs.replace(state, position=record.offset)
    try:
        envelope = trusting.admit(state.trust, record, signature)
        if envelope.id in state.ids:
            raise EventRefused(Refusal.DUPLICATE, f"stands at position {state.ids[envelope.id]}")
        if isinstance(envelope.event, LogCheckpoint):
            checkpoints.stands(envelope.event, record.offset)
            return Step(moved, envelope=envelope)
    except EventRefused as refused:
        return Step(moved, refused=refused)
    if isinstance(envelope.event, TrustChanged):
        trust = trusting.changed(state.trust, envelope.event, record.offset, envelope.id)
        moved = msgspec.structs.replace(moved, trust=trust)
        return Step(moved, envelope=envelope)
    # One dict for the life of the fold: copying 200,000 ids per record would make a boot read quadratic.
    state.ids[envelope.id] = record.offset
    if len(state.ids) > MAX_REMEMBERED_IDS:
        del state.ids[next(iter(state.ids))]
    return Step(moved, envelope=envelope)


def purge_of(step: Step[Invalidations]) -> Purge | None:
    """The purge that a folded record brought, if it brought one."""
    envelope = step.envelope
    if envelope is None or not isinstance(envelope.event, CacheInvalidated):
        return None
    return Purge(
        position=step.state.position,
        scopes=envelope.event.scopes,
        soft=envelope.event.soft,
        cause=envelope.id,
    )


def state_digest(state: Invalidations, purged: PurgeMap) -> str:
    """SHA-256 over position, trust and live scopes."""
    whole: Mapping[str, object] = {"position": state.position, "trust": state.trust, "purges": purged.purges()}
    return hashlib.sha256(msgspec.json.encode(whole, order="deterministic")).hexdigest()
