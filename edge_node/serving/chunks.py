"""A door for the region's other nodes: bytes of the artifacts that this one has, or has a part of.

    GET /artifacts/DIGEST   Range: bytes=FIRST-LAST, within one chunk   mlcdn-peer: the proof (`edge_node/peer_proof.py`)
    206 the bytes · 503 not here yet, with how much is · 404 no release here names it · 403 no proof · 429 enough at once

Laws:
- Only bytes of whole artifacts under their names, and of chunks that were verified; only artifacts that the board names;
  there is no list of them. Who asks verifies again.
- Giving never delays a prediction: few at once, at a pace, read in a thread, a piece in memory for each.

It must not know who asks, or why.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from edge_node.board import BoardFile
from edge_node.peer_proof import ARRIVED, HEADER, proves
from inference.external_data import stored_at
from schemas.errors import NotFound, Overloaded
from schemas.events import Artifact
from schemas.metrics import counter
from streams.parts.pace import Pace
from streams.parts.part_file import arrived, holds_chunk, part_of

AT_ONCE: Final = 4
PIECE_BYTES: Final = 256 * 1024
_RANGE: Final = re.compile(r"bytes=(0|[1-9][0-9]{0,12})-([1-9][0-9]{0,12}|0)")


class ChunkDoor:
    """`key` is None where artifacts are given to nobody; `url` is how peers name this node."""

    def __init__(
        self, directory: Path, board: Callable[[], BoardFile | None], key: bytes | None, url: str, bytes_s: int
    ) -> None:
        self._folder, self._board, self._key, self._url = directory / "artifacts", board, key, url
        self._pace = Pace(bytes_s, time.monotonic)
        self._giving = 0

    async def give(self, request: Request) -> Response:
        if self._key is None:
            raise NotFound("this node gives no artifacts away")
        digest = request.path_params["digest"]
        found = _RANGE.fullmatch(request.headers.get("range", ""))
        if found is None:
            raise HTTPException(416, "the Range header is bytes=FIRST-LAST")
        first, last = int(found[1]), int(found[2])
        if not proves(request.headers.get(HEADER, ""), self._key, self._url, digest, first, last):
            raise HTTPException(403, "the proof does not hold for these bytes of this node")
        named = self._named(digest)
        if named is None:
            raise NotFound("no release here names this artifact")
        artifact, whole = named
        size = artifact.chunk_size_bytes
        if not first <= last < artifact.size_bytes or first // size != last // size:
            raise HTTPException(416, "these bytes are not within one chunk of the artifact")
        if self._giving >= AT_ONCE:
            raise Overloaded(f"{AT_ONCE} of its peers are being served")
        self._giving += 1
        try:
            descriptor = await asyncio.to_thread(_opened, whole, artifact, first // size)
            if descriptor is not None:
                return _Bytes(self, descriptor, first, last, artifact.size_bytes)
            had = await asyncio.to_thread(arrived, part_of(whole), artifact)
        except BaseException:
            self._giving -= 1
            raise
        self._giving -= 1
        raise HTTPException(503, "it is not here yet", {"retry-after": "1", ARRIVED: str(had)})

    async def send(self, head: Message, descriptor: int, first: int, last: int, receive: Receive, send: Send) -> None:
        """What `give` has promised, to its end or to the client's."""
        given = counter("mlcdn_artifact_bytes_given_total")
        # A send to a client that is gone says nothing.
        gone = asyncio.create_task(_gone(receive))
        try:
            await send(head)
            while first <= last and not gone.done():
                piece = await asyncio.to_thread(os.pread, descriptor, min(PIECE_BYTES, last + 1 - first), first)
                if not piece:
                    raise RuntimeError("the artifact became shorter while it was given")
                first += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": first <= last})
                given.inc(len(piece))
                await asyncio.wait({gone}, timeout=self._pace.moved(len(piece)))
        finally:
            gone.cancel()
            self._giving -= 1
            os.close(descriptor)

    def _named(self, digest: str) -> tuple[Artifact, Path] | None:
        """What a release calls by that digest, and where it lies."""
        board = self._board()
        if board is None:
            return None
        served = (model.wanted for model in board.models.values())
        told = (seated.wanted for seated in board.desired.values())
        for wanted in (*served, *told):
            released = wanted.released
            if released.artifact.sha256 == digest:
                return released.artifact, self._folder / f"{digest}.onnx"
            for file in released.files:
                if file.artifact.sha256 == digest:
                    return file.artifact, stored_at(digest, self._folder)
        return None


class _Bytes(Response):
    """`body` is empty for whoever would make it smaller."""

    def __init__(self, door: ChunkDoor, descriptor: int, first: int, last: int, size: int) -> None:
        super().__init__(b"", 206)
        self._door, self._descriptor, self._first, self._last = door, descriptor, first, last
        self.raw_headers = [
            (b"content-length", b"%d" % (last + 1 - first)),
            (b"content-range", b"bytes %d-%d/%d" % (first, last, size)),
            (b"content-type", b"application/octet-stream"),
            (b"cache-control", b"no-store"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": 206, "headers": self.raw_headers}
        await self._door.send(head, self._descriptor, self._first, self._last, receive, send)


async def _gone(receive: Receive) -> None:
    """Until the client is."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _opened(whole: Path, artifact: Artifact, number: int) -> int | None:
    """The file that has the chunk, verified; None where none has."""
    for path, good in ((whole, True), (part_of(whole), holds_chunk(part_of(whole), artifact, number))):
        try:
            if good:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
    return None
