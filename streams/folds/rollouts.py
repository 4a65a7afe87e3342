"""A release on its way to all requests: what each verdict and each word of an operator does to it. PURE.

    ROLLING ── Advanced ──→ ROLLING at the next wave … DONE        the candidate is the stable release
       │ ↑
       │ └─ Resumed ─ PAUSED ← Paused, or HALTED
       ├─ Halted ──→ HALTED     every node is back at the stable release, or stays where it is (`returned`)
       └─ Aborted ─→ ABORTED    every node is back at the stable release; so it is from PAUSED and HALTED

Laws: the first verdict on (sequence, step) counts; a halt whose evidence ends later than that of the advance it
contradicts counts too; a percentage only rises until everything goes back; a release with no waves is the stable one by
its own event, and its one gate can take it back. It must not know gates, traffic or clocks: the broker's time of a
record says when a wave began.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from schemas.errors import EventRefused, Refusal
from schemas.events import (
    RolloutAborted,
    RolloutAdvanced,
    RolloutEvent,
    RolloutHalted,
    RolloutPaused,
    RolloutResumed,
    Side,
    Wave,
)
from streams.folds.wanted import Wanted

AT_ONCE: Final = (Wave(),)


class Status(StrEnum):
    ROLLING = "rolling"
    PAUSED = "paused"
    HALTED = "halted"
    ABORTED = "aborted"
    DONE = "done"


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """The rollout of `wanted`. `before` is what was stable when it was released, and is again if it goes back.

    It began at `begun_ms` of the broker. `step` is the wave in force, counted from 0, the number of waves once it is
    done; that began with the record at `since_position`, at `since_ms`. `judged_until_ms` is where the evidence of the
    last advance ends, and `usual` how the stable release answered by it.
    """

    wanted: Wanted
    before: Wanted | None
    waves: tuple[Wave, ...]
    step: int = 0
    status: Status = Status.ROLLING
    returned: bool = False
    begun_ms: int
    since_position: int
    since_ms: int
    judged_until_ms: int = -1
    usual: Side = Side()

    @property
    def at_once(self) -> bool:
        return not self.wanted.released.plan.waves

    @property
    def under_way(self) -> bool:
        """Whether its gate is watched."""
        return self.status in (Status.ROLLING, Status.PAUSED)

    @property
    def wave(self) -> Wave:
        """The one in force, or the last."""
        return self.waves[min(self.step, len(self.waves) - 1)]

    @property
    def stable(self) -> Wanted | None:
        """What is stable while this is the newest release."""
        if self.returned:
            return self.before
        return self.wanted if self.at_once or self.status is Status.DONE else self.before

    def share(self, region: str | None) -> float | None:
        """Percent of a region's requests that are the candidate's; None where it is not seated there.

        A region of None is one that every wave reaches.
        """
        if self.returned or self.at_once or self.status is Status.DONE:
            return None
        reached = [w.percent for w in self.waves[: self.step + 1] if region is None or w.reaches(region)]
        if not reached:
            return None
        # Where nothing is stable, nobody else can answer.
        return max(reached) if self.before is not None else 100.0


def begun(wanted: Wanted, before: Wanted | None, at_ms: int) -> Rollout:
    """Of a release whose event stands at `wanted.position`, broker's time `at_ms`."""
    waves = wanted.released.plan.waves or AT_ONCE
    return Rollout(
        wanted=wanted, before=before, waves=waves, begun_ms=at_ms, since_position=wanted.position, since_ms=at_ms
    )


def moved(rollout: Rollout | None, event: RolloutEvent, position: int, at_ms: int) -> Rollout:
    """After `event`, which stands at `position`; `EventRefused` where it does not act."""
    if rollout is None or event.sequence != rollout.wanted.sequence:
        raise EventRefused(Refusal.NOT_IN_ROLLOUT, f"{event.model}: {event.sequence} is not the newest release")
    match event:
        case RolloutAdvanced():
            return _advanced(rollout, event, position, at_ms)
        case RolloutHalted():
            return _halted(rollout, event)
        case RolloutPaused():
            _must_be(rollout, event, Status.ROLLING)
            return _with(rollout, status=Status.PAUSED)
        case RolloutResumed():
            _must_be(rollout, event, Status.PAUSED, Status.HALTED)
            return _with(rollout, status=Status.ROLLING, returned=False, since_position=position, since_ms=at_ms)
        case RolloutAborted():
            _must_be(rollout, event, Status.ROLLING, Status.PAUSED, Status.HALTED)
            return _with(rollout, status=Status.ABORTED, returned=True)
        case _:
            raise EventRefused(Refusal.WRONG_TOPIC, event.kind)


def _advanced(rollout: Rollout, event: RolloutAdvanced, position: int, at_ms: int) -> Rollout:
    if event.step != rollout.step:
        raise EventRefused(Refusal.LATE_VERDICT, f"on wave {event.step}, and {rollout.step} is in force")
    _must_be(rollout, event, Status.ROLLING)
    step = rollout.step + 1
    return _with(
        rollout,
        step=step,
        status=Status.DONE if step == len(rollout.waves) else Status.ROLLING,
        since_position=position,
        since_ms=at_ms,
        judged_until_ms=event.evidence.until_ms,
        usual=event.evidence.stable if event.evidence.stable.requests else rollout.usual,
    )


def _halted(rollout: Rollout, event: RolloutHalted) -> Rollout:
    contradicts = event.step == rollout.step - 1 and event.evidence.until_ms > rollout.judged_until_ms
    if event.step != rollout.step and not contradicts:
        raise EventRefused(Refusal.LATE_VERDICT, f"on wave {event.step}, and {rollout.step} is in force")
    done = (Status.DONE,) if contradicts else ()
    _must_be(rollout, event, Status.ROLLING, Status.PAUSED, *done)
    step = event.step if event.rollback else min(rollout.step, len(rollout.waves) - 1)
    return _with(rollout, step=step, status=Status.HALTED, returned=event.rollback)


def _must_be(rollout: Rollout, event: RolloutEvent, *statuses: Status) -> None:
    if rollout.status not in statuses:
        raise EventRefused(Refusal.NOT_IN_ROLLOUT, f"{event.model}: {event.kind}, and its rollout is {rollout.status}")


def _with(rollout: Rollout, **changes: object) -> Rollout:
    return msgspec.structs.replace(rollout, **changes)
