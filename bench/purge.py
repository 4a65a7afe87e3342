"""Append → last receipt of an invalidation, on three nodes. Floor: p99 ≤ 150 ms."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from bench.figures import line
from mlcdn.cli.target import Target
from mlcdn.demo.command import Mlcdn
from origin.invalidate import Invalidator
from origin.receipts import FleetWatch, wait_applied
from schemas.names import Scope, ScopeKind

ROUNDS = 200
FLOOR_MS = 150


def run(mlcdn: Mlcdn, work: Path) -> int:
    return asyncio.run(_run(Target.at(mlcdn.directory)))


async def _run(target: Target) -> int:
    writer = target.writer()
    watch, last = FleetWatch(target.reader), []
    await watch.look()
    invalidator = Invalidator(writer, target.reader, target.roots)
    for number in range(ROUNDS):
        scope = Scope(ScopeKind.KEY, f"prediction:bench:{number}")
        done = await invalidator.invalidate((scope,), soft=False, author="bench", reason="")
        receipts, missing = await wait_applied(watch, done.position, done.appended_ms, timeout_s=10)
        if missing:
            print(f"no receipt from {missing}")
            return 1
        last.append(max(r.applied_ms for r in receipts))
    await writer.close()
    line("append → last receipt, 3 nodes", last, "ms")
    p99 = float(np.quantile(last, 0.99))
    print(f"ratio: p99 / floor {p99 / FLOOR_MS:.2f}")
    return int(p99 > FLOOR_MS)
