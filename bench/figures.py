"""What a table of figures looks like, and the models that are measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def line(name: str, values: Sequence[float], unit: str) -> None:
    p50, p99, worst = np.quantile(values, 0.5), np.quantile(values, 0.99), max(values)
    print(f"{name:<44} n={len(values):<5} p50 {p50:9.2f}  p99 {p99:9.2f}  worst {worst:9.2f} {unit}")


def model(path: Path, seed: int, hidden: int = 128) -> Path:
    """A float32 MLP 32 → hidden → hidden → 8; 470 hidden units are about 1 MB."""
    rng = np.random.default_rng(seed)
    sizes, nodes, weights, x = [32, hidden, hidden, 8], [], [], "features"
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        weights.append(numpy_helper.from_array((rng.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32), f"w{i}"))
        weights.append(numpy_helper.from_array(rng.standard_normal(b).astype(np.float32), f"b{i}"))
        y = "scores" if last else f"g{i}"
        nodes.append(helper.make_node("Gemm", [x, f"w{i}", f"b{i}"], [y]))
        if not last:
            nodes.append(helper.make_node("Relu", [y], [f"h{i}"]))
        x = f"h{i}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 8])],
        weights,
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(built, path)
    return path
