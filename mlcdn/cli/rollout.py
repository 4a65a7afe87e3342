"""``mlcdn rollout show, pause, resume, abort`` and ``mlcdn gate explain, recompute``: waves, and what they were judged by."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import msgspec
import typer

from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.receipts import Reason, store_of
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from origin.rollouts import Operator, Said, rollout_of
from schemas.events import Evidence, Side
from streams.audit import gates
from streams.audit.control import At, fold_releases
from streams.folds.comparison import MAX_ARCHIVE_BYTES
from streams.folds.rollouts import Rollout, Status

rollout = typer.Typer(help="A release on its way through its waves.", no_args_is_help=True)
gate = typer.Typer(help="Verdicts, and what they rest on.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="Model name.")]
EventId = Annotated[str, typer.Argument(help="Event id of a verdict: `mlcdn rollout show` and `audit story` name it.")]


@rollout.command()
def show(model: Model, json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """The waves of the newest release, which is in force, and every verdict so far."""
    target = Target.at(directory)
    state, _ = fold_releases(target.reader, target.roots, At())
    found = rollout_of(state.models.get(model), model)
    verdicts = gates.verdicts(target.reader, target.roots, model, found.wanted.sequence)
    said = _document(found) | {"verdicts": msgspec.to_builtins(verdicts)}
    if json:
        output.document(said)
        return
    stable = f"{said['stable']['version']}" if said["stable"] else "nothing"
    output.say(f"{model} {found.wanted.version} (sequence {found.wanted.sequence}): {said['status']}, stable: {stable}")
    output.table(
        ("wave", "regions", "percent", "samples", "hold", "longest", ""),
        [
            (n + 1, ", ".join(w.regions) or "all", f"{w.percent:g}", w.min_samples, f"{w.hold_s:g} s",
             f"{w.max_wait_s:g} s" if w.max_wait_s else "", _mark(found, n))
            for n, w in enumerate(found.waves)
        ],
    )  # fmt: skip
    for verdict in verdicts:
        did = f" (did not act: {verdict.refused})" if verdict.refused else ""
        output.say(f"{verdict.time}  wave {verdict.step + 1} {verdict.verdict}: {verdict.reason}{did}  [{verdict.id}]")


@rollout.command()
def pause(model: Model, reason: Reason = "", json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """Stay at the wave in force; a gate that fails still takes everything back."""
    _say("pause", model, reason, json, directory)


@rollout.command()
def resume(model: Model, reason: Reason = "", json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """Go on from the wave that was paused or halted; it begins anew."""
    _say("resume", model, reason, json, directory)


@rollout.command()
def abort(model: Model, reason: Reason = "", json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """End the rollout: every node goes back to the stable release."""
    _say("abort", model, reason, json, directory)


@gate.command()
def explain(event_id: EventId, json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """What a verdict says, and every figure that it rests on."""
    target = Target.at(directory)
    found = gates.explain(target.reader, target.roots, event_id)
    if json:
        output.document(found)
        return
    event = found.event
    output.say(f"{event.model} sequence {event.sequence}, wave {event.step + 1}: {event.verdict}: {event.reason}")
    output.say(f"signed by {found.source} at {found.time}, position {found.position}")
    if found.refused:
        output.say(f"did not act: {found.refused}")
    _evidence(event.evidence)


@gate.command()
def recompute(event_id: EventId, json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """Read the same records again and judge anew; exit 1 where another verdict comes of it."""
    target = Target.at(directory)
    store = store_of(target)
    found = gates.recompute(
        target.reader, target.roots, event_id, lambda key: store.get(key, max_bytes=MAX_ARCHIVE_BYTES)
    )
    if json:
        output.document(found)
    else:
        output.say(f"signed {found.signed}; by the {found.source} {found.verdict or 'no verdict'}: {found.reason}")
        for difference in found.differences:
            output.say(f"differs: {difference}")
    if not found.same:
        raise typer.Exit(1)


def _say(word: str, model: str, reason: str, json: bool, directory: Dir) -> None:
    target = Target.at(directory)

    async def act() -> Said:
        writer = target.writer()
        try:
            operator = Operator(writer, target.reader, target.roots)
            return await operator.say(word, model, author=target.settings.author, reason=reason)
        finally:
            await writer.close()

    said = asyncio.run(act())
    if json:
        output.document({"event_id": said.event_id, "position": said.position} | _document(said.rollout))
        return
    where = f"wave {said.rollout.step + 1} of {len(said.rollout.waves)}"
    output.say(f"{model} {said.rollout.wanted.version}: {said.rollout.status}, {where}, position {said.position}")


def _document(found: Rollout) -> dict[str, Any]:
    stable = found.stable
    return {
        "model": found.wanted.model,
        "version": found.wanted.version,
        "sequence": found.wanted.sequence,
        "digest": found.wanted.digest,
        "status": str(found.status),
        "returned": found.returned,
        "step": found.step,
        "waves": msgspec.to_builtins(found.waves),
        "since": _time(found.since_ms),
        "stable": None if stable is None else {"version": stable.version, "digest": stable.digest},
    }


def _mark(found: Rollout, wave: int) -> str:
    if wave < found.step:
        return "passed"
    if wave > found.step:
        return ""
    if found.status is not Status.ROLLING:
        return str(found.status)
    return f"for {max(0, time.time_ns() // 1_000_000 - found.since_ms) / 1e3:.0f} s"


def _evidence(evidence: Evidence) -> None:
    where = ", ".join(evidence.regions) or "all regions"
    output.say(f"{where}, {_time(evidence.since_ms)} to {_time(evidence.until_ms)}")
    output.table(
        ("release", "digest", "requests", "failed", "refused", "p50 ms", "p99 ms"),
        [_side("stable", evidence.stable), _side("candidate", evidence.candidate)],
    )
    output.say(f"{evidence.disagreements} of {evidence.compared} compared answers differ")
    output.say(f"{evidence.live} of {evidence.workers} workers serve it")
    for objection in evidence.objections:
        output.say(f"objects: {objection.region} {objection.node} worker {objection.worker}: {objection.cause}")
    for r in evidence.ranges:
        if r.end > r.start:
            output.say(f"read: {r.topic} {r.partition} from {r.start} to before {r.end}")
    output.say(f"archived as {evidence.archive}" if evidence.archive else "nothing was archived")


def _side(name: str, side: Side) -> tuple[object, ...]:
    return (
        name,
        side.digest[:12],
        side.requests,
        side.errors,
        side.refused,
        f"{side.p50_ms:.2f}",
        f"{side.p99_ms:.2f}",
    )


def _time(timestamp_ms: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(timestamp_ms / 1e3)) + f".{timestamp_ms % 1000:03}Z"
