"""Chunks from the region's other nodes, as sources of a fetch: who is asked when, and what came of it.

    PeerFetches (a node's) ──► one `sources` a fetch ──► generator a chunk: a peer, another, a pause, …, the store
    a peer: GET URL/artifacts/DIGEST, Range, proof  (`edge_node/serving/chunks.py` answers)

Laws:
- Bytes of a peer are worth what their digest says; one with a wrong chunk is left alone for a minute, one that does not
  answer for some seconds, and the store is asked meanwhile.
- No redirect is followed, no proxy asked, no more read than was asked for; every wait is bounded.

Synchronous: a fetch's threads call it. It must not know the log.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Final, Protocol

import structlog
import urllib3
from urllib3.exceptions import HTTPError, LocationValueError

from edge_node.agent.peers import Neighbour, Patience, before
from edge_node.peer_proof import ARRIVED, HEADER, proof
from schemas.errors import Unreachable
from schemas.events import Artifact
from schemas.metrics import counter
from streams.artifacts import Source

LEFT_WRONG_S: Final = 60.0
LEFT_SILENT_S: Final = 5.0
# A peer that has not read of the release yet says that it knows of none.
GRACE_S: Final = 1.0
CONNECT_S: Final = 1.0
READ_S: Final = 3.0
PIECE_BYTES: Final = 65_536
# What a peer gives so slowly the store may give faster.
SLOW_S: Final = 3.0
SLOW_BYTES_S: Final = 65_536
SMALL_BYTES: Final = 4_096
# A node that has just started has not read who else there is.
FIRST_LOOK_S: Final = 2.0
PAUSES_S: Final = (0.02, 0.25)
_NUMBER: Final = re.compile("[0-9]{1,15}")

log = structlog.get_logger()


class Known(Protocol):
    """The neighbours of the moment; `looked` is set once somebody has looked."""

    looked: threading.Event

    def known(self) -> tuple[Neighbour, ...]: ...


class PeerFetches:
    """One per node."""

    def __init__(self, node: str, key: bytes, patience_s: float, neighbours: Known) -> None:
        self._node, self._key, self._patience_s, self._neighbours = node, key, patience_s, neighbours
        self._http = urllib3.PoolManager(
            num_pools=16, maxsize=8, retries=False, timeout=urllib3.Timeout(connect=CONNECT_S, read=READ_S)
        )
        self._lock = threading.Lock()
        self._left: dict[str, float] = {}

    def sources(self, artifact: Artifact, release: str = "") -> Callable[[int], Iterator[Source]]:
        """Whom one fetch of the artifact asks, chunk by chunk. `release` is the digest that beats name it by, where it is but
        a file of several."""
        release = release or artifact.sha256
        return _OneFetch(self, artifact, release, self._node, self._patience_s, self._neighbours).sources

    def left(self) -> frozenset[str]:
        now = time.monotonic()
        with self._lock:
            self._left = {node: until for node, until in self._left.items() if until > now}
            return frozenset(self._left)

    def leave(self, node: str, reason: str, seconds: float) -> None:
        counter("mlcdn_peers_left_total").labels(reason).inc()
        log.info("peer_left_alone", peer=node, reason=reason, seconds=seconds)
        with self._lock:
            self._left[node] = time.monotonic() + seconds

    def ask(self, peer: Neighbour, digest: str, first: int, last: int) -> urllib3.BaseHTTPResponse:
        headers = {
            "range": f"bytes={first}-{last}",
            "accept-encoding": "identity",
            HEADER: proof(self._key, peer.url, digest, first, last),
        }
        if not peer.url.startswith(("http://", "https://")):
            raise LocationValueError(f"{peer.url!r} is no address of a node")
        url = f"{peer.url.rstrip('/')}/artifacts/{digest}"
        return self._http.request("GET", url, headers=headers, preload_content=False, redirect=False)


class _OneFetch:
    """Its calls come from the threads of one fetch."""

    def __init__(
        self,
        fetches: PeerFetches,
        artifact: Artifact,
        release: str,
        node: str,
        patience_s: float,
        neighbours: Known,
    ) -> None:
        self.fetches, self.artifact, self._release = fetches, artifact, release
        self._node, self._patience_s, self._neighbours = node, patience_s, neighbours
        self.began = time.monotonic()
        self._lock = threading.Lock()
        self._patience = Patience(since_s=self.began)
        self._received = 0

    def sources(self, number: int) -> Iterator[Source]:
        self._neighbours.looked.wait(max(0.0, self.began + FIRST_LOOK_S - time.monotonic()))
        tries, pause = 0, PAUSES_S[0]
        while True:
            asked = before(self._release, self._node, self._neighbours.known(), self.fetches.left())
            with self._lock:
                over = self._patience.over(time.monotonic(), self._patience_s, asked.turn)
            # Once patience is over each is asked once more for each chunk, and nobody is waited for.
            if not asked.peers or (over and tries >= len(asked.peers)):
                return
            yield _Peer(self, asked.peers[(number + tries) % len(asked.peers)])
            tries += 1
            if tries % len(asked.peers) == 0 and not over:
                time.sleep(pause)
                pause = min(2 * pause, PAUSES_S[1])

    def heard(self, had: int) -> None:
        """What a peer says it has of the artifact."""
        with self._lock:
            self._patience = self._patience.heard(had, time.monotonic(), self._patience_s)

    def got(self, count: int) -> None:
        with self._lock:
            self._received += count
            received = self._received
        self.heard(received)


class _Peer:
    """A peer, as a source."""

    kind = "peer"

    def __init__(self, fetch: _OneFetch, peer: Neighbour) -> None:
        self._fetch, self._peer = fetch, peer

    def pieces(self, first: int, last: int) -> Generator[bytes]:
        fetch, left = self._fetch, last + 1 - first
        try:
            answer = fetch.fetches.ask(self._peer, fetch.artifact.sha256, first, last)
            with closing(answer):
                self._check(answer, first, last)
                stream, waited = answer.stream(PIECE_BYTES), 0.0
                while left:
                    asked = time.monotonic()
                    piece = next(stream, b"")[:left]
                    # Only what the peer takes counts: a fetch has a pace of its own.
                    waited += time.monotonic() - asked
                    if not piece:
                        return
                    left -= len(piece)
                    fetch.got(len(piece))
                    yield piece
                    if waited > SLOW_S and last + 1 - first - left < waited * SLOW_BYTES_S:
                        self._leave("slow", LEFT_SILENT_S)
                        raise Unreachable("peer", self._peer.url, "it is slow")
                _kept(answer)
        except HTTPError as error:
            self._leave("silent", LEFT_SILENT_S)
            raise Unreachable("peer", self._peer.url, type(error).__name__) from error

    def _leave(self, reason: str, seconds: float) -> None:
        self._fetch.fetches.leave(self._peer.node, reason, seconds)

    def wrong(self) -> None:
        counter("mlcdn_fetch_chunks_refused_total").labels(self.kind).inc()
        self._leave("wrong", LEFT_WRONG_S)

    def _check(self, answer: urllib3.BaseHTTPResponse, first: int, last: int) -> None:
        """Unreachable where the answer is not the bytes."""
        if answer.status == 206 and answer.headers.get("content-range", "").startswith(f"bytes {first}-{last}/"):
            return
        had = answer.headers.get(ARRIVED, "")
        if answer.status == 503 and _NUMBER.fullmatch(had):
            self._fetch.heard(min(int(had), self._fetch.artifact.size_bytes))
        elif answer.status != 429 and (answer.status != 404 or time.monotonic() > self._fetch.began + GRACE_S):
            self._leave(str(answer.status), LEFT_SILENT_S)
        _kept(answer)
        raise Unreachable("peer", self._peer.url, f"it answers {answer.status}")


def _kept(answer: urllib3.BaseHTTPResponse) -> None:
    """Keeps the connection for the next question, where little or nothing is left to read of this answer."""
    if answer.length_remaining is not None and answer.length_remaining <= SMALL_BYTES:
        answer.read()
        answer.release_conn()
