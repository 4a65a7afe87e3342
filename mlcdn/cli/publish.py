"""``mlcdn publish``: a file, an object in S3 or an MLflow model becomes a release.

Law: what an option says wins over the settings file, and the file over the defaults; what neither says is not repeated
here, so that there is one place for every default.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from mlcdn.cli import output, receipts
from mlcdn.cli.output import Json
from mlcdn.cli.receipts import AllowMissing, Timeout, Wait
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from origin import plans, release_settings, sources
from origin.publish import Published, Publisher
from origin.receipts import FleetWatch
from origin.release_settings import Document
from schemas.events import OnFailure, Placement, TierUse
from streams.log.writer import wall_clock_ms


def register(app: typer.Typer) -> None:
    app.command()(publish)


def _print_schema(asked: bool) -> None:
    if asked:
        output.document(release_settings.json_schema())
        raise typer.Exit


def publish(
    model: Annotated[str, typer.Argument(help="Model name.")],
    source: Annotated[
        str,
        typer.Argument(
            help="ONNX file; s3://BUCKET/KEY, or a key in the network's bucket; models:/NAME/NUMBER, models:/NAME@ALIAS"
            " or runs:/RUN/PATH of MLflow."
        ),
    ],
    version: Annotated[
        str | None, typer.Option(help="Label; default MLflow's, or the digest's first 12 characters.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="TOML file with any field of a release; options win over it.")
    ] = None,
    files: Annotated[
        bool, typer.Option("--files", help="Release the files beside it too that its external data is in.")
    ] = False,
    golden: Annotated[Path | None, typer.Option(help=".npz of inputs and expected outputs.")] = None,
    rtol: Annotated[float | None, typer.Option(help="Relative tolerance of the golden test; default 1e-3.")] = None,
    atol: Annotated[float | None, typer.Option(help="Absolute tolerance of the golden test; default 1e-5.")] = None,
    placement: Annotated[Placement | None, typer.Option(help="Where it runs; default edge.")] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="all, the default: everywhere at once; safe: one region 5, 25, 100 %, then the rest; or a TOML file."
        ),
    ] = None,
    on_failure: Annotated[OnFailure | None, typer.Option(help="What a gate that fails does; default rollback.")] = None,
    shadow: Annotated[
        float | None, typer.Option(help="Percent of requests that the candidate answers too, to compare; default 0.")
    ] = None,
    ttl: Annotated[
        float | None, typer.Option(help="Seconds that a cached answer is fresh; 0 turns caching off; default 300.")
    ] = None,
    cache_tiers: Annotated[
        TierUse | None, typer.Option(help="Redis and disk are asked: auto, the default, while they beat the model.")
    ] = None,
    allow_signature_change: Annotated[
        bool, typer.Option("--allow-signature-change", help="Release what breaks clients of the version served now.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why, in a person's words.")] = None,
    wait: Wait = False,
    timeout: Timeout = 60.0,
    allow_missing: AllowMissing = False,
    _print: Annotated[
        bool,
        typer.Option(
            "--print-settings-schema",
            callback=_print_schema,
            is_eager=True,
            help="Print the JSON schema of the settings file, and do nothing else.",
        ),
    ] = False,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Release a model: try it, upload it, sign one event; every edge verifies it, warms it and swaps to it."""
    target = Target.at(directory)
    said: dict[str, Any] = {
        "version": version,
        "files": files or None,
        "golden": str(golden) if golden is not None else None,
        "rtol": rtol,
        "atol": atol,
        "placement": placement,
        "plan": _plan(plan, target) if plan is not None else None,
        "on_failure": on_failure,
        "shadow_percent": shadow,
        "cache": _given({"enabled": None if ttl is None else ttl > 0, "ttl_s": ttl, "tiers": cache_tiers}),
        "allow_signature_change": allow_signature_change or None,
        "reason": reason,
    }
    document = release_settings.read_toml(settings) if settings is not None else {}
    document = release_settings.merged(document, _given(said))
    with sources.opened(source, target.settings) as found:
        document.setdefault("version", found.version)
        request = release_settings.request(document, model=model, path=found.path, author=target.settings.author)

        async def act(publisher: Publisher) -> Published:
            bar = Progress(
                TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=output.err, transient=True
            )
            with bar:
                task = bar.add_task("upload", total=None)
                return await publisher.publish(
                    request,
                    lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
                )

        receipts.release(target, act, wait=wait, timeout=timeout, allow_missing=allow_missing, json=json)


def _plan(said: str, target: Target) -> Document:
    """The plan that the option names, as a document: the settings file may name one too."""
    if said == "safe":
        watch = FleetWatch(target.reader)
        asyncio.run(watch.look())
        regions = {w.beat.region for workers in watch.fresh(wall_clock_ms()).values() for w in workers}
        return plans.document(plans.safe(sorted(regions)))
    if said == "all":
        return plans.document(plans.AT_ONCE)
    return plans.document(plans.read_toml(Path(said)))


def _given(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if value is not None and value != {}}
