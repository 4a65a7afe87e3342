"""The servers that are measured, by name: how each is started, asked and stopped.

Law: a server counts only if it first answers one row with the scores that onnxruntime itself gives for it (nginx, which
computes nothing, aside). It must not know loads, rounds or figures.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from bench import cores
from bench.loads import FEATURES, plain
from processes.ports import free_ports

HERE: Final = Path(__file__).parent
PEERS_PYTHON: Final = HERE.parent / ".venv-peers" / "bin" / "python"
START_S: Final = 60.0
STOP_S: Final = 10.0
# What a bench ends with that did all it could without a peer or a tool.
MISSING: Final = 3


@dataclass(frozen=True, slots=True)
class Peer:
    """`needs` is what must be there: a module of .venv-peers, or a program. `loads` are those that say something."""

    name: str
    script: str
    path: str
    form: str
    needs: str
    loads: tuple[str, ...]
    module: bool = True
    computes: bool = True

    def missing(self) -> str | None:
        """What to say when it cannot be measured here."""
        if not self.module:
            return None if shutil.which(self.needs) else f"missing: {self.needs} (a package of Debian)"
        if not PEERS_PYTHON.exists():
            return f"missing: {self.name} (make bench-peers installs it)"
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({self.needs!r}) is None)"
        found = subprocess.run([PEERS_PYTHON, "-P", "-c", look], check=False).returncode == 0
        return None if found else f"missing: {self.name} (module {self.needs} is not in .venv-peers)"


_INFER: Final = "/v2/models/mlp/infer"
PEERS: Final = {
    peer.name: (peer, *variants)
    for peer, *variants in (
        (Peer("nginx", "nginx.py", "/", "oip", "nginx", ("cached",), module=False, computes=False),),
        (
            Peer("mosec", "mosec.py", "/inference", "features", "mosec", ("unique", "one")),
            Peer("mosec oip", "mosec.py", "/inference", "oip", "mosec", ("unique", "one")),
        ),
        (Peer("triton", "triton.py", _INFER, "oip", "pytriton", ("cached", "zipf", "fresh id", "unique", "one")),),
        (Peer("mlserver", "mlserver.py", _INFER, "oip", "mlserver", ("cached", "unique", "one")),),
        (Peer("litserve", "litserve.py", "/predict", "features", "litserve", ("unique", "one")),),
        (Peer("bentoml", "bentoml.py", "/infer", "rows", "bentoml", ("unique", "one")),),
    )
}
"""A name is asked for; under it stand the variants that are measured."""


@dataclass(frozen=True, slots=True)
class Running:
    url: str
    root: int


class NotStarted(Exception):
    """A peer that is installed did not answer as it should."""


@contextlib.contextmanager
def started(peer: Peer, model: Path, work: Path, *, core: int, cache: bool) -> Iterator[Running]:
    """The peer on one core, until the block ends; a failure carries the end of its log."""
    first, second, third = free_ports(3)
    environment = os.environ | {
        "BENCH_PORT": str(first),
        "BENCH_PORT_2": str(second),
        "BENCH_PORT_3": str(third),
        "BENCH_MODEL": str(model),
        "BENCH_DIR": str(work),
        "BENCH_CACHE": str(int(cache)),
        "BENCH_BODY": peer.form,
        # A file called mosec.py must not be what `import mosec` finds.
        "PYTHONSAFEPATH": "1",
        "DO_NOT_TRACK": "1",
        "BENTOML_DO_NOT_TRACK": "True",
    }
    python = str(PEERS_PYTHON) if peer.module else sys.executable
    log = work / f"{peer.name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), python, str(HERE / "peers" / peer.script)],
            cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    running = Running(f"http://127.0.0.1:{first}{peer.path}", process.pid)
    try:
        wait_answers(running.url, peer.form, model if peer.computes else None, process)
        yield running
    except NotStarted as error:
        raise NotStarted(f"{peer.name}: {error}\n{log.read_text(errors='replace')[-1_500:]}") from None
    finally:
        _stop(process)


def wait_answers(
    url: str, form: str, model: Path | None, process: subprocess.Popen[bytes] | None = None, header: str = ""
) -> None:
    """Returns once the server answers one row rightly; `NotStarted` if that does not come about."""
    row = np.linspace(-1, 1, FEATURES).round(4)
    headers = {"content-type": "application/json"} | dict([header.split(": ", 1)] if header else [])
    until, said = time.monotonic() + START_S, "no answer"
    while time.monotonic() < until and (process is None or process.poll() is None):
        try:
            answer = httpx.post(url, content=plain(form, row.tolist()), headers=headers, timeout=5, trust_env=False)
        except httpx.TransportError:
            time.sleep(0.1)
            continue
        said = f"{answer.status_code} {answer.text[:300]}"
        if answer.status_code == 200:
            if model is not None and not np.allclose(_scores(answer.json()), _expected(model, row), atol=1e-4):
                raise NotStarted(f"other scores than onnxruntime's: {said}")
            return
        time.sleep(0.1)
    raise NotStarted(f"not ready within {START_S:.0f} s: {said}")


def _expected(model: Path, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from inference.runtime import onnxruntime

    session = onnxruntime.InferenceSession(model.read_bytes(), providers=["CPUExecutionProvider"])
    scores: np.ndarray[Any, Any] = session.run(None, {"features": row[None].astype(np.float32)})[0][0]
    return scores


def _scores(document: Any) -> list[float]:
    """The only list of eight numbers in an answer, wherever its protocol puts it."""
    if isinstance(document, list):
        if len(document) == 8 and all(isinstance(v, float) for v in document):
            return document
        inner = document
    else:
        inner = list(document.values()) if isinstance(document, dict) else []
    for part in inner:
        if found := _scores(part):
            return found
    return []


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks, waits, and leaves none of its children behind."""
    family = cores.tree(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    cores.kill(family)
