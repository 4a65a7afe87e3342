"""A client that asks on time whatever is still unanswered, at up to a thousand requests a second.

Laws: nothing is sent twice; a request that fails is an answer with status 0; latency counts from the moment of sending, and
how late the client itself was is counted apart. It must not know servers' names, figures or processes.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

TIMEOUT_S: Final = 10.0
LANES: Final = 256


@dataclass(frozen=True, slots=True)
class Answer:
    sent: float
    """`time.monotonic` of sending."""
    ms: float
    status: int
    digest: bytes


@dataclass(slots=True)
class Seen:
    """Answers in the order in which they were asked for."""

    answers: list[Answer] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(answer.status != 200 for answer in self.answers)

    def why(self) -> str:
        """The statuses of those that failed; 0 is no answer at all."""
        found = Counter(answer.status for answer in self.answers if answer.status != 200)
        return f" ({', '.join(f'{n} × {status}' for status, n in found.items())})" if found else ""


def request(url: str, body: bytes) -> bytes:
    """The bytes of one POST."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def open_loop(url: str, body: Callable[[int], bytes], rate: float, stop: asyncio.Event) -> Seen:
    """Asks `url` for `body(0)`, `body(1)` … at `rate` a second until `stop`, then waits for what is unanswered."""
    seen, lanes = Seen(), _Lanes(url)
    # A full collection over what was imported would show up as everybody's latency.
    gc.collect()
    gc.freeze()
    began, number, asked = time.monotonic(), 0, set[asyncio.Task[Answer]]()
    done: dict[int, Answer] = {}
    try:
        while not stop.is_set():
            now = time.monotonic()
            while (due := began + number / rate) <= now:
                task = asyncio.create_task(lanes.ask(request(url, body(number))))
                task.add_done_callback(lambda t, n=number: done.__setitem__(n, t.result()))  # type: ignore[misc]
                task.add_done_callback(asked.discard)
                asked.add(task)
                seen.late_ms.append((now - due) * 1000)
                number += 1
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        while asked:
            await asyncio.wait(asked)
            await asyncio.sleep(0)
    finally:
        lanes.close()
        gc.unfreeze()
    seen.answers = [done[n] for n in range(number)]
    return seen


async def ask_again(url: str, body: Callable[[int], bytes], stop: asyncio.Event) -> Seen:
    """One client that asks again as soon as it is answered, until `stop`. It sends only what is new: odd numbers."""
    seen, lanes = Seen(), _Lanes(url)
    try:
        while not stop.is_set():
            seen.answers.append(await lanes.ask(request(url, body(2 * len(seen.answers) + 1))))
    finally:
        lanes.close()
    return seen


class _Lanes:
    """Connections, each with one request at a time; the one that was free last is used first."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._free: deque[_Lane] = deque()
        self._permits = asyncio.Semaphore(LANES)

    async def ask(self, content: bytes) -> Answer:
        async with self._permits:
            sent = time.monotonic()
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    lane = await self._lane()
                    sent = time.monotonic()
                    status, digest, stays = await lane.ask(content)
            except (OSError, TimeoutError):
                return Answer(sent, (time.monotonic() - sent) * 1000, 0, b"")
            answer = Answer(sent, (time.monotonic() - sent) * 1000, status, digest)
            if stays:
                self._free.append(lane)
            else:
                lane.close()
            return answer

    async def _lane(self) -> _Lane:
        while self._free:
            lane = self._free.pop()
            if lane.open:
                return lane
        loop = asyncio.get_running_loop()
        _, lane = await loop.create_connection(_Lane, self._host, self._port)
        return lane

    def close(self) -> None:
        for lane in self._free:
            lane.close()


class _Lane(asyncio.Protocol):
    """One keep-alive connection: reads status, `mlcdn-digest` and a body of a known length."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._read = bytearray()
        self._waits: asyncio.Future[tuple[int, bytes, bool]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.open = transport, True

    async def ask(self, content: bytes) -> tuple[int, bytes, bool]:
        if self._transport is None or not self.open:
            raise ConnectionResetError
        self._waits = asyncio.get_running_loop().create_future()
        self._transport.write(content)
        return await self._waits

    def data_received(self, data: bytes) -> None:
        self._read += data
        end = self._read.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._read[:end]).lower()
        if len(self._read) < end + 4 + int(_field(head, b"content-length") or 0):
            return
        self._read.clear()
        if self._waits is not None and not self._waits.done():
            stays = _field(head, b"connection") != b"close"
            self._waits.set_result((int(head[9:12]), _field(head, b"mlcdn-digest"), stays))

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._waits is not None and not self._waits.done():
            self._waits.set_exception(error or ConnectionResetError("closed before it answered"))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _field(head: bytes, name: bytes) -> bytes:
    _, found, rest = head.partition(b"\r\n" + name + b":")
    return rest.partition(b"\r\n")[0].strip() if found else b""
