"""A real worker, and what bad clients put on its socket: each gets the right status or a closed connection, the worker
lives, and the next good request on a new connection is answered."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.edge_node_process import rss_bytes
from tests.service.test_worker import ROW
from tests.worker_process import WorkerProcess

LIMIT = 4_096
HEAD_S, BODY_S, WRITE_S, IDLE_S = 1.0, 1.5, 1.0, 4.0
GOOD = json.dumps({"features": ROW}).encode()
HOST = b"Host: edge\r\n"
KIND = b"Content-Type: application/json\r\n"
SMUGGLED = b"GET /v2/health/live HTTP/1.1\r\nHost: edge\r\n\r\n"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    limits = {"max_body_bytes": LIMIT, "header_timeout_s": HEAD_S, "body_timeout_s": BODY_S, "write_timeout_s": WRITE_S}
    with WorkerProcess(tmp_path_factory.mktemp("bad-input"), keep_alive_s=IDLE_S, **limits) as running:
        yield running
        assert "Traceback" not in running.log(), running.log()


@pytest.fixture(autouse=True)
def unhurt(worker: WorkerProcess) -> Iterator[None]:
    pid = worker.process.pid
    yield
    assert worker.lives() and worker.process.pid == pid
    assert worker.predict().status_code == 200


def exchange(worker: WorkerProcess, sent: bytes, *, end: bool = False, seconds: float = 6, pieces: int = 1) -> bytes:
    """All that comes back until the server closes or, behind one whole answer, is silent for a moment."""
    with worker.connect() as client:
        try:
            size = max(1, -(-len(sent) // pieces))
            for at in range(0, len(sent), size):
                time.sleep(0.02 if at else 0)
                client.sendall(sent[at : at + size])
            if end:
                client.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was refused already; what it said of it is still to be read
        got, until = b"", time.monotonic() + seconds
        while time.monotonic() < until:
            client.settimeout(0.4 if b"\r\n\r\n" in got else seconds)
            try:
                part = client.recv(2**16)
            except (TimeoutError, ConnectionResetError):
                break
            if not part:
                break
            got += part
        return got


def statuses(answers: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def post(headers: bytes = b"", body: bytes = GOOD, *, path: bytes = b"/predict", length: bool = True) -> bytes:
    own = b"Content-Length: %d\r\n" % len(body) if length else b""
    return b"POST " + path + b" HTTP/1.1\r\n" + HOST + KIND + own + headers + b"\r\n" + body


def get(head: bytes) -> bytes:
    return head + b"\r\n"


def chunked(body: bytes, size: int = 512) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


CODED = b"Transfer-Encoding: chunked\r\n"


@dataclass(frozen=True)
class Case:
    sent: bytes
    status: int | None
    """None: closed without a word."""
    end: bool = False


CASES = {
    # Two ways to read where a request ends.
    "cl-and-te": Case(post(CODED, chunked(GOOD) + SMUGGLED), 400),
    "te-and-cl": Case(
        b"POST /predict HTTP/1.1\r\n" + HOST + CODED + b"Content-Length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED, 400
    ),
    "two-cls": Case(post(b"Content-Length: 3\r\n") + SMUGGLED, 400),
    "two-equal-cls": Case(post(b"Content-Length: %d\r\n" % len(GOOD)) + SMUGGLED, 400),
    "cl-list": Case(post(b"Content-Length: 3, 3\r\n", length=False), 400),
    "cl-plus": Case(post(b"Content-Length: +5\r\n", length=False), 400),
    "cl-minus": Case(post(b"Content-Length: -5\r\n", length=False), 400),
    "cl-hex": Case(post(b"Content-Length: 0x5\r\n", length=False), 400),
    "cl-blank": Case(post(b"Content-Length: \r\n", length=False), 400),
    "cl-space-inside": Case(post(b"Content-Length: 1 2\r\n", length=False), 400),
    "cl-past-64-bits": Case(post(b"Content-Length: 18446744073709551617\r\n", length=False), 400),
    "te-unknown": Case(post(b"Transfer-Encoding: gzip\r\n", b"", length=False), 501),
    "te-gzip-chunked": Case(post(b"Transfer-Encoding: gzip, chunked\r\n", chunked(GOOD), length=False), 501),
    "te-twice": Case(post(CODED + CODED, chunked(GOOD), length=False), 400),
    "te-identity": Case(post(b"Transfer-Encoding: identity\r\n", b"", length=False), 501),
    "te-vertical-tab": Case(post(b"Transfer-Encoding: \x0bchunked\r\n", chunked(GOOD), length=False), 400),
    "te-space-before-colon": Case(post(b"Transfer-Encoding : chunked\r\n", chunked(GOOD), length=False), 400),
    "te-http-1.0": Case(b"POST /predict HTTP/1.0\r\n" + HOST + CODED + b"\r\n" + chunked(GOOD), 400),
    "chunk-size-plus": Case(post(CODED, b"+5\r\nabcde\r\n0\r\n\r\n", length=False), 400),
    "chunk-size-overflow": Case(post(CODED, b"f" * 17 + b"\r\nabcde\r\n0\r\n\r\n", length=False), 400),
    "chunk-longer-than-said": Case(post(CODED, b"3\r\nabcde\r\n0\r\n\r\n", length=False), 400),
    "chunk-bare-lf": Case(post(CODED, b"3\nabc\n0\n\n", length=False), 400),
    "upgrade-with-body": Case(post(b"Connection: Upgrade\r\nUpgrade: h2c\r\n", SMUGGLED), 400),
    # Heads.
    "bare-lf": Case(b"GET /v2 HTTP/1.1\nHost: edge\n\n", 400),
    "bare-lf-in-a-field": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nX: a\nY: b\r\n"), 400),
    "bare-cr-in-a-field": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nX: a\rY: b\r\n"), 400),
    "obs-fold": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nX: a\r\n b\r\n"), 400),
    "obs-fold-first": Case(get(b"GET /v2 HTTP/1.1\r\n X: a\r\nHost: edge\r\n"), 400),
    "nul-in-a-field": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nX: a\x00b\r\n"), 400),
    "nul-in-a-name": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nX\x00: a\r\n"), 400),
    "nul-in-the-path": Case(get(b"GET /v2\x00 HTTP/1.1\r\nHost: edge\r\n"), 400),
    "no-colon": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nX\r\n"), 400),
    "empty-name": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\n: a\r\n"), 400),
    "200-kb-header": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nX: " + b"x" * 200_000 + b"\r\n"), 431),
    "40-kb-header": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nX: " + b"x" * 40_000 + b"\r\n"), 431),
    "200-kb-path": Case(get(b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: edge\r\n"), 431),
    "4-kb-path": Case(get(b"GET /" + b"x" * 4_096 + b" HTTP/1.1\r\nHost: edge\r\n"), 414),
    "10k-headers": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\n" + b"X: y\r\n" * 10_000), 431),
    "200-headers": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\n" + b"X: y\r\n" * 200), 431),
    "no-host": Case(get(b"GET /v2 HTTP/1.1\r\n"), 400),
    "two-hosts": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nHost: other\r\n"), 400),
    "two-equal-hosts": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nHost: edge\r\n"), 400),
    "bad-host": Case(get(b"GET /v2 HTTP/1.1\r\nHost: a b\r\n"), 400),
    "host-with-a-path": Case(get(b"GET /v2 HTTP/1.1\r\nHost: edge/x\r\n"), 400),
    "host-with-a-user": Case(get(b"GET /v2 HTTP/1.1\r\nHost: me@edge\r\n"), 400),
    "empty-host": Case(get(b"GET /v2 HTTP/1.1\r\nHost:\r\n"), 400),
    "trace": Case(get(b"TRACE /v2 HTTP/1.1\r\nHost: edge\r\n"), 405),
    "connect": Case(get(b"CONNECT edge:443 HTTP/1.1\r\nHost: edge\r\n"), 405),
    "options-of-all": Case(get(b"OPTIONS * HTTP/1.1\r\nHost: edge\r\n"), 400),
    "delete": Case(get(b"DELETE /predict HTTP/1.1\r\nHost: edge\r\n"), 405),
    "unknown-method": Case(get(b"BREW /v2 HTTP/1.1\r\nHost: edge\r\n"), 400),
    "absolute-uri": Case(get(b"GET http://edge/v2 HTTP/1.1\r\nHost: edge\r\n"), 200),
    "absolute-uri-of-another": Case(get(b"GET http://other/v2 HTTP/1.1\r\nHost: edge\r\n"), 400),
    "absolute-uri-with-a-user": Case(get(b"GET http://me@edge/v2 HTTP/1.1\r\nHost: edge\r\n"), 400),
    "absolute-uri-of-a-file": Case(get(b"GET file:///etc/passwd HTTP/1.1\r\nHost: edge\r\n"), 400),
    "http-0.9": Case(b"GET /v2\r\n\r\n", 505),
    "http-1.0": Case(get(b"GET /v2 HTTP/1.0\r\nHost: edge\r\n"), 200),
    "http-2.0": Case(get(b"GET /v2 HTTP/2.0\r\nHost: edge\r\n"), 505),
    "http-2-preface": Case(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "http-9.9": Case(get(b"GET /v2 HTTP/9.9\r\nHost: edge\r\n"), 400),
    "tls": Case(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), 400),
    "garbage": Case(b"\xff\xfe\x00garbage\r\n\r\n", 400),
    # Paths.
    "dot-dot": Case(get(b"GET /v2/../etc/passwd HTTP/1.1\r\nHost: edge\r\n"), 400),
    "encoded-dot-dot": Case(get(b"GET /v2/%2e%2e%2fpasswd HTTP/1.1\r\nHost: edge\r\n"), 400),
    "encoded-slash": Case(get(b"GET /v2/models/a%2fb HTTP/1.1\r\nHost: edge\r\n"), 400),
    "encoded-nul": Case(get(b"GET /v2/models/a%00 HTTP/1.1\r\nHost: edge\r\n"), 400),
    "two-slashes": Case(get(b"GET //v2 HTTP/1.1\r\nHost: edge\r\n"), 400),
    "trailing-css": Case(get(b"GET /v2/models/digits/x.css HTTP/1.1\r\nHost: edge\r\n"), 404),
    "trailing-css-of-a-name": Case(get(b"GET /v2/models/digits.css HTTP/1.1\r\nHost: edge\r\n"), 404),
    "look-alike": Case(get("GET /v2/models/dıgits HTTP/1.1\r\nHost: edge\r\n".encode()), 400),
    "encoded-look-alike": Case(get(b"GET /v2/models/d%C4%B1gits HTTP/1.1\r\nHost: edge\r\n"), 404),
    "bad-encoding": Case(get(b"GET /v2/models/%ff%zz HTTP/1.1\r\nHost: edge\r\n"), 404),
    "con": Case(get(b"GET /v2/models/CON HTTP/1.1\r\nHost: edge\r\n"), 404),
    "empty-name-in-a-path": Case(get(b"GET /v2/models/ HTTP/1.1\r\nHost: edge\r\n"), 404),
    # Bodies.
    "no-body": Case(post(b"", b""), 400),
    "one-byte-over": Case(post(b"", GOOD.ljust(LIMIT + 1)), 413),
    "at-the-limit": Case(post(b"", GOOD.ljust(LIMIT)), 200),
    "far-over": Case(post(b"", GOOD.ljust(2**22)), 413),
    "chunked-at-the-limit": Case(post(CODED, chunked(GOOD.ljust(LIMIT)), length=False), 200),
    "chunked-over": Case(post(CODED, chunked(GOOD.ljust(LIMIT + 1)), length=False), 413),
    "chunked-far-over": Case(post(CODED, chunked(GOOD.ljust(2**22)), length=False), 413),
    "text": Case(post(b"").replace(b"application/json", b"text/plain"), 415),
    "form": Case(post(b"").replace(b"application/json", b"application/x-www-form-urlencoded"), 415),
    "gzip-of-nothing-known": Case(post(b"Content-Encoding: gzip\r\n", b"\x1f\x8b\x08\x00" + bytes(64)), 400),
    "gzip-bomb": Case(post(b"Content-Encoding: gzip\r\n", gzip.compress(bytes(2**21))), 413),
    "coding-unknown": Case(post(b"Content-Encoding: zstd\r\n", GOOD), 415),
    # Ends.
    "nothing": Case(b"", None, end=True),
    "truncated-head": Case(b"POST /predict HT", None, end=True),
    "truncated-body": Case(post(b"", GOOD)[:-10], None, end=True),
    "truncated-chunk": Case(post(CODED, chunked(GOOD)[:-10], length=False), None, end=True),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_its_status(worker: WorkerProcess, name: str) -> None:
    case = CASES[name]
    # Twice: what the worker learned of a head the first time must not open a door the second time. Then in two pieces.
    for pieces in (1, 1, 2):
        got = exchange(worker, case.sent, end=case.end, pieces=pieces)
        # One answer at most: what stood in a body was not served as a request.
        assert statuses(got) == ([] if case.status is None else [case.status]), got[:400]
        if case.status is not None and case.status >= 400:
            assert re.search(rb'\{"error":\s*"', got), got[:400]


def test_a_refusal_reaches_a_client_that_is_still_sending(worker: WorkerProcess) -> None:
    # Closed at once, the socket would be reset under the client's hands, and the refusal with it.
    with worker.connect() as client:
        client.sendall(post(b"", GOOD.ljust(2**22))[: 2**15])
        time.sleep(0.3)
        for _ in range(10):
            client.sendall(bytes(2**16))
            time.sleep(0.02)
        assert client.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_head_a_byte_a_second_is_cut(worker: WorkerProcess) -> None:
    with worker.connect() as client:
        began = time.monotonic()
        for at in itertools.count():
            client.sendall(b"GET /v2 HTTP/1.1\r\nHost: edge\r\nX: yyyy"[at : at + 1])
            client.settimeout(1)
            try:
                assert client.recv(4_096).startswith(b"HTTP/1.1 408 ")
                break
            except TimeoutError:
                assert time.monotonic() - began < HEAD_S + 3
    assert worker.cut()["head_slow"] >= 1


@pytest.mark.parametrize("form", ["length", "chunked"])
def test_a_body_a_byte_a_second_is_cut(worker: WorkerProcess, form: str) -> None:
    head = post(b"", GOOD)[: -len(GOOD)] if form == "length" else post(CODED, b"", length=False)
    before = worker.cut().get("body_slow", 0)
    with worker.connect() as client:
        client.sendall(head)
        began = time.monotonic()
        for at in itertools.count():
            byte = GOOD[at : at + 1]
            client.sendall(byte if form == "length" else b"1\r\n" + byte + b"\r\n")
            client.settimeout(1)
            try:
                assert client.recv(4_096).startswith(b"HTTP/1.1 408 ")
                break
            except TimeoutError:
                assert time.monotonic() - began < BODY_S + 3
    assert worker.cut()["body_slow"] == before + 1


def test_a_hundred_slow_connections_hold_up_nobody(worker: WorkerProcess) -> None:
    clients = [worker.connect() for _ in range(100)]
    try:
        for number, client in enumerate(clients):
            client.sendall((b"GET /v2 HT", post(b"", GOOD)[:-5], b"")[number % 3])
        for _ in range(5):
            began = time.monotonic()
            assert worker.predict().status_code == 200
            assert time.monotonic() - began < 1
        time.sleep(max(HEAD_S, BODY_S) + 1.2)
        for number, client in enumerate(clients):
            if number % 3 < 2:
                assert client.recv(4_096).startswith(b"HTTP/1.1 408 ")
    finally:
        for client in clients:
            client.close()


def not_reading(worker: WorkerProcess) -> float:
    """Connections cut because their client took no answers: which limit it met first is a matter of buffers."""
    cut = worker.cut()
    return cut.get("unread", 0) + cut.get("pipelined", 0)


def test_clients_that_never_read_are_cut_and_hold_little(worker: WorkerProcess) -> None:
    before, cut = rss_bytes(worker.process.pid), not_reading(worker)
    clients = [worker.connect(receive_buffer=4_096) for _ in range(4)]
    asked = get(b"GET /metrics HTTP/1.1\r\nHost: edge\r\n")
    try:
        for client in clients:
            client.setblocking(False)
        until = time.monotonic() + 25
        while not_reading(worker) < cut + len(clients) and time.monotonic() < until:
            for client in clients:
                try:
                    client.send(asked * 100)
                except (BlockingIOError, ConnectionError):
                    continue
            time.sleep(0.3)
            assert rss_bytes(worker.process.pid) - before < 64 * 2**20
    finally:
        for client in clients:
            client.close()
    assert not_reading(worker) >= cut + len(clients)


def test_a_client_that_asks_the_usual_and_never_reads_is_cut(worker: WorkerProcess) -> None:
    """One request at a time, as the fast lane has them."""
    before, cut = rss_bytes(worker.process.pid), not_reading(worker)
    rows = {"name": "features", "datatype": "FP32", "shape": [16, 32], "data": [[1.0] * 32] * 16}
    asked = post(b"", json.dumps({"inputs": [rows]}).encode(), path=b"/v2/models/digits/infer")
    assert statuses(exchange(worker, asked)) == [200]
    with worker.connect(receive_buffer=4_096) as client:
        client.setblocking(False)
        until = time.monotonic() + 25
        while worker.lives() and time.monotonic() < until:
            try:
                for _ in range(200):
                    client.send(asked)
                    time.sleep(0.0005)
            except BlockingIOError:
                time.sleep(0.1)
            except ConnectionError:
                break
        assert rss_bytes(worker.process.pid) - before < 32 * 2**20
    assert not_reading(worker) > cut


def test_an_idle_connection_is_closed(worker: WorkerProcess) -> None:
    with worker.connect() as client:
        client.sendall(SMUGGLED)
        assert client.recv(4_096).startswith(b"HTTP/1.1 200 ")
        client.settimeout(IDLE_S + 3)
        assert client.recv(4_096) == b""
