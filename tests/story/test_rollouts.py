"""Rollouts on a whole network: a canary that comes through, one that is taken back by itself, an operator's words."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from mlcdn.demo.command import Mlcdn
from tests.models import moody_bytes

PLAN = """
[[waves]]
regions = ["tokyo"]
percent = 50
min_samples = 40
hold_s = 1
max_wait_s = 60
[[waves]]
max_wait_s = 60
[gates]
p99_slack_ms = 500
"""


class Traffic:
    """Distinct rows for every node, one after the other; what came back by node, version and channel, and what failed."""

    def __init__(self, model: str, nodes: dict[str, str], first: float = 0.0) -> None:
        self._url = {node: f"{url}/v2/models/{model}/infer" for node, url in nodes.items()}
        self._first = first
        self.seen: Counter[tuple[str, str]] = Counter()
        self.failed: list[tuple[str, int, str]] = []

    @contextmanager
    def flowing(self) -> Iterator[None]:
        stop = threading.Event()
        thread = threading.Thread(target=self._flow, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _flow(self, stop: threading.Event) -> None:
        rng = np.random.default_rng(7)
        with httpx.Client(timeout=10, trust_env=False) as http:
            while not stop.is_set():
                for node, url in self._url.items():
                    row = rng.random(32)
                    row[0] += self._first
                    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 32], "data": row.tolist()}
                    answer = http.post(url, json={"inputs": [tensor]})
                    if answer.status_code == 200:
                        self.seen[node, answer.headers["mlcdn-model"]] += 1
                    else:
                        self.failed.append((node, answer.status_code, answer.text[:200]))
                time.sleep(0.005)


def waves(tmp_path: Path, text: str = PLAN) -> str:
    file = tmp_path / "waves.toml"
    file.write_text(text)
    return str(file)


def digests(mlcdn: Mlcdn, model: str) -> set[str]:
    return {n["digest"] for n in mlcdn.json("status", model)["nodes"]}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def until(mlcdn: Mlcdn, model: str, status: str, seconds: float) -> dict[str, Any]:
    give_up = time.monotonic() + seconds
    while True:
        found: dict[str, Any] = mlcdn.json("rollout", "show", model)
        if found["status"] == status:
            return found
        assert time.monotonic() < give_up, f"{found['status']}, not {status}"
        time.sleep(0.2)


def test_a_canary_comes_through_and_its_verdicts_come_out_again(
    mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path], tmp_path: Path
) -> None:
    mlcdn("publish", "canary", str(model_files["v1"]), "--version", "v1", "--wait")
    traffic = Traffic("canary", nodes)
    with traffic.flowing():
        plan = waves(tmp_path)
        done = mlcdn.json("publish", "canary", str(model_files["v2"]), "--version", "v2", "--plan", plan, "--wait")
        time.sleep(0.3)
    assert not traffic.failed
    assert done["rollout"]["status"] == "done"
    assert [v["verdict"] for v in done["rollout"]["verdicts"]] == ["pass", "pass"]
    assert traffic.seen["tokyo-1", "canary;v2;candidate"] >= 40
    # Two workers of a node take their verdict over within milliseconds of each other, and its beats within a second.
    assert digests(mlcdn, "canary") == {sha256(model_files["v2"])}
    for verdict in done["rollout"]["verdicts"]:
        assert mlcdn.json("gate", "recompute", verdict["id"])["same"]
    explained = mlcdn.json("gate", "explain", done["rollout"]["verdicts"][0]["id"])
    assert explained["event"]["evidence"]["candidate"]["requests"] >= 40


def test_a_candidate_that_fails_its_clients_is_taken_back_by_itself(
    mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path], tmp_path: Path
) -> None:
    moody = tmp_path / "moody.onnx"
    moody.write_bytes(moody_bytes(1))
    mlcdn("publish", "moody", str(model_files["v1"]), "--version", "v1", "--wait")
    traffic = Traffic("moody", nodes, first=100.0)
    with traffic.flowing():
        plan = waves(tmp_path)
        done = mlcdn.json("publish", "moody", str(moody), "--version", "v2", "--plan", plan, "--wait", expect=1)
        time.sleep(0.3)
    (verdict,) = done["rollout"]["verdicts"]
    assert (done["rollout"]["status"], verdict["verdict"]) == ("halted", "fail")
    assert "requests were refused" in verdict["reason"]
    assert {node for node, _, _ in traffic.failed} == {"tokyo-1"}, "nobody else has met it"
    assert digests(mlcdn, "moody") == {sha256(model_files["v1"])}
    calm = Traffic("moody", nodes, first=100.0)
    with calm.flowing():
        time.sleep(0.5)
    assert not calm.failed
    assert mlcdn.json("gate", "recompute", verdict["id"])["same"]
    assert "requests were refused" in mlcdn("audit", "story", "moody")


def test_an_operator_pauses_resumes_and_aborts(mlcdn: Mlcdn, model_files: dict[str, Path], tmp_path: Path) -> None:
    mlcdn("publish", "steered", str(model_files["v1"]), "--version", "v1", "--wait")
    mlcdn("publish", "steered", str(model_files["v2"]), "--version", "v2", "--plan", waves(tmp_path))
    assert mlcdn.json("rollout", "pause", "steered", "--reason", "look")["status"] == "paused"
    mlcdn("rollout", "pause", "steered", expect=1)
    assert mlcdn.json("rollout", "resume", "steered")["status"] == "rolling"
    aborted = mlcdn.json("rollout", "abort", "steered", "--reason", "no")
    assert (aborted["status"], aborted["stable"]["version"]) == ("aborted", "v1")
    keys = {key["key"]: key["label"] for key in mlcdn.json("keys", "list")}
    last = [json.loads(line) for line in mlcdn("topics", "tail", "releases", "--json").splitlines()]
    assert {keys[said["signer"]] for said in last if said["kind"] == "RolloutAborted"} == {"operator"}
    mlcdn("rollout", "resume", "steered", expect=1)
    mlcdn("rollout", "show", "nobody", expect=1)


def test_a_region_that_was_away_comes_to_the_wave_in_force(
    mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path], tmp_path: Path
) -> None:
    mlcdn("publish", "away", str(model_files["v1"]), "--version", "v1", "--wait")
    tokyo = mlcdn.network()["regions"]["tokyo"]["nodes"][0]
    stopped = [tokyo["pids"]["agent"], *tokyo["pids"]["workers"]]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        plan = waves(tmp_path, '[[waves]]\nregions = ["london"]\npercent = 5\n[[waves]]\n')
        mlcdn("publish", "away", str(model_files["v2"]), "--version", "v2", "--plan", plan, "--wait", "--timeout", "40")
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    give_up = time.monotonic() + 20
    while httpx.get(f"{nodes['tokyo-1']}/v2/models/away", trust_env=False).headers["mlcdn-model"] != "away;v2;stable":
        assert time.monotonic() < give_up, "tokyo did not come to what is in force"
        time.sleep(0.1)
    assert until(mlcdn, "away", "done", 1)["stable"]["version"] == "v2"
