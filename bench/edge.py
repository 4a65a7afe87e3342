"""Requests a second and latency of one node with one worker, beside other servers of the same model.

One server at a time, each on core 0 with wrk on core 1, in rounds whose order turns; medians over the rounds. The network
(Kafka, S3, Valkey, the other nodes) runs on both cores all the while, so every server bears it, and our node sends its
request rows to that Kafka. Every round our model is a new release and every peer a new process, so that no cache is warmer
than another. `Starlette` is our node asked with a `traceparent`, which the fast lane does not take.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx

from bench import cores, reach
from bench.figures import model
from bench.loads import LOADS, Bodies, Written
from bench.servers import MISSING, PEERS, NotStarted, Peer, Running, started, wait_answers
from bench.wrk import Reading, drive
from mlcdn.demo.command import Mlcdn

MODEL: Final = "bench-edge"
OURS: Final = {
    "mlcdn": ("", ("cached", "zipf", "fresh id", "unique", "one")),
    "mlcdn Starlette": (
        "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ("cached", "unique", "one"),
    ),
}
SAMPLE: Final = 200


@dataclass(frozen=True, slots=True)
class Options:
    peers: tuple[str, ...] = ("nginx", "mosec")
    rounds: int = 5
    seconds: float = 3.0


@dataclass(slots=True)
class Row:
    """What one server did under one load, a value a round."""

    readings: list[Reading] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)


Table = dict[tuple[str, str], Row]


def run(mlcdn: Mlcdn, work: Path, options: Options = Options()) -> int:
    absent = [line for name in options.peers for peer in PEERS[name][:1] if (line := peer.missing())]
    absent += [f"missing: {tool}; nothing was measured" for tool in ("wrk", "taskset") if shutil.which(tool) is None]
    print(*absent, sep="\n", end="\n" * bool(absent))
    if any("nothing" in line for line in absent):
        return MISSING
    peers = [peer for name in options.peers if not PEERS[name][0].missing() for peer in PEERS[name]]
    bodies, table = Bodies(work), Table()
    failed: dict[str, str] = {}
    for number in range(options.rounds):
        path = model(work / f"edge-{number}.onnx", number)
        mlcdn("publish", MODEL, str(path), "--version", f"edge-{number}", "--wait")
        servers: list[Peer | None] = [None, *peers]
        turn = number % len(servers)
        for server in servers[turn:] + servers[:turn]:
            if server is None:
                _ours(mlcdn, path, bodies, options, table)
            elif server.name not in failed:
                try:
                    _peer(server, path, work, bodies, options, table)
                except NotStarted as error:
                    failed[server.name] = str(error)
                    print(f"missing: {error}")
    _print(table)
    print(*reach.lines({key: _medians(row) for key, row in table.items()}), sep="\n")
    if any(r.errors for row in table.values() for r in row.readings):
        return 1
    return MISSING if absent or failed else 0


def _ours(mlcdn: Mlcdn, path: Path, bodies: Bodies, options: Options, table: Table) -> None:
    node = mlcdn.network()["regions"]["tokyo"]["nodes"][0]
    if len(node["pids"]["workers"]) != 1:
        raise RuntimeError(f"the node has {len(node['pids']['workers'])} workers, not one")
    running = Running(f"{node['url']}/v2/models/{MODEL}/infer", node["pids"]["edge"])
    with cores.pinned(running.root, cores.two_cores()[0]):
        for name, (header, loads) in OURS.items():
            wait_answers(running.url, "oip", path, header=header)
            for load in loads:
                written = bodies.written(LOADS[load], "oip")
                row = _measure(running, written, options, table, name, header)
                row.hits.append(_hits(running.url, written))


def _peer(peer: Peer, path: Path, work: Path, bodies: Bodies, options: Options, table: Table) -> None:
    core, _ = cores.two_cores()
    for cache in (True, False):
        loads = [load for load in peer.loads if LOADS[load].cacheable == cache]
        if not loads:
            continue
        with _directory(work, peer) as directory, started(peer, path, directory, core=core, cache=cache) as running:
            for load in loads:
                _measure(running, bodies.written(LOADS[load], peer.form), options, table, peer.name)


@contextmanager
def _directory(work: Path, peer: Peer) -> Iterator[Path]:
    directory = work / f"peer-{peer.name.replace(' ', '-')}"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measure(running: Running, written: Written, options: Options, table: Table, server: str, header: str = "") -> Row:
    _, client = cores.two_cores()
    drive(written, running.url, written.load.warm_s, core=client, header=header)
    before = cores.cpu_s(running.root)
    reading = drive(written, running.url, options.seconds, core=client, header=header)
    spent = cores.cpu_s(running.root) - before
    row = table.setdefault((server, written.load.name), Row())
    row.readings.append(reading)
    row.cpu_us.append(spent / max(1, reading.requests) * 1e6)
    return row


def _hits(url: str, written: Written) -> float:
    """The share of a few answers that came out of a cache, by their own word: a load is what its name says."""
    hits = 0
    with httpx.Client(trust_env=False, timeout=5, headers={"content-type": "application/json"}) as client:
        for body in written.sample(SAMPLE):
            answer = client.post(url, content=body)
            answer.raise_for_status()
            hits += "hit" in answer.headers["cache-status"]
    return hits / SAMPLE


def _medians(row: Row) -> reach.Figures:
    readings = row.readings
    return reach.Figures(
        rps=statistics.median(r.rps for r in readings),
        p50_ms=statistics.median(r.p50_ms for r in readings),
        p99_ms=statistics.median(r.p99_ms for r in readings),
        cpu_us=statistics.median(row.cpu_us),
    )


def _print(table: Table) -> None:
    print(
        f"{'server':<16} {'load':<9} {'rps':>9} {'p50 ms':>8} {'p99 ms':>8} {'errors':>6} {'CPU us':>7} {'wrk':>4} "
        f"{'hits':>5}  rps of each round"
    )
    for (server, load), row in sorted(table.items(), key=lambda item: (list(LOADS).index(item[0][1]), item[0][0])):
        figures = _medians(row)
        print(
            f"{server:<16} {load:<9} {figures.rps:>9,.0f} {figures.p50_ms:>8.3f} {figures.p99_ms:>8.3f} "
            f"{sum(r.errors for r in row.readings):>6} {figures.cpu_us:>7.1f} "
            f"{statistics.median(r.busy for r in row.readings):>4.0%} "
            f"{f'{statistics.median(row.hits):.0%}' if row.hits else '-':>5}  {[round(r.rps) for r in row.readings]}"
        )
