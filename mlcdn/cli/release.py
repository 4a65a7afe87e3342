"""``mlcdn publish, rollback, retire, status``: releases, and what every node made of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from inference.golden import ATOL, RTOL
from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from origin.publish import Published, Publisher, ReleaseRequest
from origin.receipts import FleetWatch, NodeOutcome, wait_live
from schemas.errors import BadInput, NotFound
from schemas.events import CachePolicy, Placement, ServedModel, TierUse
from schemas.topics import INVALIDATIONS, RELEASES
from streams.artifacts import ArtifactStore
from streams.audit.control import At, fold_releases
from streams.folds.fleet import Fleet, WorkerState
from streams.folds.releases import Releases, Wanted

Reason = Annotated[str, typer.Option(help="Why, in a person's words.")]
Wait = Annotated[
    bool, typer.Option("--wait", help="Return when every node with a fresh beat serves it; 1 if one does not.")
]
Timeout = Annotated[float, typer.Option(help="Longest to wait, seconds.")]
AllowMissing = Annotated[bool, typer.Option("--allow-missing", help="A node that is away is no failure.")]


def register(app: typer.Typer) -> None:
    app.command()(publish)
    app.command()(rollback)
    app.command()(retire)
    app.command()(status)


def publish(
    model: Annotated[str, typer.Argument(help="Model name.")],
    file: Annotated[Path, typer.Argument(help="ONNX file.")],
    version: Annotated[str | None, typer.Option(help="Label; default the digest's first 12 characters.")] = None,
    golden: Annotated[Path | None, typer.Option(help=".npz of inputs and expected outputs.")] = None,
    rtol: Annotated[float, typer.Option(help="Relative tolerance of the golden test.")] = RTOL,
    atol: Annotated[float, typer.Option(help="Absolute tolerance of the golden test.")] = ATOL,
    placement: Annotated[Placement, typer.Option(help="Where it runs.")] = Placement.EDGE,
    ttl: Annotated[float, typer.Option(help="Seconds that a cached answer is fresh; 0 turns caching off.")] = 300.0,
    cache_tiers: Annotated[
        TierUse, typer.Option(help="Redis and disk are asked: auto while they beat the model.")
    ] = TierUse.AUTO,
    reason: Reason = "",
    wait: Wait = False,
    timeout: Timeout = 60.0,
    allow_missing: AllowMissing = False,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Release a model: try it, upload it, sign one event; every edge verifies it, warms it and swaps to it."""
    if not file.is_file():
        raise BadInput(f"{file} is no file")
    target = Target.at(directory)
    request = ReleaseRequest(
        model=model,
        path=file,
        version=version,
        golden=golden,
        rtol=rtol,
        atol=atol,
        placement=placement,
        cache=CachePolicy(enabled=ttl > 0, ttl_s=ttl, tiers=cache_tiers),
        author=target.settings.author,
        reason=reason,
    )

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

    _release(target, act, wait=wait, timeout=timeout, allow_missing=allow_missing, json=json)


