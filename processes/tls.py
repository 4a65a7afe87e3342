"""The certificate that a server shows, read from two files and read again when they change.

Laws:
- A new pair is tried on a context of its own; only a whole one takes the old one's place, in one assignment. A broken or
  mismatched one is refused, said and counted, and the old one serves on.
- What is open stays open: only a new handshake sees the new pair.
- A pair counts as changed once two looks in a row saw the same files: between the two, somebody may still be writing.

It must not know HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
Outcome = Literal["reloaded", "refused"]


class CertificateRefused(Exception):
    """A certificate and a key that no server can show."""


class Certificate:
    """Its `context` is for servers, and stays the same one through every change of the files."""

    def __init__(self, chain: Path, key: Path, on_outcome: Callable[[Outcome], None] = lambda _: None) -> None:
        self._chain, self._key, self._on_outcome = chain, key, on_outcome
        self._seen = self._tried = self._identity()
        self._shown = self._load()
        # The handshake asks for the certificate after it has read the client's hello, with or without a name in it.
        self.context = _context()
        self.context.sni_callback = self._choose

    def look(self) -> Outcome | None:
        """Reads the files again if they changed; what came of it, or None."""
        before, self._seen = self._seen, self._identity()
        if self._seen in (None, self._tried) or self._seen != before:
            return None
        self._tried = self._seen
        outcome: Outcome
        try:
            self._shown = self._load()
        except CertificateRefused as error:
            log.error("certificate_refused", extra={"cause": str(error)})
            outcome = "refused"
        else:
            log.info("certificate_reloaded", extra={"chain": str(self._chain)})
            outcome = "reloaded"
        self._on_outcome(outcome)
        return outcome

    async def watch(self) -> None:
        """Looks once a second, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.look)

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = self._shown

    def _load(self) -> ssl.SSLContext:
        context = _context()
        try:
            # A key with a passphrase is refused, where the default would ask the terminal.
            context.load_cert_chain(self._chain, self._key, password="")
        except (OSError, ValueError) as error:
            raise CertificateRefused(f"certificate {self._chain} with key {self._key}: {error}") from error
        return context

    def _identity(self) -> tuple[tuple[int, int, int], ...] | None:
        """None while a file is not there: a rename is under way."""
        try:
            found = [path.stat() for path in (self._chain, self._key)]
        except OSError:
            return None
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found)


def certificate_of(
    chain: Path | None, key: Path | None, on_outcome: Callable[[Outcome], None] = lambda _: None
) -> Certificate | None:
    """None where neither file is set. `CertificateRefused` says what is wrong with them."""
    if chain is None and key is None:
        return None
    if chain is None or key is None:
        raise CertificateRefused("tls_cert and tls_key come together: a certificate and its private key")
    return Certificate(chain, key, on_outcome)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    return context
