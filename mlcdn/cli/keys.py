"""``mlcdn keys new, list, revoke``: signing keys, granted and revoked by events that a root signs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from mlcdn.identities import OPERATOR_KINDS, change_trust
from schemas.errors import BadInput, NotFound
from schemas.events import Grant, TrustChanged
from streams.audit.control import At, fold_releases
from streams.log.keys import generate, load_private, write_roots

app = typer.Typer(help="Who may sign what.", no_args_is_help=True)


def _root_key(target: Target, given: Path | None) -> Path:
    if given is not None:
        return given
    if target.document is None:
        raise BadInput("say which root private key signs: --root FILE")
    return Path(target.document["keys"]["root"])


@app.command()
def root(
    out: Annotated[Path, typer.Option(help="Directory for root.key and roots.txt.")] = Path("keys"),
) -> None:
    """Make a root key and the file of public roots that every machine of a network gets. Keep root.key off them."""
    path = generate(out, "root")
    roots = write_roots(out / "roots.txt", {"root": load_private(path)})
    output.say(f"{path}  stays with you")
    output.say(f"{roots}  goes to every machine: setting root_keys")


@app.command()
def new(
    label: Annotated[str, typer.Argument(help="A name for people.")],
    models: Annotated[
        list[str] | None, typer.Option(help="Globs of models it may speak of; default every one.")
    ] = None,
    kinds: Annotated[list[str] | None, typer.Option(help="Event kinds it may sign; default an operator's.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for the key file.")] = Path("keys"),
    root: Annotated[Path | None, typer.Option(help="Root private key; default the local network's.")] = None,
    reason: Annotated[str, typer.Option(help="Why.")] = "",
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Make a key and grant it: written to the log, in force from that position on."""
    target = Target.at(directory)
    private = load_private(_root_key(target, root))
    path = generate(out, label)
    grant = Grant(
        public_key=load_private(path).public_key().public_bytes_raw(),
        label=label,
        models=tuple(models or ("*",)),
        kinds=tuple(kinds or OPERATOR_KINDS),
    )
    event = TrustChanged(grants=(grant,), author=target.settings.author, reason=reason)
    asyncio.run(change_trust(target.settings.kafka, private, event, target.roots))
    output.say(f"{path}")


@app.command(name="list")
def list_(json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """Every key the log knows, revoked ones too."""
    target = Target.at(directory)
    state, _ = fold_releases(target.reader, target.roots, At())
    rows = [
        {
            "key": keyid,
            "label": grant.label,
            "models": list(grant.models),
            "kinds": list(grant.kinds),
            "granted_at": grant.granted_at,
            "revoked_at": grant.revoked_at,
        }
        for keyid, grant in state.trust.keys.items()
    ]
    if json:
        output.document(rows)
    else:
        output.table(
            ("key", "label", "models", "kinds", "granted at", "revoked at"),
            [(r["key"], r["label"], " ".join(g.models), " ".join(g.kinds), g.granted_at, g.revoked_at)
             for r, g in zip(rows, state.trust.keys.values(), strict=True)],
        )  # fmt: skip


@app.command()
def revoke(
    key: Annotated[
        str, typer.Argument(help="Key id or label; or its private key's file, where this log never granted it.")
    ],
    root: Annotated[Path | None, typer.Option(help="Root private key; default the local network's.")] = None,
    reason: Annotated[str, typer.Option(help="Why.")] = "",
    directory: Dir = DEFAULT_DIR,
) -> None:
    """From that position on the key signs nothing; what it signed before stays valid."""
    target = Target.at(directory)
    state, _ = fold_releases(target.reader, target.roots, At())
    found = tuple(
        g.public_key for keyid, g in state.trust.keys.items() if key in (keyid, g.label) and g.revoked_at is None
    )
    if not found and Path(key).is_file():
        found = (load_private(Path(key)).public_key().public_bytes_raw(),)
    if not found:
        raise NotFound(f"no key in force has the id or label {key!r}")
    event = TrustChanged(
        grants=(),
        revoked=found,
        author=target.settings.author,
        reason=reason,
    )
    private = load_private(_root_key(target, root))
    asyncio.run(change_trust(target.settings.kafka, private, event, target.roots))
