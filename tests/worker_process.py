"""One edge worker as a process, over a board as its agent would write it, with no Kafka, Redis or origin anywhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from processes.parent_death import tied_to_parent
from processes.ports import LOOPBACK, free_port, listen
from tests import models
from tests.service.test_worker import ROW, Node

START_S = 20.0


class WorkerProcess:
    """Serves the model `digits`. Settings are given by name."""

    def __init__(self, directory: Path, *, before: str = "", **settings: object) -> None:
        self.node = Node(directory)
        self.node.release(models.mlp_bytes(1))
        self.directory, self._before = directory, before
        self._listener = listen(LOOPBACK, 0)
        self._listener.setblocking(True)
        self.port = int(self._listener.getsockname()[1])
        self.scheme = "https" if "tls_cert" in settings else "http"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLCDN_")}
        self._environment = environment | {
            "MLCDN_DIR": str(directory),
            "MLCDN_NODE": "tokyo-1",
            "MLCDN_KAFKA": f"{LOOPBACK}:{free_port()}",
            "MLCDN_LISTEN_FD": str(self._listener.fileno()),
            **{f"MLCDN_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        program = f"{self._before}; from edge_node.serving.main import main; main()" if self._before else None
        argv = [sys.executable, "-c", program] if program else [sys.executable, "-m", "edge_node.serving.main"]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                env=self._environment,
                pass_fds=[self._listener.fileno()],
                stdout=log,
                stderr=log,
                preexec_fn=tied_to_parent(),  # noqa: PLW1509
            )
        end = time.monotonic() + START_S
        while not self.is_ready():
            assert self.process.poll() is None and time.monotonic() < end, self.log()
            time.sleep(0.05)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self._listener.close()

    def is_ready(self) -> bool:
        try:
            url = f"{self.scheme}://{LOOPBACK}:{self.port}/v2/health/ready"
            return httpx.get(url, trust_env=False, verify=False, timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        made.settimeout(10)
        made.connect((LOOPBACK, self.port))
        return made

    def predict(self) -> httpx.Response:
        """On a new connection."""
        url = f"{self.scheme}://{LOOPBACK}:{self.port}/predict"
        return httpx.post(url, json={"features": ROW}, trust_env=False, verify=False, timeout=10)

    def lives(self) -> bool:
        return self.process.poll() is None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def cut(self) -> dict[str, float]:
        """The connections it counts as cut, by reason."""
        text = httpx.get(f"{self.scheme}://{LOOPBACK}:{self.port}/metrics", trust_env=False, verify=False).text
        lines = [line for line in text.splitlines() if line.startswith("mlcdn_connections_cut_total{")]
        return {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in lines}

    def log(self) -> str:
        return (self.directory / "log").read_text()
