"""Where a release's answers are computed: its session in this worker, or the origin.

Laws: rows run together only where the trial showed that company does not change them, and never more than the release's
`max_size` at once; others run one by one. A run ends at the release's deadline, whoever still waits for it.

It must not know caches, keys or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edge_node.serving.model_slot import Served
from edge_node.serving.origin_client import OriginClient
from inference.deadlines import Deadline
from inference.onnx_model import RunFailed
from inference.protocol import encode_outputs
from schemas.errors import BadInput, BadTensor, Unreachable

Array = np.ndarray[Any, np.dtype[Any]]
Inputs = Mapping[str, Array]


def check(served: Served, rows: Sequence[Inputs], outputs: Sequence[str] | None) -> None:
    """BadTensor unless the release's signature allows them."""
    known = {spec.name for spec in served.outputs}
    for name in outputs or ():
        if name not in known:
            raise BadInput(f"unknown output {name[:80]!r}; model {served.name} has {sorted(known)}")
    if served.model is not None:
        for inputs in rows:
            served.model.validate_inputs(inputs)
    else:
        expected = {spec.name: spec for spec in served.inputs}
        for inputs in rows:
            for name in inputs.keys() ^ expected.keys():
                raise BadTensor(f"input {name[:80]!r} is {'unknown' if name in inputs else 'missing'}")


async def compute(
    served: Served,
    rows: Sequence[Inputs],
    outputs: Sequence[str] | None,
    origin: OriginClient | None,
    traceparent: str,
) -> list[bytes]:
    """The encoded outputs of every row."""
    deadline = Deadline.after(served.wanted.released.limits.deadline_ms / 1e3)
    if served.model is None:
        if origin is None:
            raise Unreachable("origin", "nowhere", "no origin is configured")
        return await asyncio.gather(
            *(origin.infer(served.name, served.digest, r, served.inputs, outputs, deadline, traceparent) for r in rows)
        )
    batching = served.wanted.released.batching
    if len(rows) > 1 and batching.batchable and _alike(rows):
        encoded: list[bytes] = []
        for start in range(0, len(rows), batching.max_size):
            encoded += await _together(served, rows[start : start + batching.max_size], outputs, deadline)
        return encoded
    # One after the other: a batch of one request must not take the whole queue of its model.
    return [encode_outputs(await served.run(inputs, outputs, deadline), served.outputs) for inputs in rows]


def _alike(rows: Sequence[Inputs]) -> bool:
    shapes = {name: array.shape for name, array in rows[0].items()}
    return all({name: array.shape for name, array in row.items()} == shapes for row in rows)


async def _together(
    served: Served, rows: Sequence[Inputs], outputs: Sequence[str] | None, deadline: Deadline
) -> list[bytes]:
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    result = await served.run(joined, outputs, deadline)
    if any(array.shape[:1] != (len(rows),) for array in result.values()):
        raise RunFailed(f"model {served.name} did not answer row by row")
    return [
        encode_outputs({name: array[i : i + 1] for name, array in result.items()}, served.outputs)
        for i in range(len(rows))
    ]
