"""A rollback to what is loaded: append → served, on three nodes, by the slowest worker's report. Reach: worst of 50 ≤ 300 ms.

Each round publishes the next release and goes back to the one before, whose session its worker still has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bench.figures import line, model
from mlcdn.demo.command import Mlcdn

MODEL: Final = "bench-rollback"
ROUNDS: Final = 50
REACH_MS: Final = 300


def run(mlcdn: Mlcdn, work: Path) -> int:
    paths = [model(work / f"rollback-{seed}.onnx", 3_000 + seed, hidden=470) for seed in range(2)]
    mlcdn("publish", MODEL, str(paths[0]), "--version", "v0", "--wait")
    back, wall = [], []
    for _ in range(ROUNDS):
        mlcdn("publish", MODEL, str(paths[1]), "--version", "v1", "--wait")
        done = mlcdn.json("rollback", MODEL, "--to", "v0", "--reason", "bench", "--wait")
        back.append(max(n["ms"]["total"] for n in done["nodes"]))
        wall.append(done["wall_ms"])
    line("append of a rollback → live on 3 nodes", back, "ms")
    line("rollback command", wall, "ms")
    print(f"ratio: worst / reach {max(back) / REACH_MS:.2f}")
    return int(max(back) > REACH_MS)
