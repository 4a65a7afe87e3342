"""Requests a second, cached and uncached, beside nginx ``return 200``; and a swap under load.

wrk drives one worker over loopback; nginx and wrk are Debian's packages. What is missing is named, and the bench fails.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.figures import model
from mlcdn.demo.command import Mlcdn
from processes.ports import free_port

ROUNDS = 5
SECONDS = 3
MODEL = "bench-edge"


def run(mlcdn: Mlcdn, work: Path) -> int:
    missing = [tool for tool in ("nginx", "wrk") if shutil.which(tool) is None]
    if missing:
        print(f"missing: {', '.join(missing)}; nothing was measured")
        return 1
    mlcdn("publish", MODEL, str(model(work / "edge.onnx", 1)), "--version", "v1", "--wait")
    url = mlcdn.network()["regions"]["tokyo"]["nodes"][0]["url"]
    cached, unique = _scripts(work)
    rows: dict[str, list[float]] = {"nginx return 200": [], "cached": [], "uncached": []}
    with tempfile.TemporaryDirectory() as directory:
        nginx, port = _nginx(Path(directory))
        try:
            for _ in range(ROUNDS):
                rows["nginx return 200"].append(_wrk(cached, f"http://127.0.0.1:{port}/"))
                rows["cached"].append(_wrk(cached, f"{url}/v2/models/{MODEL}/infer"))
                rows["uncached"].append(_wrk(unique, f"{url}/v2/models/{MODEL}/infer"))
        finally:
            nginx.send_signal(signal.SIGTERM)
            nginx.wait()
    for name, rates in rows.items():
        print(f"{name:<20} median {statistics.median(rates):>10,.0f} rps  of {[round(r) for r in rates]}")
    base = statistics.median(rows["nginx return 200"])
    print(f"ratio: cached / nginx {statistics.median(rows['cached']) / base:.3f}, "
          f"uncached / nginx {statistics.median(rows['uncached']) / base:.3f}")  # fmt: skip
    return 0


def _scripts(work: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    bodies = []
    for row in rng.standard_normal((64, 32)).round(4):
        tensor = {"name": "features", "shape": [1, 32], "datatype": "FP32", "data": row.tolist()}
        bodies.append(json.dumps({"inputs": [tensor]}))
    table = "bodies={\n" + ",\n".join(f"[==[{b}]==]" for b in bodies) + "}\n"
    head = 'wrk.method="POST"; wrk.headers["Content-Type"]="application/json"\n'
    rate, errors = "s.requests/(s.duration/1e6)", "s.errors.status+s.errors.read+s.errors.connect+s.errors.timeout"
    done = f'done=function(s,l,r) io.write(string.format("RATE %.1f ERRORS %d\\n", {rate}, {errors})) end\n'
    cached = work / "cached.lua"
    cached.write_text(
        table + head + "local i=0\nrequest=function() i=i%64+1; return wrk.format(nil,nil,nil,bodies[i]) end\n" + done
    )
    unique = work / "unique.lua"
    # The first feature counts up, and is exact in float32: no two requests are the same, so no cache can answer.
    count = 'request=function() i=i+1; local b=bodies[i%64+1]:gsub(\'"data": %[[%d.-]+\', \'"data": [\'..i..".5", 1)\n'
    unique.write_text(table + head + f"local i=0\n{count} return wrk.format(nil,nil,nil,b) end\n" + done)
    return cached, unique


def _wrk(script: Path, url: str) -> float:
    done = subprocess.run(
        ["wrk", "-t1", "-c32", f"-d{SECONDS}s", "-s", str(script), url], capture_output=True, text=True, check=True
    )
    found = re.search(r"RATE ([\d.]+) ERRORS (\d+)", done.stdout)
    if found is None or found.group(2) != "0":
        raise RuntimeError(f"wrk against {url}: {done.stdout[-500:]}")
    return float(found.group(1))


def _nginx(directory: Path) -> tuple[subprocess.Popen[bytes], int]:
    port = free_port()
    config = directory / "nginx.conf"
    config.write_text(
        f"daemon off; worker_processes 1; pid {directory}/pid; error_log {directory}/error.log;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; keepalive_requests 1000000; client_body_temp_path {directory}/b;"
        f" proxy_temp_path {directory}/p; fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u;"
        f" scgi_temp_path {directory}/s;\n"
        f' server {{ listen 127.0.0.1:{port}; location / {{ default_type application/json; return 200 "{"x" * 300}"; }} }} }}\n'
    )
    process = subprocess.Popen(["nginx", "-c", str(config), "-p", str(directory)], stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    return process, port
