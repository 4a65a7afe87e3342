"""A release on its way: what each verdict and each word of an operator does to it, as tables and as laws."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import names
from schemas.errors import BadInput, EventRefused, Refusal
from schemas.events import (
    Artifact,
    Evidence,
    ModelReleased,
    Plan,
    RolloutAborted,
    RolloutAdvanced,
    RolloutEvent,
    RolloutHalted,
    RolloutPaused,
    RolloutResumed,
    Tensor,
    Verdict,
    Wave,
)
from streams.folds.rollouts import Rollout, Status, begun, moved
from streams.folds.wanted import Channel, Wanted, model_of, seat

CANARY = Plan(waves=(Wave(regions=("tokyo",), percent=5), Wave(regions=("tokyo",), percent=25), Wave()))


def wanted(sequence: int, plan: Plan = CANARY) -> Wanted:
    digest = f"{sequence:064x}"
    released = ModelReleased(
        model="m",
        version=f"v{sequence}",
        sequence=sequence,
        artifact=Artifact(
            sha256=digest,
            size_bytes=1,
            object_key=names.model_object_key("m", digest),
            chunk_size_bytes=65_536,
            chunk_sha256=(bytes(32),),
        ),
        inputs=(),
        outputs=(Tensor(name="y", datatype="FP32", shape=(-1,)),),
        plan=plan,
        created_at_ms=0,
        author="op",
    )
    return Wanted(model="m", version=f"v{sequence}", sequence=sequence, position=10, cause="c", released=released)


def evidence(until_ms: int = 0) -> Evidence:
    return Evidence(since_ms=0, until_ms=until_ms)


def advanced(step: int, until_ms: int = 0, sequence: int = 2) -> RolloutAdvanced:
    return RolloutAdvanced(
        model="m", sequence=sequence, step=step, verdict=Verdict.PASS, reason="", evidence=evidence(until_ms)
    )


def halted(step: int, until_ms: int = 0, *, rollback: bool = True, sequence: int = 2) -> RolloutHalted:
    return RolloutHalted(
        model="m",
        sequence=sequence,
        step=step,
        verdict=Verdict.FAIL,
        reason="",
        rollback=rollback,
        evidence=evidence(until_ms),
    )


def said(kind: Any, sequence: int = 2) -> Any:
    return kind(model="m", sequence=sequence, author="op")


PAUSED, RESUMED, ABORTED = said(RolloutPaused), said(RolloutResumed), said(RolloutAborted)
V1 = wanted(1)


def after(*events: RolloutEvent, plan: Plan = CANARY, before: Wanted | None = V1) -> Rollout:
    rollout = begun(wanted(2, plan), before, 1_000)
    for position, event in enumerate(events, 11):
        rollout = moved(rollout, event, position, 1_000 + position)
    return rollout


def shares(rollout: Rollout) -> tuple[float | None, float | None]:
    return rollout.share("tokyo"), rollout.share("london")


def test_waves_reach_further_until_the_candidate_is_the_stable_release() -> None:
    begin = after()
    assert (shares(begin), begin.stable) == ((5, None), V1)
    second = after(advanced(0))
    assert (shares(second), second.stable, second.since_ms) == ((25, None), V1, 1_011)
    third = after(advanced(0), advanced(1))
    assert (shares(third), third.stable) == ((100, 100), V1)
    done = after(advanced(0), advanced(1), advanced(2))
    assert (shares(done), done.stable, done.status) == ((None, None), wanted(2), Status.DONE)


def test_a_halt_takes_everything_back_or_leaves_the_wave_as_it_is() -> None:
    back = after(advanced(0), halted(1))
    assert (shares(back), back.stable, back.status) == ((None, None), V1, Status.HALTED)
    kept = after(advanced(0), halted(1, rollback=False))
    assert (shares(kept), kept.stable, kept.status) == ((25, None), V1, Status.HALTED)
    again = after(advanced(0), halted(1), RESUMED)
    assert (shares(again), again.status, again.since_ms) == ((25, None), Status.ROLLING, 1_013)


def test_at_once_is_stable_by_its_own_event_until_its_gate_takes_it_back() -> None:
    at_once = Plan()
    assert (shares(after(plan=at_once)), after(plan=at_once).stable) == ((None, None), wanted(2, at_once))
    assert after(halted(0), plan=at_once).stable == V1
    assert after(halted(0), RESUMED, plan=at_once).stable == wanted(2, at_once)
    assert after(halted(0, rollback=False), plan=at_once).stable == wanted(2, at_once)
    assert after(halted(0), plan=at_once, before=None).stable is None


def test_where_nothing_is_stable_the_candidate_answers_all() -> None:
    assert shares(after(before=None)) == (100, None)


def test_a_wave_of_no_percent_seats_the_candidate_for_its_shadow() -> None:
    plan = Plan(waves=(Wave(percent=0), Wave()))
    assert shares(after(plan=plan)) == (0, 0)


REFUSED = [
    ((), advanced(0, sequence=1), Refusal.NOT_IN_ROLLOUT, "of an earlier release"),
    ((), advanced(1), Refusal.LATE_VERDICT, "on a wave that is not in force yet"),
    ((advanced(0),), advanced(0), Refusal.LATE_VERDICT, "the first verdict counts"),
    ((advanced(0, 50),), halted(0, 50), Refusal.LATE_VERDICT, "a halt whose evidence ends no later"),
    ((advanced(0), advanced(1)), halted(0, 99), Refusal.LATE_VERDICT, "on a wave before the last one judged"),
    ((halted(0),), advanced(0), Refusal.NOT_IN_ROLLOUT, "after a halt only an operator goes on"),
    ((halted(0),), halted(0, 99), Refusal.NOT_IN_ROLLOUT, "halted twice"),
    ((halted(0),), PAUSED, Refusal.NOT_IN_ROLLOUT, "paused when halted"),
    ((PAUSED,), advanced(0), Refusal.NOT_IN_ROLLOUT, "advanced when paused"),
    ((), RESUMED, Refusal.NOT_IN_ROLLOUT, "resumed when rolling"),
    ((ABORTED,), RESUMED, Refusal.NOT_IN_ROLLOUT, "resumed when aborted"),
    ((ABORTED,), ABORTED, Refusal.NOT_IN_ROLLOUT, "aborted twice"),
    ((advanced(0), advanced(1), advanced(2)), ABORTED, Refusal.NOT_IN_ROLLOUT, "aborted when done"),
]


@pytest.mark.parametrize(("events", "event", "refusal"), [r[:3] for r in REFUSED], ids=[r[3] for r in REFUSED])
def test_what_does_not_act(events: tuple[RolloutEvent, ...], event: RolloutEvent, refusal: Refusal) -> None:
    rollout = after(*events)
    with pytest.raises(EventRefused) as refused:
        moved(rollout, event, 99, 99)
    assert refused.value.refusal is refusal


def test_a_halt_on_later_evidence_counts_against_an_advance() -> None:
    back = after(advanced(0, 50), halted(0, 51))
    assert (back.status, back.step, shares(back)) == (Status.HALTED, 0, (None, None))
    kept = after(advanced(0, 50), halted(0, 51, rollback=False))
    assert (kept.status, kept.step, shares(kept)) == (Status.HALTED, 1, (25, None))
    undone = after(advanced(0), advanced(1), advanced(2, 50), halted(2, 51))
    assert (undone.status, undone.stable) == (Status.HALTED, V1)


def test_a_pause_keeps_the_wave_and_a_failed_gate_still_halts_it() -> None:
    assert shares(after(advanced(0), PAUSED)) == (25, None)
    assert after(PAUSED, halted(0)).status is Status.HALTED
    assert after(PAUSED, RESUMED).since_ms == 1_012


EVENTS = st.one_of(
    st.builds(advanced, st.integers(0, 3), st.integers(0, 5), st.integers(1, 2)),
    st.builds(halted, st.integers(0, 3), st.integers(0, 5), rollback=st.booleans(), sequence=st.integers(1, 2)),
    st.sampled_from([PAUSED, RESUMED, ABORTED]),
)


@given(st.lists(EVENTS, max_size=12))
@settings(max_examples=300)
def test_a_share_only_rises_until_everything_goes_back(events: list[RolloutEvent]) -> None:
    rollout = after()
    for position, event in enumerate(events, 11):
        try:
            then = moved(rollout, event, position, 1_000 + position)
        except EventRefused:
            continue
        for region in ("tokyo", "london"):
            was, now = rollout.share(region), then.share(region)
            if was is not None and not then.returned and then.status is not Status.DONE:
                assert now is not None
                assert now >= was
            if then.returned:
                assert now is None
        assert then.stable == (wanted(2) if then.status is Status.DONE else V1)
        rollout = then


@pytest.mark.parametrize(
    "make",
    [
        lambda: Wave(percent=-1),
        lambda: Wave(percent=101),
        lambda: Wave(percent=float("nan")),
        lambda: Wave(regions=("Tokyo!",)),
        lambda: Wave(hold_s=10, max_wait_s=5),
        lambda: Plan(waves=(Wave(percent=50),)),
        lambda: Plan(waves=(Wave(regions=("tokyo",)),)),
        lambda: RolloutAdvanced(model="m", sequence=1, step=0, verdict=Verdict.FAIL, reason="", evidence=evidence()),
        lambda: RolloutHalted(
            model="m", sequence=1, step=0, verdict=Verdict.PASS, reason="", rollback=True, evidence=evidence()
        ),
    ],
)
def test_what_is_no_plan_and_no_verdict(make: Any) -> None:
    with pytest.raises(BadInput):
        make()


def test_a_seat_says_its_model() -> None:
    assert [model_of(seat("m.x", channel)) for channel in Channel] == ["m.x", "m.x"]
    assert seat("m", Channel.STABLE) == "m"
    assert not names.NAME.fullmatch(seat("m", Channel.CANDIDATE)), "no model can take a candidate's seat"
