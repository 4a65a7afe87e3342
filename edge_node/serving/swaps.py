"""Takes over what the board says should be served, and reports how that went.

    a board that changed → per seat: load · warm · prefill (preparing.py) · swap one reference → ModelSwapped, or SwapFailed

A model's seats are the stable one, ``m``, and the candidate's, ``m@candidate``, which is seated once the stable one is.

Laws:
- Level, not edge: what is served is compared with what the board says, so a missed change, a crash or a repetition are
  all repaired by the next look.
- Nothing that answers is touched before its successor is warm; a release that cannot be taken over leaves it as it is,
  is said once a cause, and is tried again with growing pauses, at once when the board changes.
- The answers to the hottest requests are known before the first of them is asked of the new release.
- No request goes back to what it had left: a candidate that has become the stable release answers its share until the
  stable seat has it, which takes its session over. One that was taken back is dropped at once, and a percentage alone
  is a number that changes.

It must not know requests, caches or where artifacts come from.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import structlog

from edge_node.board import BoardFile, BoardModel
from edge_node.serving.batches import Ask
from edge_node.serving.model_slot import ModelSlot, Slots
from edge_node.serving.predict import Predictor
from edge_node.serving.preparing import PhaseFailed, Preparing
from edge_node.serving.reporter import Identity
from edge_node.serving.served import Prepared, Served
from edge_node.serving.sleeping import Sleeping
from edge_node.serving.standing import standing
from edge_node.serving.swap_failures import Say, SwapFailures, release_fields
from inference.onnx_model import SessionSettings
from schemas.events import ModelSwapped, ServedModel
from schemas.metrics import counter, gauge, histogram
from streams.folds.wanted import Channel, Wanted, model_of, seat

ASK_ORIGIN_S: Final = 0.2

log = structlog.get_logger()


class _Ready(msgspec.Struct, frozen=True):
    """A session, or None where the origin answers; and what it answers to the requests that are asked most."""

    prepared: Prepared | None = None
    answers: list[tuple[Ask, bytes]] = []


class Swaps:
    """One event loop owns it. `follow` is told of every board; `tend` starts what is due."""

    def __init__(
        self,
        slots: Slots,
        directory: Path,
        session_settings: SessionSettings,
        identity: Identity,
        say: Say,
        answers: Predictor,
        memory_bytes: int,
    ) -> None:
        self._slots, self._directory, self._answers = slots, directory, answers
        self._identity, self._say = identity, say
        self._preparing = Preparing(session_settings)
        self._sleeping = Sleeping(slots, directory, self._preparing, memory_bytes)
        self._board: BoardFile | None = None
        self._failures = SwapFailures(identity, say)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        # Whether all that it found was served once: until then no request is disturbed by a load.
        self._begun = False

    @property
    def settled(self) -> bool:
        """No seat that is on the board and was never served is still on its way: what the worker can serve, it serves."""
        targets = self._board.models if self._board else {}
        return all(self._settled(name, target) for name, target in targets.items())

    def follow(self, board: BoardFile) -> None:
        self._board = board
        models = {model_of(name) for name in board.models}
        for model in models:
            self._slots.add(model)
        for slot in self._slots:
            if slot.name in models:
                self._see_to_candidate(slot)
            else:
                self._retire(slot.name)
        self._failures.follow(board)
        self.tend()

    def tend(self) -> None:
        """Starts a take-over for every seat that is not what it should be."""
        self._sleeping.tend()
        self._begun = self._begun or self.settled
        for name, target in (self._board.models if self._board else {}).items():
            if (
                name not in self._running
                and self._failures.due(name)
                and not self._is_served(target)
                and self._has_its_turn(target)
            ):
                task = asyncio.get_running_loop().create_task(self._take_over(name, target))
                self._running[name] = task
                task.add_done_callback(partial(self._ended, name))

    def standing(self) -> tuple[ServedModel, ...]:
        """For the beat."""
        return standing(self._slots, self._board)

    def percent(self, model: str) -> float:
        """Of its requests, as its candidate answers them now."""
        slot = self._slots.find(model)
        return slot.percent if slot is not None else 0.0

    async def close(self) -> None:
        tasks = [*self._running.values(), *self._retiring]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sleeping.close()
        self._preparing.close()

    def _ended(self, name: str, _: asyncio.Task[None]) -> None:
        self._running.pop(name, None)
        self._begun = self._begun or self.settled

    # -- which seat is next

    def _settled(self, name: str, target: BoardModel) -> bool:
        slot = self._slots.find(target.wanted.model)
        if name in self._failures or (slot is not None and slot.on(name) is not None):
            return True
        if target.forwarded and slot is not None and slot.usual is not None:
            # The origin may be away, and that is no reason to wait with what is there.
            return True
        # A candidate has no turn where nothing stable could be taken over.
        return not self._has_its_turn(target) and target.wanted.model in self._failures

    def _has_its_turn(self, target: BoardModel) -> bool:
        """A candidate's share is of the requests of the release that should be stable: that one is seated first."""
        model = target.wanted.model
        stable = self._board.models.get(model) if self._board else None
        if target.channel is Channel.STABLE or stable is None:
            return True
        slot = self._slots.find(model)
        seated = slot is not None and slot.current is not None
        return seated and (self._is_served(stable) or model in self._failures)

    def _is_served(self, target: BoardModel) -> bool:
        slot = self._slots.find(target.wanted.model)
        served = slot.on(seat(target.wanted.model, target.channel)) if slot is not None else None
        return (
            served is not None and _is_same(served.wanted, target.wanted) and (served.model is None) == target.forwarded
        )

    def _see_to_candidate(self, slot: ModelSlot) -> None:
        """Its share, or its end. What has become the stable release stays until the stable seat has it."""
        assert self._board is not None
        candidate, told = slot.candidate, self._board.models.get(seat(slot.name, Channel.CANDIDATE))
        if candidate is None:
            return
        if told is not None and _is_same(told.wanted, candidate.wanted):
            slot.share(told.percent)
        elif slot.current is not None:
            stable = self._board.models.get(slot.name)
            if stable is None or stable.wanted.digest != candidate.digest or self._is_served(stable):
                log.info("candidate_dropped", model=slot.name, version=candidate.wanted.version)
                slot.drop_candidate()
        _say_share(slot)

    # -- taking over

    async def _take_over(self, name: str, target: BoardModel) -> None:
        slot, wanted = self._slots.find(target.wanted.model), target.wanted
        if slot is None:
            return
        slot.loading.add(name)
        ms: dict[str, float] = dict(target.ms)
        try:
            if target.forwarded:
                await self._until_forwarded(name, slot, target)
            ready = _Ready() if target.forwarded else await self._prepare(slot, target, ms)
        except PhaseFailed as failed:
            self._failures.failed(name, slot, target, failed)
            return
        finally:
            slot.loading.discard(name)
        told = self._board.models.get(name) if self._board else None
        still_told = told is not None and _is_same(told.wanted, wanted) and told.forwarded == target.forwarded
        if self._slots.find(slot.name) is not slot or told is None or not still_told:
            # Retired, taken back or followed by another while it was loading.
            if ready.prepared is not None and not slot.has(ready.prepared.model):
                ready.prepared.model.close()
            return
        began = time.perf_counter()
        new = Served(wanted, target.channel, ready.prepared, target.path or "")
        if ready.answers:
            self._answers.prefill(new, ready.answers)
        if target.channel is Channel.CANDIDATE:
            old = slot.seat_candidate(new, told.percent)
            _say_share(slot)
        else:
            old = slot.swap(new)
            self._see_to_candidate(slot)
        ms["swap"] = (time.perf_counter() - began) * 1e3
        self._failures.forget(name)
        counter("mlcdn_swaps_total").labels(slot.name, "swapped").inc()
        for phase, value in ms.items():
            histogram("mlcdn_swap_phase_seconds").labels(phase).observe(value / 1e3)
        log.info("model_swapped", model=name, version=wanted.version, digest=wanted.digest[:12], ms=ms)
        self._say(
            ModelSwapped(
                **self._identity.fleet(),
                **release_fields(wanted),
                previous_digest=old.digest if old else "",
                channel=target.channel,
                ms=ms,
            ),
            causation_id=wanted.cause,
        )

    async def _until_forwarded(self, name: str, slot: ModelSlot, target: BoardModel) -> None:
        """While something answers, until the origin has its successor, or that is not wanted any more."""
        wanted = target.wanted
        while slot.usual is not None and not await self._answers.forwarding.ready(wanted.model, wanted.digest):
            await asyncio.sleep(ASK_ORIGIN_S)
            told = self._board.models.get(name) if self._board else None
            if told is None or not _is_same(told.wanted, wanted) or told.forwarded != target.forwarded:
                return

    async def _prepare(self, slot: ModelSlot, target: BoardModel, ms: dict[str, float]) -> _Ready:
        loaded = slot.loaded(target.wanted.digest)
        if loaded is not None and not slot.is_candidates(loaded.model):
            # A rollback, which is urgent; what it answered before, caches still know.
            return _Ready(loaded)
        prepared = loaded or await self._load(slot, target, ms)
        asks = self._asked_most(slot, target)
        if not asks:
            return _Ready(prepared)
        try:
            return _Ready(prepared, await self._preparing.prefill(prepared, asks, ms))
        except BaseException:
            if loaded is None:
                prepared.model.close()
            raise

    async def _load(self, slot: ModelSlot, target: BoardModel, ms: dict[str, float]) -> Prepared:
        if target.path is None:
            raise PhaseFailed("load", "the board names no file")
        golden = self._directory / target.golden_path if target.golden_path else None
        quiet = self._begun and slot.usual is not None
        return await self._preparing.prepare(target.wanted, self._directory / target.path, golden, quiet, ms)

    def _asked_most(self, slot: ModelSlot, target: BoardModel) -> list[Ask]:
        """Of other releases than itself."""
        hottest = self._answers.hottest
        if not target.wanted.released.cache.enabled:
            return []
        # The stable release goes on beside its candidate, and what is asked of it most stays known.
        asks = hottest.known(slot.name) if target.channel is Channel.CANDIDATE else hottest.take(slot.name)
        return [ask for ask in asks if ask.served.digest != target.wanted.digest]

    def _retire(self, name: str) -> None:
        slot = self._slots.remove(name)
        if slot is not None:
            log.info("model_retired", model=name)
            self._answers.hottest.take(name)
            task = asyncio.get_running_loop().create_task(slot.close())
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)


def _is_same(one: Wanted, other: Wanted) -> bool:
    return (one.sequence, one.digest, one.cause) == (other.sequence, other.digest, other.cause)


def _say_share(slot: ModelSlot) -> None:
    gauge("mlcdn_candidate_percent").labels(slot.name).set(slot.percent if slot.candidate is not None else 0.0)
