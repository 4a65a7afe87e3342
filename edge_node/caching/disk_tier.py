"""The host's disk as a tier: what a restarted worker starts warm from.

Laws:
- The loop never touches the disk: all of it happens in one thread, reads as they come, writes gathered for 0.1 s and
  then written in one transaction. A look-up waits `timeout_s` at most; while the thread is stuck, look-ups cost nothing.
- The queue of writes is bounded, and what does not fit is counted and forgotten.
- Each worker has a directory of its own: the files are dropped and begun anew by whoever has them open, and LMDB has no
  way to tell another process. Two on one directory: the second one's tier stays off, and looks again each second.
- What is asked for in the oldest generation is written again, so that it outlives it.

It must not know whether an entry may answer. One event loop owns it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import lmdb
import structlog

from edge_node.caching.disk_generations import DiskReport, Generations
from edge_node.caching.entry import Entry, EntryRefused, pack, unpack
from edge_node.caching.tallies import dropped, missed
from edge_node.caching.tier_choice import LookupCost
from schemas.errors import MlcdnError
from schemas.metrics import gauge

PROBED: Final = b"probe"
TIMEOUT_S: Final = 0.05
GATHER_S: Final = 0.1
RETRY_S: Final = 1.0
MAX_QUEUED: Final = 1_024
MAX_QUEUED_BYTES: Final = 16 * 2**20
BATCH: Final = 256
BATCH_BYTES: Final = 4 * 2**20
# Of a tier: larger values would make a generation hold a handful.
_LARGEST_SHARE: Final = 64
_FAILURES: Final = (lmdb.Error, OSError, MlcdnError)

T = TypeVar("T")
log = structlog.get_logger()


class DiskTier:
    name: Final = "disk"

    def __init__(self, directory: Path, max_bytes: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self._directory, self._max_bytes, self._timeout_s = directory, max_bytes, timeout_s
        self._largest = max_bytes // _LARGEST_SHARE
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="disk-tier")
        self._generations: Generations | None = None  # the thread's
        self.cost = LookupCost()
        self._failed_at = -RETRY_S
        self._told = ""  # why it was left alone last: said once, not at each retry
        self._stuck: asyncio.Future[Any] | None = None
        self._queue: dict[tuple[str, bytes], Entry] = {}
        self._queued_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._closed = False

    @property
    def answers(self) -> bool:
        if self._stuck is not None and self._stuck.done():
            self._stuck = None
        return self._stuck is None and time.monotonic() - self._failed_at >= RETRY_S and not self._closed

    async def get_many(self, keys: Sequence[bytes], digest: str, namespace: str) -> dict[bytes, Entry]:
        if not self.answers:
            missed(self.name, "breaker", len(keys))
            return {}
        reading = self._in_thread(lambda: self._read(keys, digest, namespace))
        if not await self._is_done(reading, len(keys)):
            missed(self.name, "timeout", len(keys))
            return {}
        if reading.exception() is not None:
            missed(self.name, "unreadable", len(keys))
            return {}
        found, reasons, leaving = reading.result()
        for reason in reasons:
            missed(self.name, reason)
        for entry in leaving:
            self.offer(entry, namespace)
        return found

    async def probe(self) -> None:
        if self.answers:
            await self._is_done(self._in_thread(lambda: self._files().get(PROBED)), 1)

    def offer(self, entry: Entry, namespace: str) -> None:
        size = len(entry.body)
        if not self.answers:
            dropped(self.name, "breaker")
        elif size > self._largest:
            dropped(self.name, "oversize")
        elif len(self._queue) >= MAX_QUEUED or self._queued_bytes + size > MAX_QUEUED_BYTES:
            dropped(self.name, "queue_full")
        else:
            at = (namespace, entry.key)
            queued = self._queue.get(at)
            if queued is None or queued.as_of <= entry.as_of:
                self._queue[at] = entry
                self._queued_bytes += size - (len(queued.body) if queued is not None else 0)
            if self._writing is None:
                self._hurry.clear()
                self._writing = asyncio.get_running_loop().create_task(self._write())

    async def check(self) -> DiskReport:
        """Reads every entry there is. Raises what the disk raises: it is a person who asks."""
        return await self._in_thread(lambda: self._files().check())

    async def settle(self) -> None:
        while self._writing is not None:
            self._hurry.set()
            await asyncio.wait({self._writing})

    async def close(self) -> None:
        """A thread that hangs in the disk is left behind: it must not hold up a worker that stops."""
        if self._closed:
            return
        try:
            async with asyncio.timeout(2.0):
                await self.settle()
                self._closed = True
                await self._in_thread(self._close_files)
        except (TimeoutError, *_FAILURES) as error:
            log.warning("cache_tier_did_not_close", tier=self.name, cause=type(error).__name__)
        finally:
            self._closed = True
            if self._writing is not None:
                self._writing.cancel()
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _write(self) -> None:
        """Ends when the queue is empty; the next offer starts another."""
        try:
            while self._queue:
                if not self._hurry.is_set():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(GATHER_S):
                            await self._hurry.wait()
                batch = self._batch()
                try:
                    written, used = await self._in_thread(lambda batch=batch: self._put(batch))  # type: ignore[misc]
                except _FAILURES:
                    dropped(self.name, "unwritable", len(batch))
                else:
                    if written < len(batch):
                        dropped(self.name, "older", len(batch) - written)
                    gauge("mlcdn_cache_bytes").labels(self.name).set(used)
        finally:
            self._writing = None

    def _batch(self) -> list[tuple[str, Entry]]:
        batch: list[tuple[str, Entry]] = []
        size = 0
        while self._queue and len(batch) < BATCH and size < BATCH_BYTES:
            at = next(iter(self._queue))
            entry = self._queue.pop(at)
            size += len(entry.body)
            batch.append((at[0], entry))
        self._queued_bytes -= size
        return batch

    async def _is_done(self, reading: asyncio.Future[Any], keys: int) -> bool:
        began = time.perf_counter()
        await asyncio.wait({reading}, timeout=self._timeout_s)
        if not reading.done():
            self._stuck = reading
        elif reading.exception() is None:
            self.cost.observe(time.perf_counter() - began, keys)
        return reading.done()

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        future.add_done_callback(self._noticed)
        return future

    def _noticed(self, future: asyncio.Future[T]) -> None:
        """Whoever waited may have gone."""
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            self._failed_at = time.monotonic()
            if str(error) != self._told:
                log.warning("cache_tier_left_alone", tier=self.name, cause=str(error))
        self._told = "" if error is None else str(error)

    # In the thread from here on.

    def _files(self) -> Generations:
        if self._generations is None:
            self._generations = Generations(self._directory, self._max_bytes)
        return self._generations

    def _read(
        self, keys: Sequence[bytes], digest: str, namespace: str
    ) -> tuple[dict[bytes, Entry], list[str], list[Entry]]:
        files = self._files()
        found: dict[bytes, Entry] = {}
        reasons: list[str] = []
        leaving: list[Entry] = []
        now_ms = time.time_ns() // 1_000_000
        for key in keys:
            held = files.get(_at(namespace, key))
            if held is None:
                reasons.append("absent")
                continue
            try:
                found[key] = unpack(held[0], key=key, digest=digest, namespace=namespace)
            except EntryRefused as refused:
                reasons.append(refused.reason)
                files.remove(_at(namespace, key))
            else:
                if found[key].last_use_ms <= now_ms:
                    # Else it would be carried from generation to generation, and keep a lower `as_of` out for ever.
                    del found[key]
                    reasons.append("expired")
                    files.remove(_at(namespace, key))
                    continue
                leaving += [found[key]] if held[1] else []
        return found, reasons, leaving

    def _put(self, batch: Sequence[tuple[str, Entry]]) -> tuple[int, int]:
        files = self._files()
        written = files.put_many((_at(namespace, entry.key), pack(entry, namespace)) for namespace, entry in batch)
        return written, files.used_bytes()

    def _close_files(self) -> None:
        if self._generations is not None:
            self._generations.close()
            self._generations = None


def _at(namespace: str, key: bytes) -> bytes:
    return namespace.encode() + b":" + key
