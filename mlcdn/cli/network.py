"""``mlcdn up, down, ps, doctor, settings, run``: the local network, and one process in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.target import DEFAULT_DIR, Dir, read_document
from mlcdn.doctor import examine
from mlcdn.network import Network, NetworkPlan
from processes.signals import stop_on_signals
from processes.supervisor import Supervisor
from schemas import settings
from schemas.errors import BadInput, Conflict, NotReady, Unreachable

MODULES = {
    "edge": "edge_node.main",
    "agent": "edge_node.agent.main",
    "worker": "edge_node.serving.main",
    "origin": "origin.main",
    "streams": "streams.main",
    "router": "router.main",
}


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(down)
    app.command()(ps)
    app.command()(doctor)
    app.command(name="settings")(show_settings)
    app.command()(run)


def up(
    regions: Annotated[str, typer.Option(help="Regions, comma-separated.")] = "tokyo,london,virginia",
    nodes: Annotated[int, typer.Option(help="Edge nodes a region.")] = 1,
    workers: Annotated[int, typer.Option(help="Workers a node.")] = 1,
    location: Annotated[list[str] | None, typer.Option(help="NAME=LAT,LON of a region not in the table.")] = None,
    kafka_port: Annotated[int | None, typer.Option(help="Kafka's port; the system's choice if not given.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when all is ready; `mlcdn down` stops it.")] = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """The whole network on this machine: Kafka, S3, a Valkey a region, origin, streams, router, edges."""
    plan = NetworkPlan(
        directory=directory,
        regions=tuple(r for r in regions.split(",") if r),
        nodes=nodes,
        workers=workers,
        locations=dict(_location(said) for said in location or []),
        kafka_port=kafka_port,
    )
    _refuse_if_running(directory)
    if detach:
        _detach(directory, sys.argv[1:])
    else:
        asyncio.run(_foreground(plan))


async def _foreground(plan: NetworkPlan) -> None:
    async with stop_on_signals() as stop, Supervisor() as supervisor:
        network = Network(plan, supervisor, output.progress)
        starting = asyncio.create_task(network.start())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return
        stopped.cancel()
        await starting
        _addresses(network.document)
        await network.run_until(stop)


def _detach(directory: Path, arguments: list[str]) -> None:
    """Starts `mlcdn up` in a session of its own and waits until it is ready or gone."""
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "up.log"
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "mlcdn", *(a for a in arguments if a != "--detach")],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    seen = 0
    while not (directory / "network.json").exists():
        lines = log.read_text(errors="replace").splitlines()
        for line in lines[seen:]:
            output.progress(line)
        seen = len(lines)
        if child.poll() is not None:
            raise NotReady(f"the network did not start; see {log}")
        time.sleep(0.1)
    _addresses(read_document(directory))


def _refuse_if_running(directory: Path) -> None:
    try:
        document = read_document(directory)
    except Unreachable:
        return
    if _alive(document["pids"]["up"]):
        raise Conflict(f"a network runs in {directory} already (pid {document['pids']['up']}); mlcdn down stops it")


def _location(said: str) -> tuple[str, tuple[float, float]]:
    try:
        name, _, place = said.partition("=")
        lat, lon = map(float, place.split(","))
    except ValueError:
        raise BadInput(f"--location {said!r} is not NAME=LAT,LON") from None
    return name, (lat, lon)


def _addresses(document: dict[str, Any]) -> None:
    rows: list[tuple[str, str]] = [
        ("router", document["router"]["http"]),
        ("origin", document["origin"]),
        ("admin", document["admin"]["url"]),
        ("kafka", document["kafka"]),
        ("s3", document["s3"]["endpoint"]),
    ]
    rows += [(node["node"], node["url"]) for region in document["regions"].values() for node in region["nodes"]]
    output.table(("part", "address"), rows)


def down(
    wipe: Annotated[bool, typer.Option("--wipe", help="Delete the directory too, data and keys included.")] = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Stop the local network."""
    try:
        pid = read_document(directory)["pids"]["up"]
    except Unreachable:
        pid = None
    if pid is not None and _alive(pid):
        os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + 60
        while _alive(pid):
            if time.monotonic() > until:
                raise NotReady(f"the network (pid {pid}) did not stop within 60 s")
            time.sleep(0.05)
        output.progress("stopped")
    else:
        (directory / "network.json").unlink(missing_ok=True)
        output.progress(f"no network runs in {directory}")
    if wipe:
        shutil.rmtree(directory, ignore_errors=False) if directory.exists() else None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def ps(json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """What runs, with process ids and addresses."""
    document = read_document(directory)
    rows: list[dict[str, Any]] = [
        {"name": name, "pid": pid, "alive": _alive(pid)} for name, pid in document["pids"].items()
    ]
    for region in document["regions"].values():
        for node in region["nodes"]:
            pids = node["pids"]
            children = [("edge", pids["edge"]), ("agent", pids["agent"])]
            children += [(f"worker {i}", pid) for i, pid in enumerate(pids["workers"])]
            rows += [
                {"name": f"{node['node']} {what}", "pid": pid, "alive": pid is not None and _alive(pid)}
                for what, pid in children
            ]
    if json:
        output.document(rows)
    else:
        output.table(("name", "pid", "state"), [(r["name"], r["pid"], "up" if r["alive"] else "down") for r in rows])
    if not all(r["alive"] for r in rows):
        raise typer.Exit(1)


def doctor(json: Json = False, directory: Dir = DEFAULT_DIR) -> None:
    """Check every part and setting; say what is wrong and the command that mends it."""
    findings = examine(directory)
    if json:
        output.document(findings)
    else:
        output.table(
            ("check", "state", "detail", "mend"),
            [(f.check, "ok" if f.ok else "WRONG", f.detail, f.mend) for f in findings],
        )
    if not all(f.ok for f in findings):
        raise typer.Exit(1)


def show_settings(
    config: Annotated[Path | None, typer.Option("--config", help="TOML file.")] = None,
    json: Json = False,
) -> None:
    """Every setting with its value, source and meaning."""
    loaded = settings.load(config)
    rows = [
        {
            "setting": name,
            "value": str(getattr(loaded, name)),
            "source": settings.source_of(name, config),
            "meaning": field.description or "",
        }
        for name, field in settings.Settings.model_fields.items()
    ]
    if json:
        output.document(rows)
    else:
        output.table(("setting", "value", "source", "meaning"), [tuple(r.values()) for r in rows])


def run(
    process: Annotated[str, typer.Argument(help=f"One of {', '.join(MODULES)}.")],
    config: Annotated[Path | None, typer.Option("--config", help="TOML file.")] = None,
) -> None:
    """One process in the foreground: SIGTERM drains it."""
    if process not in MODULES:
        raise BadInput(f"no process {process!r}; there are {', '.join(MODULES)}")
    if config is not None:
        os.environ["MLCDN_CONFIG"] = str(config)
    settings.load()
    os.execv(sys.executable, [sys.executable, "-m", MODULES[process]])
