"""Gates: what passes, what fails, what stays open; and the job that says so, over a log in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from schemas import codec
from schemas.errors import BadInput, Unreachable
from schemas.events import (
    ArtifactRejected,
    Compare,
    Gates,
    ModelSwapped,
    OnFailure,
    Plan,
    RolloutAborted,
    RolloutAdvanced,
    RolloutHalted,
    RolloutPaused,
    RolloutResumed,
    SwapFailed,
    Verdict,
    Wave,
)
from schemas.topics import FLEET, RELEASES, REQUESTS
from streams.folds import fleet, gates
from streams.folds.comparison import Comparison
from streams.folds.fleet import Fleet
from streams.folds.gates import Judgement
from streams.folds.rollouts import Status
from streams.log.record import Record
from tests.rollout_scene import OPERATOR, V1, V2, V3, Scene

CANARY = Plan(waves=(
    Wave(regions=("tokyo",), percent=10, min_samples=100, hold_s=2, max_wait_s=60),
    Wave(min_samples=0),
))  # fmt: skip


def records(scene: Scene) -> list[Record]:
    found = [
        record
        for topic in (FLEET.name, REQUESTS.name)
        for partition in range(scene.log.partitions(topic))
        for record in scene.log.read(topic, partition)
    ]
    return sorted(found, key=lambda r: r.timestamp_ms)


def judged(scene: Scene, read: list[Record] | None = None) -> Judgement:
    comparison, state = Comparison(gates.subject_of(scene.rollout)), Fleet()
    for record in records(scene) if read is None else read:
        if record.topic == FLEET.name:
            state = fleet.fold(state, record).state
        comparison.take(record, codec.decode(record.topic, record.key, record.value, record.headers))
    return gates.judge(scene.rollout, comparison, state, scene.now_ms)


def canary(plan: Plan = CANARY, **more: Any) -> Scene:
    """v1 serves, v2 is released in waves; both workers serve it, and two seconds are over."""
    scene = Scene()
    scene.release(1, V1)
    scene.now_ms += 1_000
    scene.release(2, V2, plan, **more)
    scene.now_ms += 3_000
    scene.beat(2, V2)
    scene.beat(2, V2, node="n-2")
    scene.beat(1, V1, node="far", region="london")
    return scene


def good(scene: Scene) -> None:
    scene.requests(V1, 1_000)
    scene.requests(V2, 300)


def test_a_wave_that_is_as_good_passes() -> None:
    scene = canary()
    good(scene)
    said = judged(scene)
    assert said.verdict is Verdict.PASS, said.reason
    assert (said.evidence.workers, said.evidence.live) == (2, 2), "london is not of this wave"
    assert (said.evidence.stable.requests, said.evidence.candidate.requests) == (1_000, 300)


def fails(scene: Scene) -> None:
    scene.requests(V2, 300, failed=20)


def overloaded(scene: Scene) -> None:
    scene.requests(V2, 300, failed=20, status=429)


def choosy(scene: Scene) -> None:
    scene.requests(V2, 300, failed=20, status=400)


def slow(scene: Scene) -> None:
    scene.requests(V2, 300, ms=50)


def early(scene: Scene) -> None:
    scene.requests(V2, 10, failed=10)


def rejected(scene: Scene) -> None:
    scene.report(ArtifactRejected, 2, V2)


def unloadable(scene: Scene) -> None:
    scene.beat(2, V1, state="failed")
    scene.report(SwapFailed, 2, V2)
    scene.now_ms += 5_000
    scene.beat(2, V1, state="failed")


@pytest.mark.parametrize(
    ("worsen", "why"),
    [
        (fails, "20 of 600 requests failed"),
        (overloaded, "20 of 600 requests failed"),
        (choosy, "20 of 600 requests were refused"),
        (slow, "p99"),
        (early, "10 of 310 requests failed"),
        (rejected, "n-1 does not serve it: trial: broken"),
        (unloadable, "n-1 does not serve it: trial: broken"),
    ],
)
def test_a_wave_that_is_worse_fails(worsen: Callable[[Scene], None], why: str) -> None:
    scene = canary()
    good(scene)
    worsen(scene)
    said = judged(scene)
    assert (said.verdict, why in said.reason) == (Verdict.FAIL, True), said.reason


def test_ten_failures_of_ten_are_enough_and_one_of_ten_is_not() -> None:
    few = canary()
    few.requests(V1, 1_000)
    few.requests(V2, 10, failed=1)
    assert judged(few).verdict is None
    few.requests(V2, 10, failed=9)
    assert judged(few).verdict is Verdict.FAIL


def test_the_stable_releases_own_failures_are_not_the_candidates() -> None:
    scene = canary()
    scene.requests(V1, 1_000, failed=100)
    scene.requests(V2, 300, failed=30)
    assert judged(scene).verdict is Verdict.PASS
    scene.requests(V2, 100, failed=30, status=404)
    assert judged(scene).verdict is Verdict.FAIL, "what fails there does not excuse what is refused here"


def test_answers_out_of_caches_are_not_timed() -> None:
    scene = canary()
    scene.requests(V1, 10_000, tier="memory", ms=0.05)
    scene.requests(V1, 300, ms=20)
    scene.requests(V2, 300, ms=20)
    assert judged(scene).verdict is Verdict.PASS


def other_region(scene: Scene) -> None:
    scene.requests(V2, 300, failed=300, region="london")


def of_another_release(scene: Scene) -> None:
    scene.requests(V3, 300, failed=300)


def a_rejection_that_may_pass(scene: Scene) -> None:
    scene.report(ArtifactRejected, 2, V2, retrying=True)


def a_failure_that_was_mended(scene: Scene) -> None:
    scene.report(SwapFailed, 2, V2)
    scene.report(ModelSwapped, 2, V2)


def a_rejection_of_a_silent_node(scene: Scene) -> None:
    scene.report(ArtifactRejected, 2, V2, node="gone")


@pytest.mark.parametrize(
    "also",
    [
        other_region,
        of_another_release,
        a_rejection_that_may_pass,
        a_failure_that_was_mended,
        a_rejection_of_a_silent_node,
    ],
)
def test_what_does_not_count(also: Callable[[Scene], None]) -> None:
    scene = canary()
    good(scene)
    also(scene)
    assert judged(scene).verdict is Verdict.PASS


def test_what_was_answered_before_the_wave_does_not_count() -> None:
    scene = Scene()
    scene.release(1, V1)
    scene.requests(V2, 300, failed=300)
    scene.now_ms += 1
    scene.release(2, V2, CANARY)
    scene.requests(V2, 300, failed=300)  # in the very millisecond that the wave began
    scene.now_ms += 3_000
    scene.beat(2, V2)
    assert judged(scene).evidence.candidate.requests == 0


def too_early(scene: Scene) -> None:
    good(scene)
    scene.now_ms -= 2_000


def too_few(scene: Scene) -> None:
    scene.requests(V2, 99)


def not_everywhere(scene: Scene) -> None:
    good(scene)
    scene.beat(1, V1, node="n-2", state="loading")


def nobody_heard(scene: Scene) -> None:
    good(scene)
    scene.now_ms += 10_001


@pytest.mark.parametrize(
    ("incomplete", "missing"),
    [
        (too_early, "1 of 2 s are over"),
        (too_few, "99 of 100 requests"),
        (not_everywhere, "1 of 2 workers"),
        (nobody_heard, "0 of 0 workers"),
    ],
)
def test_what_is_incomplete_stays_open_and_is_inconclusive_in_the_end(
    incomplete: Callable[[Scene], None], missing: str
) -> None:
    scene = canary()
    incomplete(scene)
    said = judged(scene)
    assert (said.verdict, missing in said.reason) == (None, True), said.reason
    if incomplete is not too_early:
        scene.now_ms += 60_000
        said = judged(scene)
        assert said.verdict is Verdict.INCONCLUSIVE
        assert "after 6" in said.reason or "after 7" in said.reason


def test_drift_is_judged_where_a_shadow_was_asked_for() -> None:
    plain = canary()
    good(plain)
    plain.shadow(200, 3)
    assert judged(plain).verdict is Verdict.FAIL, "3 of 200 differ, 1 % may"
    asked = canary(shadow_percent=100.0)
    good(asked)
    assert "0 of 100 answers were compared" in judged(asked).reason
    asked.shadow(200, 2)
    assert judged(asked).verdict is Verdict.PASS
    asked.shadow(0, 0, failed=3)
    assert judged(asked).verdict is Verdict.FAIL, "what the candidate does not answer differs"
    wide = canary(Plan(waves=CANARY.waves, gates=Gates(max_disagreement=0.5)), shadow_percent=100.0)
    good(wide)
    wide.shadow(200, 90)
    assert judged(wide).verdict is Verdict.PASS


def test_a_model_that_was_trained_anew_is_compared_by_its_largest_score() -> None:
    for compare, verdict in ((Compare.TOP1, Verdict.PASS), (Compare.VALUES, Verdict.FAIL)):
        plan = Plan(waves=CANARY.waves, gates=Gates(compare=compare))
        scene = canary(plan, shadow_percent=100.0)
        good(scene)
        scene.shadow(200, 200, top1=(200, 199))
        assert judged(scene).verdict is verdict
        scene.shadow(200, 200, top1=(200, 100))
        assert judged(scene).verdict is Verdict.FAIL


def test_a_release_at_once_is_held_to_its_workers_alone() -> None:
    scene = canary(Plan())
    scene.requests(V2, 500, failed=100)
    assert "2 of 3 workers" in judged(scene).reason
    scene.beat(2, V2, node="far", region="london")
    assert judged(scene).verdict is Verdict.PASS
    scene.report(ArtifactRejected, 2, V2)
    assert judged(scene).verdict is Verdict.FAIL


def test_order_and_repetition_change_nothing() -> None:
    scene = canary(shadow_percent=50.0)
    for n in range(20):
        scene.now_ms += 10
        scene.requests(V1, 50 + n, failed=n % 3, ms=1 + n)
        scene.requests(V2, 20 + n, ms=2 + n)
        scene.shadow(20, n % 2)
    read = records(scene)
    expected = judged(scene)
    for seed in range(5):
        again = [*read, *random.Random(seed).sample(read, 30)]
        random.Random(seed).shuffle(again)
        beats = [r for r in read if r.topic == FLEET.name]
        # Beats of one node keep their order: they are in one partition.
        mixed = [r for r in again if r.topic != FLEET.name] + beats + beats
        assert judged(scene, mixed) == expected


def test_an_archive_is_the_comparison() -> None:
    scene = canary()
    good(scene)
    scene.shadow(200, 1)
    comparison = Comparison(gates.subject_of(scene.rollout))
    for record in [*records(scene), *records(scene)]:
        comparison.take(record, codec.decode(record.topic, record.key, record.value, record.headers))
    again = Comparison.of_archive(comparison.archive())
    assert (again.stable, again.candidate, again.compared, again.disagreements) == (
        comparison.stable, comparison.candidate, 200, 1
    )  # fmt: skip
    assert again.archive() == comparison.archive()
    for spoilt in (b"", b"x", comparison.archive()[:-9]):
        with pytest.raises(BadInput):
            Comparison.of_archive(spoilt)


def run(scene: Scene, *jobs: Any, ticks: int = 3) -> None:
    """Each job reads what came, and judges; for as long as they say something."""

    async def turns() -> None:
        for job in jobs:
            if not job._topics:
                await job.boot()
        for _ in range(ticks):
            for job in jobs:
                for topic in (RELEASES.name, FLEET.name, REQUESTS.name):
                    for partition in range(scene.log.partitions(topic)):
                        for record in list(scene.log.read(topic, partition, job._next[topic, partition])):
                            await job.take(record)
                await job.tick()
            scene.now_ms += 100

    asyncio.run(turns())


def verdicts(scene: Scene) -> list[RolloutAdvanced | RolloutHalted]:
    said = []
    for record in scene.log.read(RELEASES.name, 0):
        event = codec.decode(record.topic, record.key, record.value, record.headers).event
        if isinstance(event, RolloutAdvanced | RolloutHalted):
            said.append(event)
    return said


def test_the_job_takes_a_good_release_through_its_waves() -> None:
    scene = canary()
    job = scene.job()
    run(scene, job)
    assert not verdicts(scene)
    good(scene)
    run(scene, job)
    assert [(v.step, v.verdict) for v in verdicts(scene)] == [(0, Verdict.PASS)]
    scene.beat(2, V2)
    scene.beat(2, V2, node="n-2")
    run(scene, job)
    assert scene.rollout.step == 1, "london does not serve it yet"
    scene.beat(2, V2, node="far", region="london")
    run(scene, job)
    assert scene.rollout.status is Status.DONE
    assert scene.history.stable is not None
    assert scene.history.stable.digest == V2
    run(scene, job)
    assert len(verdicts(scene)) == 2


def test_the_job_takes_a_bad_release_back_and_says_on_what_grounds() -> None:
    scene = canary()
    job = scene.job()
    run(scene, job)
    good(scene)
    fails(scene)
    run(scene, job)
    (halt,) = verdicts(scene)
    assert isinstance(halt, RolloutHalted)
    assert halt.rollback
    assert scene.history.stable is not None
    assert scene.history.stable.digest == V1
    counted = {(r.topic, r.partition): (r.start, r.end) for r in halt.evidence.ranges}
    assert len(counted) == 12
    assert sum(end - start for (topic, _), (start, end) in counted.items() if topic == REQUESTS.name) == 3
    kept = canary(on_failure=OnFailure.KEEP)
    job = kept.job()
    run(kept, job)
    kept.report(ArtifactRejected, 2, V2)
    run(kept, job)
    assert (kept.rollout.status, kept.rollout.returned, kept.rollout.share("tokyo")) == (Status.HALTED, False, 10)


def test_two_jobs_and_one_that_was_away_do_no_harm() -> None:
    scene = canary()
    good(scene)
    run(scene, scene.job(), scene.job())
    assert scene.rollout.step == 1
    scene.beat(2, V2, node="far", region="london")
    run(scene, scene.job())
    assert scene.rollout.status is Status.DONE


def test_a_job_that_comes_to_a_wave_late_reads_it_from_its_beginning() -> None:
    scene = Scene()
    scene.release(1, V1)
    job = scene.job()
    run(scene, job)
    scene.now_ms += 1_000
    scene.release(2, V2, CANARY)
    scene.now_ms += 3_000
    scene.beat(2, V2)
    good(scene)

    async def requests_first() -> None:
        # What stands on another topic may reach the job before the release does.
        for topic in (REQUESTS.name, FLEET.name, RELEASES.name):
            for partition in range(scene.log.partitions(topic)):
                for record in list(scene.log.read(topic, partition, job._next[topic, partition])):
                    await job.take(record)

    asyncio.run(requests_first())
    run(scene, job, ticks=1)
    assert [v.evidence.candidate.requests for v in verdicts(scene)] == [300]


def test_an_operator_pauses_resumes_and_aborts() -> None:
    scene = canary()
    job = scene.job()
    scene.say(OPERATOR, RolloutPaused(model="m", sequence=2, author="op"))
    good(scene)
    run(scene, job)
    assert not verdicts(scene), "a pause passes nothing"
    scene.say(OPERATOR, RolloutResumed(model="m", sequence=2, author="op"))
    run(scene, job)
    assert not verdicts(scene), "the wave began anew"
    scene.say(OPERATOR, RolloutAborted(model="m", sequence=2, author="op"))
    run(scene, job)
    assert scene.rollout.returned
    paused = canary()
    paused.say(OPERATOR, RolloutPaused(model="m", sequence=2, author="op"))
    fails(paused)
    run(paused, paused.job())
    assert paused.rollout.status is Status.HALTED, "a pause halts what fails"


def test_a_verdict_that_the_log_lost_is_said_again() -> None:
    scene = canary()
    job = scene.job()
    run(scene, job)
    good(scene)
    scene.log.fail_next(1)
    with pytest.raises(Unreachable):
        run(scene, job)
    run(scene, job)
    assert not verdicts(scene), "it may yet have been written"
    scene.now_ms += 10_000
    scene.beat(2, V2)
    scene.beat(2, V2, node="n-2")
    run(scene, job, ticks=1)
    assert [v.step for v in verdicts(scene)] == [0]


class Away:
    def put_bytes(self, key: str, data: bytes) -> bool:
        raise Unreachable("S3", "nowhere", "it is away")


class Store(dict[str, bytes]):
    def put_bytes(self, key: str, data: bytes) -> bool:
        self[key] = data
        return True


def test_what_was_compared_is_stored_and_a_store_that_is_away_delays_nothing() -> None:
    scene, store = canary(), Store()
    job = scene.job(store)
    run(scene, job)
    fails(scene)
    run(scene, job)
    (halt,) = verdicts(scene)
    (key,) = store
    assert halt.evidence.archive in key
    assert Comparison.of_archive(store[key]).candidate == halt.evidence.candidate
    away = canary()
    job = away.job(Away())
    run(away, job)
    fails(away)
    run(away, job)
    assert verdicts(away)[0].evidence.archive == ""
