"""Connections over real sockets, under both event loops: what is slow, too large, too many or ambiguous is refused or cut,
counted by its reason, and everybody else is served."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
import uvloop
from starlette.types import Message, Receive, Scope, Send

from processes import http_server
from processes.http_connection import GuardedProtocol
from processes.http_limits import Limits
from processes.http_server import Server
from processes.ports import LOOPBACK, listen

BIG = 32 * 2**20
OK = b"HTTP/1.1 200"
GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
SHORT = Limits(
    head_timeout_s=0.4, body_timeout_s=0.4, write_timeout_s=0.6, keep_alive_s=5.0, linger_s=0.3, drain_idle_s=0.2
)


class Here:
    """A server, and what it counted."""

    def __init__(self, limits: Limits) -> None:
        self.cut: Counter[str] = Counter()
        self.seen: list[Scope] = []
        self.disconnected = 0
        self.sent_chunks = 0
        self.go_on = asyncio.Event()
        self._listener = listen(LOOPBACK, 0)
        self.port = self._listener.getsockname()[1]
        config = uvicorn.Config(
            self.app,
            interface="asgi3",
            http=GuardedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
        )
        self.server = Server(config, limits, lambda reason: self.cut.update([reason]))
        self.serving = asyncio.create_task(self.server.serve([self._listener]))

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        size = 0
        while True:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected += 1
                return
            size += len(message["body"])
            if not message["more_body"]:
                break
        if scope["path"] == "/wait":
            await self.go_on.wait()
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(BIG // 65536):
                await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
                self.sent_chunks += not self.cut
            await send({"type": "http.response.body", "body": b""})
            return
        body = bytes(BIG) if scope["path"] == "/big" else str(size).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def client(self) -> Client:
        return Client(*await asyncio.open_connection(LOOPBACK, self.port, limit=2**20))

    async def is_well(self) -> None:
        """The next good request is answered."""
        async with await self.client() as client:
            assert (await client.ask(GET)).startswith(OK)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()
        await asyncio.sleep(0)

    async def ask(self, data: bytes) -> bytes:
        """One answer, whole."""
        self.writer.write(data)
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)
        found = re.search(rb"content-length: (\d+)", head)
        assert found
        return head + await self.reader.readexactly(int(found[1]))

    async def rest(self) -> bytes:
        """What comes until the server closes."""
        return await asyncio.wait_for(self.reader.read(-1), 8)

    async def trickle(self, data: bytes, pause_s: float, piece: int = 1) -> None:
        for at in range(0, len(data), piece):
            if self.closed():
                return
            self.writer.write(data[at : at + piece])
            await asyncio.sleep(pause_s)

    def closed(self) -> bool:
        """Whether the server's end arrived, behind bytes that nobody has read yet."""
        found: bool = self.reader._eof  # type: ignore[attr-defined]
        return found or self.writer.is_closing()


async def until(true: Callable[[], bool], seconds: float = 8) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(limits: Limits) -> AsyncIterator[Here]:
    here = Here(limits)
    await until(lambda: here.server.started)
    try:
        yield here
    finally:
        here.go_on.set()
        here.server.should_exit = True
        await here.serving


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(http_server, "SWEEP_S", 0.05)
    factory = uvloop.new_event_loop if request.param == "uvloop" else None

    def run(
        scenario: Callable[[Here], Coroutine[Any, Any, None]], limits: Limits = SHORT, *, well: bool = True
    ) -> None:
        async def whole() -> None:
            async with serving(limits) as here:
                await scenario(here)
                if well:
                    await here.is_well()

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(whole(), 30))

    return run


# -- slow clients


@pytest.mark.parametrize(
    ("begun", "more"),
    [(b"GET / HT", b""), (b"", b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"x" * 1000), (b"", b"\r\n" * 1000)],
    ids=["silent", "a-byte-at-a-time", "only-newlines"],
)
def test_a_head_that_does_not_end_is_cut(run: Callable[..., None], begun: bytes, more: bytes) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as client:
            began = time.monotonic()
            client.writer.write(begun)
            await client.trickle(more, 0.02)
            assert (await client.rest()).startswith(b"HTTP/1.1 408 ")
            assert 0.3 < time.monotonic() - began < 2
        assert here.cut == {"head_slow": 1}
        assert not here.seen

    run(scenario)


def test_a_body_that_does_not_end_is_cut_and_its_request_told(run: Callable[..., None]) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as client:
            client.writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n")
            await client.trickle(b"x" * 999, 0.02)
            answer = await client.rest()
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'{"error": "the body did not end in 0.4 s"}' in answer
        assert here.cut == {"body_slow": 1}
        assert here.disconnected == 1

    run(scenario)


@pytest.mark.parametrize("path", [b"/big", b"/stream"])
def test_a_client_that_never_reads_is_cut_and_holds_little(run: Callable[..., None], path: bytes) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as client:
            client.reader._limit = 1  # type: ignore[attr-defined]  # the stream's own reading pauses at once
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.writer.write(b"GET " + path + b" HTTP/1.1\r\nhost: a\r\n\r\n")
            await until(lambda: bool(here.cut))
            assert here.cut == {"unread": 1}
        # What the kernel's buffers took, and one write more.
        assert here.sent_chunks * 65536 < BIG // 2
        assert not here.server.server_state.connections

    run(scenario)


