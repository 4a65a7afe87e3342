"""mosec: a Rust HTTP server in front of one Python worker process, dynamic batching up to 32 rows.

Its JSON is free: ``{"features": [32 floats]}`` in, ``{"scores": [8 floats]}`` out. Its own JSON module is Python's; msgspec is
twice as fast here, so msgspec it is. `max_wait_time` is the least it takes, 1 ms. It has no cache. With BENCH_BODY=oip it is
asked with the bytes that our edge is asked with: more to parse, and the same 32 floats.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from mosec import Server, Worker

MAX_BATCH = 32
MAX_WAIT_MS = 1


class Mlp(Worker):
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self.decode = msgspec.json.Decoder().decode
        self.encode = msgspec.json.Encoder().encode
        oip = os.environ["BENCH_BODY"] == "oip"
        self.features = (lambda body: body["inputs"][0]["data"]) if oip else (lambda body: body["features"])

    def deserialize(self, data: bytes) -> Any:
        return self.decode(data)

    def serialize(self, data: Any) -> bytes:
        return self.encode(data)

    def forward(self, data: list[Any]) -> list[dict[str, list[float]]]:
        rows = np.array([self.features(body) for body in data], np.float32)
        return [{"scores": scores} for scores in self.session.run(None, {"features": rows})[0].tolist()]


if __name__ == "__main__":
    os.environ |= {
        "MOSEC_ADDRESS": "127.0.0.1",
        "MOSEC_PORT": os.environ["BENCH_PORT"],
        "MOSEC_LOG_LEVEL": "warning",
    }
    server = Server()
    server.append_worker(Mlp, num=1, max_batch_size=MAX_BATCH, max_wait_time=MAX_WAIT_MS)
    server.run()
