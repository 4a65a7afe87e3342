"""A TCP proxy that hurts what passes through it: late, slow, held, lost, cut, reset or refused, until it is healed.

    client ── port ──► proxy ──► upstream        each way: read → due time → rewritten → held back or lost → written

Laws:
- It runs in a thread with a loop of its own; what it does to connections is changed at any time, by plain attributes.
- TCP is never lied to: bytes that were held come later, in order; a connection that lost bytes is reset when healed.
- A handshake is the kernel's: it succeeds at once, whatever the fault. `refuse` closes the port.

It must not know the protocol. `instead` are bytes that every answer has in place of others of the same length: a broker
that says where it is found would lead its clients past the proxy.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from processes.ports import LOOPBACK

T = TypeVar("T")
LOOK_S: Final = 0.005
PIECE: Final = 16_384
# What is on its way while it is late; above it the sender has to wait, as on a real line.
PIECES_ON_THE_WAY: Final = 256
_RESET: Final = struct.pack("ii", 1, 0)


class TcpFaults:
    """`latency_s` is one way's; `bytes_s` and `cut_after` are those of each connection's answers."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream = upstream_port
        self.latency_s, self.bytes_s, self.cut_after = 0.0, 0.0, 0
        self.held = self.lost = False
        self.instead: tuple[bytes, bytes] | None = None
        self.carried = 0
        """Bytes that were written on, both ways."""
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-faults")

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def connections(self) -> int:
        return len(self._links)

    def listen(self) -> None:
        """Takes connections, on the same port as before."""
        self._call(self._listen())

    def refuse(self) -> None:
        """New connections are refused; those that there are go on."""
        self._call(self._close())

    def reset(self) -> None:
        """Ends every connection with a RST to both sides."""
        self._call(self._reset(all_of_them=True))

    def heal(self) -> None:
        """As if nothing had been, except for what was lost."""
        self.latency_s, self.bytes_s, self.cut_after = 0.0, 0.0, 0
        self.held = self.lost = False
        self._call(self._reset(all_of_them=False))
        if self._server is None:
            self.listen()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _reset(self, *, all_of_them: bool) -> None:
        for link in list(self._links):
            if all_of_them or link.has_lost:
                link.reset()

    async def _end(self) -> None:
        await self._close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for link in list(self._links):
            link.reset()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_connection(LOOPBACK, self._upstream)
        except OSError:
            _reset(writer)
            return
        link = _Link(self, (reader, writer), upstream)
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)


class _Link:
    """One client's connection and its other half."""

    def __init__(self, faults: TcpFaults, client: _Stream, upstream: _Stream) -> None:
        self._faults, self._client, self._upstream = faults, client, upstream
        self.has_lost = False
        self._over = asyncio.Event()

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for reader, writer, back in (
                    (self._client[0], self._upstream[1], False),
                    (self._upstream[0], self._client[1], True),
                ):
                    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES_ON_THE_WAY)
                    group.create_task(self._read(reader, on_the_way))
                    group.create_task(self._write(on_the_way, writer, back))
        except* OSError:
            pass  # one side is gone: so is the other, now
        finally:
            self.reset()

    def reset(self) -> None:
        self._over.set()
        _reset(self._client[1])
        _reset(self._upstream[1])

    async def _read(self, reader: asyncio.StreamReader, on_the_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        data = b" "
        while data:
            data = await reader.read(PIECE)
            await on_the_way.put((self._now() + self._faults.latency_s, data))

    async def _write(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, back: bool) -> None:
        faults, sent, kept, ended = self._faults, 0, b"", False
        while not ended:
            due, data = await queue.get()
            ended = not data
            await asyncio.sleep(max(0.0, due - self._now()))
            while faults.held:  # noqa: ASYNC110 (set by other threads: no event of this loop's)
                await asyncio.sleep(LOOK_S)
            if faults.lost or self.has_lost:
                self.has_lost = True
                if ended:
                    # An end that was lost is no end: only a reset is.
                    await self._over.wait()
                    raise ConnectionResetError
                continue
            if back and faults.instead is not None:
                data, kept = _replaced(kept + data, *faults.instead, whole=ended)
            if back and faults.bytes_s:
                await asyncio.sleep(len(data) / faults.bytes_s)
            if back and faults.cut_after and sent + len(data) > faults.cut_after:
                writer.write(data[: faults.cut_after - sent])
                writer.close()
                await writer.wait_closed()
                raise ConnectionAbortedError("cut")
            writer.write(data)
            await writer.drain()
            sent += len(data)
            faults.carried += len(data)
        writer.write_eof()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def _replaced(data: bytes, old: bytes, new: bytes, *, whole: bool) -> tuple[bytes, bytes]:
    """`data` with `new` for `old`, and the end of it that may be the beginning of an `old`."""
    assert len(old) == len(new)
    data = data.replace(old, new)
    if not whole:
        for length in range(min(len(old) - 1, len(data)), 0, -1):
            if data.endswith(old[:length]):
                return data[:-length], data[-length:]
    return data, b""


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
