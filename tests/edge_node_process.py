"""One whole edge node for tests, as processes: ``python -m edge_node.main``, an operator who releases to it, and clients.

Laws: only processes that a test started are killed, by pid; every wait is bounded; what a client got is counted answer
by answer, and one that never came counts as a failure. It must not know what a test hurts.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from edge_node.board import INCARNATION, BoardReader
from mlcdn.identities import Identities
from mlcdn.local_stack.stack import StackAddresses
from processes.parent_death import tied_to_parent
from processes.ports import LOOPBACK, free_port
from schemas import codec
from schemas.events import CacheInvalidated, CachePolicy, Event, ModelReleased, RequestBatch, Tensor, TierUse
from schemas.names import Scope, ScopeKind, model_object_key
from schemas.topics import REQUESTS
from streams.artifacts import ArtifactStore, describe
from streams.log.keys import load_private
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer

T = TypeVar("T")
WIDTH = 32
END_S = 15.0
ANSWER_S = 10.0


def until(what: Callable[[], T | None], seconds: float) -> T:
    """The first value that is neither None nor False."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = what()
        if value is not None and value is not False:
            return value
        time.sleep(0.005)
    raise AssertionError(f"not within {seconds} s")


class Operator:
    """Uploads artifacts, signs and appends events, and reads what nodes say of their requests."""

    def __init__(self, addresses: StackAddresses, identities: Identities, scratch: Path) -> None:
        self._kafka, self._key, self._scratch = addresses.kafka, load_private(identities.operator), scratch
        self._store = ArtifactStore(
            addresses.s3_endpoint, addresses.s3_bucket, addresses.s3_access_key, addresses.s3_secret_key, "us-east-1"
        )
        self._sequences: dict[str, int] = {}

    def prepare(self, model: str, data: bytes) -> ModelReleased:
        """The next release of the model, uploaded and not yet said."""
        path = self._scratch / "artifact.onnx"
        path.write_bytes(data)
        artifact = describe(path, lambda digest: model_object_key(model, digest))
        self._store.put(artifact, path)
        sequence = self._sequences[model] = self._sequences.get(model, 0) + 1
        return ModelReleased(
            model=model,
            version=f"v{sequence}",
            sequence=sequence,
            artifact=artifact,
            inputs=(Tensor(name="features", datatype="FP32", shape=(-1, WIDTH)),),
            outputs=(Tensor(name="scores", datatype="FP32", shape=(-1, 8)),),
            # These models are quicker than a look-up; what hurts Redis must hurt who asks it.
            cache=CachePolicy(tiers=TierUse.ALWAYS),
            created_at_ms=1,
            author="test",
        )

    def release(self, model: str, data: bytes) -> str:
        """The digest of what was released."""
        event = self.prepare(model, data)
        self.append(event)
        return event.artifact.sha256

    def invalidate(self, model: str) -> int:
        """The position of the invalidation."""
        return self.append(CacheInvalidated(scopes=(Scope(ScopeKind.MODEL, model),), author="test"))

    def rows(self, node: str) -> tuple[int, int]:
        """How many requests the node told the log of, and how many it says it could not."""
        reader = KafkaReader(self._kafka)
        told = dropped = 0
        for partition in range(REQUESTS.partitions):
            for record in reader.read(REQUESTS.name, partition):
                if record.key == node.encode():
                    event = codec.decode(record.topic, record.key, record.value, record.headers).event
                    assert isinstance(event, RequestBatch)
                    told, dropped = told + event.rows, dropped + event.dropped
        return told, dropped

    def append(self, event: Event) -> int:
        return self.append_all([event])[0]

    def append_all(self, events: Sequence[Event]) -> list[int]:
        """As many at once as there are; their positions."""

        async def append() -> list[int]:
            writer = Writer(
                KafkaAppender(self._kafka, client_id="test"), source="/operators/test", signing_key=self._key
            )
            try:
                return [done.record.offset for done in await asyncio.gather(*map(writer.append, events))]
            finally:
                await writer.close()

        return asyncio.run(append())


def node_settings(addresses: StackAddresses, identities: Identities, directory: Path, node: str) -> dict[str, str]:
    return {
        "MLCDN_KAFKA": addresses.kafka,
        "MLCDN_S3_ENDPOINT": addresses.s3_endpoint,
        "MLCDN_S3_BUCKET": addresses.s3_bucket,
        "MLCDN_S3_ACCESS_KEY": addresses.s3_access_key,
        "MLCDN_S3_SECRET_KEY": addresses.s3_secret_key,
        "MLCDN_REDIS_URL": addresses.redis["tokyo"],
        "MLCDN_ROOT_KEYS": str(identities.roots),
        "MLCDN_DIR": str(directory),
        "MLCDN_NODE": node,
        "MLCDN_REGION": "tokyo",
        "MLCDN_DRAIN_S": "1",
    }


