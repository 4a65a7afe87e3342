"""Runs one model's jobs: which together, where, until when.

    submit → the tick's queue → one look at all that came in this turn of the loop → batches
        in the loop      at once, one after the other, until the tick's share is used up
        in a thread      as long as one is free; what comes while all are busy is the next batch

Laws:
- Every job lands once: with its outputs, its own error, or 504 at its deadline, whether its run came back or not.
- A batch that fails is run again job by job, so that one request's bad input or short deadline is not another's.
- The queue is bounded where it can grow: in front of busy threads. Above the release's `max_queue`, 429 at once; a
  request that is let in is let in with all its rows. What runs in the loop is gone by the next turn.
- Each model has threads of its own: one that hangs until its deadline keeps no other from running. They run at a lower
  priority than the loop, so that a heavy model does not slow a light one down on the same core.

It must not know caches, keys, HTTP or the board.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Final

import structlog
from prometheus_client import Histogram

from edge_node.serving.batches import Job, Waiting, joined, parted
from edge_node.serving.served import Served
from inference.onnx_model import RunFailed
from processes.priority import lower_priority
from schemas.errors import DeadlineExceeded, MlcdnError, NotReady, Overloaded
from schemas.metrics import histogram

# After this the loop sees to its sockets first.
TICK_S: Final = 0.001
IN_LOOP_MOST: Final = 4_096
_THREAD_NICENESS: Final = 10

log = structlog.get_logger()


class Engine:
    """One event loop owns it; only runs leave for threads."""

    def __init__(self, name: str, threads: int, wake: Callable[[Served], None]) -> None:
        """`wake` is asked for a session that was let go, perhaps more than once, and calls `woken`."""
        self._name, self._limit, self._wake = name, threads, wake
        self.last_used = time.monotonic()
        self._waiting = Waiting()
        self._busy = 0
        self._due: asyncio.Handle | None = None
        self._closed = False
        self._full = 1
        self._threads = ThreadPoolExecutor(
            threads, thread_name_prefix=f"run-{name}", initializer=partial(lower_priority, _THREAD_NICENESS)
        )
        # Made at the first run: of a hundred models released at once they took 50 to 100 ms of the loop.
        self._batch_rows: dict[str, Histogram] = {}

    @cached_property
    def _run_s(self) -> Histogram:
        return histogram("mlcdn_run_seconds").labels(self._name)

    @cached_property
    def _queue_s(self) -> Histogram:
        return histogram("mlcdn_queue_seconds").labels(self._name)

    @property
    def queued(self) -> int:
        """Jobs that wait, or are in a thread."""
        return len(self._waiting) + self._busy

    def submit(self, jobs: Sequence[Job]) -> None:
        """Of one request, all of them or none: they land later, never in here. Overloaded where too many wait."""
        if self._closed:
            raise NotReady(f"model {self._name} is not served any more")
        served = jobs[0].ask.served
        beside_loop = not served.cost.in_loop or served.asleep
        if beside_loop:
            self._admit(jobs[0])
        elif len(self._waiting) >= IN_LOOP_MOST:
            raise Overloaded(f"model {self._name} has {IN_LOOP_MOST} computations waiting")
        for job in jobs:
            if beside_loop:
                self._watch(job)
            served.enter()
            self._waiting.add(job)
        batching = served.wanted.released.batching
        self._full = batching.max_size
        self._see_to_it(batching.max_delay_us / 1e6)

    def woken(self, served: Served, error: MlcdnError | None = None) -> None:
        """Its session is there again, or will not come: then who waits for it is told so."""
        if error is not None:
            for job in self._waiting.drain():
                if job.ask.served is served:
                    self._land(job, error)
                else:
                    self._waiting.add(job)
        self._turn_soon()

    def close(self) -> None:
        self._closed = True
        for job in self._waiting.drain():
            self._land(job, NotReady(f"model {self._name} is not served any more"))
        self._threads.shutdown(wait=False)

    def _admit(self, job: Job) -> None:
        """What the threads that are free will take this turn does not wait."""
        released = job.ask.served.wanted.released
        leaving = (self._limit - self._busy) * (1 if job.alone else released.batching.max_size)
        if len(self._waiting) >= released.limits.max_queue + leaving:
            raise Overloaded(f"model {self._name} has {released.limits.max_queue} computations waiting")

    def _see_to_it(self, delay_s: float = 0.0) -> None:
        if self._due is None:
            loop = asyncio.get_running_loop()
            self._due = loop.call_later(delay_s, self._turn) if delay_s else loop.call_soon(self._turn)
        elif len(self._waiting) >= self._full and isinstance(self._due, asyncio.TimerHandle):
            self._due.cancel()
            self._due = asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._due = None
        until = time.perf_counter() + TICK_S
        self.last_used = time.monotonic()
        while len(self._waiting):
            first = self._waiting.first()
            if first.ask.served.asleep:
                self._wake(first.ask.served)
                return
            cost, most = first.ask.served.cost, first.ask.served.wanted.released.batching.max_size
            if cost.in_loop and not first.alone_after_failure:
                batch = self._taken(cost.rows_in_loop(most))
                if batch:
                    self._run_in_loop(batch)
                if time.perf_counter() > until and len(self._waiting):
                    self._see_to_it()
                    return
            elif self._busy < self._limit:
                batch = self._taken(most)
                if batch:
                    self._run_in_thread(batch)
            else:
                return

    def _taken(self, most: int) -> list[Job]:
        """The next batch, without those that are too late already."""
        batch = []
        now = time.monotonic()
        for job in self._waiting.take(most):
            if job.ask.deadline.at <= now:
                self._land(job, DeadlineExceeded("the deadline passed before the model ran"))
            else:
                batch.append(job)
        return batch

    def _run_in_loop(self, batch: list[Job]) -> None:
        self._said(batch, "tick")
        began = time.perf_counter()
        try:
            outcome: list[bytes] | MlcdnError = _run(batch)
        except MlcdnError as error:
            outcome = error
        self._ended(batch, outcome, time.perf_counter() - began)

    def _run_in_thread(self, batch: list[Job]) -> None:
        self._said(batch, "busy" if self._busy else "tick")
        self._busy += 1
        for job in batch:
            # It came while the model still ran in the loop.
            if job.timer is None:
                self._watch(job)
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._threads, _timed, batch)

        def back(done: asyncio.Future[tuple[list[bytes] | MlcdnError, float]]) -> None:
            self._busy -= 1
            self._ended(batch, *done.result())
            if not self._closed:
                self._turn_soon()

        future.add_done_callback(back)

    def _turn_soon(self) -> None:
        if len(self._waiting):
            self._see_to_it()

    def _ended(self, batch: list[Job], outcome: list[bytes] | MlcdnError, seconds: float) -> None:
        served = batch[0].ask.served
        rows = sum(job.rows for job in batch) or 1
        self._run_s.observe(seconds)
        if not isinstance(outcome, MlcdnError):
            served.cost.observe(rows, seconds)
            for job, packed in zip(batch, outcome, strict=True):
                self._land(job, packed)
        elif len(batch) == 1:
            self._land(batch[0], outcome)
        else:
            log.info("batch_taken_apart", model=self._name, jobs=len(batch), cause=str(outcome))
            for job in batch:
                self._again(job)

    def _again(self, job: Job) -> None:
        """By itself, and in a thread: what went wrong in company may also take long."""
        if job.has_ended:
            return
        if self._closed:
            self._land(job, NotReady(f"model {self._name} is not served any more"))
            return
        job.alone = job.alone_after_failure = True
        if job.timer is None:
            self._watch(job)
        self._waiting.add(job)
        self._see_to_it()

    def _watch(self, job: Job) -> None:
        """For what may be in a thread at its deadline; what runs in the loop keeps the loop's timers from running."""
        loop = asyncio.get_running_loop()
        job.timer = loop.call_later(max(0.0, job.ask.deadline.remaining()), self._expire, job)

    def _expire(self, job: Job) -> None:
        self._waiting.drop(job)
        self._land(job, DeadlineExceeded("no answer before the deadline"))

    def _land(self, job: Job, outcome: bytes | MlcdnError) -> None:
        if job.has_ended:
            return
        job.has_ended = True
        if job.timer is not None:
            job.timer.cancel()
        job.ask.served.leave()
        job.ended(outcome)

    def _said(self, batch: Sequence[Job], reason: str) -> None:
        rows = self._batch_rows.get(reason)
        if rows is None:
            rows = self._batch_rows[reason] = histogram("mlcdn_batch_rows").labels(self._name, reason)
        rows.observe(sum(job.rows for job in batch) or 1)
        self._queue_s.observe((time.perf_counter_ns() - batch[0].queued_ns) / 1e9)


def _run(batch: list[Job]) -> list[bytes]:
    first = batch[0]
    model = first.ask.served.model
    if model is None:
        raise NotReady(f"model {first.ask.served.name} has no session here")
    deadline = min((job.ask.deadline for job in batch), key=lambda d: d.at) if len(batch) > 1 else first.ask.deadline
    try:
        return parted(batch, model.run(joined(batch), first.ask.outputs, deadline))
    except MlcdnError:
        raise
    except Exception as error:
        # A library's own: the caller is told no more than that, and the worker serves on.
        log.exception("run_broke", model=first.ask.served.name)
        raise RunFailed("internal error") from error


def _timed(batch: list[Job]) -> tuple[list[bytes] | MlcdnError, float]:
    began = time.perf_counter()
    try:
        return _run(batch), time.perf_counter() - began
    except MlcdnError as error:
        return error, time.perf_counter() - began
