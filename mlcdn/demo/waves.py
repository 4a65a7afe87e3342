"""The demo under load: a swap, a canary that passes its gates, and one that is halted and taken back by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mlcdn.demo.command import Mlcdn, PromiseBroken, promise
from mlcdn.demo.digits import Digits
from mlcdn.demo.traffic import MODEL, Answers, Recompute, open_loop

TOKYO: Final = {"lat": "35.7", "lon": "139.7"}
PLACES: Final = (TOKYO, {"lat": "51.5", "lon": "-0.1"}, {"lat": "38.9", "lon": "-77.4"})
PLAN: Final = """\
[[waves]]
regions = ["tokyo"]
percent = 25
min_samples = 40
hold_s = 2
max_wait_s = 30

[[waves]]
hold_s = 1
max_wait_s = 30

[gates]
min_compared = 40
max_p99_ratio = 5       # two cores run the network, the load and this
p99_slack_ms = 100
max_disagreement = 0.1  # of answers that two honest models of these digits give
"""


async def under_load(router: str, digits: Digits, rate: float, act: Callable[[], Any]) -> tuple[Answers, Any]:
    """What `act` gives, and what the load saw from two seconds before it to two seconds after."""
    stop = asyncio.Event()
    load = asyncio.create_task(open_loop(router, digits.held_out, PLACES, rate, stop))
    await asyncio.sleep(2)
    try:
        came = await asyncio.to_thread(act)
        await asyncio.sleep(2)
    finally:
        stop.set()
    return await load, came


def check_load(answers: Answers, digits: Digits, artifacts: dict[str, Path], found: list[str]) -> None:
    """No request failed, and every answer is what the artifact that it names gives."""
    wrong = Recompute(artifacts, digits.held_out).wrong(answers.seen)
    versions = ", ".join(f"{d[:12]} {n}" for d, n in answers.by_digest.items())
    found.append(
        f"{answers.sent} sent in {answers.seconds:.1f} s ({answers.sent / answers.seconds:.0f}/s),"
        f" {answers.failed} failed, {wrong} wrong; p50 {answers.quantile(0.5):.1f} ms p99 {answers.quantile(0.99):.1f} ms",
    )
    found.append(f"answers by digest: {versions}; by region: {dict(answers.by_region)}")
    promise(answers.sent / answers.seconds >= 200, "the open loop fell below 200 requests a second")
    promise(answers.failed == 0, f"{answers.failed} requests failed: {answers.failures[:3]}")
    promise(wrong == 0, f"{wrong} answers are not what the artifact they name gives")


def until_halted(mlcdn: Mlcdn, seconds: float) -> dict[str, Any]:
    """The rollout, once a gate has halted it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        rollout: dict[str, Any] = mlcdn.json("rollout", "show", MODEL)
        if rollout["status"] == "halted":
            return rollout
        time.sleep(0.3)
    raise PromiseBroken(f"no gate halted the rollout within {seconds:g} s: it is {rollout['status']}")


@dataclass(frozen=True, slots=True)
class Waves:
    """Two rollouts by one plan."""

    mlcdn: Mlcdn
    router: str
    digits: Digits
    rate: float
    work: Path

    def good(self, before: str, after: str, found: list[str]) -> None:
        """It comes through, and no request fails."""
        answers, released = self._released("v3", self.digits.v3, 0)
        found += [f"wave {v['step'] + 1} {v['verdict']}: {v['reason']}" for v in released["rollout"]["verdicts"]]
        check_load(answers, self.digits, {before: self.digits.v2, after: self.digits.v3}, found)
        promise(released["rollout"]["status"] == "done", f"the rollout is {released['rollout']['status']}")
        promise(
            {n["digest"] for n in self.mlcdn.json("status", MODEL)["nodes"]} == {after}, "v3 is not live everywhere"
        )

    def bad(self, before: str, after: str, found: list[str]) -> None:
        """It is halted; every node is back; whoever had met it is told by the digest of the answer."""
        answers, released = self._released("v4", self.digits.v4, 1)
        verdict = released["rollout"]["verdicts"][-1]
        found.append(f"{released['rollout']['status']}: {verdict['reason']}")
        check_load(answers, self.digits, {before: self.digits.v3, after: self.digits.v4}, found)
        promise(released["rollout"]["status"] == "halted", f"the rollout is {released['rollout']['status']}")
        promise({n["digest"] for n in self.mlcdn.json("status", MODEL)["nodes"]} == {before}, "v3 does not serve on")
        self.mlcdn("gate", "recompute", verdict["id"])
        found.append(f"the verdict was recomputed from the log: mlcdn gate recompute {verdict['id']}")

    def _released(self, version: str, file: Path, code: int) -> tuple[Answers, dict[str, Any]]:
        plan = self.work / "waves.toml"
        plan.write_text(PLAN)
        words = ("publish", MODEL, str(file), "--version", version, "--plan", str(plan), "--shadow", "100", "--wait")
        answers, released = asyncio.run(
            under_load(self.router, self.digits, self.rate, lambda: self.mlcdn.json(*words, expect=code))
        )
        return answers, released