def test_a_client_that_reads_slowly_but_steadily_gets_all_of_it(run: Callable[..., None]) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as client:
            client.writer.write(b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n")
            got, began = 0, time.monotonic()
            while got < BIG:
                got += len(await asyncio.wait_for(client.reader.read(2**18), 5))
                await asyncio.sleep(0.015)
            assert time.monotonic() - began > 2 * SHORT.write_timeout_s
        assert not here.cut

    run(scenario)


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(run: Callable[..., None]) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as idle, await here.client() as busy, await here.client() as silent:
            assert (await idle.ask(GET)).startswith(OK)
            busy.writer.write(b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n")
            assert await idle.rest() == b""
            assert await silent.rest() == b""
            assert here.cut == {"idle": 2}
            await asyncio.sleep(0.6)
            here.go_on.set()
            assert (await busy.ask(b"")).startswith(OK)

    run(scenario, Limits(keep_alive_s=0.4))


# -- large, many


@pytest.mark.parametrize("piece", [1_000, 200_000], ids=["trickled", "at-once"])
def test_a_head_of_200_kb_is_refused(run: Callable[..., None], piece: int) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as client:
            await client.trickle(b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"x" * 200_000 + b"\r\n\r\n", 0.001, piece)
            assert (await client.rest()).startswith(b"HTTP/1.1 431 ")
        assert here.cut == {"head_large": 1}
        assert not here.seen

    run(scenario, Limits(linger_s=0.3))


@pytest.mark.parametrize(
    ("start", "more"),
    [(b"1;", b"x"), (b"0\r\n", b"trailer: x\r\n"), (b"0\r\ntrailer: ", b"x")],
    ids=["extension", "trailers", "one-trailer"],
)
def test_what_a_chunked_body_is_stuffed_with_is_bounded(run: Callable[..., None], start: bytes, more: bytes) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as client:
            client.writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + start)
            await client.trickle(more * (300_000 // len(more)), 0.001, 10_000)
            assert (await client.rest()).startswith(b"HTTP/1.1 400 ")
        assert here.cut == {"body_stuffed": 1}

    run(scenario, Limits(linger_s=0.3))


def test_trailers_join_no_head(run: Callable[..., None]) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as client:
            head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
            assert (await client.ask(head + b"1\r\nx\r\n0\r\nauthorization: me\r\n\r\n")).endswith(b"1")
            assert (await client.ask(GET)).startswith(OK)
        assert b"authorization" not in dict(here.seen[0]["headers"])

    run(scenario)


def test_a_connection_too_many_gets_503_until_another_leaves(run: Callable[..., None]) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as one, await here.client() as two:
            assert (await one.ask(GET)).startswith(OK)
            assert (await two.ask(GET)).startswith(OK)
            for _ in range(3):
                async with await here.client() as third:
                    third.writer.write(GET)
                    assert (await third.rest()).startswith(b"HTTP/1.1 503 ")
            assert (await one.ask(GET)).startswith(OK)
        assert here.cut == {"connections": 3}

    run(scenario, Limits(max_connections=2, linger_s=0.3))


# -- order


def test_a_refusal_waits_for_the_answers_before_it(run: Callable[..., None]) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as client:
            client.writer.write(b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\nGARBAGE\r\n\r\n")
            await asyncio.sleep(0.1)
            here.go_on.set()
            answers = await client.rest()
            assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"400"]
        assert here.cut == {"malformed": 1}

    run(scenario)


def test_pipelined_requests_are_answered_in_order_and_bounded(run: Callable[..., None]) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as client:
            client.writer.write(b"GET /wait HTTP/1.1\r\nhost: a\r\n\r\n" + GET * 50)
            await asyncio.sleep(0.1)
            here.go_on.set()
            answers = await client.rest()
            assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200"] * 11 + [b"429"]
        assert here.cut == {"pipelined": 1}

    run(scenario, Limits(max_pipelined=10, linger_s=0.3))


def test_a_request_that_asks_for_an_upgrade_is_a_plain_one_and_so_is_the_next(run: Callable[..., None]) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as client:
            asks = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
            get = b"GET / HTTP/1.1\r\nhost: a\r\n" + asks + b"\r\n"
            post = b"POST / HTTP/1.1\r\nhost: a\r\n" + asks + b"content-length: %d\r\n\r\n" % len(GET) + GET
            coded = b"POST / HTTP/1.1\r\nhost: a\r\n" + asks + b"transfer-encoding: chunked\r\n\r\n"
            chunked = coded + b"%x\r\n" % len(GET) + GET + b"\r\n0\r\n\r\n"
            for whole, size in ((get, b"0"), (post, b"%d" % len(GET)), (chunked, b"%d" % len(GET))):
                assert (await client.ask(whole + GET)).endswith(b"\r\n" + size)
                assert (await client.ask(b"")).endswith(b"\r\n0")
                # In pieces too, cut where the head ends and inside the body.
                client.writer.write(whole[: len(whole) - len(GET)])
                await asyncio.sleep(0.02)
                assert (await client.ask(whole[len(whole) - len(GET) :])).endswith(b"\r\n" + size)
            assert len(here.seen) == 9
        assert not here.cut

    run(scenario)


def test_a_drain_gives_every_connection_a_last_answer(run: Callable[..., None]) -> None:
    async def scenario(here: Here) -> None:
        async with await here.client() as idle, await here.client() as late, await here.client() as busy:
            assert (await idle.ask(GET)).startswith(OK)
            late.writer.write(b"POST / HTTP/1.1\r\nhost: ")
            busy.writer.write(b"POST /wait HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n1")
            await asyncio.sleep(0.05)
            here.server.drain()
            assert b"connection: close" in await idle.ask(GET)
            here.server.should_exit = True
            await asyncio.sleep(0.15)
            late.writer.write(b"a\r\ncontent-length: 1\r\n\r\n1")
            assert b"connection: close" in await late.ask(b"")
            here.go_on.set()
            assert b"connection: close" in await busy.ask(b"23")
            with pytest.raises(ConnectionRefusedError):
                await here.client()

    run(scenario, well=False)
