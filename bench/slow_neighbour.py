"""A fast model's latency alone, and beside a model that takes 50 ms a run on the same worker; what the neighbour adds.

The fast one is asked 200 times a second, half of it misses; the slow one by one client that asks again as soon as it is
answered, never the same row. Alone and beside take turns. The slow model multiplies matrices that it makes out of its row, so
that it is slow by arithmetic and not by size; how often is calibrated here.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.figures import line, model
from bench.loads import Mixed
from bench.open_loop import Seen, ask_again, open_loop
from bench.servers import wait_answers
from mlcdn.demo.command import Mlcdn

FAST, SLOW = "bench-fast", "bench-slow"
RATE: Final = 200.0
ROUNDS: Final = 5
SECONDS: Final = 4.0
WARM_S: Final = 1.0
RUN_MS: Final = 50.0
SIDE: Final = 256


def run(mlcdn: Mlcdn, work: Path) -> int:
    fast, slow = model(work / "fast.onnx", 1), work / "slow.onnx"
    took, times = _calibrated(slow)
    print(f"the slow model: {times} products of {SIDE} × {SIDE} matrices, {took:.1f} ms a run alone")
    urls = []
    for name, path in ((FAST, fast), (SLOW, slow)):
        mlcdn("publish", name, str(path), "--version", "v1", "--wait")
        node = mlcdn.network()["regions"]["tokyo"]["nodes"][0]
        urls.append(f"{node['url']}/v2/models/{name}/infer")
        wait_answers(urls[-1], "oip", path)
    alone, beside, slow_seen = Seen(), Seen(), Seen()
    for _ in range(ROUNDS):
        seen, _ = asyncio.run(_round(urls[0], None))
        _add(alone, seen)
        seen, neighbour = asyncio.run(_round(urls[0], urls[1]))
        _add(beside, seen)
        _add(slow_seen, neighbour)
    for name, seen in (("fast alone", alone), ("fast beside the slow", beside), ("slow", slow_seen)):
        line(name, [a.ms for a in seen.answers], "ms")
    failed = alone.failed + beside.failed + slow_seen.failed
    p99 = [float(np.quantile([a.ms for a in seen.answers], 0.99)) for seen in (alone, beside)]
    print(f"{failed} failed{alone.why()}{beside.why()}{slow_seen.why()}; "
          f"the client itself was late by p99 {np.quantile(beside.late_ms, 0.99):.1f} ms")  # fmt: skip
    print(f"ratio: p99 beside / alone {p99[1] / p99[0]:.2f}; the neighbour adds {p99[1] - p99[0]:.2f} ms")
    return int(failed > 0)


def _add(to: Seen, seen: Seen) -> None:
    warm = int(WARM_S * RATE) if seen.late_ms else 0
    to.answers += seen.answers[warm:]
    to.late_ms += seen.late_ms[warm:]


async def _round(fast: str, slow: str | None) -> tuple[Seen, Seen]:
    stop = asyncio.Event()
    load = asyncio.create_task(open_loop(fast, Mixed(), RATE, stop))
    neighbour = asyncio.create_task(ask_again(slow, Mixed(), stop)) if slow else None
    await asyncio.sleep(WARM_S + SECONDS)
    stop.set()
    return await load, await neighbour if neighbour else Seen()


def _calibrated(path: Path) -> tuple[float, int]:
    """Writes the slow model; what a run takes and how many products it has."""
    times = 8
    for _ in range(4):
        _slow(path, times)
        took = _run_ms(path)
        if abs(took - RUN_MS) < RUN_MS / 10:
            break
        times = max(1, round(times * RUN_MS / took))
    return took, times


def _run_ms(path: Path) -> float:
    from inference.runtime import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    row, took = np.ones((1, 32), np.float32), []
    for _ in range(10):
        began = time.perf_counter()
        session.run(None, {"features": row})
        took.append((time.perf_counter() - began) * 1000)
    return float(np.median(took))


def _slow(path: Path, times: int) -> None:
    """Row → matrix (outer product) → `times` products with itself's first power → 8 scores; each row by itself."""
    rng = np.random.default_rng(7)
    spread = (rng.standard_normal((32, SIDE)) / 32).astype(np.float32)
    weights = [
        numpy_helper.from_array(spread, "spread"),
        numpy_helper.from_array((rng.standard_normal((SIDE, 8)) / SIDE).astype(np.float32), "out"),
        numpy_helper.from_array(np.array(1 / SIDE, np.float32), "scale"),
        numpy_helper.from_array(np.array([1], np.int64), "one"),
        numpy_helper.from_array(np.array([2], np.int64), "two"),
    ]
    nodes = [
        helper.make_node("MatMul", ["features", "spread"], ["h0"]),
        helper.make_node("Tanh", ["h0"], ["h"]),
        helper.make_node("Unsqueeze", ["h", "two"], ["column"]),
        helper.make_node("Unsqueeze", ["h", "one"], ["line"]),
        helper.make_node("MatMul", ["column", "line"], ["m0"]),
    ]
    for i in range(times):
        nodes.append(helper.make_node("MatMul", [f"m{i}", "m0"], [f"p{i}"]))
        nodes.append(helper.make_node("Mul", [f"p{i}", "scale"], [f"m{i + 1}"]))
    nodes.append(helper.make_node("ReduceMean", [f"m{times}"], ["mean"], axes=[1], keepdims=0))
    nodes.append(helper.make_node("MatMul", ["mean", "out"], ["scores"]))
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 8])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
