"""Request bodies in and answers out: read once within a limit, smaller where both sides can.

Laws:
- No more than the limit is held of a body, neither as it came nor decompressed; what is over it is 413 at once.
- What takes long over many bytes does so in a thread, not in the loop that others wait for.

It must not know what a body says.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from edge_node.serving import answers
from edge_node.serving.encodings import OFFERED, UnknownCoding, chosen, decoded, encoded

_IN_THREAD_BYTES: Final = 64 * 1024
JSON_LENGTH: Final = "inference-header-content-length"


async def read_body(request: Request, limit: int) -> bytes:
    """Plain, whatever it came as."""
    _check_type(request)
    body = bytearray()
    # For how long is the connection's to say.
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes", {"connection": "close"})
    coding = request.headers.get("content-encoding")
    if coding is None:
        return bytes(body)
    try:
        return await asyncio.to_thread(decoded, bytes(body), coding, limit)
    except UnknownCoding as error:
        raise HTTPException(415, str(error), {"accept-encoding": OFFERED}) from None


def _check_type(request: Request) -> None:
    said = request.headers.get("content-type")
    if said is None:
        return
    kind = said.partition(";")[0].strip().lower()
    binary = JSON_LENGTH in request.headers
    if (
        kind != "application/json"
        and not kind.endswith("+json")
        and not (binary and kind == "application/octet-stream")
    ):
        raise HTTPException(415, f"the body must be application/json, or binary tensors with {JSON_LENGTH}")


def whole(body: bytes, headers: answers.Headers, status: int = 200) -> Response:
    """With these headers and no others."""
    return _Whole(body, headers, status)


class _Whole(Response):
    """Starlette's makes headers of its own, for 3 us."""

    def __init__(self, body: bytes, headers: answers.Headers, status: int) -> None:
        self.body, self.raw_headers, self.status_code, self.background = body, headers, status, None


async def smaller(request: Request, response: Response) -> Response:
    """`response`, in the coding that the caller likes, where that is worth it."""
    body = bytes(response.body)
    if len(body) < answers.COMPRESSIBLE_BYTES:
        return response
    coding = chosen(request.headers.get("accept-encoding", ""))
    if coding is None:
        return response
    if len(body) > _IN_THREAD_BYTES:
        small = await asyncio.to_thread(encoded, body, coding)
    else:
        small = encoded(body, coding)
    if small is None:
        return response
    return whole(small, answers.smaller_headers(response.raw_headers, coding, len(small)), response.status_code)
