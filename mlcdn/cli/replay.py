"""``mlcdn replay-requests``: a candidate answers what clients have asked, before any client asks it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.receipts import store_of
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from origin import replay as gate
from origin.replay import RegionReport, Report
from schemas import names
from schemas.errors import BadInput
from schemas.events import Compare
from schemas.topics import RECORDINGS
from streams.audit.control import At, fold_releases
from streams.audit.recordings import last_recorded
from streams.log.reader import KafkaReader


def register(app: typer.Typer) -> None:
    app.command("replay-requests")(replay_requests)


def replay_requests(
    model: Annotated[str, typer.Argument(help="Model name.")],
    version: Annotated[
        str | None, typer.Option(help="The release to ask; default the one that was published last.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="An ONNX file to ask instead, which nobody has released.")] = None,
    region: Annotated[str | None, typer.Option(help="Only what this region recorded; default every region.")] = None,
    last: Annotated[int, typer.Option(help="So many recorded requests of each region, the newest.")] = 1_000,
    at: Annotated[
        str | None,
        typer.Option(help="Only what was recorded until then: position on the releases topic, or ISO 8601 time."),
    ] = None,
    compare: Annotated[
        Compare | None, typer.Option(help="What makes two answers differ; default as the release's plan says.")
    ] = None,
    max_disagreement: Annotated[
        float | None, typer.Option(help="Share of answers that may differ; default that of the release's plan.")
    ] = None,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Ask a candidate the last recorded requests of each region; exit 1 where too many of its answers differ."""
    names.name(model, "model")
    if file is not None and version is not None:
        raise BadInput("say --version or --file, not both")
    if max_disagreement is not None:
        names.within(max_disagreement, 0, 1, "--max-disagreement")
    target = Target.at(directory)
    if file is not None:
        candidate = gate.file_candidate(file)
    else:
        state, _ = fold_releases(target.reader, target.roots, At())
        candidate = gate.released_candidate(state.models.get(model), model, version)
    reader = KafkaReader(target.settings.recordings_kafka or target.settings.kafka)
    with output.watched(reader, [RECORDINGS.name], shown=not json) as watched:
        samples = last_recorded(watched, model, last, region, until_ms=At.parse(at).time(target.reader))
    with tempfile.TemporaryDirectory(prefix="mlcdn-replay-") as folder:
        path = file if file is not None else gate.fetched(candidate, store_of(target), Path(folder))
        report = gate.replay(
            candidate, path, model, samples, last=last, compare=compare, max_disagreement=max_disagreement
        )
    if json:
        output.document(report)
    else:
        _say(report)
    if not report.passed:
        raise typer.Exit(1)


def _say(report: Report) -> None:
    output.say(f"{report.model} {report.version} {report.digest[:12]}, the last {report.last} of each region")
    output.table(
        ("region", "recorded", "compared", "differ", "failed", "redacted", "max difference", "top-1"),
        [
            (r.region, r.recorded, r.rows, r.disagreements, r.failed, r.redacted, f"{r.max_difference:.6g}",
             f"{r.top1_agreements} of {r.top1_rows}" if r.top1_rows else "")
            for r in report.regions
        ],
    )  # fmt: skip
    for r in report.regions:
        _details(r)
    if not any(r.rows + r.failed for r in report.regions):
        output.say("nothing was compared: no recorded request of it can be asked again")
        return
    verdict = "passed" if report.passed else "failed"
    output.say(
        f"{verdict}: {report.disagreement:.4%} differ ({report.compare}) or failed, {report.max_disagreement:.4%} may"
    )


def _details(report: RegionReport) -> None:
    for read in report.ranges:
        output.say(f"{report.region}: read {read.topic} {read.partition} from {read.start} to before {read.end}")
    for digest, rows in report.answered_by.items():
        output.say(f"{report.region}: {rows} were answered by {digest[:12]}")
    if report.first_difference:
        output.say(f"{report.region}: first difference at {report.first_difference}")
