"""Takes over what the board says should be served, and reports how that went.

    a board that changed → per model: load · warm · prefill (preparing.py) · swap one reference → ModelSwapped, or SwapFailed

Laws:
- Level, not edge: what is served is compared with what the board says, so a missed change, a crash or a repetition are
  all repaired by the next look.
- Nothing that answers is touched before its successor is warm; a release that cannot be taken over leaves it as it is,
  is said once a cause, and is tried again with growing pauses, at once when the board changes.
- The answers to the hottest requests are known before the first of them is asked of the new release.
- A session that there is no room for is let go, and loaded again for the next request that needs it.

It must not know requests, caches or where artifacts come from.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import structlog

from edge_node.board import BoardFile, BoardModel
from edge_node.serving.batches import Ask
from edge_node.serving.engine import Engine
from edge_node.serving.model_slot import ModelSlot, Slots
from edge_node.serving.predict import Predictor
from edge_node.serving.preparing import PhaseFailed, Preparing
from edge_node.serving.reporter import Identity
from edge_node.serving.residency import to_let_go
from edge_node.serving.served import Prepared, Served
from inference.onnx_model import SessionSettings
from schemas.errors import NotReady
from schemas.events import Event, ModelSwapped, ServedModel, SwapFailed
from schemas.metrics import counter, histogram
from streams.folds.wanted import Wanted

LOOK_AT_MEMORY_S: Final = 1.0
RETRY_S: Final = (1.0, 2.0, 5.0, 15.0, 30.0)

log = structlog.get_logger()


class Say(Protocol):
    def __call__(self, event: Event, *, causation_id: str | None = None) -> None: ...


class _Ready(msgspec.Struct, frozen=True):
    """A session, and what it answers to the requests that are asked most."""

    prepared: Prepared
    answers: list[tuple[Ask, bytes]] = []


class _Failure(msgspec.Struct):
    """What kept a release from being taken over, and when to try again (monotonic seconds)."""

    target: BoardModel
    cause: str
    attempts: int
    retry_at: float


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
        self._identity, self._say, self._memory_bytes = identity, say, memory_bytes
        slots.wake = self.wake
        self._preparing = Preparing(session_settings)
        self._board: BoardFile | None = None
        self._failures: dict[str, _Failure] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._waking: dict[str, asyncio.Task[None]] = {}
        self._next_look = 0.0

    @property
    def settled(self) -> bool:
        """No model that has a file and never served is still on its way: what the worker can serve, it serves."""
        targets = self._board.models if self._board else {}
        return all(
            name in self._failures or ((slot := self._slots.find(name)) is not None and slot.current is not None)
            for name in targets
        )

    def follow(self, board: BoardFile) -> None:
        self._board = board
        for name in board.models:
            self._slots.add(name)
        for slot in self._slots:
            if slot.name not in board.models:
                self._retire(slot.name)
        self._failures = {n: f for n, f in self._failures.items() if board.models.get(n) == f.target}
        self.tend()

    def tend(self) -> None:
        """Starts a take-over for every model that is not what it should be."""
        self._let_go()
        for name, target in (self._board.models if self._board else {}).items():
            failure = self._failures.get(name)
            due = failure is None or failure.retry_at <= time.monotonic()
            if name not in self._running and due and not _is_served(self._slots.find(name), target):
                task = asyncio.get_running_loop().create_task(self._take_over(name, target))
                self._running[name] = task
                task.add_done_callback(partial(self._ended, name))

    def standing(self) -> tuple[ServedModel, ...]:
        """For the beat: every model that is served or should be."""
        desired = self._board.desired if self._board else {}
        names = sorted({slot.name for slot in self._slots} | set(desired))
        return tuple(self._standing_of(name, seated.wanted if (seated := desired.get(name)) else None) for name in names)

    async def close(self) -> None:
        tasks = [*self._running.values(), *self._retiring, *self._waking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._preparing.close()

    def _ended(self, name: str, _: asyncio.Task[None]) -> None:
        self._running.pop(name, None)

    def _standing_of(self, name: str, wanted: Wanted | None) -> ServedModel:
        slot = self._slots.find(name)
        current = slot.current if slot else None
        shown = current.wanted if current else wanted
        assert shown is not None, "a slot that neither serves nor should is removed"
        error = (slot.error if slot else "") or (self._board.errors.get(name, "") if self._board else "")
        behind = wanted is not None and (current is None or current.wanted.sequence != wanted.sequence)
        if behind and error:
            state = "failed"
        elif behind:
            state = "loading" if slot is not None and slot.loading else "pending"
        else:
            state = "live" if current is not None and current.model is not None else "forwarded"
        return ServedModel(
            name=name,
            version=shown.version,
            digest=shown.digest if current else "",
            sequence=shown.sequence if current else 0,
            channel=current.channel if current else "stable",
            state=state,
            error=error[:500] if behind else "",
        )

    async def _take_over(self, name: str, target: BoardModel) -> None:
        slot, wanted = self._slots.find(name), target.wanted
        if slot is None:
            return
        slot.loading = True
        ms: dict[str, float] = dict(target.ms)
        try:
            ready = None if target.forwarded else await self._prepare(slot, target, ms)
        except PhaseFailed as failed:
            self._failed(slot, target, failed)
            return
        finally:
            slot.loading = False
        if self._slots.find(name) is not slot:
            # Retired while it was loading.
            if ready is not None:
                ready.prepared.model.close()
            return
        began = time.perf_counter()
        new = Served(wanted, target.channel, ready.prepared if ready is not None else None, target.path or "")
        if ready is not None and ready.answers:
            self._answers.prefill(new, ready.answers)
        old = slot.swap(new)
        ms["swap"] = (time.perf_counter() - began) * 1e3
        self._failures.pop(name, None)
        counter("mlcdn_swaps_total").labels(name, "swapped").inc()
        for phase, value in ms.items():
            histogram("mlcdn_swap_phase_seconds").labels(phase).observe(value / 1e3)
        log.info("model_swapped", model=name, version=wanted.version, digest=wanted.digest[:12], ms=ms)
        self._say(
            ModelSwapped(
                **self._identity.fleet(),
                **_release(wanted),
                previous_digest=old.digest if old else "",
                channel=target.channel,
                ms=ms,
            ),
            causation_id=wanted.cause,
        )

    async def _prepare(self, slot: ModelSlot, target: BoardModel, ms: dict[str, float]) -> _Ready:
        loaded = slot.loaded(target.wanted.digest)
        if loaded is not None:
            return _Ready(loaded)
        if target.path is None:
            raise PhaseFailed("load", "the board names no file")
        golden = self._directory / target.golden_path if target.golden_path else None
        quiet = slot.current is not None
        prepared = await self._preparing.prepare(target.wanted, self._directory / target.path, golden, quiet, ms)
        asks = self._answers.hottest.take(slot.name) if target.wanted.released.cache.enabled else []
        if not asks:
            return _Ready(prepared)
        try:
            return _Ready(prepared, await self._preparing.prefill(prepared, asks, ms))
        except BaseException:
            prepared.model.close()
            raise

    def wake(self, served: Served) -> None:
        """The engine has work for a session that was let go."""
        if served.digest not in self._waking and served.engine is not None:
            task = asyncio.get_running_loop().create_task(self._wake(served, served.engine))
            self._waking[served.digest] = task
            task.add_done_callback(lambda _: self._waking.pop(served.digest, None))

    async def _wake(self, served: Served, engine: Engine) -> None:
        assert served.model is not None
        path = self._directory / served.path
        try:
            model = await self._preparing.wake(served.wanted, path)
        except PhaseFailed as failed:
            log.error("session_not_loaded_again", model=served.name, cause=failed.cause)
            engine.woken(served, NotReady(f"model {served.name} could not be loaded again"))
            return
        served.model.reopen(model)
        log.info("session_loaded_again", model=served.name, digest=served.digest[:12])
        engine.woken(served)

    def _let_go(self) -> None:
        """What there is no room for, once a second."""
        now = time.monotonic()
        if not self._memory_bytes or now < self._next_look:
            return
        self._next_look = now + LOOK_AT_MEMORY_S
        for name, which in to_let_go([slot.resident(now) for slot in self._slots], self._memory_bytes):
            slot = self._slots.find(name)
            if slot is not None:
                log.info("session_let_go", model=name, which=which)
                slot.let_go(which)

    def _failed(self, slot: ModelSlot, target: BoardModel, failed: PhaseFailed) -> None:
        before = self._failures.get(slot.name)
        again = before is not None and before.target == target
        attempts = before.attempts + 1 if before is not None and again else 1
        pause = RETRY_S[min(attempts, len(RETRY_S)) - 1]
        self._failures[slot.name] = _Failure(target, failed.cause, attempts, time.monotonic() + pause)
        slot.error = f"{failed.phase}: {failed.cause}"
        counter("mlcdn_swaps_total").labels(slot.name, "failed").inc()
        if before is not None and again and before.cause == failed.cause:
            return
        log.error("swap_failed", model=slot.name, phase=failed.phase, cause=failed.cause)
        self._say(
            SwapFailed(
                **self._identity.fleet(), **_release(target.wanted), phase=failed.phase, cause=failed.cause[:500]
            ),
            causation_id=target.wanted.cause,
        )

    def _retire(self, name: str) -> None:
        slot = self._slots.remove(name)
        if slot is not None:
            log.info("model_retired", model=name)
            self._answers.hottest.take(name)
            task = asyncio.get_running_loop().create_task(slot.close())
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)


def _is_served(slot: ModelSlot | None, target: BoardModel) -> bool:
    current = slot.current if slot else None
    return (
        current is not None
        and (current.wanted.sequence, current.digest, current.wanted.cause)
        == (target.wanted.sequence, target.wanted.digest, target.wanted.cause)
        and current.channel == target.channel
        and (current.model is None) == target.forwarded
    )


def _release(wanted: Wanted) -> dict[str, Any]:
    return {
        "model": wanted.model,
        "version": wanted.version,
        "sequence": wanted.sequence,
        "digest": wanted.digest,
        "position": wanted.position,
    }
