"""A deadline, and the one thread of a process that ends runs which passed theirs.

Laws:
- One watchdog thread a process, however many runs: it sleeps until the earliest deadline. A timer in an event loop
  would come when the loop is free (measured 2.6 s late under load; this thread 0.1 s).
- A run is ended through its own RunOptions, between two nodes or two turns of a Loop; a single long node is not
  interrupted.
- A run that ends by itself first is left alone, also if its deadline passed while it ended.
- What has ended is let go: the heap holds no more finished runs than running ones, and a few.

It must not know models, requests or event loops.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec

from inference.runtime import onnxruntime


class Deadline(msgspec.Struct, frozen=True):
    """A moment on the monotonic clock of this process."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        return self.at - time.monotonic()

    @property
    def passed(self) -> bool:
        return self.remaining() <= 0


class Watch:
    """One guarded run. `fired` says that the watchdog ended it."""

    __slots__ = ("done", "fired", "options", "queued")

    def __init__(self) -> None:
        self.options: Any = onnxruntime.RunOptions()
        self.done = False
        self.fired = False
        self.queued = True


# Below this many finished runs the heap is not worth tidying.
_TIDY_FROM: Final = 100


class Watchdog:
    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Watch]] = []
        self._finished = 0  # of those in the heap
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wakes_at = math.inf

    @contextmanager
    def watch(self, deadline: Deadline) -> Iterator[Watch]:
        watch = Watch()
        with self._changed:
            # Not alive also in a forked child, where only the forking thread goes on.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._serve, name="run-deadlines", daemon=True)
                self._thread.start()
            heapq.heappush(self._heap, (deadline.at, next(self._order), watch))
            # Only for who must wake earlier than it will: woken for every run it fought each for the interpreter.
            if deadline.at < self._wakes_at:
                self._changed.notify()
        try:
            yield watch
        finally:
            with self._changed:
                watch.done = True
                self._finished += watch.queued
                if self._finished > max(_TIDY_FROM, len(self._heap) // 2):
                    self._tidy()

    def _tidy(self) -> None:
        # Left until their deadlines, 530 bytes each, 10,000 runs a second under 30 s would hold 160 MB.
        self._heap = [entry for entry in self._heap if not entry[2].done]
        heapq.heapify(self._heap)
        self._finished = 0

    def _pop(self) -> Watch:
        watch = heapq.heappop(self._heap)[2]
        watch.queued = False
        self._finished -= watch.done
        return watch

    def _serve(self) -> None:
        with self._changed:
            while True:
                while self._heap and self._heap[0][2].done:
                    self._pop()
                if not self._heap:
                    self._wakes_at = math.inf
                    self._changed.wait()
                    continue
                self._wakes_at = self._heap[0][0]
                wait = self._wakes_at - time.monotonic()
                if wait > 0:
                    self._changed.wait(wait)
                    continue
                watch = self._pop()
                if not watch.done:
                    watch.fired = True
                    watch.options.terminate = True


WATCHDOG = Watchdog()
