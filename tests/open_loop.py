"""An open loop: requests are due at a fixed rate, whatever became of those before, and each is timed from when it was due.

    due times ──► a free connection, or a new one ──► 200 with the right digest, or `wrong` says what it was

Laws: nothing is asked twice; a request that could not be sent in time counts as slow, never as not sent; at the end of
the block every request has been answered or has failed. It runs in a thread with a loop of its own.

It must not know what a test hurts.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from processes.ports import LOOPBACK
from tests.edge_node_process import question

ANSWER_S: Final = 10.0
ADDED_MS, ANY_ADDED_MS = 5.0, 150.0
HEAD: Final = b"POST /predict HTTP/1.1\r\nHost: edge\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class OpenLoop:
    """Asks the models of `digests` in turn, another row each time. `ms` are latencies, in the order of the answers."""

    def __init__(self, port: int, digests: Mapping[str, str], *, rate: float) -> None:
        self.rate, self._port, self._digests, self._pause_s = rate, port, dict(digests), 1 / rate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="open-loop")
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.wrong: list[str] = []
        self.ms: list[float] = []
        self.sent = self.answered = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        models = list(self._digests)
        # Where no earlier loop began: its rows are in no cache.
        first = time.monotonic_ns() // 1_000_000 % 10_000_000
        due = time.perf_counter()
        asking: set[asyncio.Task[None]] = set()
        while not self._stop.is_set():
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            while due <= time.perf_counter():
                task = asyncio.create_task(self._ask(models[self.sent % len(models)], first + self.sent, due))
                asking.add(task)
                task.add_done_callback(asking.discard)
                self.sent += 1
                due += self._pause_s
        await asyncio.gather(*asking)
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()

    async def _ask(self, model: str, number: int, due: float) -> None:
        body = json.dumps(question(model, number)).encode()
        try:
            async with asyncio.timeout(ANSWER_S):
                head, answer = await self._exchange(HEAD % len(body) + body)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self.wrong.append(f"{model}: {error!r}")
            return
        self.ms.append((time.perf_counter() - due) * 1e3)
        if not head.startswith(b"HTTP/1.1 200 "):
            self.wrong.append(f"{model}: {head[:12]!r} {answer[:200]!r}")
        elif (digest := json.loads(answer)["digest"]) != self._digests[model]:
            self.wrong.append(f"{model}: {digest}")
        else:
            self.answered += 1

    async def _exchange(self, request: bytes) -> tuple[bytes, bytes]:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(LOOPBACK, self._port)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
        except BaseException:
            writer.transport.abort()
            raise
        if b"\r\nconnection: close" in head.lower():
            writer.close()
        else:
            self._idle.append((reader, writer))
        return head, body


def percentile(ms: list[float], share: float) -> float:
    """The value that `share` of all are not above."""
    return sorted(ms)[math.ceil(len(ms) * share) - 1]


@dataclass(frozen=True, slots=True)
class Pace:
    """The p99 of a load in ms, and that of its quietest second.

    A p99 of a few hundred requests moves by more than a promise leaves on a machine of two cores, shared with whatever else
    runs. But that comes and goes, and only ever adds; what a fault costs all the time is in every second. So the quietest
    seconds are held against each other, and the whole may be a little worse by chance.
    """

    p99: float
    quiet: float

    @classmethod
    def of(cls, load: OpenLoop) -> Pace:
        ms, window = load.ms, round(load.rate)
        starts = range(0, max(1, len(ms) - window + 1), max(1, window // 4))
        return cls(percentile(ms, 0.99), min(percentile(ms[start : start + window], 0.99) for start in starts))

    def __str__(self) -> str:
        return f"{self.p99:.1f} ms (quietest {self.quiet:.1f})"

    def keeps(self, usual: Pace, times: float) -> bool:
        return self.quiet < usual.quiet * times + ADDED_MS and self.p99 < usual.p99 * times + ANY_ADDED_MS
