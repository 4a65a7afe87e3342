"""Ed25519 signatures over the records of signed topics. PURE.

What is signed is the DSSE pre-authentication encoding of everything that gives a record its meaning: topic, key, ce_type,
ce_id, ce_source, ce_time, ce_causationid and value. So a signature cannot be moved to another topic, key or event. The
position is not signed: a record cannot know it. Sources: DSSE v1.0.2 (protocol), RFC 8032 (Ed25519).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from schemas.codec import Headers, Message
from schemas.errors import EventRefused, Refusal

PAYLOAD_TYPE: Final = b"application/vnd.mlcdn.record.v1"
KEYID_HEADER: Final = "mlcdn-keyid"
SIGNATURE_HEADER: Final = "mlcdn-signature"
_SIGNED_HEADERS: Final = ("ce_type", "ce_id", "ce_source", "ce_time", "ce_causationid")


@lru_cache(1_024)
def _loaded(public_key: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public_key)


def key_id(public_key: bytes) -> str:
    """A key is known by its bytes: the first 16 bytes of their SHA-256, hex."""
    return hashlib.sha256(public_key).hexdigest()[:32]


def pre_authentication_encoding(topic: str, key: bytes | None, value: bytes | None, headers: Headers) -> bytes:
    """DSSE's PAE over the record's fields, each with its length in front, so that no two records share an encoding."""
    said: Mapping[str, bytes | None] = dict(headers)
    fields = [topic.encode(), key or b"", *(said.get(h) or b"" for h in _SIGNED_HEADERS), value or b""]
    body = b"".join(len(f).to_bytes(8, "big") + f for f in fields)
    return b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE, len(body), body)


def sign(message: Message, private_key: Ed25519PrivateKey) -> Message:
    """The message with its two signature headers."""
    public = private_key.public_key().public_bytes_raw()
    signature = private_key.sign(
        pre_authentication_encoding(message.topic, message.key, message.value, message.headers),
    )
    headers = (*message.headers, (KEYID_HEADER, key_id(public).encode()), (SIGNATURE_HEADER, signature))
    return Message(topic=message.topic, key=message.key, value=message.value, headers=headers)


def signer(headers: Headers) -> str:
    """The key id that a record names; refuses an unsigned record."""
    said = dict(headers)
    keyid = said.get(KEYID_HEADER)
    if not keyid or not said.get(SIGNATURE_HEADER):
        raise EventRefused(Refusal.UNSIGNED)
    return keyid.decode("ascii", "replace")[:64]


def verify(public_key: bytes, topic: str, key: bytes | None, value: bytes | None, headers: Headers) -> None:
    """Refuses a record that `public_key` did not sign as it stands."""
    signature = dict(headers).get(SIGNATURE_HEADER) or b""
    try:
        _loaded(public_key).verify(
            signature,
            pre_authentication_encoding(topic, key, value, headers),
        )
    except InvalidSignature:
        raise EventRefused(Refusal.BAD_SIGNATURE) from None
