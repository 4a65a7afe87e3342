"""Which signatures of a topic need no check, because a checkpoint says what a check would find. PURE.

A checkpoint speaks for a record when its signer may sign checkpoints by the trust that stands in the topic itself, its own
signature holds, the chain at its position is the one read here, and the record stands above its `since`. Its list then
names the bad ones. Records wait for it, so each comes out with the chain at it, and with what is known of its signature.

Laws: roots and checkpoints are always checked; after a checkpoint that does not match, none is believed; what waits is
bounded, and what has waited too long comes out to be checked, as does all while nobody may sign checkpoints. It is good
for reporting only: whoever steals a checkpoint's key can make a forged record pass here, so nothing that acts may use it
(docs/decisions/0015).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Final

from schemas import codec
from schemas.codec import Envelope
from schemas.errors import EventRefused
from schemas.events import LogCheckpoint, TrustChanged
from streams.folds import chain
from streams.folds import trust as trusting
from streams.folds.trust import Trust
from streams.log.record import Record

# Five times what the job lets wait for a checkpoint, since it signs nothing in the midst of a burst; 80 MB of purges.
MOST_WAITING: Final = 50_000

# A record, the chain at it, whether its signature holds; None: to be checked.
Judged = tuple[Record, bytes, bool | None]


def _frames(kind: str) -> tuple[bytes, ...]:
    """How a value begins whose event is of that kind, in any version."""
    return tuple(b"\0" + schema.id.to_bytes(4, "big") for schema in codec.SCHEMAS if schema.kind == kind)


_TRUST: Final = _frames(TrustChanged.__name__)
_CHECKPOINT: Final = _frames(LogCheckpoint.__name__)
_EITHER: Final = _TRUST + _CHECKPOINT


def judged(topic: str, roots: tuple[bytes, ...], records: Iterable[Record], *, full: bool) -> Iterator[Judged]:
    """`records` are all of the topic from its first. `full`: no checkpoint is believed."""
    trust, at, believed = Trust.of(roots), chain.start(topic), not full
    waiting: list[tuple[Record, bytes]] = []
    may = False
    for record in records:
        at = chain.link(at, record)
        if not believed:
            yield record, at, None
            continue
        waiting.append((record, at))
        if record.value is not None and record.value.startswith(_EITHER):
            envelope = _admitted(trust, record)
            event = envelope.event if envelope is not None else None
            if envelope is not None and isinstance(event, TrustChanged):
                trust = trusting.changed(trust, event, record.offset, envelope.id)
                may = any(LogCheckpoint.__name__ in grant.kinds for grant in trust.keys.values())
            elif isinstance(event, LogCheckpoint):
                place = bisect_left(waiting, event.position, key=_offset)
                # One that speaks of what has come out already, or of nothing that stood below it, says nothing new.
                if place < len(waiting) - 1 and waiting[place][0].offset == event.position:
                    believed = waiting[place][1].hex() == event.chain_sha256
                    yield from _spoken_for(waiting[: place + 1], event) if believed else _unspoken_for(waiting)
                    waiting = waiting[place + 1 :] if believed else []
        if len(waiting) >= MOST_WAITING or not may:
            yield from _unspoken_for(waiting)
            waiting = []
    yield from _unspoken_for(waiting)


def _admitted(trust: Trust, record: Record) -> Envelope | None:
    try:
        return trusting.admit(trust, record)
    except EventRefused:
        return None


def _spoken_for(waiting: list[tuple[Record, bytes]], said: LogCheckpoint) -> Iterator[Judged]:
    bad = frozenset(said.bad_signatures)
    for record, at in waiting:
        yield record, at, record.offset not in bad if record.offset > said.since else None


def _unspoken_for(waiting: list[tuple[Record, bytes]]) -> Iterator[Judged]:
    for record, at in waiting:
        yield record, at, None


def _offset(waits: tuple[Record, bytes]) -> int:
    return waits[0].offset
