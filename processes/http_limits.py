"""What an HTTP connection may cost, why one is refused or cut, and what the connections of one server share.

Laws: every limit has its reason to be counted by; `refusal` decides on a whole head alone and does no I/O; more
connections than file descriptors are never promised.

It must not know what a request asks, nor which metric a count ends in.
"""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Literal, Protocol

from uvicorn.server import ServerState

if TYPE_CHECKING:
    from processes.http_connection import GuardedProtocol

log = logging.getLogger(__name__)

# For what a process opens as it goes: models, upstreams, a scrape of its metrics.
KEPT_DESCRIPTORS: Final = 24
Reason = Literal[
    "head_slow",  # a request head that did not end in time
    "head_large",  # or in size
    "body_slow",
    "body_stuffed",  # chunk extensions or trailers without end
    "malformed",  # what the parser refuses
    "ambiguous",  # what two parsers could read in two ways
    "unread",  # the client does not take its answer
    "idle",
    "pipelined",  # too many requests before the first answer
    "connections",  # one connection too many
]


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds and sizes. The defaults are those of nginx where it has one, and tighter for a body and an answer."""

    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 10.0
    keep_alive_s: float = 75.0
    linger_s: float = 2.0
    """A refused client's further bytes are read and dropped for so long: a socket closed on unread bytes is reset, and
    the refusal with it."""
    drain_idle_s: float = 1.0
    """For so long a drain leaves an idle connection its last request: closed at once, it would meet the client's next one
    half-way."""
    max_head_bytes: int = 64 * 1024
    max_connections: int = 10_000
    max_pipelined: int = 128
    max_lingering: int = 1_000
    """Refused clients that are waited for at once."""


class ConnectionSettings(Protocol):
    """What a process's settings say of its connections."""

    @property
    def header_timeout_s(self) -> float: ...

    @property
    def body_timeout_s(self) -> float: ...

    @property
    def write_timeout_s(self) -> float: ...

    @property
    def keep_alive_s(self) -> float: ...

    @property
    def max_connections(self) -> int: ...


def limits_of(settings: ConnectionSettings) -> Limits:
    """Asked for when everything else is open: the process may have fewer file descriptors than connections wanted."""
    connections, lingering = affordable(settings.max_connections, Limits().max_lingering)
    if connections < settings.max_connections:
        log.warning("few_file_descriptors", extra={"connections": connections, "wanted": settings.max_connections})
    return Limits(
        head_timeout_s=settings.header_timeout_s,
        body_timeout_s=settings.body_timeout_s,
        write_timeout_s=settings.write_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        max_connections=connections,
        max_lingering=lingering,
    )


def affordable(connections: int, lingering: int) -> tuple[int, int]:
    """How many of each the process has descriptors for, at least one and none; raises its own limit where it may."""
    used = len(os.listdir("/dev/fd")) + KEPT_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = used + connections + lingering
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections, lingering
    room = max(0, soft - used)
    lingering = min(lingering, room // 4)
    return max(1, min(connections, room - lingering)), lingering


class Shared(ServerState):
    """uvicorn's state of one server, with its limits. `drains_since` is loop time, None while it serves."""

    def __init__(self, limits: Limits, on_cut: Callable[[Reason], None]) -> None:
        super().__init__()
        self.limits, self.cut = limits, on_cut
        self.drains_since: float | None = None
        self.lingering: set[GuardedProtocol] = set()


class Refused(Exception):
    """A request that is answered by the connection itself. Raised in a parser's callback, it stops the parser."""

    def __init__(self, status: int, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason


def answer_of(refused: Refused) -> bytes:
    """The whole answer, which closes the connection."""
    body = json.dumps({"error": refused.message}).encode()
    status = HTTPStatus(refused.status)
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


_NO_METHODS: Final = frozenset({b"CONNECT", b"TRACE"})


def refusal(
    method: bytes, version: str, headers: Sequence[tuple[bytes, bytes]], url: bytes, limits: Limits
) -> Refused | None:
    """Why a whole head is refused. Names are in lower case.

    A request whose length two parsers could read in two ways is never served: it is how one client's bytes become
    another's request behind a proxy.
    """
    if len(url) + sum(len(name) + len(value) + 4 for name, value in headers) > limits.max_head_bytes:
        return Refused(431, f"a request head has at most {limits.max_head_bytes} bytes", "head_large")
    if method in _NO_METHODS:
        return Refused(405, f"{method.decode()} is not served", "malformed")
    if version not in ("1.0", "1.1"):
        return Refused(505, f"HTTP/{version} is not served", "malformed")
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if lengths and codings:
        return Refused(400, "a request has Content-Length or Transfer-Encoding, not both", "ambiguous")
    if len(lengths) > 1 or any(not value.isdigit() for value in lengths):
        return Refused(400, "a request has one Content-Length, in digits", "ambiguous")
    if codings:
        if version != "1.1":
            return Refused(400, "Transfer-Encoding belongs to HTTP/1.1", "ambiguous")
        if [value.lower() for value in codings] != [b"chunked"]:
            return Refused(501, "the only transfer coding served is chunked", "ambiguous")
    hosts = [value for name, value in headers if name == b"host"]
    if version == "1.1" and len(hosts) != 1:
        return Refused(400, "a request has exactly one valid Host header", "ambiguous")
    if not url.startswith(b"/") and url != b"*":
        scheme, _, rest = url.partition(b"://")
        if scheme.lower() not in (b"http", b"https") or hosts != [rest.partition(b"/")[0]]:
            return Refused(400, "a whole URL as the target names the host that the Host header names", "ambiguous")
    return None
