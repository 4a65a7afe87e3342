"""TCP ports: free ones to hand to a child, and a listening socket with an error that helps.

Law: free ports are chosen *below* the kernel's ephemeral range. A client that keeps connecting to a stopped server
inside that range sooner or later gets the server's own port as its source port, connects to itself, and the server
cannot come back.
"""

import errno
import secrets
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"
_LOWEST = 10_000
_TRIES = 2_000


class PortBusy(OSError):
    """Somebody else listens there."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            errno.EADDRINUSE, f"port {port} of {host} is in use: stop what listens there, or configure another port"
        )
        self.host = host
        self.port = port


def ephemeral_range_start() -> int:
    """The first port the kernel may give to an outgoing connection."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except FileNotFoundError:
        return 49_152  # macOS and the BSDs


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(n: int, below: int = 65_536) -> list[int]:
    """`n` different ports of the loopback that nobody uses now. Nothing reserves them: be ready to try others."""
    highest = min(below, ephemeral_range_start())
    if highest - _LOWEST < 100 * n:
        # A host whose ephemeral range begins that low leaves no room: take what the kernel gives.
        lowest, highest = 1_024, below
    else:
        lowest = _LOWEST
    held: list[socket.socket] = []
    try:
        for _ in range(_TRIES):
            if len(held) == n:
                return [taken.getsockname()[1] for taken in held]
            candidate = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            try:
                candidate.bind((LOOPBACK, lowest + secrets.randbelow(highest - lowest)))
            except OSError:
                candidate.close()
                continue
            held.append(candidate)
        raise OSError(errno.EADDRINUSE, f"found no {n} free ports between {lowest} and {highest}")
    finally:
        for taken in held:
            taken.close()


def is_free(port: int, host: str = LOOPBACK) -> bool:
    try:
        listen(host, port).close()
    except PortBusy:
        return False
    return True


def listen(host: str, port: int, *, backlog: int = 2_048) -> socket.socket:
    """A non-blocking listening socket; port 0 lets the kernel choose. Errors are PortBusy or name the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, else asyncio never turns Nagle's algorithm off: each small answer waited 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortBusy(host, port) from error
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener
