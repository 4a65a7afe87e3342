"""What a worker says of its models in a beat: each seat that is served or should be, and how far it is. No I/O.

    live       what should be served is, from its session       forwarded   … at the origin
    loading    it is on its way here                            pending     it is not yet on its way, or not yet on the disk
    failed     it could not be taken over; what was served before, if anything, is what the seat says

It must not know how a release is taken over.
"""

from __future__ import annotations

from edge_node.board import BoardFile
from edge_node.serving.model_slot import Slots
from schemas.events import ServedModel
from streams.folds.wanted import Channel, Seated, model_of


def standing(slots: Slots, board: BoardFile | None) -> tuple[ServedModel, ...]:
    """A model's stable seat first."""
    desired = board.desired if board is not None else {}
    there = {served.seat for slot in slots for served in (slot.current, slot.candidate) if served is not None}
    errors = board.errors if board is not None else {}
    return tuple(
        _standing_of(name, slots, desired.get(name), errors.get(name, "")) for name in sorted(there | set(desired))
    )


def _standing_of(name: str, slots: Slots, seated: Seated | None, error: str) -> ServedModel:
    slot, wanted = slots.find(model_of(name)), seated.wanted if seated is not None else None
    current = slot.on(name) if slot is not None else None
    shown = current.wanted if current is not None else wanted
    assert shown is not None, "a seat that neither serves nor should is not said"
    error = (slot.errors.get(name, "") if slot else "") or error
    behind = wanted is not None and (current is None or current.wanted.sequence != wanted.sequence)
    if behind and error:
        state = "failed"
    elif behind:
        state = "loading" if slot is not None and name in slot.loading else "pending"
    else:
        state = "live" if current is not None and current.model is not None else "forwarded"
    channel = seated.channel if seated is not None else current.channel if current is not None else Channel.STABLE
    return ServedModel(
        name=shown.model,
        version=shown.version,
        digest=shown.digest if current else "",
        sequence=shown.sequence if current else 0,
        channel=channel,
        state=state,
        error=error[:500] if behind else "",
    )
