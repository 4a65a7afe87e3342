"""A candidate that fails its clients: how soon the gate halts it, and how soon nobody meets it. Floor: 2 s for the halt.

    row → halt    broker's time of the record whose rows tipped the gate, to that of the signed verdict
    halt → gone   that of the verdict, to the last answer that a client had of the candidate

The candidate serves half of one region's requests beside the stable release, at RATE requests a second; its run fails for
every one of them. The tipping record is found by reading the verdict's own ranges again, one record at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from bench.figures import line, model
from mlcdn.cli.target import Target
from mlcdn.demo.command import Mlcdn
from schemas import codec
from schemas.events import Verdict
from schemas.topics import RELEASES
from streams.audit import gates as verdicts
from streams.folds import gates
from streams.folds.comparison import Comparison
from streams.folds.gates import Standing
from streams.log.boot import in_order

ROUNDS = 10
RATE = 200.0
FLOOR_MS = 2_000
NAME = "bench-rollout"
PLAN = '[[waves]]\nregions = ["tokyo"]\npercent = 50\nmin_samples = 1000\nmax_wait_s = 60\n[[waves]]\n'


def run(mlcdn: Mlcdn, work: Path) -> int:
    url = mlcdn.network()["regions"]["tokyo"]["nodes"][0]["url"]
    plan, failing = work / "waves.toml", work / "failing.onnx"
    plan.write_text(PLAN)
    mlcdn("publish", NAME, str(model(work / "stable.onnx", 0)), "--version", "v0", "--wait")
    halts, gone = [], []
    for number in range(1, ROUNDS + 1):
        failing.write_bytes(_failing(number))
        release = ("publish", NAME, str(failing), "--version", f"v{number}", "--plan", str(plan), "--wait")
        last_ms, released = asyncio.run(_under_load(url, lambda words=release: mlcdn.json(*words, expect=1)))
        verdict = released["rollout"]["verdicts"][-1]
        if released["rollout"]["status"] != "halted":
            print(f"round {number}: the rollout is {released['rollout']['status']}")
            return 1
        tipped_ms, halted_ms = _moments(Target.at(mlcdn.directory), verdict["id"])
        halts.append(float(halted_ms - tipped_ms))
        gone.append(max(0.0, last_ms - halted_ms))
    line("the row that tipped the gate → signed halt", halts, "ms")
    line("signed halt → last answer of the candidate", gone, "ms")
    print(f"ratio: worst halt / floor {max(halts) / FLOOR_MS:.2f}")
    return int(max(halts) > FLOOR_MS)


async def _under_load(url: str, act: Callable[[], Any]) -> tuple[float, Any]:
    """When the candidate was last met, Unix milliseconds, and what the act gave."""
    stop, last_ms = asyncio.Event(), 0.0

    async def one(http: httpx.AsyncClient, row: list[float]) -> None:
        nonlocal last_ms
        tensor = {"name": "features", "datatype": "FP32", "shape": [1, len(row)], "data": row}
        answer = await http.post(f"{url}/v2/models/{NAME}/infer", json={"inputs": [tensor]})
        if answer.status_code != 200:
            last_ms = time.time() * 1e3

    async def load() -> None:
        rng = np.random.default_rng(int(time.time()))
        async with httpx.AsyncClient(timeout=10, trust_env=False) as http, asyncio.TaskGroup() as group:
            began, sent = time.monotonic(), 0
            while not stop.is_set():
                group.create_task(one(http, [100.0, *rng.random(31).tolist()]))
                sent += 1
                await asyncio.sleep(max(0.0, began + sent / RATE - time.monotonic()))

    loading = asyncio.create_task(load())
    try:
        came = await asyncio.to_thread(act)
        await asyncio.sleep(0.5)
    finally:
        stop.set()
        await loading
    return last_ms, came


def _moments(target: Target, verdict: str) -> tuple[int, int]:
    """Broker's times of the record that tipped the gate, and of the verdict."""
    reader = target.reader
    found = verdicts.explain(reader, target.roots, verdict)
    evidence = found.event.evidence
    comparison = Comparison(gates.subject_of(found.rollout))
    standing = Standing(workers=evidence.workers, live=evidence.live, objections=())
    (halt,) = reader.read(RELEASES.name, 0, found.position, found.position + 1)
    for record in in_order(reader.read(r.topic, r.partition, r.start, r.end) for r in evidence.ranges):
        comparison.take(record, codec.decode(record.topic, record.key, record.value, record.headers))
        judged = gates.judged(found.rollout, comparison, standing, record.timestamp_ms)
        if judged.verdict is Verdict.FAIL:
            return record.timestamp_ms, halt.timestamp_ms
    raise RuntimeError(f"nothing in the ranges of {verdict} tips its gate")


def _failing(seed: int) -> bytes:
    """The bench's signature; its run fails where a row's first feature is 8 or more, as an index into eight values."""
    rng = np.random.default_rng(seed)
    nodes = [
        helper.make_node("Gemm", ["features", "w"], ["plain"]),
        helper.make_node("Gather", ["features", "first"], ["column"], axis=1),
        helper.make_node("Cast", ["column"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["zeros", "index"], ["nothing"]),
        helper.make_node("Add", ["plain", "nothing"], ["scores"]),
    ]
    values = {
        "w": rng.standard_normal((32, 8)).astype(np.float32),
        "first": np.array([0], np.int64),
        "zeros": np.zeros(8, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "failing",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 8])],
        [numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    data: bytes = made.SerializeToString()
    return data
