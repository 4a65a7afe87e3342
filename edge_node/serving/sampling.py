"""Who else is told of an answer, once it was given: a candidate's shadow, and the recordings.

    a stable release whose answers somebody wants has a `witness`; both doors hand it each answer, after the client has it

Laws:
- An answer that nobody wants costs one look at an attribute. One that is wanted costs its caller nothing: the witness is
  called in a later turn of the loop.
- What is told is what was asked and what was answered, never whose it was: see shadow.py and recordings.py.
- Level, not edge: who is told follows from what sits on a model's seats, looked at whenever that has changed.
- The exact repeats of the fast lane are not told: what they repeat was, within the second that they live.

It must not know HTTP, models or the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import structlog

from edge_node.serving.batches import Ask
from edge_node.serving.model_slot import ModelSlot, Slots
from edge_node.serving.recordings import Recordings
from edge_node.serving.reporter import Identity
from edge_node.serving.served import Served
from edge_node.serving.shadow import Shadow
from schemas.events import Event

log = structlog.get_logger()
Witness = Callable[[Ask, bytes], None]
Array = np.ndarray[Any, np.dtype[Any]]


class _Watched(msgspec.Struct):
    """One model as it was when it was last looked at."""

    turn: int = -1
    stable: Served | None = None
    shadow: Shadow | None = None


class Sampling:
    """One event loop owns it. `tend` follows what is served, and is where all that is not urgent happens."""

    def __init__(self, slots: Slots, identity: Identity, say: Callable[[Event], None], recordings: Recordings) -> None:
        self._slots, self._identity, self._say, self._recordings = slots, identity, say, recordings
        self._watched: dict[str, _Watched] = {}

    def tend(self) -> None:
        try:
            self._tend()
        except Exception:
            # What is only watched must not stop what is served.
            log.exception("sampling_broke")

    def stop(self) -> None:
        """Nobody is told of anything from here on."""
        for watched in self._watched.values():
            self._leave(watched)
        self._watched.clear()

    async def close(self) -> None:
        await self._recordings.close()

    def _tend(self) -> None:
        names = set()
        for slot in self._slots:
            names.add(slot.name)
            watched = self._watched.setdefault(slot.name, _Watched())
            if watched.turn != slot.turn:
                watched.turn = slot.turn
                self._follow(slot, watched)
        for name in self._watched.keys() - names:
            self._leave(self._watched.pop(name))
        idle = not any(slot.queued for slot in self._slots)
        for watched in self._watched.values():
            if watched.shadow is not None:
                watched.shadow.tend(idle)
        self._recordings.tend()

    def _follow(self, slot: ModelSlot, watched: _Watched) -> None:
        stable, candidate = slot.current, slot.candidate
        shadow = watched.shadow
        wanted = (
            stable is not None
            and candidate is not None
            and candidate.model is not None
            and candidate.wanted.released.shadow_percent > 0
        )
        if shadow is not None and not (wanted and shadow.of(stable, candidate)):
            shadow.close()
            shadow = None
        if shadow is None and wanted and stable is not None and candidate is not None:
            shadow = Shadow(stable, candidate, self._identity, self._say)
        if watched.stable is not None and watched.stable is not stable:
            watched.stable.witness = None
        watched.stable, watched.shadow = stable, shadow
        if stable is not None:
            stable.witness = _both(shadow.offer if shadow is not None else None, self._recordings.witness(stable))

    def _leave(self, watched: _Watched) -> None:
        if watched.stable is not None:
            watched.stable.witness = None
        if watched.shadow is not None:
            watched.shadow.close()


def tell(ask: Ask, body: bytes) -> None:
    """Of an answer whose release has a witness: in a later turn of the loop, when the client has it."""
    witness = ask.served.witness
    if witness is not None:
        asyncio.get_running_loop().call_soon(witness, ask, body)


def _both(shadow: Witness | None, recordings: Witness | None) -> Witness | None:
    if shadow is None or recordings is None:
        return shadow or recordings

    def witness(ask: Ask, body: bytes) -> None:
        shadow(ask, body)
        recordings(ask, body)

    return witness
