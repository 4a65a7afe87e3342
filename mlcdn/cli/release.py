"""``mlcdn rollback, retire``: another release than the newest, or none."""

from __future__ import annotations

from typing import Annotated

import typer

from mlcdn.cli import receipts
from mlcdn.cli.output import Json
from mlcdn.cli.receipts import AllowMissing, Reason, Timeout, Wait
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target


def register(app: typer.Typer) -> None:
    app.command()(rollback)
    app.command()(retire)


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
