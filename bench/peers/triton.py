"""Triton Inference Server out of nvidia-pytriton's wheel: dynamic batching, and its local response cache when asked.

Open Inference Protocol. The wheel has no ONNX backend, so the model runs in Triton's Python backend, one instance in a
process of its own; a cache hit never leaves Triton's C++. gRPC, metrics and logs are off; the default of eight HTTP threads
measured faster on one core than one or two. The server is started directly,
with a model repository that is written here, because pytriton's own proxy would add a hop to every miss.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

CACHE_BYTES = 256 * 2**20
MAX_BATCH = 32
CONFIG = """
backend: "python"
max_batch_size: {max_batch}
input [ {{ name: "features" data_type: TYPE_FP32 dims: [ 32 ] }} ]
output [ {{ name: "scores" data_type: TYPE_FP32 dims: [ 8 ] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
dynamic_batching {{ }}
response_cache {{ enable: {cache} }}
parameters [ {{ key: "onnx" value: {{ string_value: "{onnx}" }} }} ]
"""
MODEL = """
import json

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = json.loads(args["model_config"])["parameters"]["onnx"]["string_value"]
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        rows = [triton.get_input_tensor_by_name(r, "features").as_numpy() for r in requests]
        scores = self.session.run(None, {"features": np.concatenate(rows)})[0]
        answers, at = [], 0
        for row in rows:
            tensor = triton.Tensor("scores", scores[at : at + len(row)])
            answers.append(triton.InferenceResponse([tensor]))
            at += len(row)
        return answers
"""


def main() -> None:
    spec = find_spec("pytriton")
    assert spec is not None and spec.origin is not None
    shipped = Path(spec.origin).parent / "tritonserver"
    work = Path(tempfile.mkdtemp(prefix="bench-triton-", dir=os.environ["BENCH_DIR"]))
    cached = os.environ["BENCH_CACHE"] == "1"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    backend = work / "backends" / "python"
    shutil.copytree(shipped / "backends" / "python", backend)
    # The stub finds the wheel's libraries relative to where it lies.
    (backend / "triton_python_backend_stub").symlink_to(
        shipped / "python_backend_stubs" / version / "triton_python_backend_stub"
    )
    model = work / "models" / "mlp"
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.py").write_text(MODEL)
    config = CONFIG.format(max_batch=MAX_BATCH, cache=str(cached).lower(), onnx=os.environ["BENCH_MODEL"])
    (model / "config.pbtxt").write_text(config)
    libraries = [str(shipped / "external_libs"), str(sysconfig.get_config_var("LIBDIR"))]
    os.environ["LD_LIBRARY_PATH"] = ":".join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]).strip(":")
    # The stub embeds an interpreter, which finds this venv by the first python on the path.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    arguments = [
        str(shipped / "bin" / "tritonserver"),
        f"--model-repository={work / 'models'}",
        f"--backend-directory={work / 'backends'}",
        f"--cache-directory={shipped / 'caches'}",
        "--http-address=127.0.0.1",
        f"--http-port={os.environ['BENCH_PORT']}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--log-info=false",
        "--log-warning=false",
    ]
    if cached:
        arguments.append(f"--cache-config=local,size={CACHE_BYTES}")
    os.execv(arguments[0], arguments)


if __name__ == "__main__":
    main()
