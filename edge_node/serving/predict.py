"""The core of a prediction: key → memory → [in flight?] → Redis → disk → model or origin → fill.

    1. the fence was read before the inputs were (`Controls.as_of`)
    2. memory is asked; a hit is an answer
    3. a twin in flight is joined, if no purge of its scopes lies between
    4. else a flight is registered, and its task asks Redis and disk, then runs the model, once for all its rows
    5. the fence is read again: what was read before a purge is not an answer from a cache, nor worth a fill
    6. memory is filled before the answer leaves, Redis and disk behind it

Laws: a key holds the digest, so no release is answered by its predecessor; Redis and disk count only once the agent has
caught up; a cache that fails costs a counter and its time-out; what the caller's deadline cuts off is the waiting, what
the release's deadline cuts off is the run.

It must not know HTTP, how tiers store, or where models come from.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import structlog

from edge_node.board import position_of
from edge_node.board.fence import generation_of
from edge_node.caching.cache import Cache
from edge_node.caching.entry import Entry
from edge_node.caching.keys import prediction_key
from edge_node.caching.lookup import Verdict, judge
from edge_node.serving.board_view import BoardView
from edge_node.serving.computing import check, compute
from edge_node.serving.controls import Consulted, Controls
from edge_node.serving.flights import Ask, Flight, Flights
from edge_node.serving.model_slot import Served
from edge_node.serving.origin_client import OriginClient
from inference.deadlines import Deadline
from inference.onnx_model import RunFailed
from schemas import names
from schemas.errors import DeadlineExceeded, MlcdnError, NotReady
from schemas.metrics import counter
from streams.folds.invalidations import Standing

Array = np.ndarray[Any, np.dtype[Any]]
CACHE_TIERS = ("memory", "redis", "disk")
MAX_ENTRY_TAGS = 128

log = structlog.get_logger()


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`body` is the protocol's `outputs`; `position` is ``releases/invalidations``, as obeyed."""

    body: bytes
    tier: str
    key: bytes
    age_s: int
    trail: tuple[Consulted, ...]
    position: str

    @property
    def cached(self) -> bool:
        return self.tier in CACHE_TIERS


class _Found(msgspec.Struct, frozen=True):
    """What a flight comes to."""

    body: bytes
    tier: str
    stored_at_ms: int
    trail: tuple[Consulted, ...]


