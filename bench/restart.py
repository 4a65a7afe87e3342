"""kill -9 of a whole edge → the first prediction answered again, from its own disk."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx

from bench.figures import line, model
from mlcdn.demo.command import Mlcdn

# Each of three nodes twice: the supervisor waits 0.1 s before the first restart of a node and doubles that with each.
ROUNDS = 2


def run(mlcdn: Mlcdn, work: Path) -> int:
    mlcdn("publish", "bench-restart", str(model(work / "restart.onnx", 1)), "--wait")
    took = []
    for _ in range(ROUNDS):
        for region in mlcdn.network()["regions"]:
            node = mlcdn.network()["regions"][region]["nodes"][0]
            killed = time.perf_counter()
            os.kill(node["pids"]["edge"], signal.SIGKILL)
            _answers(node["url"])
            took.append((time.perf_counter() - killed) * 1000)
            _new_parent(mlcdn, region, node["pids"]["edge"])
    line("kill -9 of an edge → serving", took, "ms")
    print(f"ratio: worst / 3 s {max(took) / 3_000:.2f}")
    return int(max(took) > 3_000)


def _answers(url: str) -> None:
    body = {"features": [0.5] * 32, "model": "bench-restart"}
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            if httpx.post(f"{url}/predict", json=body, timeout=1, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.01)
    raise TimeoutError(url)


def _new_parent(mlcdn: Mlcdn, region: str, old: int) -> None:
    until = time.monotonic() + 30
    while mlcdn.network()["regions"][region]["nodes"][0]["pids"]["edge"] == old and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(2)
