"""Carries plans out: one loop that plans, starts what is due, and writes the board.

    wake → plan → Fetch, Trial: tasks, a bounded number at once · Activate, Forward, Retire: one write of the board
         → a task that ends wakes the loop again

Laws:
- What the log says is None until a fold has caught up, and then nothing is planned: an agent that knows little takes
  nothing away. The board as it stood is served meanwhile.
- Every failure is a state (cause, attempts, when to try again), shown on the board, reported once a release and cause.
- The board is written in a thread, one write at a time: a slow disk delays no invalidation.

It must not know where a fold comes from, or how a fetch or a trial is done.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec
import structlog

from edge_node.agent import reconcile
from edge_node.agent.download import Abandoned
from edge_node.agent.model_files import GOLDEN, MODEL, ModelFiles
from edge_node.agent.proving import NotProven, Proving, Trials
from edge_node.agent.reconcile import Activate, Actual, Collect, Desired, Fetch, Forward, Retire, StoredFile, Trial
from edge_node.agent.rejections import Rejections, Say
from edge_node.board import BoardFile, BoardModel, BoardWriter
from schemas.errors import MlcdnError, ModelRefused
from streams.folds.wanted import Channel, Seated, Wanted

IDLE_S: Final = 1.0
POSITIONS_S: Final = 1.0
DISK_PAUSE_S: Final = 1.0

log = structlog.get_logger()


class Fetcher(Protocol):
    async def fetch(self, wanted: Wanted, abandoned: threading.Event) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the installer needs to know of its node. `fleet` gives the fields that every report begins with."""

    runtime: str
    fetch_concurrency: int
    disk_bytes: int
    fleet: Callable[[], dict[str, Any]]
    now_ms: Callable[[], int]
    random: Callable[[], float]


@dataclass(slots=True)
class _Work:
    seated: Seated
    task: asyncio.Task[None]
    abandoned: threading.Event = field(default_factory=threading.Event)