class EdgeNode:
    """A parent, its agent and one worker, on one directory and one port through all their lives."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self.directory, self.name = Path(settings["MLCDN_DIR"]), settings["MLCDN_NODE"]
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._settings = dict(settings) | {"MLCDN_PORT": str(self.port), "MLCDN_URL": self.url}
        self._process: subprocess.Popen[bytes] | None = None
        self.directory.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        assert not self.runs, "it runs already"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLCDN_")}
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edge_node.main"],
                env=environment | self._settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A test suite that is killed leaves no node behind; nothing runs in between that needs a lock.
                preexec_fn=tied_to_parent(),  # noqa: PLW1509
            )

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL for the parent; its children die with it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        if not self.runs:
            return
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def pids(self) -> dict[str, Any] | None:
        """{"agent": pid, "workers": [pid]}, once both run."""
        try:
            found: dict[str, Any] = json.loads((self.directory / "pids.json").read_text())
        except FileNotFoundError:
            return None
        return found if found["agent"] and found["workers"] else None

    def worker(self) -> int:
        pid: int = until(self.pids, 5)["workers"][0]
        return pid

    def pause_agent(self) -> Callable[[], None]:
        """SIGSTOP; returns what wakes it again."""
        pid: int = until(self.pids, 5)["agent"]
        os.kill(pid, signal.SIGSTOP)
        return lambda: os.kill(pid, signal.SIGCONT)

    def board(self) -> BoardReader:
        """The caller closes it."""
        return BoardReader(self.directory)

    def incarnation(self) -> int:
        reader = self.board()
        try:
            return reader.fence[INCARNATION]
        finally:
            reader.close()

    def get(self, path: str) -> httpx.Response | None:
        """None where nobody answers."""
        try:
            return httpx.get(self.url + path, timeout=2, trust_env=False)
        except httpx.TransportError:
            return None

    def serves(self, model: str, digest: str) -> bool:
        answer = self.get(f"/v2/models/{model}/ready")
        return answer is not None and answer.status_code == 200 and answer.headers["mlcdn-digest"] == digest

    def standing(self) -> dict[str, str]:
        """What /health says of each dependency: `ok` or `degraded`."""
        answer = self.get("/health")
        found: dict[str, str] = answer.json()["dependencies"] if answer is not None else {}
        return found

    def predict(self, model: str, number: int) -> httpx.Response:
        return httpx.post(f"{self.url}/predict", json=question(model, number), timeout=ANSWER_S, trust_env=False)

    def log(self) -> str:
        return (self.directory / "log").read_text()


def question(model: str, number: int) -> dict[str, Any]:
    """Another number is another row, which no cache has seen."""
    return {"model": model, "features": [float(number), *([0.25] * (WIDTH - 1))]}


class Load:
    """One client that asks `models` in turn, another row each time, `rate` times a second, until the block ends.

    `wrong` says what was not a 200 with the digest that `digests` names. `retry_s` is for how long a request whose
    connection broke is sent again; by default not at all.
    """

    def __init__(self, node: EdgeNode, digests: Mapping[str, str], *, rate: float = 50.0, retry_s: float = 0.0) -> None:
        self._node, self._digests, self._pause_s, self._retry_s = node, dict(digests), 1 / rate, retry_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")
        self.wrong: list[str] = []
        self.ms: list[float] = []
        self.sent = self.answered = self.retried = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        models = list(self._digests)
        # Where no earlier load began: its rows are in no cache.
        first = time.monotonic_ns() // 1_000_000 % 10_000_000
        with httpx.Client(base_url=self._node.url, timeout=ANSWER_S, trust_env=False) as client:
            while not self._stop.is_set():
                model = models[self.sent % len(models)]
                self.sent += 1
                began = time.perf_counter()
                self._ask(client, model, first + self.sent)
                self.ms.append((time.perf_counter() - began) * 1e3)
                self._stop.wait(max(0.0, self._pause_s - (time.perf_counter() - began)))

    def _ask(self, client: httpx.Client, model: str, number: int) -> None:
        end = time.monotonic() + self._retry_s
        while True:
            try:
                answer = client.post("/predict", json=question(model, number))
                break
            except httpx.TransportError as error:
                if time.monotonic() >= end:
                    self.wrong.append(type(error).__name__)
                    return
                self.retried += 1
                time.sleep(0.02)
        if answer.status_code != 200:
            self.wrong.append(f"{answer.status_code} {answer.text[:200]}")
        elif (digest := answer.json()["digest"]) != self._digests[model]:
            self.wrong.append(f"{model}: {digest}")
        else:
            self.answered += 1


def rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)
