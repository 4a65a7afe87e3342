"""The four walks, each a script of event in and effect out, over the whole network."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlcdn.client import Client
from mlcdn.demo.command import Mlcdn

pytestmark = pytest.mark.timeout(300)
ROW = [[i / 32 for i in range(32)]]


def ask(url: str, model: str, **headers: str) -> httpx.Response:
    body = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 32], "data": ROW[0]}]}
    return httpx.post(f"{url}/v2/models/{model}/infer", json=body, headers=headers, timeout=10, trust_env=False)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def until(true: Any, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def test_a_release_reaches_every_worker(mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path]) -> None:
    released = mlcdn.json("publish", "walk", str(model_files["v1"]), "--version", "v1", "--wait")
    assert [n["outcome"] for n in released["nodes"]] == ["live"] * 3
    assert all(n["ms"]["total"] > 0 for n in released["nodes"])
    for url in nodes.values():
        answer = ask(url, "walk")
        assert answer.status_code == 200
        assert answer.headers["mlcdn-digest"] == digest_of(model_files["v1"])
    status = mlcdn.json("status", "walk")
    assert status["desired"]["version"] == "v1"
    assert {(n["node"], n["worker"]) for n in status["nodes"]} == {(node, w) for node in nodes for w in (0, 1)}
    assert {n["state"] for n in status["nodes"]} == {"live"}


def test_a_swap_under_requests_fails_none(mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path]) -> None:
    mlcdn("publish", "swap", str(model_files["v1"]), "--version", "v1", "--wait")
    known = {digest_of(model_files["v1"]), digest_of(model_files["v2"])}
    seen: list[tuple[int, str]] = []
    stop = False

    def load(url: str) -> None:
        with httpx.Client(timeout=10, trust_env=False) as http:
            number = 0
            while not stop:
                number += 1
                data = [number / 1000, *ROW[0][1:]]
                body = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 32], "data": data}]}
                answer = http.post(f"{url}/v2/models/swap/infer", json=body)
                seen.append((answer.status_code, answer.headers.get("mlcdn-digest", "")))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        loads = [pool.submit(load, url) for url in nodes.values()]
        time.sleep(0.5)
        mlcdn("publish", "swap", str(model_files["v2"]), "--version", "v2", "--wait")
        mlcdn("rollback", "swap", "--reason", "test", "--wait")
        stop = True
        for one in loads:
            one.result()
    assert {status for status, _ in seen} == {200}
    assert {digest for _, digest in seen} == known


def test_a_prediction_comes_from_a_cache_the_second_time(
    mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path]
) -> None:
    mlcdn("publish", "cached", str(model_files["v1"]), "--wait")
    for url in nodes.values():
        first = ask(url, "cached")
        # Two workers share the port and the region's Redis, so the second answer may come from either.
        until(lambda url=url: "; hit" in ask(url, "cached").headers["cache-status"], 5, "a hit")
        again = ask(url, "cached")
        assert again.json()["outputs"] == first.json()["outputs"]
        assert int(again.headers["age"]) >= 0
        assert again.headers["mlcdn-cache-key"] == first.headers["mlcdn-cache-key"]


def test_the_router_sends_each_to_its_own_region(
    mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path]
) -> None:
    mlcdn("publish", "routed", str(model_files["v1"]), "--wait")
    router = mlcdn.network()["router"]["http"]
    for region, place in ((r, v["location"]) for r, v in mlcdn.network()["regions"].items()):
        where = {"lat": str(place["lat"]), "lon": str(place["lon"])}

        def routed(where: dict[str, str] = where) -> dict[str, Any]:
            return httpx.get(f"{router}/route", params={"model": "routed", **where}, trust_env=False).json()

        until(lambda routed=routed: len(routed()["edges"]) == 3, 10, "three edges in the table")
        # One that was away in another story is doubted for a while after its return.
        until(
            lambda routed=routed, region=region: routed()["edges"][0]["region"] == region,
            20,
            f"{region} is first for its own",
        )
        with Client(router, place=where) as client:
            assert client.predict("routed", ROW).region == region
    moved = httpx.post(f"{router}/v2/models/routed/infer", json={}, trust_env=False)
    assert moved.status_code == 307
    assert moved.headers["location"].endswith("/v2/models/routed/infer")


def test_a_killed_edge_is_left_and_comes_back(
    mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path]
) -> None:
    mlcdn("publish", "lost", str(model_files["v1"]), "--wait")
    london = mlcdn.network()["regions"]["london"]["nodes"][0]
    router = mlcdn.network()["router"]["http"]
    os.kill(london["pids"]["edge"], signal.SIGKILL)
    with Client(router, place={"lat": "51.5", "lon": "-0.1"}, timeout_s=20) as client:
        for _ in range(20):
            assert client.predict("lost", ROW).outputs["scores"]
    until(lambda: _serves(nodes["london-1"], "lost", digest_of(model_files["v1"])), 30, "london serves again")
    until(lambda: mlcdn.network()["regions"]["london"]["nodes"][0]["pids"]["edge"] != london["pids"]["edge"], 10, "pid")


def _serves(url: str, model: str, digest: str) -> bool:
    try:
        answer = ask(url, model)
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and answer.headers["mlcdn-digest"] == digest


def test_a_purge_is_obeyed_by_every_node(mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path]) -> None:
    mlcdn("publish", "purged", str(model_files["v1"]), "--wait")
    for url in nodes.values():
        until(lambda url=url: "; hit" in ask(url, "purged").headers["cache-status"], 5, "a hit")
    purge = mlcdn.json("invalidate", "--model", "purged", "--reason", "test", "--wait")
    assert {r["node"] for r in purge["receipts"]} == set(nodes)
    assert purge["missing"] == []
    for url in nodes.values():
        answer = ask(url, "purged")
        assert "; hit" not in answer.headers["cache-status"]
        assert int(answer.headers["mlcdn-position"].split("/")[1]) >= purge["position"]


def test_the_story_names_causes_and_verify_agrees(mlcdn: Mlcdn, model_files: dict[str, Path]) -> None:
    released = mlcdn.json("publish", "told", str(model_files["v1"]), "--reason", "to be told", "--wait")
    story = mlcdn.json("audit", "story", "told")
    kinds = [line["kind"] for line in story]
    assert kinds[0] == "ModelReleased"
    assert kinds.count("ModelSwapped") == 6
    assert {line["cause"] for line in story if line["kind"] == "ModelSwapped"} == {released["event_id"]}
    assert mlcdn.json("audit", "story", released["event_id"])[0]["id"] == released["event_id"]
    assert mlcdn("audit", "story", "told") == mlcdn("audit", "story", "told")
    told = mlcdn.json("audit", "state", "--at", str(released["position"]))
    assert "told" in {seat["wanted"]["model"] for seat in told["told"]}
    before = mlcdn.json("audit", "state", "--at", str(released["position"] - 1))
    assert "told" not in {seat["wanted"]["model"] for seat in before["told"]}
    assert mlcdn.json("audit", "verify")["ok"]


def test_a_tampered_board_is_named(mlcdn: Mlcdn, model_files: dict[str, Path]) -> None:
    mlcdn("publish", "board", str(model_files["v1"]), "--version", "v1", "--wait")
    mlcdn("publish", "board", str(model_files["v2"]), "--version", "v2", "--wait")
    virginia = mlcdn.network()["regions"]["virginia"]["nodes"][0]
    # Whatever the log says next has the agent write the board anew, a checkpoint too.
    os.kill(virginia["pids"]["agent"], signal.SIGSTOP)
    try:
        _tamper(Path(virginia["dir"]) / "board" / "models.json")
        for pid in virginia["pids"]["workers"]:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not _verifies(mlcdn), 20, "verify fails")
        found = mlcdn.json("audit", "verify", expect=1)
    finally:
        os.kill(virginia["pids"]["agent"], signal.SIGCONT)
    assert {d["node"] for d in found["differences"]} == {"virginia-1"}
    mlcdn("publish", "board", str(model_files["v3"]), "--version", "v3", "--wait")
    until(lambda: _verifies(mlcdn), 20, "verify holds again")


def _tamper(path: Path) -> None:
    board = json.loads(path.read_text())
    board["desired"]["board"]["wanted"]["version"] = "v1"
    board["policy"] += 1
    path.write_text(json.dumps(board))


def _verifies(mlcdn: Mlcdn) -> bool:
    import subprocess
    import sys

    command = [sys.executable, "-m", "mlcdn", "audit", "verify", "--dir", str(mlcdn.directory)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_model_at_the_origin_is_forwarded_and_cached(
    mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path]
) -> None:
    mlcdn("publish", "far", str(model_files["v1"]), "--placement", "origin", "--wait")
    url = nodes["tokyo-1"]
    until(lambda: ask(url, "far").status_code == 200, 10, "the origin has it")
    assert ask(url, "far").headers["mlcdn-digest"] == digest_of(model_files["v1"])
    until(lambda: "; hit" in ask(url, "far").headers["cache-status"], 5, "a hit")


def test_garbage_on_every_topic_stops_nothing(
    mlcdn: Mlcdn, nodes: dict[str, str], model_files: dict[str, Path]
) -> None:
    from confluent_kafka import Producer

    from schemas.topics import TOPICS

    producer = Producer({"bootstrap.servers": mlcdn.network()["kafka"]})
    for topic in TOPICS:
        for value in (b"", b"garbage", b"\0\0\0\x03\xe8body", None if topic != "mlcdn.routes" else b"\0", bytes(5_000)):
            producer.produce(topic, key=b"x", value=value)
    assert producer.flush(10) == 0
    released = mlcdn.json("publish", "after", str(model_files["v1"]), "--wait")
    assert [n["outcome"] for n in released["nodes"]] == ["live"] * 3
    letters = mlcdn("topics", "tail", "dead_letters", "--from", "0", "--json")
    assert "malformed" in letters or "unsigned" in letters
    assert {ask(url, "after").status_code for url in nodes.values()} == {200}
    verified = mlcdn.json("audit", "verify")
    assert verified["ok"]
    assert verified["refused"]
