"""One act on a model, its receipts from every node, and the exit code that tells the truth: what `publish`, `rollback`
and `retire` share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from inference.trial_report import TrialReport
from mlcdn.cli import output
from mlcdn.cli.target import Target
from origin.outcome import Outcome, outcome
from origin.publish import Published, Publisher
from origin.receipts import FleetWatch, NodeOutcome
from origin.rollouts import Ended
from streams.artifacts import ArtifactStore

Reason = Annotated[str, typer.Option(help="Why, in a person's words.")]
Wait = Annotated[
    bool, typer.Option("--wait", help="Return when every node with a fresh beat serves it; 1 if one does not.")
]
Timeout = Annotated[float, typer.Option(help="Longest to wait, seconds.")]
AllowMissing = Annotated[bool, typer.Option("--allow-missing", help="A node that is away is no failure.")]


def store_of(target: Target) -> ArtifactStore:
    s = target.settings
    return ArtifactStore(s.s3_endpoint, s.s3_bucket, s.s3_access_key, s.s3_secret_key.get_secret_value(), s.s3_region)


def release(
    target: Target,
    act: Callable[[Publisher], Awaitable[Published]],
    *,
    wait: bool,
    timeout: float,
    allow_missing: bool,
    json: bool,
) -> None:
    """Acts, waits where asked to, says what came of it; exits with 1 where a node does not serve it."""
    done = asyncio.run(_acted(target, act, wait, timeout))
    published = done.published
    if json:
        output.document(done.document())
    else:
        output.say(
            f"{published.model} {published.version} {published.digest[:12]}: sequence {published.sequence},"
            f" position {published.position}, event {published.event_id}",
        )
        if published.trial is not None:
            output.say(f"  trial: {_tried(published.trial)}")
        for change in published.changes:
            output.say(f"  changed for clients: {change}")
        for node in done.nodes:
            output.say(f"  {node.region:<12} {node.node:<16} {_told(node)}")
    if done.rollout is not None:
        _over(done.rollout)
        return
    late = done.not_live(allow_missing=allow_missing)
    if late:
        output.err.print(f"mlcdn: not live on {', '.join(n.node for n in late)}: {late[0].reason}", markup=False)
        raise typer.Exit(1)
    if wait and not done.nodes and not allow_missing:
        output.err.print("mlcdn: no node had a fresh beat, so nothing serves it yet", markup=False)
        raise typer.Exit(1)


async def _acted(
    target: Target, act: Callable[[Publisher], Awaitable[Published]], wait: bool, timeout: float
) -> Outcome:
    writer = target.writer()
    try:
        publisher = Publisher(store_of(target), writer, target.reader, target.roots)
        return await outcome(
            lambda: act(publisher),
            FleetWatch(target.reader) if wait else None,
            target.roots,
            timeout,
            lambda node: output.progress(f"{node.node}: {_told(node)}"),
            lambda said: output.progress(f"wave {said.step + 1}: {said.verdict}: {said.reason}"),
        )
    finally:
        await writer.close()


def _over(rollout: Ended) -> None:
    """Says what the waves came to; exits with 1 where that is not every request."""
    last = rollout.verdicts[-1] if rollout.verdicts else None
    if rollout.done:
        return
    why = f": {last.reason} (mlcdn gate explain {last.id})" if last is not None else ""
    output.err.print(f"mlcdn: {rollout.status} at wave {rollout.step + 1} of {rollout.waves}{why}", markup=False)
    raise typer.Exit(1)


def _told(node: NodeOutcome) -> str:
    if node.outcome == "live":
        return f"live after {node.ms['total']:.0f} ms"
    return f"{node.outcome}: {node.reason}"


def _tried(trial: TrialReport) -> str:
    run = (
        f"one row in {trial.run_ms:.2f} ms"
        if trial.run_ms is not None
        else "not run: no inputs are known that it takes"
    )
    rows = "rows run together" if trial.batchable else f"rows run one by one: {trial.batchable_reason}"
    return (
        f"loaded in {trial.load_ms:.1f} ms, {run}, peak {trial.peak_rss_bytes / 2**20:.0f} MiB, {rows},"
        f" golden test {trial.golden}"
    )
