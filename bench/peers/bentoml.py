"""BentoML: one service, one worker, adaptive batching up to 32 rows.

Its JSON names the method's parameter: ``{"features": [[32 floats]]}`` in, a list of rows out. Access log, metrics and
tracing are off. It has no cache.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import bentoml
import numpy as np
import onnxruntime

MAX_BATCH = 32
MAX_LATENCY_MS = 1_000  # over it the batcher refuses: it is a limit, not a wait


@bentoml.service(
    workers=1,
    threads=1,
    traffic={"timeout": 30, "max_concurrency": 1024},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Mlp:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )

    @bentoml.api(batchable=True, batch_dim=0, max_batch_size=MAX_BATCH, max_latency_ms=MAX_LATENCY_MS)
    def infer(self, features: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"features": features.astype(np.float32, copy=False)})[0]


if __name__ == "__main__":
    # A service is imported by its module's name, and this one's would hide the package's.
    shutil.copy(__file__, Path(os.environ["BENCH_DIR"]) / "bento_service.py")
    arguments = ["serve", "bento_service:Mlp", "--working-dir", os.environ["BENCH_DIR"]]
    arguments += ["--host", "127.0.0.1", "--port", os.environ["BENCH_PORT"]]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *arguments])
