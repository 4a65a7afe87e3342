"""Takes over what the board says should be served, and reports how that went.

    a board that changed → per model: load in a thread · warm · swap one reference → ModelSwapped, or SwapFailed

Laws:
- Level, not edge: what is served is compared with what the board says, so a missed change, a crash or a repetition are
  all repaired by the next look.
- Nothing that answers is touched before its successor is warm; a release that cannot be taken over leaves it as it is,
  is said once a cause, and is tried again with growing pauses, at once when the board changes.
- A load beside live traffic runs at the lowest priority (p99 2.2 ms, against 5.5 in a plain thread), but not for ever:
  on a saturated core it can take 20 s, so after `QUIET_LOAD_S` it is done again at normal priority. The first load is
  in no one's way.

It must not know requests, caches or where artifacts come from.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
import structlog

from edge_node.board import BoardFile, BoardModel
from edge_node.serving.model_slot import ModelSlot, Slots
from edge_node.serving.reporter import Identity
from edge_node.serving.served import Prepared, Served
from edge_node.serving.warming import warm
from inference.onnx_model import OnnxModel, SessionSettings
from processes.priority import lower_priority
from schemas.errors import MlcdnError
from schemas.events import Event, ModelSwapped, ServedModel, SwapFailed
from schemas.metrics import counter, histogram
from streams.folds.releases import Wanted

QUIET_LOAD_S: Final = 10.0
RETRY_S: Final = (1.0, 2.0, 5.0, 15.0, 30.0)
_LOWEST_PRIORITY: Final = 19
T = TypeVar("T")

log = structlog.get_logger()


class Say(Protocol):
    def __call__(self, event: Event, *, causation_id: str | None = None) -> None: ...


class PhaseFailed(Exception):
    def __init__(self, phase: str, cause: str) -> None:
        super().__init__(cause)
        self.phase, self.cause = phase, cause


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
    ) -> None:
        self._slots, self._directory, self._settings = slots, directory, session_settings
        self._identity, self._say = identity, say
        self._board: BoardFile | None = None
        self._failures: dict[str, _Failure] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._one_quiet_load = asyncio.Lock()
        self._quiet = ThreadPoolExecutor(
            1, thread_name_prefix="load-quiet", initializer=partial(lower_priority, _LOWEST_PRIORITY)
        )
        self._plain = ThreadPoolExecutor(2, thread_name_prefix="load")

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
        return tuple(self._standing_of(name, desired.get(name)) for name in names)

    async def close(self) -> None:
        for task in [*self._running.values(), *self._retiring]:
            task.cancel()
        await asyncio.gather(*self._running.values(), *self._retiring, return_exceptions=True)
        self._quiet.shutdown(wait=False, cancel_futures=True)
        self._plain.shutdown(wait=False, cancel_futures=True)

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
            prepared = None if target.forwarded else await self._prepare(slot, target, ms)
        except PhaseFailed as failed:
            self._failed(slot, target, failed)
            return
        finally:
            slot.loading = False
        if self._slots.find(name) is not slot:
            # Retired while it was loading.
            if prepared is not None:
                prepared.model.close()
            return
        began = time.perf_counter()
        old = slot.swap(Served(wanted, target.channel, prepared))
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

    async def _prepare(self, slot: ModelSlot, target: BoardModel, ms: dict[str, float]) -> Prepared:
        loaded = slot.loaded(target.wanted.digest)
        if loaded is not None:
            return loaded
        if target.path is None:
            raise PhaseFailed("load", "the board names no file")
        path = self._directory / target.path
        model = await self._timed(
            slot,
            "load",
            ms,
            lambda: OnnxModel.load(path, target.wanted.digest, self._settings),
            discard=OnnxModel.close,
        )
        golden = self._directory / target.golden_path if target.golden_path else None
        try:
            cost = await self._timed(slot, "warm", ms, lambda: warm(model, golden, target.wanted))
        except BaseException:
            model.close()
            raise
        return Prepared(model, cost)

    async def _timed(
        self,
        slot: ModelSlot,
        phase: str,
        ms: dict[str, float],
        work: Callable[[], T],
        discard: Callable[[T], None] | None = None,
    ) -> T:
        began = time.perf_counter()
        try:
            return await self._in_thread(work, slot.current is not None, discard)
        except MlcdnError as error:
            raise PhaseFailed(phase, str(error)) from error
        except Exception as error:  # a library's own: reported as the cause, the old release serves on
            log.exception("swap_broke", model=slot.name, phase=phase)
            raise PhaseFailed(phase, type(error).__name__) from error
        finally:
            ms[phase] = (time.perf_counter() - began) * 1e3

    async def _in_thread(self, work: Callable[[], T], beside_traffic: bool, discard: Callable[[T], None] | None) -> T:
        loop = asyncio.get_running_loop()
        if not beside_traffic:
            return await loop.run_in_executor(self._plain, work)
        async with self._one_quiet_load:
            quiet = loop.run_in_executor(self._quiet, work)
            done, _ = await asyncio.wait({quiet}, timeout=QUIET_LOAD_S)
            if done:
                return quiet.result()
        log.warning("quiet_load_is_slow", seconds=QUIET_LOAD_S)

        def late(future: asyncio.Future[T]) -> None:
            if not future.cancelled() and future.exception() is None and discard is not None:
                discard(future.result())

        quiet.add_done_callback(late)
        return await loop.run_in_executor(self._plain, work)

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
