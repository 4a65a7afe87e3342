"""An operator's word on a rollout: pause, resume, abort; signed, appended, and read back. And what a rollout comes to.

Law: what is said is of the rollout that stands in the log when it is said; one that a newer release has ended is a
`Conflict`, and so is one that is not in a state for it. It must not know gates.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from origin.read_back import read_on
from schemas.codec import Envelope
from schemas.errors import Conflict, NotFound
from schemas.events import RolloutAborted, RolloutAdvanced, RolloutHalted, RolloutPaused, RolloutResumed
from schemas.topics import RELEASES
from streams.folds import releases
from streams.folds.releases import ModelHistory, Releases
from streams.folds.rollouts import Rollout, Status
from streams.log.record import LogReader
from streams.log.writer import Writer

WORDS: Final = {"pause": RolloutPaused, "resume": RolloutResumed, "abort": RolloutAborted}


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """The log took it; `rollout` is as it stands after it."""

    model: str
    sequence: int
    event_id: str
    position: int
    rollout: Rollout


class Operator:
    """`writer` signs with a key that may speak of rollouts."""

    def __init__(self, writer: Writer, reader: LogReader, roots: tuple[bytes, ...]) -> None:
        self._writer, self._reader, self._roots = writer, reader, roots

    async def say(self, word: str, model: str, *, author: str, reason: str) -> Said:
        """`word` is one of `WORDS`. `NotFound` where the model has no rollout, `Conflict` where the log did not take it."""
        state, _ = await asyncio.to_thread(read_on, self._reader, Releases.initial(self._roots))
        rollout = rollout_of(state.models.get(model), model)
        event = WORDS[word](model=model, sequence=rollout.wanted.sequence, author=author, reason=reason)
        appended = await self._writer.append(event, causation_id=rollout.wanted.cause)
        position = appended.record.offset
        state, refused = await asyncio.to_thread(read_on, self._reader, state, position + 1)
        if state.position != position:
            raise Conflict(f"position {position} is not in the log that acknowledged it: was the topic made again?")
        if refused is not None:
            raise Conflict(f"{word} did not act: {refused.detail or refused}")
        return Said(
            model=model,
            sequence=event.sequence,
            event_id=appended.id,
            position=position,
            rollout=rollout_of(state.models[model], model),
        )


def rollout_of(history: ModelHistory | None, model: str) -> Rollout:
    if history is None:
        raise NotFound(f"no model {model} was ever released")
    if history.rollout is None:
        raise NotFound(f"{model} has no rollout: what was said last of it is a rollback or a retirement")
    return history.rollout


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict that acted."""

    id: str
    step: int
    verdict: str
    reason: str


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """What a rollout came to: `status` is done, halted, aborted or paused; rolling where the time ran out first, and
    superseded where another release came. `verdicts` are those that were waited for."""

    status: str
    step: int
    waves: int
    verdicts: tuple[Judgement, ...]

    @property
    def done(self) -> bool:
        return self.status == Status.DONE


async def wait_over(
    reader: LogReader,
    roots: tuple[bytes, ...],
    model: str,
    position: int,
    *,
    timeout_s: float,
    progress: Callable[[Judgement], None] = lambda _: None,
) -> Ended:
    """Until the rollout that the release at `position` began is not under way any more."""
    state, _ = await asyncio.to_thread(read_on, reader, Releases.initial(roots), position + 1)
    begun = rollout_of(state.models.get(model), model)
    verdicts: list[Judgement] = []

    def ended(status: str, rollout: Rollout) -> Ended:
        return Ended(status=status, step=rollout.step, waves=len(rollout.waves), verdicts=tuple(verdicts))

    rollout = begun
    records = reader.tail({(RELEASES.name, 0): position + 1})
    try:
        async with asyncio.timeout(timeout_s):
            async for record in records:
                step = releases.fold(state, record)
                state = step.state
                history = state.models[model]
                if history.rollout is None or history.rollout.wanted.sequence != begun.wanted.sequence:
                    return ended("superseded", rollout)
                rollout = history.rollout
                if (said := _verdict_on(model, step.envelope)) is not None:
                    verdicts.append(said)
                    progress(said)
                if rollout.status is not Status.ROLLING:
                    return ended(rollout.status, rollout)
    except TimeoutError:
        return ended(rollout.status, rollout)
    finally:
        await records.aclose()
    return ended(rollout.status, rollout)


def _verdict_on(model: str, envelope: Envelope | None) -> Judgement | None:
    event = envelope.event if envelope is not None else None
    if envelope is None or not isinstance(event, RolloutAdvanced | RolloutHalted) or event.model != model:
        return None
    return Judgement(id=envelope.id, step=event.step, verdict=str(event.verdict), reason=event.reason)
