"""A candidate's shadow: it answers, for nobody, what the stable release has answered for clients, and is compared with it.

    an answer that was given → one of the share? → a short queue → [the worker has nothing else to do?]
      → the candidate, in a thread of its own that has the time nobody else wants → compare → one ShadowCompared a second

Laws:
- No answer waits for it, is changed by it, or is kept because of it: it begins after the answer has left, fills no cache,
  and runs neither in the loop nor in an engine. The loop only compares, one small answer a turn, since a thread that waits
  for a core must not do so with the interpreter in its hands.
- It gives way: nothing is begun while a model has computations waiting, or the loop or the machine are busy, nor within a
  second of a run that had to wait for its core; what waited long, or found the queue full, is skipped and counted.
- By a request's key, so the same one is always in the share or never, and is compared once a second at most.
- A candidate that hangs until its deadline keeps no other model's shadow from running.

It must not know doors, caches, percentages of a rollout, or what a difference leads to.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
import numpy as np
import structlog

from edge_node.serving.batches import Ask
from edge_node.serving.reporter import Identity
from edge_node.serving.served import Served
from inference.compare import Compared, compared, packed_values, values
from inference.deadlines import Deadline
from inference.golden import ATOL, RTOL
from inference.oip_binary import raw_size
from inference.onnx_model import OnnxModel
from inference.packed import unpack
from processes.priority import only_spare_time, waited_s
from schemas.errors import MlcdnError
from schemas.events import Event, ShadowCompared
from schemas.metrics import counter

MAX_WAITING: Final = 64
MAX_WAITING_BYTES: Final = 16 * 2**20
MAX_WAIT_S: Final = 2.0
REPORT_S: Final = 1.0
# Compared in one stay in the thread.
BATCH: Final = 16
# Of a core: above this the loop has enough to do.
BUSY: Final = 0.7
# Between two looks, which ask for 20 ms: more than this says that the machine has enough to do.
LATE_S: Final = 0.03
_BUCKETS: Final = 10_000
# A run that waited so long for its core, or so much of its time, shows a machine without time to spare: a thread that has
# the interpreter might wait like that. Then none is begun for a while.
WAITED_S: Final = 0.002
WAITED_SHARE: Final = 0.2
PAUSE_S: Final = 1.0
# Above this a comparison is too long for the loop.
LARGE_BYTES: Final = 16_384

Array = np.ndarray[Any, np.dtype[Any]]
log = structlog.get_logger()


class _Given(msgspec.Struct, frozen=True, gc=False):
    """What was asked, and what the stable release answered."""

    inputs: Mapping[str, Array]
    body: bytes
    since: float
    size: int


class Tally(msgspec.Struct):
    rows: int = 0
    disagreements: int = 0
    max_difference: float = 0.0
    top1_rows: int = 0
    top1_agreements: int = 0
    failed: int = 0
    skipped: int = 0


class Shadow:
    """Of one candidate beside one stable release. One event loop owns it."""

    def __init__(self, stable: Served, candidate: Served, identity: Identity, say: Callable[[Event], None]) -> None:
        self._stable, self._candidate, self._identity, self._say = stable, candidate, identity, say
        # A share above nothing is one bucket at least.
        self._below = math.ceil(round(candidate.wanted.released.shadow_percent * _BUCKETS / 100, 6))
        self._waiting: deque[_Given] = deque()
        self._bytes = 0
        self._seen: set[bytes] = set()
        self._tally = Tally()
        self._started_ms = time.time_ns() // 1_000_000
        self._reported = time.monotonic()
        self._idle = self._closed = False
        self._paused_until = 0.0
        self._looked, self._worked = time.monotonic(), time.thread_time()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"shadow-{candidate.name}", initializer=only_spare_time)
        self._working: asyncio.Task[None] | None = None
        golden = candidate.wanted.released.golden
        self._tolerances = (golden.rtol, golden.atol) if golden is not None else (RTOL, ATOL)

    def of(self, stable: Served | None, candidate: Served | None) -> bool:
        return self._stable is stable and self._candidate is candidate

    def offer(self, ask: Ask, body: bytes) -> None:
        """An answer of the stable release that a client has."""
        if int.from_bytes(ask.key[8:12], "big") % _BUCKETS >= self._below or ask.key in self._seen or self._closed:
            return
        size = sum(map(raw_size, ask.inputs.values())) + len(body)
        if len(self._waiting) >= MAX_WAITING or self._bytes + size > MAX_WAITING_BYTES:
            self._tally.skipped += 1
            return
        self._seen.add(ask.key)
        self._bytes += size
        self._waiting.append(_Given(ask.inputs, body, time.monotonic(), size))

    def tend(self, idle: bool) -> None:
        """Every few ms. `idle`: no model of the worker has computations waiting."""
        now, worked = time.monotonic(), time.thread_time()
        share = (worked - self._worked) / max(now - self._looked, 1e-6)
        looked, self._looked, self._worked = self._looked, now, worked
        self._idle = idle and share < BUSY and now - looked < LATE_S
        while self._waiting and now - self._waiting[0].since > MAX_WAIT_S:
            self._taken()
            self._tally.skipped += 1
        self._begin()
        if now - self._reported >= REPORT_S:
            self._report(now)

    def close(self) -> None:
        """What was compared is said; what waited is not compared any more."""
        self._closed = True
        self._forget()
        self._report(time.monotonic())
        self._thread.shutdown(wait=False)

    def _begin(self) -> None:
        model, engine = self._candidate.model, self._candidate.engine
        if not self._waiting or not self._may_run() or model is None or engine is None or self._candidate.asleep:
            return
        if self._working is None or self._working.done():
            # A candidate that only a shadow asks for is not idle: its session stays.
            engine.last_used = time.monotonic()
            self._working = asyncio.get_running_loop().create_task(self._work(model))

    async def _work(self, model: OnnxModel) -> None:
        """Until nothing waits, or it has to give way."""
        loop = asyncio.get_running_loop()
        with self._candidate.held():
            while self._waiting and self._may_run():
                batch = [self._taken() for _ in range(min(BATCH, len(self._waiting)))]
                answers = await loop.run_in_executor(self._thread, self._run, model, batch)
                for given, answer in zip(batch, answers, strict=False):
                    if given.size > LARGE_BYTES:
                        self._count(await asyncio.to_thread(self._compared, given, answer))
                    else:
                        self._count(self._compared(given, answer))
                        # One a turn of the loop: what came meanwhile is answered first.
                        await asyncio.sleep(0)
                for given in reversed(batch[len(answers) :]):
                    self._bytes += given.size
                    self._waiting.appendleft(given)
        if self._closed:
            self._forget()
            self._report(time.monotonic())

    def _may_run(self) -> bool:
        engine = self._candidate.engine
        spare = self._idle and time.monotonic() >= self._paused_until
        return spare and not self._closed and engine is not None and not engine.queued

    def _run(self, model: OnnxModel, batch: Sequence[_Given]) -> list[Mapping[str, Array] | None]:
        """In the thread: the answers, None for what the candidate refuses or breaks on, up to where it has to give way."""
        answers: list[Mapping[str, Array] | None] = []
        limit_s = self._candidate.wanted.released.limits.deadline_ms / 1e3
        for given in batch:
            if answers and not self._may_run():
                break
            began, waited = time.monotonic(), waited_s()
            try:
                model.validate_inputs(given.inputs)
                names = [output.name for output in unpack(given.body) if output.name in model.output_names]
                answers.append(model.run(given.inputs, names, Deadline.after(limit_s)) if names else {})
            except MlcdnError:
                answers.append(None)
            except Exception:
                log.exception("shadow_broke", model=self._candidate.name)
                answers.append(None)
            ended = time.monotonic()
            if waited_s() - waited > max(WAITED_S, WAITED_SHARE * (ended - began)):
                self._paused_until = ended + PAUSE_S
        return answers

    def _compared(self, given: _Given, answer: Mapping[str, Array] | None) -> Compared | None:
        if answer is None:
            return None
        return compared(packed_values(given.body), values(answer, self._candidate.outputs), *self._tolerances)

    def _count(self, one: Compared | None) -> None:
        tally = self._tally
        if one is None:
            tally.failed += 1
            return
        tally.rows += 1
        tally.disagreements += one.difference is not None
        tally.max_difference = max(tally.max_difference, one.max_difference)
        tally.top1_rows += one.top1_rows
        tally.top1_agreements += one.top1_agreements

    def _forget(self) -> None:
        """What waits is not compared any more."""
        self._tally.skipped += len(self._waiting)
        self._waiting.clear()
        self._bytes = 0

    def _taken(self) -> _Given:
        given = self._waiting.popleft()
        self._bytes -= given.size
        return given

    def _report(self, now: float) -> None:
        tally, self._tally = self._tally, Tally()
        started_ms, self._started_ms = self._started_ms, time.time_ns() // 1_000_000
        self._reported = now
        self._seen.clear()
        if not (tally.rows or tally.failed or tally.skipped):
            return
        model = self._candidate.name
        agreed = tally.rows - tally.disagreements
        for outcome, count in (
            ("agreed", agreed),
            ("differed", tally.disagreements),
            ("failed", tally.failed),
            ("skipped", tally.skipped),
        ):
            counter("mlcdn_shadow_answers_total").labels(model, outcome).inc(count)
        self._say(
            ShadowCompared(
                **self._identity.fleet(),
                model=model,
                sequence=self._candidate.wanted.sequence,
                stable_digest=self._stable.digest,
                candidate_digest=self._candidate.digest,
                started_at_ms=started_ms,
                rows=tally.rows,
                disagreements=tally.disagreements,
                max_difference=tally.max_difference,
                top1_rows=tally.top1_rows,
                top1_agreements=tally.top1_agreements,
                failed=tally.failed,
                skipped=tally.skipped,
            )
        )