def rollback(
    model: Annotated[str, typer.Argument(help="Model name.")],
    to: Annotated[str | None, typer.Option(help="Version; default the one before.")] = None,
    reason: Reason = "",
    wait: Wait = False,
    timeout: Timeout = 60.0,
    allow_missing: AllowMissing = False,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Serve an earlier release again, as a new fact."""
    target = Target.at(directory)
    _release(
        target,
        lambda publisher: publisher.rollback(model, to, author=target.settings.author, reason=reason),
        wait=wait,
        timeout=timeout,
        allow_missing=allow_missing,
        json=json,
    )


def retire(
    model: Annotated[str, typer.Argument(help="Model name.")],
    reason: Reason = "",
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Serve the model no longer."""
    target = Target.at(directory)
    _release(
        target,
        lambda publisher: publisher.retire(model, author=target.settings.author, reason=reason),
        wait=False,
        timeout=0,
        allow_missing=True,
        json=json,
    )


def store_of(target: Target) -> ArtifactStore:
    s = target.settings
    return ArtifactStore(s.s3_endpoint, s.s3_bucket, s.s3_access_key, s.s3_secret_key.get_secret_value(), s.s3_region)


def _release(
    target: Target,
    act: Callable[[Publisher], Awaitable[Published]],
    *,
    wait: bool,
    timeout: float,
    allow_missing: bool,
    json: bool,
) -> None:
    began = time.monotonic()
    published, nodes = asyncio.run(_act_and_wait(target, act, wait, timeout))
    wall_ms = (time.monotonic() - began) * 1000
    if json:
        said: dict[str, Any] = {
            "model": published.model,
            "version": published.version,
            "sequence": published.sequence,
            "digest": published.digest,
            "position": published.position,
            "event_id": published.event_id,
            "nodes": msgspec.to_builtins(nodes),
            "wall_ms": wall_ms,
        }
        output.document(said)
    else:
        output.say(
            f"{published.model} {published.version} {published.digest[:12]}: sequence {published.sequence},"
            f" position {published.position}, event {published.event_id}",
        )
        for node in nodes:
            output.say(f"  {node.region:<12} {node.node:<16} {_told(node)}")
    late = [n for n in nodes if n.outcome != "live" and not (allow_missing and n.outcome == "missing")]
    if late:
        output.err.print(f"mlcdn: not live on {', '.join(n.node for n in late)}: {late[0].reason}", markup=False)
        raise typer.Exit(1)
    if wait and not nodes and not allow_missing:
        output.err.print("mlcdn: no node had a fresh beat, so nothing serves it yet", markup=False)
        raise typer.Exit(1)


async def _act_and_wait(
    target: Target,
    act: Callable[[Publisher], Awaitable[Published]],
    wait: bool,
    timeout: float,
) -> tuple[Published, list[NodeOutcome]]:
    watch = FleetWatch(target.reader)
    if wait:
        await watch.look()
    writer = target.writer()
    try:
        published = await act(Publisher(store_of(target), writer, target.reader, target.roots))
    finally:
        await writer.close()
    if not wait:
        return published, []
    await watch.look()
    nodes = await wait_live(
        watch,
        published.model,
        published.sequence,
        published.appended_ms,
        timeout_s=timeout,
        progress=lambda outcome: output.progress(f"{outcome.node}: {_told(outcome)}"),
    )
    return published, nodes


def _told(node: NodeOutcome) -> str:
    if node.outcome == "live":
        return f"live after {node.ms['total']:.0f} ms"
    return f"{node.outcome}: {node.reason}"


def status(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Per region and node: version, digest, state, positions and lag, last error."""
    target = Target.at(directory)
    state, _ = fold_releases(target.reader, target.roots, At())
    if model is not None and model not in state.models:
        raise NotFound(f"no model {model} was ever released")
    watch = FleetWatch(target.reader)
    asyncio.run(watch.look())
    highs = {t.name: target.reader.watermarks(t.name, 0)[1] - 1 for t in (RELEASES, INVALIDATIONS)}
    documents = [_status(name, state, watch, highs) for name in ([model] if model else sorted(state.models))]
    if json:
        output.document(documents[0] if model is not None else documents)
        return
    for said in documents:
        want = said["desired"]
        output.say(f"{said['model']}: " + (f"{want['version']} {want['digest'][:12]}" if want else "retired"))
        output.table(
            ("region", "node", "worker", "version", "digest", "state", "releases lag", "invalidations lag", "error"),
            [_row(n) for n in said["nodes"]],
        )


def _status(name: str, state: Releases, watch: FleetWatch, highs: dict[str, int]) -> dict[str, Any]:
    wanted = state.models[name].wanted
    now = time.time_ns() // 1_000_000
    nodes = []
    for worker in (w for workers in watch.fresh(now).values() for w in workers):
        beat = worker.beat
        served = next((m for m in beat.models if m.name == name), None)
        if wanted is not None:
            served = _since(watch.state, worker, served, wanted)
        positions = {t.name.removeprefix("mlcdn."): beat.positions.get(t.name, -1) for t in (RELEASES, INVALIDATIONS)}
        nodes.append(
            {
                "region": beat.region,
                "node": beat.node,
                "worker": beat.worker,
                "version": served.version if served else "",
                "digest": served.digest if served else "",
                "channel": served.channel if served else "",
                "positions": positions,
                "lag": {t: highs[f"mlcdn.{t}"] - p for t, p in positions.items()},
                "state": served.state if served else "absent",
                "error": served.error if served else "",
            },
        )
    return {
        "model": name,
        "desired": None if wanted is None else {
            "version": wanted.version,
            "sequence": wanted.sequence,
            "digest": wanted.digest,
            "position": wanted.position,
        },
        "nodes": sorted(nodes, key=lambda n: (n["region"], n["node"], n["worker"])),
    }  # fmt: skip


def _since(fleet: Fleet, worker: WorkerState, served: ServedModel | None, wanted: Wanted) -> ServedModel | None:
    """What the worker serves, by its last beat or by a swap it has reported since: beats are a second apart."""
    beat = worker.beat
    report = fleet.reports.get((beat.node, beat.worker, wanted.model, wanted.sequence))
    if report is None or report.outcome != "live" or report.received_ms < worker.received_ms:
        return served
    return ServedModel(
        name=wanted.model,
        version=wanted.version,
        digest=report.digest,
        sequence=report.sequence,
        channel=served.channel if served else "stable",
        state="forwarded" if wanted.released.placement is Placement.ORIGIN else "live",
    )


def _row(node: dict[str, Any]) -> tuple[object, ...]:
    where = (node["region"], node["node"], node["worker"])
    return (*where, node["version"], node["digest"][:12], node["state"], *node["lag"].values(), node["error"])
