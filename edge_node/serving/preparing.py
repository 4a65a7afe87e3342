"""From a file on disk to a session that may answer: load · warm · prefill, each timed, beside live traffic.

Laws:
- Nothing here touches what answers. What goes wrong is a `PhaseFailed` that names the phase.
- A load beside live traffic runs at the lowest priority (p99 2.2 ms, against 5.5 in a plain thread), but not for ever:
  on a saturated core it can take 20 s, so after `QUIET_LOAD_S` it is done again at normal priority; later where the files
  are large, since two loads at once take twice the memory. The first load is in no one's way.

It must not know slots, the board or the log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import structlog

from edge_node.serving.batches import Ask
from edge_node.serving.served import Prepared
from edge_node.serving.warming import prefilled, warm
from inference.external_data import stored
from inference.onnx_model import OnnxModel, SessionSettings
from processes.priority import lower_priority
from schemas.errors import MlcdnError
from streams.folds.wanted import Wanted

QUIET_LOAD_S: Final = 10.0
_LOWEST_PRIORITY: Final = 19
_LARGE_BYTES_S: Final = 50 * 2**20
T = TypeVar("T")

log = structlog.get_logger()


class PhaseFailed(Exception):
    def __init__(self, phase: str, cause: str) -> None:
        super().__init__(cause)
        self.phase, self.cause = phase, cause


class Preparing:
    """One event loop owns it."""

    def __init__(self, settings: SessionSettings) -> None:
        self._settings = settings
        self._one_quiet_load = asyncio.Lock()
        self._quiet = ThreadPoolExecutor(
            1, thread_name_prefix="load-quiet", initializer=partial(lower_priority, _LOWEST_PRIORITY)
        )
        self._plain = ThreadPoolExecutor(2, thread_name_prefix="load")

    async def prepare(
        self, wanted: Wanted, path: Path, golden: Path | None, quiet: bool, ms: dict[str, float]
    ) -> Prepared:
        """`quiet`: others are answered meanwhile. `ms` gets each phase's time."""
        model = await self._timed(
            "load", ms, quiet, lambda: self._load(path, wanted), OnnxModel.close, _large_s(wanted)
        )
        try:
            cost = await self._timed("warm", ms, quiet, lambda: warm(model, golden, wanted))
        except BaseException:
            model.close()
            raise
        return Prepared(model, cost)

    async def prefill(self, prepared: Prepared, asks: Sequence[Ask], ms: dict[str, float]) -> list[tuple[Ask, bytes]]:
        """What the new session answers to `asks`, as far as the time for it goes."""
        return await self._timed("prefill", ms, True, lambda: prefilled(prepared.model, asks))

    async def wake(self, wanted: Wanted, path: Path) -> OnnxModel:
        """The session again that was let go; somebody waits for it."""
        return await self._timed("load", {}, False, lambda: self._load(path, wanted), OnnxModel.close)

    def close(self) -> None:
        self._quiet.shutdown(wait=False, cancel_futures=True)
        self._plain.shutdown(wait=False, cancel_futures=True)

    def _load(self, path: Path, wanted: Wanted) -> OnnxModel:
        released = wanted.released
        return OnnxModel.load(path, released.artifact.sha256, self._settings, stored(released.files, path.parent))

    async def _timed(
        self,
        phase: str,
        ms: dict[str, float],
        quiet: bool,
        work: Callable[[], T],
        discard: Callable[[T], None] | None = None,
        more_s: float = 0.0,
    ) -> T:
        began = time.perf_counter()
        try:
            return await self._in_thread(work, quiet, discard, QUIET_LOAD_S + more_s)
        except MlcdnError as error:
            raise PhaseFailed(phase, str(error)) from error
        except Exception as error:  # a library's own: reported as the cause, the old release serves on
            log.exception("swap_broke", phase=phase)
            raise PhaseFailed(phase, type(error).__name__) from error
        finally:
            ms[phase] = (time.perf_counter() - began) * 1e3

    async def _in_thread(
        self, work: Callable[[], T], quiet: bool, discard: Callable[[T], None] | None, quiet_s: float
    ) -> T:
        loop = asyncio.get_running_loop()
        if not quiet:
            return await loop.run_in_executor(self._plain, work)
        async with self._one_quiet_load:
            running = loop.run_in_executor(self._quiet, work)
            done, _ = await asyncio.wait({running}, timeout=quiet_s)
            if done:
                return running.result()
        log.warning("quiet_load_is_slow", seconds=quiet_s)

        def late(future: asyncio.Future[T]) -> None:
            if not future.cancelled() and future.exception() is None and discard is not None:
                discard(future.result())

        running.add_done_callback(late)
        return await loop.run_in_executor(self._plain, work)


def _large_s(wanted: Wanted) -> float:
    """What files of weights add to the time of a load."""
    return sum(file.artifact.size_bytes for file in wanted.released.files) / _LARGE_BYTES_S
