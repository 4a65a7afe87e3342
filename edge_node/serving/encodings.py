"""Bodies made smaller: which content coding an answer may have, and how a request's is undone. PURE.

Laws:
- Undoing is bounded by the body's limit before memory is used: a bomb costs no more than a large body.
- A coding is worth it only where it saves a tenth; the fastest level, since an edge has more network than time.
- Accept-Encoding is read as RFC 9110 has it, weights included; a member that is not understood is ignored.

It must not know HTTP servers, or what a body says.
"""

from __future__ import annotations

import re
import zlib
from typing import Final

from schemas.errors import BadInput

# zlib's window sizes: 31 is gzip's frame, 15 zlib's own, which HTTP calls deflate.
_WINDOWS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}
OFFERED: Final = "gzip, deflate"
_MEMBER: Final = re.compile(r"\s*([\w!#$%&'*+.^`|~-]+)\s*(?:;\s*q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*)?")
_LEVEL: Final = 1
_WORTH: Final = 0.9


class TooLarge(BadInput):
    """What a body comes to is more than it may."""

    status = 413


class UnknownCoding(BadInput):
    status = 415


def decoded(body: bytes, coding: str, limit: int) -> bytes:
    """The body that was meant; at most `limit` bytes of it are ever made."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in _WINDOWS:
        raise UnknownCoding(f"the body is {coding[:40]}; send it plain or as one of: {OFFERED}")
    inflater = zlib.decompressobj(_WINDOWS[coding])
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error:
        raise BadInput(f"the body is not {coding}") from None
    if len(plain) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes once it is decompressed")
    if not inflater.eof:
        raise BadInput(f"the {coding} body ends too early")
    if inflater.unused_data:
        raise BadInput(f"{len(inflater.unused_data)} bytes follow the {coding} body")
    return plain


def chosen(accept: str) -> str | None:
    """The coding that the caller likes best of ours; None where plain is no worse."""
    weights: dict[str, float] = {}
    for member in accept.lower().split(","):
        if match := _MEMBER.fullmatch(member):
            weights[match[1]] = float(match[2] or 1)
    rest = weights.get("*", 0.0)
    best = max(("gzip", "deflate"), key=lambda coding: weights.get(coding, rest))
    weight = weights.get(best, rest)
    return best if weight > 0 and weight >= weights.get("identity", 0.0) else None


def encoded(body: bytes, coding: str) -> bytes | None:
    """None where it would not be worth it."""
    deflater = zlib.compressobj(_LEVEL, wbits=_WINDOWS[coding])
    small = deflater.compress(body) + deflater.flush()
    return small if len(small) <= len(body) * _WORTH else None
