"""Who may say what. PURE.

The roots (public keys in a file on each machine) may sign `TrustChanged` and nothing else; everything below them is
granted in the log, per topic, and applies from the granting record's position on. So every replay judges alike.

A signature says nothing of a position, so each change of trust is taken once in its topic, by its event id: or whoever may
write to the log could append an old grant again and bring a revoked key back.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache

import msgspec

from schemas import codec, signing, topics
from schemas.codec import Envelope
from schemas.errors import EventRefused, Refusal
from schemas.events import CacheInvalidated, LogCheckpoint, TrustChanged
from schemas.names import ScopeKind
from streams.log.record import Record


class KeyGrant(msgspec.Struct, frozen=True, kw_only=True):
    """A key as the log knows it; positions are those of the granting and the revoking record."""

    public_key: bytes
    label: str
    models: tuple[str, ...]
    kinds: tuple[str, ...]
    granted_at: int
    revoked_at: int | None = None

    def may(self, *kinds: str, model: str) -> bool:
        """Whether it may say all these kinds of things of the model now."""
        allowed = any(fnmatchcase(model, glob) for glob in self.models)
        return self.revoked_at is None and allowed and all(kind in self.kinds for kind in kinds)


class Trust(msgspec.Struct, frozen=True, kw_only=True):
    """`roots` are 32-byte public keys; `keys` are by key id; `taken` are the event ids of the changes that made it."""

    roots: tuple[bytes, ...]
    keys: dict[str, KeyGrant] = {}
    taken: tuple[str, ...] = ()

    @classmethod
    def of(cls, roots: tuple[bytes, ...]) -> Trust:
        return cls(roots=tuple(sorted(roots)))


@lru_cache(64)
def _by_id(roots: tuple[bytes, ...]) -> dict[str, bytes]:
    return {signing.key_id(root): root for root in roots}


def admit(trust: Trust, record: Record, known: bool | None = None) -> Envelope:
    """The event of a signed record, once its signer may say it; otherwise `EventRefused` with the reason.

    1. size and presence, before any cost; 2. the signer is known and not revoked; 3. the signature holds;
    4. the body decodes; 5. the signer may say this kind of thing, of this model.

    `known` is what an earlier check of this very record's signature found, and saves another; a root's is always checked.
    """
    if record.value is None:  # 1
        raise EventRefused(Refusal.TOMBSTONE)
    if len(record.value) > topics.TOPICS[record.topic].max_bytes:
        raise EventRefused(Refusal.TOO_LARGE, f"{len(record.value)} bytes")
    keyid = signing.signer(record.headers)  # 2
    root = _by_id(trust.roots).get(keyid)
    grant = trust.keys.get(keyid)
    if root is None and grant is None:
        raise EventRefused(Refusal.UNKNOWN_KEY, keyid)
    if root is None and grant is not None and grant.revoked_at is not None:
        raise EventRefused(Refusal.KEY_REVOKED, f"{grant.label}, at position {grant.revoked_at}")
    public_key = root if root is not None else grant.public_key if grant is not None else b""
    if known is None or root is not None:  # 3
        signing.verify(public_key, record.topic, record.key, record.value, record.headers)
    elif not known:
        raise EventRefused(Refusal.BAD_SIGNATURE)
    envelope = codec.decode(record.topic, record.key, record.value, record.headers)  # 4
    if root is not None:  # 5
        if not isinstance(envelope.event, TrustChanged):
            raise EventRefused(Refusal.KEY_NOT_ALLOWED, f"a root signs TrustChanged only, not {envelope.event.kind}")
        if envelope.id in trust.taken:
            raise EventRefused(Refusal.DUPLICATE, "this change of trust was taken before")
    elif grant is not None:
        _allowed(grant, envelope)
    return envelope


def _allowed(grant: KeyGrant, envelope: Envelope) -> None:
    event = envelope.event
    if event.kind == "TrustChanged" or event.kind not in grant.kinds:
        raise EventRefused(Refusal.KEY_NOT_ALLOWED, f"{grant.label} may not sign {event.kind}")
    if isinstance(event, LogCheckpoint) or "*" in grant.models:
        return  # it speaks of no model, or may speak of every one
    if isinstance(event, CacheInvalidated):
        # Only a model scope names a model; anything wider takes a key that may speak of every model.
        models = [s.value if s.kind is ScopeKind.MODEL else "*" for s in event.scopes]
    else:
        models = [event.key]
    for model in models:
        if model == "*" or not any(fnmatchcase(model, glob) for glob in grant.models):
            raise EventRefused(Refusal.KEY_NOT_ALLOWED, f"{grant.label} may not speak of {model}")


def changed(trust: Trust, event: TrustChanged, position: int, cause: str) -> Trust:
    """Trust after the change at `position`; `cause` is its event id."""
    keys = dict(trust.keys)
    for grant in event.grants:
        keys[signing.key_id(grant.public_key)] = KeyGrant(
            public_key=grant.public_key,
            label=grant.label,
            models=grant.models,
            kinds=grant.kinds,
            granted_at=position,
        )
    for public_key in event.revoked:
        keyid = signing.key_id(public_key)
        # One that this log never granted signed in another: what a node remembers of that ends with it (checkpoints.py).
        known = keys.get(keyid) or KeyGrant(public_key=public_key, label="", models=(), kinds=(), granted_at=position)
        if known.revoked_at is None:
            keys[keyid] = msgspec.structs.replace(known, revoked_at=position)
    return Trust(roots=trust.roots, keys=keys, taken=(*trust.taken, cause))
