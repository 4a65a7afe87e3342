"""One model as a worker serves it: what is live, what was live before, how much is in flight.

Laws:
- A request holds the `Served` it began with to its end, so a swap is one assignment and no answer mixes two releases.
- The previous release stays loaded for a rollback; the one before it is closed once the last request has left it.
- Each slot has an engine, with threads of its own: a model that hangs until its deadline keeps no other from running.

It must not know the board, caches or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from edge_node.serving.engine import Engine
from edge_node.serving.residency import Resident, Which
from edge_node.serving.served import Prepared, Served
from schemas.errors import BadInput, NotFound, NotReady


class ModelSlot:
    """Where one model is served from. One event loop owns it."""

    def __init__(self, name: str, threads: int, wake: Callable[[Served], None]) -> None:
        self.name = name
        self.current: Served | None = None
        self.previous: Served | None = None
        # What the last attempt to take over a newer release came to; empty when there was none or it succeeded.
        self.error = ""
        self.loading = False
        self.engine = Engine(name, threads, wake)
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> Served:
        if self.current is None:
            reason = f": {self.error}" if self.error else " yet"
            raise NotReady(f"model {self.name} is not served here{reason}")
        return self.current

    @property
    def in_flight(self) -> int:
        return self.current.in_flight if self.current else 0

    @property
    def queued(self) -> int:
        return self.engine.queued

    def swap(self, new: Served) -> Served | None:
        """`new` answers from the next request on; returns what answered before."""
        old, before = self.current, self.previous
        new.engine = self.engine
        self.current, self.error = new, ""
        if old is not None and old.digest == new.digest:
            if old.model is not None and old.model is not new.model:
                self._close(old)
            return old
        self.previous = old
        if before is not None and before.model is not new.model:
            self._close(before)
        return old

    def loaded(self, digest: str) -> Prepared | None:
        """The session of an artifact that is still in memory: a rollback needs no file."""
        for served in (self.current, self.previous):
            if served is not None and served.digest == digest and served.model is not None and served.model.is_open:
                return Prepared(served.model, served.cost)
        return None

    def resident(self, now: float) -> Resident:
        """Its sessions in memory; `now` is monotonic."""
        current, previous = self.current, self.previous
        shared = current is not None and previous is not None and current.model is previous.model
        return Resident(
            model=self.name,
            current_bytes=current.memory_bytes if current is not None else 0,
            previous_bytes=previous.memory_bytes if previous is not None and not shared else 0,
            idle_s=now - self.engine.last_used,
        )

    def let_go(self, which: Which) -> None:
        """The session of an earlier release for good, that of the current one until it is asked for."""
        if which == "previous" and self.previous is not None:
            self._close(self.previous)
            self.previous = None
        current = self.current
        if which == "current" and current is not None and current.model is not None and not current.in_flight:
            current.model.close()

    async def close(self) -> None:
        """After the last request has left: nothing of the model stays in memory."""
        for served in (self.current, self.previous):
            if served is not None:
                self._close(served)
        self.current = self.previous = None
        await asyncio.gather(*self._closing)
        self.engine.close()

    def _close(self, served: Served) -> None:
        async def drain_and_close() -> None:
            await served.drained()
            if served.model is not None:
                served.model.close()

        task = asyncio.get_running_loop().create_task(drain_and_close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class Slots:
    """The models of a worker by name. `default` is the one that `/predict` means where a request names none."""

    def __init__(self, default: str, threads: int) -> None:
        self._default, self._threads = default, threads
        # Loads a session again that was let go. Set before the first slot is added, by who lets go.
        self.wake: Callable[[Served], None] = lambda _: None
        self._slots: dict[str, ModelSlot] = {}

    def __iter__(self) -> Iterator[ModelSlot]:
        return iter(list(self._slots.values()))

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, name: str) -> ModelSlot | None:
        return self._slots.get(name)

    def get(self, name: str) -> ModelSlot:
        slot = self._slots.get(name)
        if slot is None:
            raise NotFound(f"no model {name[:80]!r}; served here: {sorted(self._slots) or 'none'}")
        return slot

    def meant(self, name: str | None) -> ModelSlot:
        """The named model, else the only one, else the default."""
        slot = self.find_meant(name)
        if slot is not None:
            return slot
        if name is not None or self._default:
            return self.get(name or self._default)
        if not self._slots:
            raise NotReady("no model is served here yet")
        raise BadInput(f"say which model: {sorted(self._slots)}")

    def find_meant(self, name: str | None) -> ModelSlot | None:
        """As `meant`; None where that refuses."""
        if name is not None:
            return self._slots.get(name)
        if len(self._slots) == 1:
            return next(iter(self._slots.values()))
        return self._slots.get(self._default)

    def add(self, name: str) -> ModelSlot:
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = ModelSlot(name, self._threads, self.wake)
        return slot

    def remove(self, name: str) -> ModelSlot | None:
        """The slot answers nothing new from here on; the caller closes it."""
        return self._slots.pop(name, None)
