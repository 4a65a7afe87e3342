"""A verdict asked again, and an operator's word: over a log in memory."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from origin.rollouts import Operator, wait_over
from schemas.errors import BadInput, Conflict, NotFound
from schemas.events import RolloutAdvanced, RolloutHalted, Verdict
from schemas.topics import FLEET, REQUESTS
from streams.audit import gates
from streams.folds.rollouts import Status
from streams.log.local import LocalLog
from tests.core.test_gates import CANARY, Store, canary, fails, good, run
from tests.rollout_scene import JOB, OPERATOR, ROOTS, V2, V3, Scene


class Aged:
    """The log of which retention has taken the requests and the fleet."""

    def __init__(self, log: LocalLog) -> None:
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def watermarks(self, topic: str, partition: int) -> tuple[int, int]:
        low, high = self._log.watermarks(topic, partition)
        return (high, high) if topic in (REQUESTS.name, FLEET.name) else (low, high)


def halted(store: Store) -> tuple[Scene, str]:
    scene = canary()
    job = scene.job(store)
    run(scene, job)
    good(scene)
    fails(scene)
    run(scene, job)
    (line,) = gates.verdicts(scene.log, ROOTS, "m", 2)
    return scene, line.id


def test_a_verdict_is_explained_and_comes_out_again() -> None:
    store = Store()
    scene, verdict = halted(store)
    explained = gates.explain(scene.log, ROOTS, verdict)
    assert isinstance(explained.event, RolloutHalted)
    assert (explained.rollout.status, explained.refused) == (Status.ROLLING, "")
    fails(scene)  # what came later is not of it
    again = gates.recompute(scene.log, ROOTS, verdict, store.__getitem__)
    assert (again.source, again.same, again.differences) == ("log", True, ())
    aged = gates.recompute(Aged(scene.log), ROOTS, verdict, store.__getitem__)
    assert (aged.source, aged.same, aged.differences) == ("archive", True, ())


def test_a_verdict_that_the_records_do_not_bear_out_is_named() -> None:
    scene = canary()
    good(scene)
    job = scene.job()
    run(scene, job, ticks=1)
    (line,) = gates.verdicts(scene.log, ROOTS, "m", 2)
    passed = gates.explain(scene.log, ROOTS, line.id).event
    assert isinstance(passed, RolloutAdvanced)
    lying = canary()
    lying.requests(V2, 300, failed=200)
    said = lying.say(JOB, RolloutAdvanced(
        model="m", sequence=2, step=0, verdict=Verdict.PASS, reason="all is well", evidence=passed.evidence
    ))  # fmt: skip
    again = gates.recompute(lying.log, ROOTS, said.id, Store().__getitem__)
    assert (again.signed, again.verdict, again.same) == (Verdict.PASS, Verdict.FAIL, False)
    assert any(d.startswith("candidate:") for d in again.differences)


def test_a_verdict_without_records_or_archive() -> None:
    scene, verdict = halted(Store())
    spoilt = dict.fromkeys(("any",), b"x")
    with pytest.raises(NotFound, match="no verdict"):
        gates.explain(scene.log, ROOTS, "no-such-id")
    with pytest.raises(BadInput):
        gates.recompute(Aged(scene.log), ROOTS, verdict, lambda _: spoilt["any"])
    bare = canary()
    job = bare.job()
    run(bare, job)
    fails(bare)
    run(bare, job)
    (line,) = gates.verdicts(bare.log, ROOTS, "m", 2)
    with pytest.raises(NotFound, match="nothing was archived"):
        gates.recompute(Aged(bare.log), ROOTS, line.id, spoilt.__getitem__)


def test_an_operators_word_is_read_back() -> None:
    scene = canary()
    operator = Operator(scene.writer(OPERATOR), scene.log, ROOTS)

    def say(word: str, model: str = "m") -> Status:
        return asyncio.run(operator.say(word, model, author="op", reason="")).rollout.status

    assert say("pause") is Status.PAUSED
    with pytest.raises(Conflict, match="pause did not act"):
        say("pause")
    assert say("resume") is Status.ROLLING
    assert say("abort") is Status.ABORTED
    with pytest.raises(NotFound, match="was ever released"):
        say("pause", "other")


async def _ended(scene: Scene, position: int, later: Any) -> Any:
    waiting = asyncio.create_task(wait_over(scene.log, ROOTS, "m", position, timeout_s=5))
    await asyncio.sleep(0)
    await later()
    return await waiting


def test_waiting_ends_with_the_rollout() -> None:
    scene = Scene()
    scene.release(1, V3)
    position = scene.release(2, V2, CANARY).record.offset
    operator = Operator(scene.writer(OPERATOR), scene.log, ROOTS)
    ended = asyncio.run(_ended(scene, position, lambda: operator.say("abort", "m", author="op", reason="")))
    assert (ended.status, ended.done, ended.step, ended.waves) == ("aborted", False, 0, 2)
    still = Scene()
    still.release(1, V3)
    position = still.release(2, V2, CANARY).record.offset
    assert asyncio.run(wait_over(still.log, ROOTS, "m", position, timeout_s=0.05)).status == "rolling"
    still.release(3, V3, CANARY)
    assert asyncio.run(wait_over(still.log, ROOTS, "m", position, timeout_s=5)).status == "superseded"
