"""Whether a release can follow another without a client noticing: its inputs and outputs held against those served now.
PURE.

Laws:
- What was a good request stays one. An input may take more than before (a fixed dimension becomes free, a required input
  optional, a ranked one takes any rank), never less; a new input is optional.
- What was promised of an answer stays true. An output may promise more than before (a free dimension becomes fixed),
  never less; a new output stands behind those there were, since clients of ``/predict`` read the first, and others count.
- A model with one required input keeps it: ``/predict`` asks for that one without a name.
- Labels say what the columns of an output stand for: they may come, not change.

It must not know the log, artifacts or who asks.
"""

from __future__ import annotations

from typing import Final

import msgspec

from schemas.errors import Conflict
from schemas.events import Tensor

_FREE: Final = -1
_SHOWN_LABELS: Final = 8


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """`side`: input or output. `how` is a clause that follows the tensor's name."""

    side: str
    tensor: str
    how: str

    def __str__(self) -> str:
        return f"{self.side} {self.tensor!r} {self.how}"


class SignatureChanged(Conflict):
    """The release would break clients of the version that is served now; `changes` says where."""

    def __init__(self, model: str, version: str, changes: tuple[Change, ...]) -> None:
        said = "; ".join(map(str, changes))
        super().__init__(f"{model} does not fit the clients of {version}, which is served now: {said}")
        self.changes = changes


def changes(
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    new_inputs: tuple[Tensor, ...],
    new_outputs: tuple[Tensor, ...],
) -> tuple[Change, ...]:
    """What of the new signature a client of the old one can trip over; inputs first, each in the old order."""
    return (*_inputs(inputs, new_inputs), *_outputs(outputs, new_outputs))


def _inputs(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> list[Change]:
    there, known = {t.name: t for t in new}, {t.name for t in old}
    found = [
        Change(side="input", tensor=t.name, how=how)
        for t in old
        if (how := _narrowed(t, there[t.name]) if t.name in there else "is gone")
    ]
    found += [
        Change(side="input", tensor=t.name, how="is new and not optional")
        for t in new
        if t.name not in known and not t.optional
    ]
    sole = [t.name for t in old if not t.optional]
    if not found and len(sole) == 1 and [t.name for t in new if not t.optional] != sole:
        found.append(Change(side="input", tensor=sole[0], how="is not the one required input any more"))
    return found


def _narrowed(old: Tensor, new: Tensor) -> str:
    """Why `new` takes less than `old`; empty if it does not."""
    if old.datatype != new.datatype:
        return f"was {old.datatype}, is {new.datatype}"
    if old.optional and not new.optional:
        return "was optional, is required"
    return "" if _within(old, new) else f"was {_shape(old)}, takes {_shape(new)}"


def _outputs(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> list[Change]:
    place = {t.name: i for i, t in enumerate(new)}
    found = []
    for i, before in enumerate(old):
        if before.name not in place:
            how = "is gone"
        elif place[before.name] != i:
            how = f"was output {i}, is output {place[before.name]}"
        else:
            how = _loosened(before, new[i])
        if how:
            found.append(Change(side="output", tensor=before.name, how=how))
    return found


def _loosened(old: Tensor, new: Tensor) -> str:
    """Why `new` promises less than `old`; empty if it does not."""
    if old.datatype != new.datatype:
        return f"was {old.datatype}, is {new.datatype}"
    if new.optional and not old.optional:
        return "was always there, is optional"
    if not _within(new, old):
        return f"was {_shape(old)}, is {_shape(new)}"
    if old.labels and old.labels != new.labels:
        return f"had the columns {_labels(old)}, has {_labels(new)}"
    return ""


def _within(narrow: Tensor, wide: Tensor) -> bool:
    """Whether every shape that `narrow` allows is one that `wide` allows."""
    if not wide.ranked:
        return True
    if not narrow.ranked or len(narrow.shape) != len(wide.shape):
        return False
    return all(there in (_FREE, here) for here, there in zip(narrow.shape, wide.shape, strict=True))


def _shape(tensor: Tensor) -> str:
    return (
        "[" + ", ".join("N" if d == _FREE else str(d) for d in tensor.shape) + "]" if tensor.ranked else "of any rank"
    )


def _labels(tensor: Tensor) -> str:
    shown = [label[:40] for label in tensor.labels[:_SHOWN_LABELS]]
    more = len(tensor.labels) - len(shown)
    return "[" + ", ".join(shown) + (f", … {more} more" if more > 0 else "") + "]" if shown else "none"