class Installer:
    """One event loop owns it. `desire` says what the log says; `run` does the rest."""

    def __init__(
        self, board: BoardWriter, files: ModelFiles, fetcher: Fetcher, trials: Trials, say: Say, around: Surroundings
    ) -> None:
        self._board, self._files, self._fetcher, self._around = board, files, fetcher, around
        self._proving = Proving(trials, files, around.runtime)
        self._rejections = Rejections(say, around.fleet, around.now_ms, around.random)
        self._desired: Desired | None = None
        self._positions: dict[str, int] = {}
        self._busy: dict[str, _Work] = {}
        self._ms: dict[tuple[str, str], dict[str, float]] = {}
        self._previous: dict[str, frozenset[str]] = {}
        self._turns = asyncio.Semaphore(around.fetch_concurrency)
        self._wake = asyncio.Event()
        self._positions_at = 0.0
        self.writing = asyncio.Lock()
        """Held while models.json is written; whoever else replaces the board takes it too."""

    def desire(self, desired: Desired | None, positions: dict[str, int]) -> None:
        """What the log says as of `positions`; None while that is not known."""
        changed = desired != self._desired
        self._desired, self._positions = desired, positions
        if changed:
            self._wake.set()

    async def run(self, stop: asyncio.Event) -> None:
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while not stop.is_set():
                self._wake.clear()
                pause = IDLE_S
                try:
                    await self._reconcile()
                    pause = self._rejections.pause_s(IDLE_S, {work.seated.seat for work in self._busy.values()})
                except OSError as error:
                    # The old board is whole and served; the next plan writes what this one could not.
                    log.error("board_not_written", error=error.strerror)
                    pause = DISK_PAUSE_S
                woken = asyncio.ensure_future(self._wake.wait())
                await asyncio.wait({woken, stopped}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
        finally:
            stopped.cancel()
            await self._end_work()

    async def _reconcile(self) -> None:
        desired = self._desired
        if desired is None or self._board.file is None:
            return
        told = {seated.digest for seated in desired.seats.values()}
        for work in self._busy.values():
            if work.seated.digest not in told:
                work.abandoned.set()
        steps = reconcile.plan(self._actual(*await asyncio.to_thread(self._files.on_disk)), desired)
        board: list[Activate | Forward | Retire] = []
        for step in steps:
            match step:
                case Fetch():
                    self._begin(step.seated, self._fetch)
                case Trial():
                    self._begin(step.seated, self._try_out)
                case Activate() | Forward() | Retire():
                    board.append(step)
                case Collect():
                    freed = await asyncio.to_thread(self._files.remove, step.names)
                    log.info("artifacts_collected", files=len(step.names), bytes=freed)
        await self._write(desired, board)

    def _actual(self, stored: tuple[StoredFile, ...], begun: dict[str, int], free_bytes: int) -> Actual:
        return Actual(
            models=self._board.file.models if self._board.file else {},
            verified=self._files.verified,
            proofs=self._files.proofs,
            failures=self._rejections.failures,
            busy=frozenset(self._busy),
            stored=stored,
            begun=begun,
            previous=self._previous,
            runtime=self._around.runtime,
            disk_bytes=self._around.disk_bytes,
            free_bytes=free_bytes,
            now_ms=self._around.now_ms(),
        )

    # -- the board

    async def _write(self, desired: Desired, steps: list[Activate | Forward | Retire]) -> None:
        """All that changed in one write. Positions alone do not wake every worker more than once a second."""
        async with self.writing:
            before = self._board.file
            assert before is not None
            after = msgspec.structs.replace(
                before,
                models=self._models(before, steps),
                desired=desired.seats,
                errors=reconcile.errors(self._rejections.failures, desired),
                positions=dict(self._positions),
            )
            if after == before:
                return
            moved_only = msgspec.structs.replace(after, positions=before.positions) == before
            if moved_only and time.monotonic() - self._positions_at < POSITIONS_S:
                return
            await asyncio.to_thread(self._board.publish, after)
            self._positions_at = time.monotonic()
        for step in steps:
            # A step may have failed meanwhile, for want of a slot; what it left is for the next plan.
            if isinstance(step, Retire) or after.models.get(step.seated.seat) != before.models.get(step.seated.seat):
                self._told(step, before)

    def _models(self, before: BoardFile, steps: list[Activate | Forward | Retire]) -> dict[str, BoardModel]:
        models = dict(before.models)
        for step in steps:
            if isinstance(step, Retire):
                del models[step.seat]
                continue
            seated, wanted = step.seated, step.seated.wanted
            old = models.get(seated.seat)
            try:
                slot = old.slot if old else self._board.free_slot(m.slot for m in (models | before.models).values())
            except MlcdnError as error:
                self._rejections.failed(seated, "activate", error)
                continue
            if isinstance(step, Forward):
                models[seated.seat] = BoardModel(
                    wanted=wanted, channel=seated.channel, percent=seated.percent, slot=slot, forwarded=True
                )
                continue
            golden = wanted.released.golden
            models[seated.seat] = BoardModel(
                wanted=wanted,
                channel=seated.channel,
                percent=seated.percent,
                path=self._files.relative(wanted.released.artifact.sha256, MODEL),
                golden_path=self._files.relative(golden.sha256, GOLDEN) if golden else None,
                slot=slot,
                ms=self._ms.get((wanted.model, wanted.digest), {}),
            )
        return models

    def _told(self, step: Activate | Forward | Retire, before: BoardFile) -> None:
        if isinstance(step, Retire):
            self._previous.pop(step.seat, None)
            self._rejections.forget(step.seat)
            log.info("model_taken_off_the_board", model=step.seat)
            return
        seated, wanted = step.seated, step.seated.wanted
        old = before.models.get(seated.seat)
        if old is not None and seated.channel is Channel.STABLE and old.wanted.digest != wanted.digest:
            self._previous[wanted.model] = reconcile.needs(old.wanted)
            self._files.used(old.wanted.released)
        self._rejections.forget(seated.seat)
        self._ms.pop((wanted.model, wanted.digest), None)
        self._files.used(wanted.released)
        log.info("model_on_the_board", model=seated.seat, version=wanted.version, sequence=wanted.sequence)

    # -- tasks

    def _begin(self, seated: Seated, work: Callable[[_Work], Coroutine[Any, Any, None]]) -> None:
        async def bounded() -> None:
            async with self._turns:
                await self._guarded(seated, lambda: work(mine))

        task = asyncio.get_running_loop().create_task(bounded(), name=f"install:{seated.seat}")
        mine = _Work(seated, task)
        self._busy[seated.digest] = mine

        def over(_: asyncio.Task[None]) -> None:
            del self._busy[seated.digest]
            self._wake.set()

        task.add_done_callback(over)

    async def _guarded(self, seated: Seated, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Abandoned:
            log.info("fetch_abandoned", model=seated.seat, sequence=seated.wanted.sequence)
        # Whatever breaks here concerns one model, and the others are to go on; it is said and tried again.
        except Exception as error:
            log.exception("install_broke", model=seated.seat)
            self._rejections.record(seated, "install", type(error).__name__, retryable=True)

    async def _fetch(self, work: _Work) -> None:
        seated, wanted = work.seated, work.seated.wanted
        if work.abandoned.is_set():
            raise Abandoned(wanted.model)
        try:
            ms = await self._fetcher.fetch(wanted, work.abandoned)
        except MlcdnError as error:
            self._rejections.failed(seated, "verify" if isinstance(error, ModelRefused) else "download", error)
            return
        self._ms.setdefault((wanted.model, wanted.digest), {}).update(ms)
        self._rejections.passed(seated)

    async def _try_out(self, work: _Work) -> None:
        seated, wanted = work.seated, work.seated.wanted
        try:
            ms = await self._proving.prove(wanted)
        except NotProven as error:
            self._rejections.record(seated, error.phase, error.cause, retryable=False)
            return
        except MlcdnError as error:
            self._rejections.failed(seated, "trial", error)
            return
        self._ms.setdefault((wanted.model, wanted.digest), {})["trial"] = ms
        self._rejections.passed(seated)

    async def _end_work(self) -> None:
        """A fetch ends at its next chunk; what it has is verified again by the next life."""
        tasks = [work.task for work in self._busy.values()]
        for work in self._busy.values():
            work.abandoned.set()
            work.task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
