"""Gates: may a rollout go on? A judgement on the wave in force, and the event that says it. PURE.

    fail          a worker will not serve the candidate · it fails more requests, is slower, or answers differently by more
                  than the plan allows: said as soon as it is so
    pass          the wave has lasted `hold_s`, every worker that is heard of serves the candidate, it has answered
                  `min_samples` requests, and enough answers were compared where a shadow was asked for
    inconclusive  that was not so within `max_wait_s`

Laws: too few samples never pass; a failure is said before the samples are complete only if the rest of them could not
mend it; a release at once is held to its workers alone; the same records and the same `now` give the same judgement,
whatever their order or repetition. `now_ms` is the broker's clock. It must not know how records come, or who signs.
"""

from __future__ import annotations

from typing import Final

import msgspec

from schemas.events import AGENT, Evidence, Objection, OnFailure, RolloutAdvanced, RolloutHalted, Verdict
from schemas.events.rollouts import MAX_OBJECTIONS
from streams.folds import fleet as fleets
from streams.folds.comparison import Comparison, Subject
from streams.folds.fleet import Fleet
from streams.folds.rollouts import Rollout, Status

# A worker that was silent for longer is no witness, for or against.
FRESH_MS: Final = 10_000
# A worker tries again what it could not load; so long it may.
MENDS_MS: Final = 5_000
# A share is judged of no fewer requests than this: one failed request among ten is no tenth.
FEWEST: Final = 100
# A 99th percentile of fewer answers is their slowest.
FEWEST_LATENCIES: Final = 200
SERVING: Final = ("live", "forwarded")


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """`verdict` is None while there is none yet; `reason` then says what is missing. `evidence` lacks its ranges."""

    verdict: Verdict | None
    reason: str
    evidence: Evidence


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """The workers of the wave's regions that were heard of, those that serve the candidate, and those that will not."""

    workers: int
    live: int
    objections: tuple[Objection, ...]


def subject_of(rollout: Rollout) -> Subject:
    """What the wave in force is about."""
    return Subject(
        model=rollout.wanted.model,
        sequence=rollout.wanted.sequence,
        stable=rollout.before.digest if rollout.before is not None else "",
        candidate=rollout.wanted.digest,
        regions=rollout.wave.regions,
        since_ms=rollout.since_ms,
        compare=rollout.wanted.released.plan.gates.compare,
    )


def standing_of(fleet: Fleet, subject: Subject, now_ms: int) -> Standing:
    """By each worker's last beat, and by what it and its agent reported since the release."""
    heard = [
        worker.beat
        for worker in fleet.workers.values()
        if not worker.left
        and now_ms - worker.received_ms <= FRESH_MS
        and fleets.current(fleet, worker)
        and (not subject.regions or worker.beat.region in subject.regions)
    ]
    live, objections = 0, set()
    for beat in heard:
        mine = [m for m in beat.models if (m.name, m.sequence) == (subject.model, subject.sequence)]
        report = fleet.reports.get((beat.node, beat.worker, subject.model, subject.sequence))
        if any(m.state in SERVING for m in mine) or (report is not None and report.outcome == "live"):
            live += 1
        elif report is not None and now_ms - report.received_ms >= MENDS_MS:
            objections.add(Objection(region=beat.region, node=beat.node, worker=beat.worker, cause=report.reason))
        agents = fleet.reports.get((beat.node, AGENT, subject.model, subject.sequence))
        if agents is not None and agents.outcome == "rejected" and not agents.retrying:
            objections.add(Objection(region=beat.region, node=beat.node, worker=AGENT, cause=agents.reason))
    return Standing(workers=len(heard), live=live, objections=tuple(sorted(objections)[:MAX_OBJECTIONS]))


def judge(rollout: Rollout, comparison: Comparison, fleet: Fleet, now_ms: int) -> Judgement:
    """The wave in force at `now_ms`, by what `comparison` and `fleet` have taken."""
    return judged(rollout, comparison, standing_of(fleet, comparison.subject, now_ms), now_ms)


