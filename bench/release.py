"""Append → live: a 1 MB model on every node of three regions, by the slowest worker's report. Floor: worst ≤ 1.5 s."""

from __future__ import annotations

from pathlib import Path

from bench.figures import line, model
from mlcdn.demo.command import Mlcdn

ROUNDS = 50
FLOOR_MS = 1_500


def run(mlcdn: Mlcdn, work: Path) -> int:
    live, wall = [], []
    for seed in range(ROUNDS):
        path = model(work / "release.onnx", seed, hidden=470)
        released = mlcdn.json("publish", "bench-release", str(path), "--version", f"v{seed}", "--wait")
        live.append(max(n["ms"]["total"] for n in released["nodes"]))
        wall.append(released["wall_ms"])
    line("append → live on 3 nodes", live, "ms")
    line("publish command, trial and upload included", wall, "ms")
    print(f"ratio: worst / floor {max(live) / FLOOR_MS:.2f}")
    return int(max(live) > FLOOR_MS)
