"""What swaps leave behind: RSS of the worker after 10 and after 200 swaps of a 1 MB model, asked 50 times a second.

Eight bodies only: what caches hold is theirs to bound, and each release leaves its entries there until they age out.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import numpy as np

from bench import cores
from bench.figures import model
from bench.loads import Mixed
from bench.open_loop import Seen, open_loop
from bench.servers import wait_answers
from mlcdn.demo.command import Mlcdn

MODEL: Final = "bench-memory"
RATE: Final = 50.0
FIRST, LAST = 10, 200
STEP: Final = 10
SETTLE_S: Final = 2.0
REACH: Final = 1.1


def run(mlcdn: Mlcdn, work: Path) -> int:
    path = model(work / "memory.onnx", 10_000, hidden=470)
    mlcdn("publish", MODEL, str(path), "--version", "memory-0", "--wait")
    node = mlcdn.network()["regions"]["tokyo"]["nodes"][0]
    wait_answers(url := f"{node['url']}/v2/models/{MODEL}/infer", "oip", path)
    (worker,) = node["pids"]["workers"]
    seen, sizes = asyncio.run(_load(mlcdn, work, url, worker))
    now = mlcdn.network()["regions"]["tokyo"]["nodes"][0]["pids"]["workers"]
    if now != [worker]:
        print(f"the worker did not live through it: {worker}, now {now}")
        return 1
    print("RSS after swaps, MiB: " + ", ".join(f"{number}: {mib:.1f}" for number, mib in sizes.items()))
    slope = float(np.polyfit(list(sizes), list(sizes.values()), 1)[0]) * 1024
    print(f"{len(seen.answers)} requests, {seen.failed} failed{seen.why()}; {slope:+.1f} KiB a swap by least squares")
    ratio = sizes[LAST] / sizes[FIRST]
    print(f"ratio: RSS after {LAST} swaps / after {FIRST} {ratio:.3f} "
          f"(reach ≤ {REACH}: {'met' if ratio <= REACH else 'not met'})")  # fmt: skip
    return int(seen.failed > 0)


async def _load(mlcdn: Mlcdn, work: Path, url: str, worker: int) -> tuple[Seen, dict[int, float]]:
    stop, sizes = asyncio.Event(), dict[int, float]()
    load = asyncio.create_task(open_loop(url, Mixed(8, new=False), RATE, stop))
    try:
        for number in range(1, LAST + 1):
            await asyncio.to_thread(_swap, mlcdn, work, number)
            if number % STEP == 0:
                await asyncio.sleep(SETTLE_S)
                sizes[number] = cores.rss_mib(worker)
    finally:
        stop.set()
        seen = await load
    return seen, sizes


def _swap(mlcdn: Mlcdn, work: Path, number: int) -> None:
    path = model(work / "memory.onnx", 10_000 + number, hidden=470)
    mlcdn("publish", MODEL, str(path), "--version", f"memory-{number}", "--wait")
