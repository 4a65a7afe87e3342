"""``mlcdn invalidate``: purge by key, prefix, pattern, tag, model or all, with a receipt per node."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
import typer

from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from origin.invalidate import Invalidated, Invalidator
from origin.receipts import FleetWatch, Receipt, wait_applied
from schemas.errors import BadInput
from schemas.names import Scope, ScopeKind

Values = list[str] | None


def register(app: typer.Typer) -> None:
    app.command()(invalidate)


def invalidate(
    model: Annotated[Values, typer.Option(help="Everything of a model.")] = None,
    key: Annotated[Values, typer.Option(help="One entry by name: prediction:<model>:<hex>.")] = None,
    prefix: Annotated[Values, typer.Option(help="Entries whose name begins so.")] = None,
    pattern: Annotated[Values, typer.Option(help="Entries whose name matches a glob.")] = None,
    tag: Annotated[Values, typer.Option(help="Entries with a tag.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every entry.")] = False,
    soft: Annotated[bool, typer.Option("--soft", help="May be served stale while one refill runs.")] = False,
    reason: Annotated[str, typer.Option(help="Why.")] = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="Return with a receipt from every node; 1 if one is missing.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Longest to wait, seconds.")] = 30.0,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Purge cached answers. After --wait returned, no node serves what was purged."""
    given = {
        ScopeKind.MODEL: model,
        ScopeKind.KEY: key,
        ScopeKind.PREFIX: prefix,
        ScopeKind.PATTERN: pattern,
        ScopeKind.TAG: tag,
    }
    scopes = tuple(Scope(kind, value) for kind, values in given.items() for value in values or ())
    scopes += (Scope(ScopeKind.ALL),) if everything else ()
    if not scopes:
        raise BadInput("say what to purge: --model, --key, --prefix, --pattern, --tag or --all")
    target = Target.at(directory)
    done, receipts, missing = asyncio.run(_invalidate(target, scopes, soft, reason, wait, timeout))
    if json:
        output.document(
            {
                "position": done.position,
                "event_id": done.event_id,
                "receipts": msgspec.to_builtins(receipts),
                "missing": missing,
            },
        )
    else:
        output.say(f"purged {', '.join(map(str, scopes))} at position {done.position}, event {done.event_id}")
        for receipt in receipts:
            output.say(f"  {receipt.region:<12} {receipt.node:<16} obeys after {receipt.applied_ms:.0f} ms")
    if missing:
        output.err.print(f"mlcdn: no receipt from {', '.join(missing)}", markup=False)
        raise typer.Exit(1)


async def _invalidate(
    target: Target,
    scopes: tuple[Scope, ...],
    soft: bool,
    reason: str,
    wait: bool,
    timeout_s: float,
) -> tuple[Invalidated, list[Receipt], list[str]]:
    watch = FleetWatch(target.reader)
    if wait:
        await watch.look()
    writer = target.writer()
    try:
        done = await Invalidator(writer, target.reader, target.roots).invalidate(
            scopes,
            soft=soft,
            author=target.settings.author,
            reason=reason,
        )
    finally:
        await writer.close()
    if not wait:
        return done, [], []
    receipts, missing = await wait_applied(watch, done.position, done.appended_ms, timeout_s=timeout_s)
    return done, receipts, missing