def judged(rollout: Rollout, comparison: Comparison, standing: Standing, now_ms: int) -> Judgement:
    """As `judge`, where the standing of the workers is known already."""
    evidence = Evidence(
        since_ms=rollout.since_ms,
        until_ms=now_ms,
        regions=comparison.subject.regions,
        stable=comparison.stable,
        candidate=comparison.candidate,
        compared=comparison.compared,
        disagreements=comparison.disagreements,
        workers=standing.workers,
        live=standing.live,
        objections=standing.objections,
    )

    def said(verdict: Verdict | None, reasons: list[str]) -> Judgement:
        return Judgement(verdict=verdict, reason="; ".join(reasons)[:1_000], evidence=evidence)

    if failures := [*_objected(standing), *_worse(rollout, comparison)]:
        return said(Verdict.FAIL, failures)
    if rollout.status is not Status.ROLLING:
        return said(None, [f"the rollout is {rollout.status}"])
    missing = _missing(rollout, comparison, standing, now_ms)
    if not missing:
        return said(Verdict.PASS, [_good(evidence)])
    waited_s = (now_ms - rollout.since_ms) / 1e3
    if 0 < rollout.wave.max_wait_s <= waited_s:
        return said(Verdict.INCONCLUSIVE, [*missing, f"after {waited_s:.0f} s"])
    return said(None, missing)


def decided(rollout: Rollout, judgement: Judgement, evidence: Evidence) -> RolloutAdvanced | RolloutHalted | None:
    """The event that says the judgement; None where there is none yet. `evidence` is the judgement's, with its ranges."""
    wanted = rollout.wanted
    if judgement.verdict is None:
        return None
    if judgement.verdict is Verdict.PASS:
        return RolloutAdvanced(
            model=wanted.model,
            sequence=wanted.sequence,
            step=rollout.step,
            verdict=judgement.verdict,
            reason=judgement.reason,
            evidence=evidence,
        )
    failed = judgement.verdict is Verdict.FAIL
    return RolloutHalted(
        model=wanted.model,
        sequence=wanted.sequence,
        step=rollout.step,
        verdict=judgement.verdict,
        reason=judgement.reason,
        rollback=failed and wanted.released.on_failure is OnFailure.ROLLBACK,
        evidence=evidence,
    )


def _objected(standing: Standing) -> list[str]:
    return [f"{o.node} does not serve it: {o.cause}" for o in standing.objections[:3]]


def _worse(rollout: Rollout, comparison: Comparison) -> list[str]:
    gates, wave = rollout.wanted.released.plan.gates, rollout.wave
    stable, candidate, found = comparison.stable, comparison.candidate, list[str]()
    if rollout.at_once:
        return found
    if stable.requests < FEWEST:
        # Where the candidate answers nearly everything: as it was when the wave before was judged.
        stable = rollout.usual
    # What it might still have failed when its samples are complete.
    of = max(candidate.requests, wave.min_samples, FEWEST)
    for count, usual, what in (
        (candidate.errors, stable.error_rate, "failed"),
        (candidate.refused, stable.refused_rate, "were refused"),
    ):
        if count > (usual + gates.max_error_rise) * of:
            found.append(f"{count} of {candidate.requests} requests {what}, and {usual:.2%} of the stable release's")
    beside, own = comparison.computed
    if stable is rollout.usual:
        beside = stable.requests if stable.p99_ms > 0 else 0
    if min(beside, own) >= FEWEST_LATENCIES:
        allowed = max(stable.p99_ms * gates.max_p99_ratio, stable.p99_ms + gates.p99_slack_ms)
        if candidate.p99_ms > allowed:
            found.append(f"p99 {candidate.p99_ms:.1f} ms, and {stable.p99_ms:.1f} ms of the stable release's")
    if comparison.disagreements > gates.max_disagreement * max(comparison.compared, gates.min_compared):
        found.append(f"{comparison.disagreements} of {comparison.compared} compared answers differ")
    return found


def _missing(rollout: Rollout, comparison: Comparison, standing: Standing, now_ms: int) -> list[str]:
    wave, released, found = rollout.wave, rollout.wanted.released, []
    held_s = (now_ms - rollout.since_ms) / 1e3
    if held_s < wave.hold_s:
        found.append(f"{held_s:.0f} of {wave.hold_s:.0f} s are over")
    if not standing.workers or standing.live < standing.workers:
        found.append(f"{standing.live} of {standing.workers} workers serve it")
    if comparison.candidate.requests < wave.min_samples:
        found.append(f"{comparison.candidate.requests} of {wave.min_samples} requests were answered")
    # Where the candidate answers everything, there is nothing to compare with.
    drift = released.shadow_percent > 0 and wave.percent < 100 and rollout.before is not None
    if drift and comparison.compared < released.plan.gates.min_compared:
        found.append(f"{comparison.compared} of {released.plan.gates.min_compared} answers were compared")
    return found


def _good(evidence: Evidence) -> str:
    candidate, stable = evidence.candidate, evidence.stable
    return (
        f"{evidence.live} workers serve it, {candidate.requests} requests, {candidate.errors} failed,"
        f" p99 {candidate.p99_ms:.1f} ms beside {stable.p99_ms:.1f} ms, {evidence.disagreements} of"
        f" {evidence.compared} compared answers differ"
    )
