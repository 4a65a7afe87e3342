"""One worker beside two: requests a second, a request's cost, and how the work is shared between the two.

A second network of one region with two workers a node stands beside the first; wrk runs on any core. On two cores, where
two workers and wrk want three, this shows that a second worker takes its share and costs nothing; how rates grow with
workers takes more cores than workers.
"""

from __future__ import annotations

import os
import shutil
import statistics
from pathlib import Path
from typing import Final

from bench import cores
from bench.figures import model
from bench.loads import LOADS, Bodies
from bench.servers import MISSING, wait_answers
from bench.wrk import Reading, drive
from mlcdn.demo.command import Mlcdn

MODEL: Final = "bench-workers"
ROUNDS: Final = 5
SECONDS: Final = 2.0
ASKED: Final = ("cached", "unique")


def run(mlcdn: Mlcdn, work: Path) -> int:
    if shutil.which("wrk") is None:
        print("missing: wrk; nothing was measured")
        return MISSING
    two = Mlcdn(work / "two-workers")
    two("up", "--detach", "--regions", "tokyo", "--workers", "2", timeout_s=240)
    try:
        return _compare({1: mlcdn, 2: two}, work)
    finally:
        two("down", "--wipe")


def _compare(networks: dict[int, Mlcdn], work: Path) -> int:
    path, bodies = model(work / "workers.onnx", 1), Bodies(work)
    readings: dict[tuple[str, int], list[Reading]] = {}
    cost: dict[tuple[str, int], list[float]] = {}
    shares: dict[tuple[str, int], list[float]] = {}
    for mlcdn in networks.values():
        mlcdn("publish", MODEL, str(path), "--version", "v1", "--wait")
    for _ in range(ROUNDS):
        for load in ASKED:
            for number, mlcdn in networks.items():
                node = mlcdn.network()["regions"]["tokyo"]["nodes"][0]
                workers = node["pids"]["workers"]
                if len(workers) != number:
                    raise RuntimeError(f"{len(workers)} workers, not {number}")
                url = f"{node['url']}/v2/models/{MODEL}/infer"
                wait_answers(url, "oip", path)
                written = bodies.written(LOADS[load], "oip")
                drive(written, url, written.load.warm_s, core=None)
                before = [cores.cpu_s(pid) for pid in workers]
                reading = drive(written, url, SECONDS, core=None)
                spent = [cores.cpu_s(pid) - was for pid, was in zip(workers, before, strict=True)]
                readings.setdefault((load, number), []).append(reading)
                cost.setdefault((load, number), []).append(sum(spent) / reading.requests * 1e6)
                shares.setdefault((load, number), []).append(min(spent) / max(sum(spent), 1e-9))
    print(
        f"{'load':<8} {'workers':>7} {'rps':>9} {'p50 ms':>8} {'p99 ms':>8} {'errors':>6} {'CPU us':>7}  lesser share"
    )
    for (load, number), seen in readings.items():
        print(
            f"{load:<8} {number:>7} {statistics.median(r.rps for r in seen):>9,.0f} "
            f"{statistics.median(r.p50_ms for r in seen):>8.3f} {statistics.median(r.p99_ms for r in seen):>8.3f} "
            f"{sum(r.errors for r in seen):>6} {statistics.median(cost[load, number]):>7.1f}  "
            f"{'-' if number == 1 else f'{statistics.median(shares[load, number]):.0%}'}"
        )
    for load in ASKED:
        one, both = (statistics.median(r.rps for r in readings[load, number]) for number in (1, 2))
        print(f"ratio: {load} rps, two workers / one {both / one:.2f} on {len(os.sched_getaffinity(0))} cores")
    return int(any(r.errors for seen in readings.values() for r in seen))
