"""``mlcdn status``: what the log wants of a model, and what every worker makes of it, seat by seat."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import typer

from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from origin.receipts import FleetWatch
from schemas.errors import NotFound
from schemas.events import Placement, ServedModel
from schemas.topics import INVALIDATIONS, RELEASES
from streams.audit.control import At, fold_releases
from streams.folds.fleet import Fleet, WorkerState
from streams.folds.releases import ModelHistory, Releases, desired
from streams.folds.wanted import Channel, Seated, seat


def register(app: typer.Typer) -> None:
    app.command()(status)


def status(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Per region, node and seat: version, digest, state, positions and lag, last error."""
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
        output.say(f"{said['model']}: {_wanted(said)}")
        output.table(
            ("region", "node", "worker", "channel", "version", "digest", "state", "releases lag", "invalidations lag",
             "error"),
            [_row(n) for n in said["nodes"]],
        )  # fmt: skip


def _status(name: str, state: Releases, watch: FleetWatch, highs: dict[str, int]) -> dict[str, Any]:
    now, nodes = time.time_ns() // 1_000_000, []
    for worker in (w for workers in watch.fresh(now).values() for w in workers):
        beat = worker.beat
        positions = {t.name.removeprefix("mlcdn."): beat.positions.get(t.name, -1) for t in (RELEASES, INVALIDATIONS)}
        told = desired(state, beat.region)
        for channel in Channel:
            want = told.get(seat(name, channel))
            served = next((m for m in beat.models if (m.name, m.channel) == (name, channel)), None)
            if want is not None:
                served = _since(watch.state, worker, served, want)
            if served is None and channel is not Channel.STABLE:
                continue
            nodes.append(
                {
                    "region": beat.region,
                    "node": beat.node,
                    "worker": beat.worker,
                    "version": served.version if served else "",
                    "digest": served.digest if served else "",
                    "channel": str(channel),
                    "percent": want.percent if want is not None else 0.0,
                    "positions": positions,
                    "lag": {t: highs[f"mlcdn.{t}"] - p for t, p in positions.items()},
                    "state": served.state if served else "absent",
                    "error": served.error if served else "",
                },
            )
    history = state.models[name]
    stable = history.stable
    return {
        "model": name,
        "desired": None if stable is None else {
            "version": stable.version,
            "sequence": stable.sequence,
            "digest": stable.digest,
            "position": stable.position,
        },
        "rollout": _rollout(history),
        "nodes": sorted(nodes, key=lambda n: (n["region"], n["node"], n["worker"], n["channel"] != "stable")),
    }  # fmt: skip


def _rollout(history: ModelHistory) -> dict[str, Any] | None:
    """That of the newest release, unless it is complete."""
    found = history.rollout
    if found is None or found.stable == found.wanted:
        return None
    return {
        "version": found.wanted.version,
        "sequence": found.wanted.sequence,
        "digest": found.wanted.digest,
        "status": str(found.status),
        "wave": found.step + 1,
        "waves": len(found.waves),
    }


def _since(fleet: Fleet, worker: WorkerState, served: ServedModel | None, want: Seated) -> ServedModel | None:
    """What the worker serves, by its last beat or by a swap it has reported since: beats are a second apart."""
    beat, wanted = worker.beat, want.wanted
    report = fleet.reports.get((beat.node, beat.worker, wanted.model, wanted.sequence))
    if report is None or report.outcome != "live" or report.received_ms < worker.received_ms:
        return served
    return ServedModel(
        name=wanted.model,
        version=wanted.version,
        digest=report.digest,
        sequence=report.sequence,
        channel=str(want.channel),
        state="forwarded" if wanted.released.placement is Placement.ORIGIN else "live",
    )


def _wanted(said: dict[str, Any]) -> str:
    stable, rollout = said["desired"], said["rollout"]
    words = f"{stable['version']} {stable['digest'][:12]}" if stable else "retired" if not rollout else "nothing stable"
    if rollout:
        words += f"; {rollout['version']} {rollout['status']} at wave {rollout['wave']} of {rollout['waves']}"
    return words


def _row(node: dict[str, Any]) -> tuple[object, ...]:
    where = (node["region"], node["node"], node["worker"])
    channel = node["channel"] if node["channel"] == "stable" else f"{node['channel']} {node['percent']:g} %"
    return (*where, channel, node["version"], node["digest"][:12], node["state"], *node["lag"].values(), node["error"])
