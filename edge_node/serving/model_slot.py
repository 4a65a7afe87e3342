"""One model as a worker serves it: what answers, what answered before, how much is in flight.

    current     on the stable seat          candidate   beside it, for `percent` of the requests
    previous    was stable before           usual       the stable one; the candidate where nothing is stable yet
    split       whom the candidate answers; None while the usual one answers everybody

Laws:
- A request holds the `Served` it began with to its end, so a swap is one assignment and no answer mixes two releases.
- `turn` rises with every change of what answers, so that whoever keeps an answer can tell that it may be another's now.
- The previous release stays loaded for a rollback. A session is closed once nothing that is kept has it, and the last
  request has left everything that had it: a release that changes its seat keeps its session.
- Each seat has an engine, with threads of its own: a candidate that hangs until its deadline keeps neither the stable
  release nor another model from running.

It must not know the board, caches or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from edge_node.serving.cohorts import Split
from edge_node.serving.engine import Engine
from edge_node.serving.residency import Resident, Which
from edge_node.serving.served import Prepared, Served
from inference.onnx_model import OnnxModel
from schemas.errors import BadInput, NotFound, NotReady
from streams.folds.wanted import Channel, seat


class ModelSlot:
    """Where one model is served from. One event loop owns it."""

    def __init__(self, name: str, threads: int, wake: Callable[[Served], None]) -> None:
        self.name, self._threads, self._wake = name, threads, wake
        self.current: Served | None = None
        self.previous: Served | None = None
        self.candidate: Served | None = None
        self.percent = 0.0
        self.usual: Served | None = None
        self.split: Split | None = None
        self.turn = 0
        # By seat: what the last attempt to take over a newer release came to, where it failed; and what is on its way.
        self.errors: dict[str, str] = {}
        self.loading: set[str] = set()
        self.engine = Engine(name, threads, wake)
        self._candidates_engine: Engine | None = None
        # Out of their seats, and not yet out of their requests.
        self._leaving: set[Served] = set()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def serving(self) -> Served:
        """The usual one."""
        if self.usual is None:
            error = self.errors.get(self.name) or self.errors.get(seat(self.name, Channel.CANDIDATE))
            raise NotReady(f"model {self.name} is not served here{f': {error}' if error else ' yet'}")
        return self.usual

    @property
    def in_flight(self) -> int:
        return sum(served.in_flight for served in (self.current, self.candidate) if served is not None)

    @property
    def queued(self) -> int:
        return sum(engine.queued for engine in self._engines())

    def swap(self, new: Served) -> Served | None:
        """`new` is stable from the next request on; returns what was."""
        old, before = self.current, self.previous
        new.engine = self.engine
        self.current = new
        self.errors.pop(self.name, None)
        if old is None or old.digest != new.digest:
            self.previous = old
            self._leaves(before)
        else:
            self._leaves(old)
        self._turn()
        return old

    def seat_candidate(self, new: Served, percent: float) -> Served | None:
        """`new` answers its share from the next request on; returns the candidate before."""
        if self._candidates_engine is None:
            self._candidates_engine = Engine(self.name, self._threads, self._wake)
        old = self.candidate
        new.engine = self._candidates_engine
        self.candidate, self.percent = new, percent
        self.errors.pop(seat(self.name, Channel.CANDIDATE), None)
        self._leaves(old)
        self._turn()
        return old

    def share(self, percent: float) -> None:
        """What part of the requests the candidate answers from the next one on."""
        if self.candidate is not None and percent != self.percent:
            self.percent = percent
            self._turn()

    def drop_candidate(self) -> None:
        """The stable release answers everything from the next request on."""
        old, self.candidate, self.percent = self.candidate, None, 0.0
        if old is not None:
            self._leaves(old)
            self._turn()

    def chosen(self, cohort: bytes) -> Served:
        """What answers this cohort."""
        if self.split is not None and self.candidate is not None and self.split.takes(cohort):
            return self.candidate
        return self.serving

    def on(self, seat: str) -> Served | None:
        """What sits on that seat."""
        return self.current if seat == self.name else self.candidate

    def has(self, model: OnnxModel) -> bool:
        """Whether the session is still anybody's."""
        return any(served.model is model for served in (*self._kept(), *self._leaving))

    def is_candidates(self, model: OnnxModel) -> bool:
        """Whether only the candidate has it."""
        return all((served.model is model) == (served is self.candidate) for served in self._kept())

    def loaded(self, digest: str) -> Prepared | None:
        """The session of an artifact that is still in memory: a rollback needs no file, nor a candidate that came through."""
        for served in self._kept():
            if served.digest == digest and served.model is not None and served.model.is_open:
                return Prepared(served.model, served.cost)
        return None

    def resident(self, now: float) -> Resident:
        """Its sessions in memory, each counted once; `now` is monotonic."""
        counted: list[object] = []
        sizes = []
        for served in (self.current, self.candidate, self.previous):
            there = served is not None and served.model is not None and served.model not in counted
            sizes.append(served.memory_bytes if served is not None and there else 0)
            counted.append(served.model if served is not None else None)
        return Resident(
            model=self.name,
            current_bytes=sizes[0],
            candidate_bytes=sizes[1],
            previous_bytes=sizes[2],
            percent=self.percent,
            idle_s=now - max(engine.last_used for engine in self._engines()),
        )

    def let_go(self, which: Which) -> None:
        """The session of an earlier release for good, that of one on its seat until it is asked for."""
        if which == "previous":
            old, self.previous = self.previous, None
            self._leaves(old)
            return
        served = self.current if which == "current" else self.candidate
        if served is not None and served.model is not None and not self._is_used(served):
            served.model.close()

    async def close(self) -> None:
        """After the last request has left: nothing of the model stays in memory."""
        kept = self._kept()
        self.current = self.previous = self.candidate = None
        for served in kept:
            self._leaves(served)
        self._turn()
        await asyncio.gather(*self._closing)
        for engine in self._engines():
            engine.close()

    def _turn(self) -> None:
        self.usual = self.current or self.candidate
        chosen = self.current is not None and self.candidate is not None and self.percent > 0
        self.split = (
            Split(self.name, self.candidate.wanted.sequence, self.percent) if chosen and self.candidate else None
        )
        self.turn += 1

    def _kept(self) -> list[Served]:
        return [served for served in (self.current, self.candidate, self.previous) if served is not None]

    def _engines(self) -> list[Engine]:
        return [engine for engine in (self.engine, self._candidates_engine) if engine is not None]

    def _is_used(self, served: Served) -> bool:
        """Whether a request may need its session, whichever release it entered."""
        return any(other.in_flight for other in (*self._kept(), *self._leaving) if other.model is served.model)

    def _leaves(self, served: Served | None) -> None:
        """Out of its seat; the last to leave a session closes it."""
        if served is None or served.model is None:
            return
        self._leaving.add(served)

        async def drain_and_close(model: OnnxModel) -> None:
            await served.drained()
            self._leaving.discard(served)
            if not self.has(model):
                model.close()

        task = asyncio.get_running_loop().create_task(drain_and_close(served.model))
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
