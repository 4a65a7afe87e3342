"""What an event says, in one line for a person. PURE.

Laws: names, versions and figures stand as they were said, digests by their first twelve characters; who decided and why
is never left out. It must not know where an event stands in the log.
"""

from __future__ import annotations

from schemas.events import (
    ArtifactRejected,
    CacheInvalidated,
    Event,
    EventRejected,
    Evidence,
    InvalidationApplied,
    LogCheckpoint,
    ModelReleased,
    ModelRetired,
    ModelRolledBack,
    ModelSwapped,
    NodeBeat,
    NodeLeft,
    RolloutAborted,
    RolloutAdvanced,
    RolloutHalted,
    RolloutPaused,
    RolloutResumed,
    ShadowCompared,
    Side,
    SwapFailed,
    TrustChanged,
)


def describe(event: Event) -> str:
    """One line for a person."""
    return _decided(event) or _judged(event) or _reported(event) or event.kind


def _decided(event: Event) -> str | None:
    match event:
        case TrustChanged():
            granted = ", ".join(
                f"{g.label} may sign {'/'.join(g.kinds)} for {'/'.join(g.models)}" for g in event.grants
            )
            return f"trust: {granted or 'no grants'}; {len(event.revoked)} revoked, by {event.author}: {event.reason}"
        case ModelReleased():
            waves = f" in {len(event.plan.waves)} waves" if event.plan.waves else ""
            return (
                f"{event.model} {event.version} released{waves} as sequence {event.sequence} by {event.author}"
                f" ({event.digest[:12]}, {sum(a.size_bytes for a in event.artifacts)} bytes): {event.reason}"
            )
        case ModelRolledBack():
            return (
                f"{event.model} rolled back to {event.version} ({event.to_digest[:12]}) as sequence {event.sequence}"
                f" by {event.author}: {event.reason}"
            )
        case ModelRetired():
            return f"{event.model} retired as sequence {event.sequence} by {event.author}: {event.reason}"
        case CacheInvalidated():
            kind = "softly" if event.soft else "hard"
            return f"purged {kind} by {event.author}: {', '.join(map(str, event.scopes))}: {event.reason}"
        case RolloutPaused() | RolloutResumed() | RolloutAborted():
            verb = event.kind.removeprefix("Rollout").lower()
            return f"rollout of {event.model} sequence {event.sequence} {verb} by {event.author}: {event.reason}"
        case _:
            return None


def _judged(event: Event) -> str | None:
    match event:
        case RolloutAdvanced():
            return f"rollout of {event.model} sequence {event.sequence}: wave {event.step + 1} passed: {event.reason}"
        case RolloutHalted():
            back = "every node goes back to the stable release" if event.rollback else "it stays where it is"
            return (
                f"rollout of {event.model} sequence {event.sequence} halted at wave {event.step + 1}, {event.verdict}:"
                f" {event.reason}; {back} ({_evidence(event.evidence)})"
            )
        case LogCheckpoint():
            return f"vouches for everything to position {event.position} ({event.chain_sha256[:12]})"
        case _:
            return None


def _reported(event: Event) -> str | None:
    match event:
        case ModelSwapped():
            phases = ", ".join(f"{k} {v:.0f} ms" for k, v in event.ms.items())
            channel = "" if event.channel in ("", "stable") else f" as {event.channel}"
            return f"{event.node} worker {event.worker} serves {event.model} {event.version}{channel} ({phases})"
        case SwapFailed() | ArtifactRejected():
            verb = "rejected" if isinstance(event, ArtifactRejected) else "could not take over"
            return f"{event.node} {verb} {event.model} {event.version} at {event.phase}: {event.cause}"
        case ShadowCompared():
            return (
                f"{event.node} worker {event.worker} compared {event.rows} answers of {event.model} sequence"
                f" {event.sequence}: {event.disagreements} differ, by {event.max_difference:g} at most, {event.failed} failed"
            )
        case InvalidationApplied():
            return f"{event.node} obeys position {event.position} after {event.ms:.0f} ms"
        case NodeBeat():
            models = ", ".join(f"{m.name} {m.version} {m.state}" for m in event.models)
            return f"{event.node} worker {event.worker} is alive: {models or 'no models'}"
        case NodeLeft():
            return f"{event.node} worker {event.worker} left: {event.cause}"
        case EventRejected():
            return (
                f"{event.node} refused {event.topic} {event.partition}/{event.offset}: {event.refusal} {event.detail}"
            )
        case _:
            return None


def _evidence(evidence: Evidence) -> str:
    said = f"candidate {_side(evidence.candidate)}; stable {_side(evidence.stable)}"
    if evidence.compared:
        said += f"; {evidence.compared} compared, {evidence.disagreements} differ"
    if evidence.workers:
        said += f"; {evidence.live} of {evidence.workers} workers serve it"
    for objection in evidence.objections:
        said += f"; {objection.node} worker {objection.worker}: {objection.cause}"
    return said


def _side(side: Side) -> str:
    if not side.requests:
        return "no requests"
    return f"{side.requests} requests, {side.error_rate:.2%} errors, p99 {side.p99_ms:.1f} ms"
