"""A model of a gigabyte on its way to two regions of two nodes: how long, out of S3 how often, in how much memory; and
again with the first node's agent killed in the middle.

A network of its own, since regions of one node have no peers. Reach: S3 gives at most 1.1 copies a region, an agent grows
by at most 64 MiB, a kill costs less than one chunk.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mlcdn.demo.command import Mlcdn

MODEL: Final = "bench-fetch"
SIZE_BYTES: Final = 2**30
CHUNK_BYTES: Final = 8 * 2**20
MIB: Final = 2**20
REGIONS: Final = ("tokyo", "london")
COPIES: Final = 1.1
GROWTH_MIB: Final = 64
PATIENCE_S: Final = 170


def run(_: Mlcdn, work: Path, size_bytes: int = SIZE_BYTES) -> int:
    mlcdn = Mlcdn(work / "fetch-net")
    mlcdn("up", "--detach", "--regions", ",".join(REGIONS), "--nodes", "2", timeout_s=240)
    try:
        mlcdn("publish", MODEL, str(_model(work / "small.onnx", 2**20, 0)), "--version", "small", "--wait")
        time.sleep(2)
        missed = _release(mlcdn, _model(work / "big.onnx", size_bytes, 1), "whole", kill=False)
        missed |= _release(mlcdn, _model(work / "big.onnx", size_bytes, 2), "killed", kill=True)
    finally:
        mlcdn("down", "--wipe")
    return missed


def _release(mlcdn: Mlcdn, path: Path, version: str, *, kill: bool) -> int:
    nodes = {node["node"]: (region, node) for region, node in _nodes(mlcdn)}
    size = path.stat().st_size
    before = {name: _received(node["url"]) for name, (_, node) in nodes.items()}
    memory = {name: _memory_mib(node["pids"]["agent"], "VmRSS") for name, (_, node) in nodes.items()}
    with ThreadPoolExecutor(2) as pool:
        said = pool.submit(
            mlcdn.json, "publish", MODEL, str(path), "--version", version, "--wait",
            "--timeout", str(PATIENCE_S), timeout_s=PATIENCE_S + 120,
        )  # fmt: skip
        killed = pool.submit(_kill_the_first, mlcdn, size).result() if kill else ""
        released = said.result()
    print(f"\n{size / MIB:.0f} MiB, {version}" + (f": agent of {killed} killed" if killed else ""))
    phases = {n["node"]: n["ms"] for n in released["nodes"]}
    now = {node["node"]: (region, node) for region, node in _nodes(mlcdn)}
    missed = 0
    for region in REGIONS:
        got = dict.fromkeys(("s3", "peer"), 0.0)
        for name, (where, node) in now.items():
            if where != region:
                continue
            since = {source: total - before[name][source] for source, total in _received(node["url"]).items()}
            got = {source: got[source] + since[source] for source in got}
            peak = _memory_mib(node["pids"]["agent"], "VmHWM")
            ms = phases.get(name, {})
            print(
                f"  {name:<12} S3 {since['s3'] / MIB:7.1f} MiB, peers {since['peer'] / MIB:7.1f} MiB; "
                f"agent at most {peak:.0f} MiB, {memory[name]:.0f} before; "
                + ", ".join(
                    f"{phase} {ms[phase] / 1e3:.2f} s" for phase in ("download", "trial", "load") if phase in ms
                )
            )
            missed |= int(peak - memory[name] > GROWTH_MIB)
        copies, twice = got["s3"] / size, (got["s3"] + got["peer"] - 2 * size) / CHUNK_BYTES
        print(
            f"  {region}: {copies:.3f} copies out of S3 (reach ≤ {COPIES}: {'met' if copies <= COPIES else 'not met'}), "
            f"{twice:.2f} chunks received twice"
        )
        missed |= int(copies > COPIES or twice > 1)
    return missed


def _kill_the_first(mlcdn: Mlcdn, size: int) -> str:
    """Of the agents that have a third of it, one; by name."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        for _, node in _nodes(mlcdn):
            for part in (Path(node["dir"]) / "artifacts").glob(".*.part"):
                with contextlib.suppress(FileNotFoundError):
                    if _arrived(part, size) > size / 3:
                        os.kill(node["pids"]["agent"], signal.SIGKILL)
                        return str(node["node"])
        time.sleep(0.01)
    raise TimeoutError("no agent had a third of it")


def _arrived(part: Path, size: int) -> int:
    """By the counters at the file's end."""
    with part.open("rb") as file:
        file.seek(-(-size // 8) * 8)
        return int((np.frombuffer(file.read(), "<u8") & np.uint64(2**63 - 1)).sum())


def _nodes(mlcdn: Mlcdn) -> Iterator[tuple[str, Any]]:
    for region, part in mlcdn.network()["regions"].items():
        for node in part["nodes"]:
            yield region, node


def _received(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text
    found = dict(re.findall(r'^mlcdn_fetch_bytes_total{source="(\w+)"} (\S+)$', text, re.M))
    return {source: float(found.get(source, 0)) for source in ("s3", "peer")}


def _memory_mib(pid: int, field: str) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(f"{field}:")).split()[1]) / 1024


def _model(path: Path, size_bytes: int, seed: int) -> Path:
    """One dense layer, 32 → hidden → 8."""
    rng, hidden = np.random.default_rng(seed), size_bytes // 4 // (32 + 8)
    weights = [
        numpy_helper.from_array(rng.random(shape, np.float32) / hidden, name)
        for name, shape in (("first", (32, hidden)), ("second", (hidden, 8)))
    ]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["features", "first"], ["h"]),
            helper.make_node("MatMul", ["h", "second"], ["scores"]),
        ],
        "wide",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 8])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
