"""``mlcdn audit state, story, verify, export``: the log asked again. Nothing is written but the files that are asked for."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from schemas.errors import BadInput, Conflict
from schemas.topics import FLEET, INVALIDATIONS, RELEASES, TOPICS
from streams.audit import export_file
from streams.audit.control import At
from streams.audit.export import line as json_line
from streams.audit.export import plan, told
from streams.audit.replay import state_at
from streams.audit.story import story as tell
from streams.audit.verify import verify as judge
from streams.folds.checkpoints import Held

_AUDITED = (RELEASES.name, INVALIDATIONS.name, FLEET.name)

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
    with output.watched(target.reader, _AUDITED, shown=not json) as reader:
        found = state_at(reader, target.roots, At.parse(at), region)
    if json:
        output.document(found)
        return
    moment = f" ({_time(found.timestamp_ms)})" if found.timestamp_ms is not None else ""
    output.say(f"position {found.position}{moment}  state {found.state_digest[:16]}")
    behind = {(d.model, d.sequence): d for d in found.decisions}
    output.table(
        ("told: model", "percent", "version", "sequence", "digest", "by", "why", "event"),
        [(s.seat, f"{s.percent:g}", w.version, w.sequence, w.digest[:12], d and d.author, d and d.reason, w.cause)
         for s in found.told for w in (s.wanted,) for d in (behind.get((w.model, w.sequence)),)],
    )  # fmt: skip
    output.say("")
    output.table(
        ("reported: region", "node", "worker", "model", "version", "digest", "state", "at", "by", "why", "event"),
        [(s.region, s.node, s.worker, s.model if s.channel != "candidate" else f"{s.model}@candidate", s.version,
          s.digest[:12], "left" if s.left else s.state, _time(s.said_at_ms), d and d.author, d and d.reason, d and d.id)
         for s in found.served for d in (s.decided_by,)],
    )  # fmt: skip


@app.command()
def story(
    what: Annotated[
        str,
        typer.Argument(
            help="A model, an event id, a digest (an answer's mlcdn-digest), or positions such as 12/34 (its mlcdn-position)."
        ),
    ],
    model: Annotated[str | None, typer.Option(help="With positions: only what was in force of this model.")] = None,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """What happened to a model, or because of an event, as one timeline with causes."""
    target = Target.at(directory)
    with output.watched(target.reader, _AUDITED, shown=not json) as reader:
        lines = tell(reader, target.roots, what, model)
    if json:
        output.document(lines)
        return
    for line in lines:
        refused = f"  REFUSED: {line.refused}" if line.refused else ""
        cause = f"  because of {line.cause}" if line.cause else ""
        output.say(f"{line.time}  {line.kind:<19} {line.what}{refused}  [{line.id}]{cause}")


@app.command()
def verify(
    full: Annotated[bool, typer.Option("--full", help="Check every signature, whatever checkpoints say.")] = False,
    since: Annotated[
        Path | None, typer.Option(help="File of an earlier --remember: the checkpoints in it must still hold.")
    ] = None,
    remember: Annotated[
        Path | None,
        typer.Option(help="File for the last checkpoints that held; left as it is where something differs."),
    ] = None,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Judge every signed record again; hold topics against checkpoints and nodes against the log; exit 1 if one differs."""
    target = Target.at(directory)
    known = _remembered(since) if since is not None else None
    with output.watched(target.reader, _AUDITED, shown=not json) as reader:
        found = judge(reader, target.roots, now_ms=time.time_ns() // 1_000_000, since=known, full=full)
    if remember is not None and found.ok:
        _remember(remember, found.checkpoints)
    if json:
        output.document(msgspec.to_builtins(found) | {"ok": found.ok})
    else:
        output.say(
            f"{found.records} records, {found.checked} signatures checked here, releases to {found.releases_position},"
            f" invalidations to {found.invalidations_position}, state {found.state_digest[:16]}",
        )
        for refused in found.refused:
            output.say(f"did not act: {refused.topic} {refused.position}: {refused.refusal} {refused.detail}")
        for topic, held in found.checkpoints.items():
            output.say(f"{topic} is vouched for to position {held.position}")
        for alarm in found.alarms:
            output.say(f"ALARM: {alarm.topic} is {alarm.reason}: {alarm.what}")
        for stale in found.stale:
            output.say(f"no fresh beat: {stale}")
        for difference in found.differences:
            output.say(f"DIFFERS: {difference.region} {difference.node} worker {difference.worker}: {difference.what}")
        output.say(f"{found.nodes} live workers, {len(found.differences)} differences")
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def export(
    topics: Annotated[
        list[str] | None, typer.Option(help="A topic, with or without mlcdn. before it; may be repeated; default all.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--from", help="Position on the releases topic, or ISO 8601 time; default the beginning."),
    ] = None,
    until: Annotated[str | None, typer.Option("--to", help="The same, and it is included; default now.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; default stdout.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an export into --out that was cut short.")
    ] = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Every record as a line of JSON, the refused with their reason; the same log gives the same bytes."""
    if resume and out is None:
        raise BadInput("--resume goes on with a file: say which with --out")
    target = Target.at(directory)
    names = [t if t in TOPICS else f"mlcdn.{t}" for t in topics] if topics else list(TOPICS)
    with output.watched(target.reader, names, shown=True) as reader:
        if out is None:
            what = plan(reader, target.roots, names, At.parse(since), At.parse(until))
            for said in told(reader, what, what.starts()):
                sys.stdout.buffer.write(json_line(said))
            sys.stdout.buffer.flush()
            return
        asked = (",".join(sorted(set(names))), since or "", until or "")
        try:
            if not (resume and export_file.is_begun(out)):
                export_file.begin(out, plan(reader, target.roots, names, At.parse(since), At.parse(until)), asked)
            point = export_file.read_point(out)
            if point is None:
                output.progress(f"{out} is complete")
                return
            if point.asked != asked and (topics or since or until):
                raise BadInput(f"{out} began with other --topics, --from or --to: {' '.join(point.asked)}")
            lines = export_file.carry_on(out, reader)
        except OSError as error:
            raise Conflict(f"{out}: {error.strerror}; --resume goes on once that is mended") from None
    output.progress(f"{lines} lines in {out}")


def _remembered(path: Path) -> dict[str, Held]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Held])
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise BadInput(f"{path} is no file of --remember: {error}") from None


def _remember(path: Path, checkpoints: dict[str, Held]) -> None:
    """Whole or not at all."""
    half = path.with_name(f"{path.name}.half")
    try:
        half.write_bytes(msgspec.json.encode(checkpoints, order="deterministic"))
        half.replace(path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None


def _time(timestamp_ms: int | None) -> str:
    if timestamp_ms is None:
        return ""
    moment = datetime.fromtimestamp(timestamp_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
