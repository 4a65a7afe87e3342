"""Which request heads the lane may know by their bytes. PURE.

Laws:
- A head is admitted only after the HTTP parser took those very bytes, whole, as one request, and what it made of them is
  usual: POST, HTTP/1.1, kept alive, no upgrade, every header on the list and there once. The same bytes again then mean
  the same, and need no parsing.
- Whatever may change an answer beside model and body is not on the list: credentials, tags, cohorts, deadlines, cache controls,
  trace contexts, codings. Such requests take the full path.
- The bytes are those between the request's first byte and its body: they begin with the method, and every line that was
  parsed ends in CRLF.

It must not know models, bodies or connections.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from edge_node.serving.encodings import chosen
from edge_node.serving.gate import HOST

Door = Literal["infer", "predict"]
MAX_HEAD_BYTES: Final = 4_096
MAX_BODY_BYTES: Final = 64 * 1024
_METHOD: Final = b"POST "
_NAME: Final = rb"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_INFER: Final = re.compile(rb"/v2/models/(%b)(?:/versions/(%b))?/infer" % (_NAME, _NAME))
_LENGTH: Final = re.compile(rb"[0-9]{1,6}")
_JSON_LENGTH: Final = b"inference-header-content-length"
_ALLOWED: Final = frozenset(
    {
        b"host",
        b"user-agent",
        b"accept",
        b"accept-encoding",
        b"connection",
        b"content-type",
        b"content-length",
        _JSON_LENGTH,
    }
)


class Head(msgspec.Struct, frozen=True):
    """What a request's head says. `length` is its body's.

    `model` is None where `/predict` leaves it to the body; `coding` is what a long answer may have,
    and `json_length` how much of a body with binary tensors is JSON.
    """

    door: Door
    model: str | None
    version: str | None
    length: int
    coding: str | None
    json_length: int | None = None


def candidate(data: bytes) -> bytes | None:
    """The head at the start of what was read, if it is there whole and of a usual size."""
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES)
    return data[: end + 4] if end > 0 and data.startswith(_METHOD) else None


def admitted(raw: bytes, url: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Head | None:
    """`raw` as `candidate` gave it; `url` and `headers`, names in lower case, as the parser did.

    The caller has seen that the method is POST, the version 1.1, the connection kept and no upgrade asked for.
    """
    lines = len(headers) + 2
    if raw.count(b"\r\n") != lines or raw.count(b"\n") != lines or raw.count(b"\r") != lines:
        return None
    named = dict(headers)
    if len(named) != len(headers) or not named.keys() <= _ALLOWED:
        return None
    json_length = named.get(_JSON_LENGTH)
    kind = named.get(b"content-type", b"application/json")
    if kind != b"application/json" and (json_length is None or kind != b"application/octet-stream"):
        return None
    if named.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    length = named.get(b"content-length", b"")
    if not HOST.fullmatch(named.get(b"host", b"")) or not _LENGTH.fullmatch(length) or int(length) > MAX_BODY_BYTES:
        return None
    coding = chosen(named.get(b"accept-encoding", b"").decode("latin-1"))
    if json_length is not None and (not _LENGTH.fullmatch(json_length) or int(json_length) > int(length)):
        return None
    if url == b"/predict":
        return None if json_length is not None else Head("predict", None, None, int(length), coding)
    match = _INFER.fullmatch(url)
    if match is None:
        return None
    model, version = match.groups()
    return Head(
        "infer",
        model.decode(),
        version.decode() if version else None,
        int(length),
        coding,
        int(json_length) if json_length is not None else None,
    )
