"""Which release answers a request: the stable one, or, while there is a candidate, the one of its cohort. No I/O.

    no candidate                      the usual release
    `mlcdn-cohort` says which cohort  by that
    else                              by the request's input, as the stable release reads it

Laws: one request is one cohort, whatever number of rows it has, and is answered by one release, which is the one to say
what is wrong with it. Signatures may differ: what only the candidate can read is chosen by what it reads, so that its
clients are a cohort too; what neither can is the stable release's to refuse.

It must not know HTTP, sessions or caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from edge_node.serving.cohorts import input_cohort, named_cohort
from edge_node.serving.model_slot import ModelSlot
from edge_node.serving.served import Served
from schemas.errors import BadInput

T = TypeVar("T")


def chosen(
    slot: ModelSlot, cohort: str, read: Callable[[Served], T], keys: Callable[[Served, T], Sequence[bytes]]
) -> tuple[Served, T]:
    """The release, and the request as it reads it. `keys` are those that the rows of a request have in its caches."""
    usual, candidate = slot.serving, slot.candidate
    if slot.split is None or candidate is None:
        return usual, read(usual)
    if cohort:
        served = slot.chosen(named_cohort(cohort))
        return served, read(served)
    try:
        inputs = read(usual)
    except BadInput as refused:
        inputs = _read_or(candidate, read, refused)
        if slot.chosen(input_cohort(keys(candidate, inputs))) is not candidate:
            raise
        return candidate, inputs
    served = slot.chosen(input_cohort(keys(usual, inputs)))
    return served, inputs if served is usual else read(served)


def _read_or(candidate: Served, read: Callable[[Served], T], refused: BadInput) -> T:
    try:
        return read(candidate)
    except BadInput:
        raise refused from None
