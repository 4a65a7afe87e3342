"""LitServe: one API server process and one inference worker, batching up to 32 rows with the least wait.

Its JSON is free: ``{"features": [32 floats]}`` in, ``{"scores": [8 floats]}`` out. Access log off;
`fast_queue` stays off, it measured slower here. It has no cache.
"""

from __future__ import annotations

import os

import litserve
import numpy as np
import onnxruntime

MAX_BATCH = 32
MAX_WAIT_S = 0.001


class Mlp(litserve.LitAPI):
    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )

    def decode_request(self, request: dict[str, list[float]]) -> np.ndarray:
        return np.array(request["features"], np.float32)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"features": rows})[0]

    def unbatch(self, scores: np.ndarray) -> list[np.ndarray]:
        return list(scores)

    def encode_response(self, scores: np.ndarray) -> dict[str, list[float]]:
        return {"scores": scores.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Mlp(max_batch_size=MAX_BATCH, batch_timeout=MAX_WAIT_S),
        accelerator="cpu",
        workers_per_device=1,
    )
    server.run(
        host="127.0.0.1",
        port=int(os.environ["BENCH_PORT"]),
        num_api_servers=1,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
