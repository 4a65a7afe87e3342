"""A swap under load: a node asked a thousand times a second, ten releases of 1 MB; failures, and p99 before and after.

The node has one core with the client (on three cores or more, each has its own) and the rest of the network, the publishing
command included, has the others: what a release costs elsewhere is not a swap's cost. Half of the questions are of 64 bodies
that caches may answer, half are new. Steady is what is neither warm-up nor between a command's start and a second after its
end.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from bench import cores
from bench.figures import line, model
from bench.loads import Mixed
from bench.open_loop import Answer, Seen, open_loop
from bench.servers import wait_answers
from mlcdn.demo.command import Mlcdn

MODEL: Final = "bench-swap"
RATE: Final = 1_000.0
SWAPS: Final = 10
AFTER: Final = 500
WARM_S: Final = 3.0
STEADY_S: Final = 5.0
BETWEEN_S: Final = 3.0
SETTLE_S: Final = 1.0
REACH: Final = 1.3


@dataclass(slots=True)
class Run:
    seen: Seen = field(default_factory=Seen)
    steady: list[tuple[float, float]] = field(default_factory=list)
    """From and to, by `time.monotonic`."""


def run(mlcdn: Mlcdn, work: Path) -> int:
    first = model(work / "swap.onnx", 1_000, hidden=470)
    mlcdn("publish", MODEL, str(first), "--version", "swap-first", "--wait")
    node = mlcdn.network()["regions"]["tokyo"]["nodes"][0]
    url = f"{node['url']}/v2/models/{MODEL}/infer"
    wait_answers(url, "oip", first)
    up, edge, everywhere = mlcdn.network()["pids"]["up"], node["pids"]["edge"], sorted(os.sched_getaffinity(0))
    server, _ = cores.two_cores()
    client, rest = ({everywhere[1]}, everywhere[2:]) if len(everywhere) > 2 else ({server}, everywhere[1:])
    ours = [p.pid for p in cores.tree(edge)]
    cores.pin([p.pid for p in cores.tree(up) if p.pid not in ours], rest)
    cores.pin(ours, {server})
    os.sched_setaffinity(0, client)
    try:
        done = asyncio.run(_load(mlcdn, work, url, rest))
    finally:
        os.sched_setaffinity(0, everywhere)
        cores.pin([p.pid for p in cores.tree(up)], everywhere)
    return _report(done)


async def _load(mlcdn: Mlcdn, work: Path, url: str, rest: list[int]) -> Run:
    stop, done = asyncio.Event(), Run()
    load = asyncio.create_task(open_loop(url, Mixed(), RATE, stop))
    await asyncio.sleep(WARM_S)
    settled = time.monotonic()
    await asyncio.sleep(STEADY_S)
    try:
        for number in range(SWAPS):
            path = await asyncio.to_thread(_model, work, number, rest)
            done.steady.append((settled, time.monotonic()))
            await asyncio.to_thread(_publish, mlcdn, path, number, rest)
            settled = time.monotonic() + SETTLE_S
            await asyncio.sleep(SETTLE_S + BETWEEN_S)
        done.steady.append((settled, time.monotonic()))
    finally:
        stop.set()
        done.seen = await load
    return done


def _model(work: Path, number: int, rest: list[int]) -> Path:
    os.sched_setaffinity(0, rest)
    return model(work / f"swap-{number}.onnx", 1_001 + number, hidden=470)


def _publish(mlcdn: Mlcdn, path: Path, number: int, rest: list[int]) -> None:
    # A thread's affinity is its own, and the command's process inherits it.
    os.sched_setaffinity(0, rest)
    mlcdn("publish", MODEL, str(path), "--version", f"swap-{number}", "--wait")


def _report(done: Run) -> int:
    answers, failed = done.seen.answers, done.seen.failed
    steady = [a.ms for a in answers if any(start <= a.sent < end for start, end in done.steady)]
    after = [[a.ms for a in answers[at : at + AFTER]] for at in _swaps(answers)]
    took = answers[-1].sent - answers[0].sent
    print(f"{len(answers)} requests at {len(answers) / took:.0f}/s over {len(after)} swaps, {failed} failed{done.seen.why()}; "
          f"the client itself was late by p99 {np.quantile(done.seen.late_ms, 0.99):.1f} ms")  # fmt: skip
    line("steady", steady, "ms")
    if len(after) != SWAPS:
        print(f"{len(after)} swaps were seen, not {SWAPS}")
        return 1
    line(f"the {AFTER} after each of {SWAPS} swaps", [ms for one in after for ms in one], "ms")
    line("p99 of each swap", [float(np.quantile(one, 0.99)) for one in after], "ms")
    base = float(np.quantile(steady, 0.99))
    ratio = float(np.quantile([ms for one in after for ms in one], 0.99)) / base
    print(f"ratio: p99 after a swap / steady {ratio:.2f} (reach ≤ {REACH}: {'met' if ratio <= REACH else 'not met'})")
    return int(failed > 0)


def _swaps(answers: list[Answer]) -> list[int]:
    """Where the first answer of each new digest stands."""
    known, found = {answers[0].digest}, []
    for at, answer in enumerate(answers):
        if answer.status == 200 and answer.digest not in known:
            known.add(answer.digest)
            found.append(at)
    return found
