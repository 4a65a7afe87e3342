"""MLServer: adaptive batching up to 32 rows, and its response cache when asked. Open Inference Protocol.

`parallel_workers` is 0: with one core its pool of processes only adds a hop. No access log, tracing or compression.
"""

from __future__ import annotations

import asyncio
import os

import numpy as np
import onnxruntime
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse

CACHE_ENTRIES = 200_000
MAX_BATCH = 32
MAX_WAIT_S = 0.001


class Mlp(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32, copy=False)
        scores = self.session.run(None, {"features": rows})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("scores", scores)])


async def main() -> None:
    cached = os.environ["BENCH_CACHE"] == "1"
    grpc_port, metrics_port = (int(os.environ[name]) for name in ("BENCH_PORT_2", "BENCH_PORT_3"))
    server = MLServer(
        Settings(
            debug=False,
            host="127.0.0.1",
            http_port=int(os.environ["BENCH_PORT"]),
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            parallel_workers=0,
            load_models_at_startup=False,
            gzip_enabled=False,
            cache_enabled=cached,
            cache_size=CACHE_ENTRIES,
        )
    )
    model = ModelSettings(
        name="mlp",
        implementation=Mlp,
        max_batch_size=MAX_BATCH,
        max_batch_time=MAX_WAIT_S,
        cache_enabled=cached,
        parameters=ModelParameters(version="v1"),
    )
    await server.start(models_settings=[model])


if __name__ == "__main__":
    asyncio.run(main())
