"""A swap under load: an open loop over three regions, five swaps; failed requests, and p99 before and after each."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from mlcdn.demo.command import Mlcdn
from mlcdn.demo.digits import Digits, train
from mlcdn.demo.run import PLACES
from mlcdn.demo.traffic import MODEL, Answers, open_loop

RATE = 200.0
SWAPS = 5
AFTER = 500


def run(mlcdn: Mlcdn, work: Path) -> int:
    digits = train(work / "digits")
    mlcdn("publish", MODEL, str(digits.v1), "--version", "v1", "--wait")
    answers = asyncio.run(_load(mlcdn, digits))
    swaps = [
        i for i in range(1, len(answers.seen)) if answers.seen[i][1] != answers.seen[i - 1][1]
    ]  # fmt: skip
    first = swaps[0] if swaps else len(answers.seen)
    steady = answers.latencies_ms[100 : max(101, first - 50)]
    after = [ms for at in _starts(swaps) for ms in answers.latencies_ms[at : at + AFTER]]
    p_before, p_after = float(np.quantile(steady, 0.99)), float(np.quantile(after, 0.99))
    print(
        f"{answers.sent} requests at {answers.sent / answers.seconds:.0f}/s over {SWAPS} swaps, {answers.failed} failed"
    )
    print(f"p50 steady {np.quantile(steady, 0.5):.2f} ms, after a swap {np.quantile(after, 0.5):.2f} ms")
    print(
        f"ratio: p99 of the {AFTER} after a swap {p_after:.1f} ms / steady {p_before:.1f} ms = {p_after / p_before:.2f}"
    )
    return int(answers.failed > 0)


def _starts(changes: list[int]) -> list[int]:
    """The first answer of each new version; three regions change within a few hundred answers of each other."""
    found: list[int] = []
    for at in changes:
        if not found or at - found[-1] > AFTER:
            found.append(at)
    return found


async def _load(mlcdn: Mlcdn, digits: Digits) -> Answers:
    stop = asyncio.Event()
    load = asyncio.create_task(open_loop(mlcdn.network()["router"]["http"], digits.held_out, PLACES, RATE, stop))
    await asyncio.sleep(4)
    for number in range(SWAPS):
        path = digits.v2 if number % 2 == 0 else digits.v1
        await asyncio.to_thread(mlcdn.json, "publish", MODEL, str(path), "--version", f"swap-{number}", "--wait")
        await asyncio.sleep(4)
    stop.set()
    return await load
