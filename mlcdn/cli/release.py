"""``mlcdn rollback, retire, status``: what was released before, and what every node makes of it."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import typer

from mlcdn.cli import output, receipts
from mlcdn.cli.output import Json
from mlcdn.cli.receipts import AllowMissing, Reason, Timeout, Wait
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from origin.receipts import FleetWatch
from schemas.errors import NotFound
from schemas.events import Placement, ServedModel
from schemas.topics import INVALIDATIONS, RELEASES
from streams.audit.control import At, fold_releases
from streams.folds.fleet import Fleet, WorkerState
from streams.folds.releases import Releases
from streams.folds.wanted import Wanted


def register(app: typer.Typer) -> None:
    app.command()(rollback)
    app.command()(retire)
    app.command()(status)


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
    receipts.release(
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
    receipts.release(
        target,
        lambda publisher: publisher.retire(model, author=target.settings.author, reason=reason),
        wait=False,
        timeout=0,
        allow_missing=True,
        json=json,
    )


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
    wanted = state.models[name].stable
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
