"""One run of wrk on one core, and what it saw. It must not know whom it asks."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.loads import Written

SCRIPT = Path(__file__).with_name("load.lua")


@dataclass(frozen=True, slots=True)
class Reading:
    """`busy` is the share of its core that wrk took: near 1, wrk was the limit and the server was not."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int
    busy: float

    @property
    def rps(self) -> float:
        return self.requests / self.seconds


def drive(written: Written, url: str, seconds: float, *, core: int | None, header: str = "") -> Reading:
    """Asks for `seconds` (wrk counts whole ones, at least one), from one core or, without it, from any."""
    environment = os.environ | {"BODIES": str(written.bodies), "HEADER": header}
    if written.order is not None:
        environment["ORDER"] = str(written.order)
    command = [] if core is None else ["taskset", "-c", str(core)]
    command += ["wrk", "-t1", f"-c{written.load.clients}", f"-d{max(1, round(seconds))}s"]
    command += ["--timeout", "10s", "--latency", "-s", str(SCRIPT), url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=seconds + 60)
    found = re.search(r"RESULT (\d+) (\d+) ([\d.]+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"wrk against {url}: {(done.stdout + done.stderr)[-500:]}")
    requests, us, cpu_s, p50, p99, status, other = map(float, found.groups())
    return Reading(int(requests), us / 1e6, p50 / 1e3, p99 / 1e3, int(status + other), cpu_s / (us / 1e6))