class Predictor:
    """One event loop owns it."""

    def __init__(self, view: BoardView, cache: Cache, origin: OriginClient | None) -> None:
        self._view, self._cache, self.origin = view, cache, origin
        self._flights = Flights(self._is_valid)
        self._tasks: set[asyncio.Task[None]] = set()

    def now(self) -> int:
        """The stamp that a request starting here is of. Read it before its body."""
        return self._obey()

    async def predict(
        self,
        served: Served,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        controls: Controls,
        parameters: Mapping[str, Any] | None = None,
    ) -> Answer:
        return (await self._predict(served, [inputs], outputs, controls, parameters))[0]

    async def predict_rows(
        self, served: Served, rows: Sequence[Mapping[str, Array]], controls: Controls
    ) -> list[Answer]:
        """Each row looked up by itself; those that no tier has, computed together where the model allows it."""
        return await self._predict(served, rows, None, controls, None)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _predict(
        self,
        served: Served,
        rows: Sequence[Mapping[str, Array]],
        outputs: Sequence[str] | None,
        controls: Controls,
        parameters: Mapping[str, Any] | None,
    ) -> list[Answer]:
        limit_ms = served.wanted.released.limits.deadline_ms
        deadline = Deadline.after(min(controls.deadline_ms or limit_ms, limit_ms) / 1e3)
        with served.held():
            check(served, rows, outputs)
            asks = [self._ask(served, inputs, outputs, controls, parameters) for inputs in rows]
            try:
                async with asyncio.timeout(deadline.remaining()):
                    found = await self._find(served, asks, outputs, controls)
            except TimeoutError:
                raise DeadlineExceeded("no answer before the deadline") from None
        return [self._answer(served, ask, one) for ask, one in zip(asks, found, strict=True)]

    def _ask(
        self,
        served: Served,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        controls: Controls,
        parameters: Mapping[str, Any] | None,
    ) -> Ask:
        key = prediction_key(served.name, served.digest, inputs, outputs, parameters, controls.tenant)
        name = names.prediction_name(served.name, key.hex())
        return Ask(key, name, served.name, inputs, controls.tags, controls.as_of)

    async def _find(
        self, served: Served, asks: Sequence[Ask], outputs: Sequence[str] | None, controls: Controls
    ) -> list[_Found]:
        policy = served.wanted.released.cache
        if controls.no_store or not policy.enabled:
            reason = "request" if controls.no_store else "bypass"
            bodies = await compute(served, [a.inputs for a in asks], outputs, self.origin, controls.traceparent)
            return [_Found(body, _model_tier(served), 0, (Consulted("edge", False, reason),)) for body in bodies]
        if controls.only_if_cached:
            return await self._only_cached(served, asks, controls)
        found: list[_Found | Flight] = []
        joined: set[int] = set()
        started: list[Flight] = []
        for index, ask in enumerate(asks):
            # 2 to 4 without an await in between, so that no twin slips in.
            hit, stale = self._memory(served, ask, controls)
            if hit is not None:
                found.append(hit)
                if stale is not None and self._flights.find(ask, True) is None:
                    self._launch(served, [self._flights.start(ask, True, stale)], outputs, controls)
                continue
            # Only memory is asked by age: what another tier holds is older than what memory held.
            fresh = controls.no_cache or controls.max_age_s is not None
            flight = self._flights.find(ask, fresh)
            if flight is not None:
                joined.add(index)
            else:
                flight = self._flights.start(ask, fresh, stale)
                started.append(flight)
            found.append(flight)
        if started:
            self._launch(served, started, outputs, controls)
        return [
            one if isinstance(one, _Found) else await self._landed(one, index in joined)
            for index, one in enumerate(found)
        ]

    def _launch(self, served: Served, flights: list[Flight], outputs: Sequence[str] | None, controls: Controls) -> None:
        task = asyncio.get_running_loop().create_task(self._fly(served, flights, outputs, controls))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fly(
        self, served: Served, flights: list[Flight], outputs: Sequence[str] | None, controls: Controls
    ) -> None:
        """Every flight lands, whatever happens."""
        with served.held():
            try:
                left = [f for f in flights if f.fresh] + await self._shared(
                    served, [f for f in flights if not f.fresh], outputs, controls
                )
                if left:
                    await self._run(served, left, outputs, controls)
            except MlcdnError as error:
                self._fail(served, flights, error)
            except Exception:
                log.exception("prediction_broke", model=served.name)
                self._fail(served, flights, RunFailed("internal error"))
            finally:
                for flight in flights:
                    self._flights.end(flight)
                    if not flight.outcome.done():
                        flight.outcome.set_exception(NotReady("the worker stops"))

    async def _run(
        self, served: Served, flights: list[Flight], outputs: Sequence[str] | None, controls: Controls
    ) -> None:
        rows = [f.ask.inputs for f in flights]
        bodies = await compute(served, rows, outputs, self.origin, controls.traceparent)
        for flight, body in zip(flights, bodies, strict=True):
            entry = self._entry(served, flight.ask, body)
            # 5, 6. What was purged meanwhile is answered to who asked before, and not kept.
            stored = self._is_valid(flight.ask)
            if stored:
                self._cache.fill(entry, shared=self._view.shared_tiers_count)
            trail = tuple(Consulted(tier, False, flight.why, stored=stored) for tier in flight.asked)
            self._land(flight, _Found(body, _model_tier(served), 0, trail))

    def _fail(self, served: Served, flights: list[Flight], error: MlcdnError) -> None:
        for flight in flights:
            if flight.outcome.done():
                continue
            self._flights.end(flight)
            if flight.stale is not None and error.status >= 500:
                flight.outcome.set_result(flight.stale)
            else:
                flight.outcome.set_exception(error)

    def _land(self, flight: Flight, found: _Found) -> None:
        self._flights.end(flight)
        if not flight.outcome.done():
            flight.outcome.set_result(found)

    async def _landed(self, flight: Flight, joined: bool) -> _Found:
        found: _Found = await asyncio.shield(flight.outcome)
        if not joined:
            return found
        *first, last = found.trail
        return msgspec.structs.replace(found, trail=(*first, msgspec.structs.replace(last, collapsed=True)))

    async def _only_cached(self, served: Served, asks: Sequence[Ask], controls: Controls) -> list[_Found]:
        found: list[_Found] = []
        for ask in asks:
            hit, _ = self._memory(served, ask, controls)
            if hit is None:
                flight = Flight(ask, False)
                if await self._shared(served, [flight], None, controls):
                    raise DeadlineExceeded("not cached, and only-if-cached was asked")
                hit = flight.outcome.result()
            found.append(hit)
        return found

    def _memory(self, served: Served, ask: Ask, controls: Controls) -> tuple[_Found | None, _Found | None]:
        """An answer, if memory has one; and what may stand in, or is to be refilled, if that is stale."""
        self._obey()
        if controls.no_cache or (entry := self._cache.peek(ask.key, served.digest)) is None:
            return None, None
        verdict = self._judge(entry, ask, controls)
        if verdict.refused:
            counter("mlcdn_cache_misses_total").labels("memory", str(verdict)).inc()
            return None, None
        found = _of_entry(entry, "memory", ())
        return (found if verdict.answers else None), (found if verdict is not Verdict.FRESH else None)

    async def _shared(
        self, served: Served, flights: list[Flight], outputs: Sequence[str] | None, controls: Controls
    ) -> list[Flight]:
        """Lands those that Redis or disk has, judged after the await with the fence as it is then; returns the others."""
        tiers = list(self._cache.standing())
        if not tiers or not flights or not self._view.shared_tiers_count:
            return flights
        asks = {flight.ask.key: flight for flight in flights}

        def accept(entry: Entry) -> bool:
            flight = asks[entry.key]
            verdict = self._judge(entry, flight.ask, controls)
            if verdict is Verdict.STALE_IF_ERROR and flight.stale is None:
                flight.stale = _of_entry(entry, tiers[-1], ())
            return verdict.answers and self._view.shared_tiers_count

        found = await self._cache.lookup_shared(list(asks), served.digest, accept)
        left = []
        for flight in flights:
            hit = found.get(flight.ask.key)
            # Again: another tier may have been waited for since `accept` took it.
            verdict = self._judge(hit[0], flight.ask, controls) if hit is not None else Verdict.EXPIRED
            if hit is None or not verdict.answers:
                flight.asked += tiers
                left.append(flight)
                continue
            entry, tier = hit
            missed = ("memory", *tiers[: tiers.index(tier)])
            one = _of_entry(entry, tier, tuple(Consulted(t, False) for t in missed))
            self._land(flight, one)
            if verdict is Verdict.STALE and self._flights.find(flight.ask, True) is None:
                self._launch(served, [self._flights.start(flight.ask, True, one)], outputs, controls)
        return left

    def _judge(self, entry: Entry, ask: Ask, controls: Controls) -> Verdict:
        """With the fence read now. An entry that lacks a tag of the request could not be purged by it: no answer."""
        self._obey()
        if not self._view.purges_known or not ask.tags <= set(entry.tags):
            return Verdict.PURGED
        max_age_ms = None if controls.max_age_s is None else controls.max_age_s * 1_000
        return judge(entry, now_ms=_now_ms(), purges=self._view.purges, max_age_ms=max_age_ms)

    def _obey(self) -> int:
        """Catches up with the fence; positions of another log empty memory and lead elsewhere in Redis and on disk."""
        stamp = self._view.catch_up()
        self._cache.adopt(self._view.namespace)
        return stamp

    def _entry(self, served: Served, ask: Ask, body: bytes) -> Entry:
        policy = served.wanted.released.cache
        now = _now_ms()
        fresh_until = now + int(policy.ttl_s * 1e3)
        # Not `peek`, which counts a miss: this one was counted when the answer was looked for.
        before = self._cache.memory.get(ask.key)
        # Tags add up, so that callers who name different ones do not take turns in refilling one entry.
        tags = sorted(ask.tags | (set(before.tags) if before is not None else set()))
        return Entry(
            key=ask.key,
            name=ask.name,
            model=served.name,
            version=served.wanted.version,
            digest=served.digest,
            as_of=position_of(ask.as_of),
            stored_at_ms=now,
            fresh_until_ms=fresh_until,
            stale_until_ms=fresh_until + int(policy.stale_while_revalidate_s * 1e3),
            error_until_ms=fresh_until + int(policy.stale_if_error_s * 1e3),
            tags=tuple(tags if len(tags) <= MAX_ENTRY_TAGS else sorted(ask.tags)),
            body=body,
        )

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def _answer(self, served: Served, ask: Ask, found: _Found) -> Answer:
        invalidations = position_of(self._view.catch_up())
        age_ms = _now_ms() - found.stored_at_ms if found.stored_at_ms else 0
        return Answer(
            body=found.body,
            tier=found.tier,
            key=ask.key,
            age_s=max(0, age_ms // 1_000),
            trail=found.trail,
            position=f"{served.wanted.position}/{invalidations}",
        )

    def _is_valid(self, ask: Ask) -> bool:
        """Whether nothing that `ask` may depend on was purged since its inputs were read."""
        stamp = self._obey()
        if not self._view.purges_known or generation_of(ask.as_of) != generation_of(stamp):
            return False
        standing = self._view.purges.standing(position_of(ask.as_of), ask.name, ask.model, ask.tags)
        return standing is Standing.VALID


def _model_tier(served: Served) -> str:
    return "model" if served.model is not None else "origin"


def _of_entry(entry: Entry, tier: str, missed: tuple[Consulted, ...]) -> _Found:
    # Negative when stale, as RFC 9211 has it.
    ttl_s = (entry.fresh_until_ms - _now_ms()) // 1_000
    return _Found(entry.body, tier, entry.stored_at_ms, (*missed, Consulted(tier, True, ttl_s=ttl_s)))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
