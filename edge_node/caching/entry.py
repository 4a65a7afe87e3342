"""A cached answer, and the frame it has outside this process. PURE.

    0   4  magic          8   8  as_of + 1, big-endian      32  16  key            56  …  about: MessagePack array
    4   1  format         16 16  BLAKE2b-128 of the rest    48   4  length of about    …  body
    5   3  zero                                             52   4  length of body

Laws:
- A frame is taken whole or not at all: magic, format, both lengths, checksum, then that it is what was asked for (key,
  namespace, digest). Anything else is `EntryRefused` with one word for the metric. Nothing in it is ever executed.
- It carries its own key, so a client library that mixes up replies costs a miss and never gives a wrong answer.
- `as_of` stands where a script in Redis finds it without knowing the rest.

It must not know tiers or purges.
"""

from __future__ import annotations

import hashlib
import struct
from sys import intern
from typing import Final

import msgspec

from edge_node.caching.keys import KEY_BYTES
from schemas import names
from schemas.errors import MlcdnError

MAGIC: Final = b"MLCE"
FORMAT: Final = 2
AS_OF_AT: Final = 8
AS_OF_BYTES: Final = 8
_HEAD: Final = struct.Struct(">4sB3xQ16s16sII")
_SUM_AT, _SUM_END = 16, 32


class EntryRefused(MlcdnError):
    """Bytes that are not the entry asked for; `reason` is one word."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"cache entry refused: {reason}")
        self.reason = reason


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """`as_of` is the invalidations position read before the inputs were."""

    key: bytes
    model: str
    version: str
    digest: str
    as_of: int
    stored_at_ms: int
    fresh_until_ms: int
    stale_until_ms: int
    error_until_ms: int
    tags: tuple[str, ...] = ()
    body: bytes

    @property
    def name(self) -> str:
        """What purges know it by."""
        return names.prediction_name(self.model, self.key.hex())

    @property
    def last_use_ms(self) -> int:
        """From here on nothing may answer with it."""
        return max(self.fresh_until_ms, self.stale_until_ms, self.error_until_ms)


class _About(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    namespace: str
    model: str
    version: str
    digest: str
    stored_at_ms: int
    fresh_until_ms: int
    stale_until_ms: int
    error_until_ms: int
    tags: tuple[str, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_About)


def pack(entry: Entry, namespace: str) -> bytes:
    """ValueError for an entry that no reader would take."""
    if len(entry.key) != KEY_BYTES or entry.as_of < -1:
        raise ValueError(f"key of {len(entry.key)} bytes, as_of {entry.as_of}")
    about = _encoder.encode(
        _About(
            namespace,
            entry.model,
            entry.version,
            entry.digest,
            entry.stored_at_ms,
            entry.fresh_until_ms,
            entry.stale_until_ms,
            entry.error_until_ms,
            entry.tags,
        )
    )
    head = _HEAD.pack(MAGIC, FORMAT, entry.as_of + 1, bytes(16), entry.key, len(about), len(entry.body))
    return b"".join((head[:_SUM_AT], _checksum(head, about, entry.body), head[_SUM_END:], about, entry.body))


def unpack(data: bytes, *, key: bytes, digest: str, namespace: str) -> Entry:
    """The entry in `data`; EntryRefused unless it is whole and the one asked for."""
    if data[: len(MAGIC)] != MAGIC:
        raise EntryRefused("foreign")
    if len(data) < _HEAD.size:
        raise EntryRefused("truncated")
    _, version, as_of, checksum, own_key, about_bytes, body_bytes = _HEAD.unpack_from(data)
    if version != FORMAT:
        raise EntryRefused("format")
    if len(data) != _HEAD.size + about_bytes + body_bytes:
        raise EntryRefused("length")
    about_end = _HEAD.size + about_bytes
    about_data, body = data[_HEAD.size : about_end], data[about_end:]
    if _checksum(data[: _HEAD.size], about_data, body) != checksum:
        raise EntryRefused("checksum")
    if own_key != key:
        raise EntryRefused("other_key")
    try:
        about = _decoder.decode(about_data)
    except msgspec.MsgspecError:
        raise EntryRefused("about") from None
    if about.namespace != namespace:
        raise EntryRefused("other_log")
    if about.digest != digest:
        raise EntryRefused("other_digest")
    return Entry(
        key=key,
        # One string for all entries of a release, not one each.
        model=intern(about.model),
        version=intern(about.version),
        digest=digest,
        as_of=as_of - 1,
        stored_at_ms=about.stored_at_ms,
        fresh_until_ms=about.fresh_until_ms,
        stale_until_ms=about.stale_until_ms,
        error_until_ms=about.error_until_ms,
        tags=about.tags,
        body=body,
    )


def as_of_in(data: bytes) -> int | None:
    """The position in a frame's head, unchecked otherwise; None for what is no frame of this format."""
    if len(data) < _HEAD.size or data[: len(MAGIC)] != MAGIC or data[len(MAGIC)] != FORMAT:
        return None
    return int.from_bytes(data[AS_OF_AT : AS_OF_AT + AS_OF_BYTES], "big") - 1


def is_whole(data: bytes) -> bool:
    """Whether lengths and checksum hold, whoever asked for it."""
    if as_of_in(data) is None:
        return False
    *_, about_bytes, body_bytes = _HEAD.unpack_from(data)
    if len(data) != _HEAD.size + about_bytes + body_bytes:
        return False
    about_end = _HEAD.size + about_bytes
    return _checksum(data[: _HEAD.size], data[_HEAD.size : about_end], data[about_end:]) == data[_SUM_AT:_SUM_END]


def _checksum(head: bytes, about: bytes, body: bytes) -> bytes:
    hasher = hashlib.blake2b(head[:_SUM_AT], digest_size=_SUM_END - _SUM_AT)
    hasher.update(head[_SUM_END:])
    hasher.update(about)
    hasher.update(body)
    return hasher.digest()
