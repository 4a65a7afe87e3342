"""``mlcdn audit state, story, verify``: the log asked again. Read-only."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated

import msgspec
import typer

from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from streams.audit.control import At
from streams.audit.replay import state_at
from streams.audit.story import story as tell
from streams.audit.verify import verify as judge

app = typer.Typer(help="Replay the log: what was told, what was served, whether the two agree.", no_args_is_help=True)


@app.command()
def state(
    at: Annotated[
        str | None, typer.Option(help="Position on the releases topic, or ISO 8601 time; default now.")
    ] = None,
    region: Annotated[str | None, typer.Option(help="Only what this region reported.")] = None,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """What every region was told to serve at a moment, and what it reported serving."""
    target = Target.at(directory)
    found = state_at(target.reader, target.roots, At.parse(at), region)
    if json:
        output.document(found)
        return
    moment = f" ({_time(found.timestamp_ms)})" if found.timestamp_ms is not None else ""
    output.say(f"position {found.position}{moment}  state {found.state_digest[:16]}")
    output.table(
        ("told: model", "version", "sequence", "digest", "position", "author", "reason"),
        [(w.model, w.version, w.sequence, w.digest[:12], w.position, w.released.author, w.released.reason)
         for w in found.told],
    )  # fmt: skip
    output.say("")
    output.table(
        ("reported: region", "node", "worker", "model", "version", "digest", "state", "at"),
        [(s.region, s.node, s.worker, s.model, s.version, s.digest[:12], s.state, _time(s.said_at_ms))
         for s in found.served],
    )  # fmt: skip


@app.command()
def story(
    what: Annotated[str, typer.Argument(help="A model, an event id, or an artifact's digest.")],
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """What happened to a model, or because of an event, as one timeline with causes."""
    target = Target.at(directory)
    lines = tell(target.reader, target.roots, what)
    if json:
        output.document(lines)
        return
    for line in lines:
        refused = f"  REFUSED: {line.refused}" if line.refused else ""
        cause = f"  because of {line.cause}" if line.cause else ""
        output.say(f"{line.time}  {line.kind:<19} {line.what}{refused}  [{line.id}]{cause}")


@app.command()
def verify(json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """Judge every signed record again; hold topics against checkpoints and nodes against the log; exit 1 if one differs."""
    target = Target.at(directory)
    found = judge(target.reader, target.roots, now_ms=time.time_ns() // 1_000_000)
    if json:
        output.document(msgspec.to_builtins(found) | {"ok": found.ok})
    else:
        output.say(
            f"{found.records} records, releases to {found.releases_position},"
            f" invalidations to {found.invalidations_position}, state {found.state_digest[:16]}",
        )
        for refused in found.refused:
            output.say(f"did not act: {refused.topic} {refused.position}: {refused.refusal} {refused.detail}")
        for topic, position in found.checkpoints.items():
            output.say(f"{topic} is vouched for to position {position}")
        for alarm in found.alarms:
            output.say(f"ALARM: {alarm.topic} is {alarm.reason}: {alarm.what}")
        for stale in found.stale:
            output.say(f"no fresh beat: {stale}")
        for difference in found.differences:
            output.say(f"DIFFERS: {difference.region} {difference.node} worker {difference.worker}: {difference.what}")
        output.say(f"{found.nodes} live workers, {len(found.differences)} differences")
    if not found.ok:
        raise typer.Exit(1)


def _time(timestamp_ms: int | None) -> str:
    if timestamp_ms is None:
        return ""
    moment = datetime.fromtimestamp(timestamp_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
