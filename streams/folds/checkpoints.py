"""What checkpoints prove of a topic: is it whole, is it what it was, is it fresh? PURE.

    frozen      the last checkpoint that held has expired: no newer one reaches this reader
    truncated   the log ends below a checkpoint that held
    rewritten   the chain is not what a checkpoint says, here or before this reader was started again

Laws: a checkpoint that repeats, or speaks of a position too far back to be known, counts for nothing and alarms nobody,
so any number of signers may race; one that holds becomes `last` when it speaks of a higher position than that and nothing
is disputed; one that does not hold is a dispute with its signer. A dispute ends, on every replay alike, when a root revokes
that key: either it lied, or somebody answers for the log as it now is.

A rewritten or truncated log *holds*: who acts on the log stays with what it last knew. It must not know a clock, a disk,
or what a node does with an alarm.
"""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

import msgspec

from schemas import signing
from schemas.errors import EventRefused, Refusal
from schemas.events import Event, LogCheckpoint, TrustChanged
from streams.folds import chain
from streams.log.record import Record

# How far back a checkpoint may speak: a signer needs milliseconds from its last read to its append.
RECENT: Final = 16_384


class Alarm(StrEnum):
    FROZEN = "frozen"
    TRUNCATED = "truncated"
    REWRITTEN = "rewritten"


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that held. `signer` is its key id."""

    position: int
    chain_sha256: str
    expires_at_ms: int
    signer: str


def stands(event: LogCheckpoint, position: int) -> None:
    """Refuses a checkpoint that speaks of its own position or a later one: nobody can know those."""
    if event.position >= position:
        raise EventRefused(Refusal.CHECKPOINT_AHEAD, f"speaks of position {event.position}")


class ChainWatch:
    """Follows one topic from its first record. Mutable: one owner, one thread.

    `last` is the last checkpoint that held. Begun with one that held in an earlier life (`remembered`), the topic is
    `another` until it has come to that position with that chain.
    """

    def __init__(self, topic: str, remembered: Held | None = None) -> None:
        self.topic = topic
        self.position = -1
        self.chain = chain.start(topic)
        self.last = remembered
        self._remembered = remembered
        # The signer of what was remembered and found otherwise.
        self._forgotten_by: str | None = None
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=RECENT)
        self._disputes: dict[str, str] = {}

    @property
    def another(self) -> bool:
        """Whether this is not the log in which the remembered checkpoint held, nor has grown to where it could be."""
        return self._remembered is not None or self._forgotten_by is not None

    def take(self, record: Record, event: Event | None, linked: bytes | None = None) -> bool:
        """One record and, if the fold took it, its event. Whether it is a checkpoint that moved `last`.

        `linked` is the chain at the record, for who has computed it already.
        """
        if record.offset <= self.position:
            return False
        self.chain = chain.link(self.chain, record) if linked is None else linked
        self.position = record.offset
        self._recent.append((self.position, self.chain))
        if self._remembered is not None and self.position >= self._remembered.position:
            self._meet(self._remembered)
        if isinstance(event, LogCheckpoint):
            return self._judge(event, signing.signer(record.headers))
        if isinstance(event, TrustChanged):
            for public_key in event.revoked:
                self._settle(signing.key_id(public_key))
        return False

    def chain_at(self, position: int) -> bytes | None:
        """None for a position that is too far back, or not there yet."""
        behind = self.position - position
        if 0 <= behind < len(self._recent):
            at, found = self._recent[-1 - behind]
            if at == position:
                return found
        # Positions that are missing in between move the others.
        return next((found for at, found in reversed(self._recent) if at == position), None)

    def holds(self, at_end: bool) -> bool:
        """Whether nobody should act on this topic. `at_end`: all that stands in the log has been taken."""
        return bool(self._disputes) or (at_end and self._remembered is not None)

    def alarms(self, now_ms: int, at_end: bool) -> dict[Alarm, str]:
        """Every alarm in force, and what it says."""
        found: dict[Alarm, str] = {}
        if self._disputes:
            found[Alarm.REWRITTEN] = "; ".join(f"{what} (key {signer})" for signer, what in self._disputes.items())
        if at_end and self._remembered is not None:
            found[Alarm.TRUNCATED] = f"ends at {self.position}, and a checkpoint held at {self._remembered.position}"
        if self.last is not None and now_ms > self.last.expires_at_ms:
            expired = datetime.fromtimestamp(self.last.expires_at_ms / 1000, UTC).isoformat(timespec="seconds")
            found[Alarm.FROZEN] = f"the last checkpoint, of position {self.last.position}, expired at {expired}"
        return found

    def _judge(self, event: LogCheckpoint, signer: str) -> bool:
        known = self.chain_at(event.position)
        if known is None:
            return False
        if known.hex() != event.chain_sha256:
            self._disputes[signer] = f"position {event.position} is not what a checkpoint says"
            return False
        if self._disputes or (self.last is not None and event.position <= self.last.position):
            return False
        self.last = Held(
            position=event.position,
            chain_sha256=event.chain_sha256,
            expires_at_ms=event.expires_at_ms,
            signer=signer,
        )
        return True

    def _meet(self, remembered: Held) -> None:
        if self.position != remembered.position or self.chain.hex() != remembered.chain_sha256:
            self._disputes[remembered.signer] = f"position {remembered.position} is not what it was"
            self._forgotten_by = remembered.signer
        self._remembered = None

    def _settle(self, signer: str) -> None:
        disputed = self._disputes.pop(signer, None) is not None
        unmet = self._remembered is not None and self._remembered.signer == signer
        if unmet:
            self._remembered = None
        if self._forgotten_by == signer:
            self._forgotten_by = None
        if (disputed or unmet) and self.last is not None and self.last.signer == signer:
            self.last = None
