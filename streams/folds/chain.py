"""The hash chain of a topic: one SHA-256 that stands for every raw record up to a position. PURE.

    chain(before the first record) = SHA-256("mlcdn.log.chain.v1 " + topic)
    chain(record)                  = SHA-256(chain before it + frame(record))

    frame   position, broker timestamp in ms            8 bytes each, big-endian, signed
            length of key, length of value              4 bytes each, -1 for none
            number of headers                           4 bytes
            for each header: length of its name (UTF-8), length of its value    4 bytes each, -1 for none
            key, value, then each header's name and value

Laws: a length stands before whatever it measures, so no two records have one frame; refused records are in the chain as
any other; the chain at a position depends on the records alone, never on which checkpoints stand among them, so two
honest signers cannot disagree. The broker stamps a record once, when it is appended, so every read gives the same time.

A record's headers are what the reading port yields: none, where a header name is not UTF-8.
It must not know checkpoints or signatures.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from hashlib import sha256
from typing import Final

from streams.log.record import Record

_DOMAIN: Final = b"mlcdn.log.chain.v1 "


def start(topic: str) -> bytes:
    """The chain before a topic's first record."""
    return sha256(_DOMAIN + topic.encode()).digest()


def link(before: bytes, record: Record) -> bytes:
    """The chain at `record`, given the chain at the record before it."""
    key, value, headers = record.key, record.value, record.headers
    numbers = [
        record.offset,
        record.timestamp_ms,
        -1 if key is None else len(key),
        -1 if value is None else len(value),
        len(headers),
    ]
    parts = [key or b"", value or b""]
    for name, said in headers:
        raw = name.encode()
        numbers += (len(raw), -1 if said is None else len(said))
        parts += (raw, said or b"")
    return sha256(b"".join((before, _head(len(headers)).pack(*numbers), *parts))).digest()


@lru_cache(256)
def _head(headers: int) -> struct.Struct:
    return struct.Struct(f">qqiii{2 * headers}i")
