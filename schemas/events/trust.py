"""Who may say what, and what vouches for the log itself. Signed. PURE."""

from __future__ import annotations

import itertools
from typing import Final

import msgspec

from schemas import names
from schemas.errors import BadInput
from schemas.events.event import Event
from schemas.events.rollouts import MAX_SEQUENCE

MAX_BAD_SIGNATURES: Final = 10_000


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """A key and what it may sign. `models` are globs over model names, `kinds` are event kinds."""

    public_key: bytes
    label: str
    models: tuple[str, ...]
    kinds: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.public_key) != 32:
            raise BadInput("a public key has 32 bytes")
        names.name(self.label, "key label")
        if not self.models or not self.kinds:
            raise BadInput("a grant names at least one model glob and one event kind")


class TrustChanged(Event, frozen=True, kw_only=True):
    """Who may sign what, from its own position on. Signed by a root key; stands in both signed topics."""

    grants: tuple[Grant, ...]
    revoked: tuple[bytes, ...] = ()
    author: str
    reason: str = ""

    def __post_init__(self) -> None:
        names.label(self.author, "author")
        names.text(self.reason, "reason")
        if not self.grants and not self.revoked:
            raise BadInput("a change of trust grants or revokes something")
        if any(len(k) != 32 for k in self.revoked):
            raise BadInput("a public key has 32 bytes")

    @property
    def key(self) -> str:
        return "trust"


class LogCheckpoint(Event, frozen=True, kw_only=True):
    """What stood in this topic up to `position`, in one hash (streams/folds/chain.py says which bytes).

    Its signer vouches that those records stood there, and that of the records above `since` exactly `bad_signatures`
    failed the check of their signature.
    """

    position: int
    chain_sha256: str
    since: int
    bad_signatures: tuple[int, ...] = ()
    expires_at_ms: int

    def __post_init__(self) -> None:
        names.within(self.position, 0, MAX_SEQUENCE, "position")
        names.digest(self.chain_sha256, "chain_sha256")
        names.within(self.since, -1, self.position, "since")
        names.within(self.expires_at_ms, 0, MAX_SEQUENCE, "expires_at_ms")
        names.within(len(self.bad_signatures), 0, MAX_BAD_SIGNATURES, "number of bad signatures")
        for before, bad in itertools.pairwise((self.since, *self.bad_signatures, self.position + 1)):
            if bad <= before and self.bad_signatures:
                raise BadInput("bad signatures are positions that rise from above `since` to `position`")

    @property
    def key(self) -> str:
        return "checkpoint"
