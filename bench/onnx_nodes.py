"""Every ONNX backend test against one worker: how many are answered as onnxruntime answers them in process, and why the
others are not. Fails if one is answered otherwise."""

from __future__ import annotations

import time
from pathlib import Path

from mlcdn.demo.command import Mlcdn


def run(_: Mlcdn, work: Path) -> int:
    # The cases and their runner are the tests', and need what tests need.
    from tests import onnx_nodes

    directory = work / "onnx_nodes"
    directory.mkdir()
    wrong = 0
    with onnx_nodes.NodesWorker(directory) as worker:
        for what, cases in (("node tests", onnx_nodes.node_cases()), ("models", onnx_nodes.model_cases())):
            started = time.perf_counter()
            outcomes = onnx_nodes.run(cases, worker)
            wrong += sum(outcome.verdict is onnx_nodes.Verdict.WRONG for outcome in outcomes)
            print(
                f"{what}: released, asked in JSON and in binary, and retired in {time.perf_counter() - started:.0f} s"
            )
            for line in onnx_nodes.table(outcomes):
                print(line)
    return int(wrong > 0)
