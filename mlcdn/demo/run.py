"""The demo: publish, serve, swap under load, refuse, canaries, purge, lose an edge, roll back, audit; each with its time.

Every step is a promise; the first one broken ends the demo with exit code 1.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from mlcdn.cli import output
from mlcdn.demo.command import Mlcdn, PromiseBroken, promise
from mlcdn.demo.digits import Digits, train
from mlcdn.demo.traffic import MODEL, body
from mlcdn.demo.waves import TOKYO, Waves, check_load, under_load, until_halted

RATE = 220.0


def demo(directory: Path, *, keep: bool = False) -> int:
    """Runs every step on a network of its own in `directory`; returns the exit code."""
    mlcdn, began = Mlcdn(directory), time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="mlcdn-demo-") as work:
            _steps(mlcdn, Path(work))
    except PromiseBroken as broken:
        output.say(f"\nBROKEN: {broken}")
        return 1
    finally:
        if not keep:
            mlcdn("down", "--wipe")
    output.say(f"\nEvery promise held, in {time.monotonic() - began:.1f} s.")
    return 0


@contextmanager
def step(title: str) -> Iterator[list[str]]:
    """Prints the title, the time it took and what was found."""
    found: list[str] = []
    began = time.monotonic()
    yield found
    output.say(f"{time.monotonic() - began:6.2f} s  {title}" + "".join(f"\n          {line}" for line in found))


def _steps(mlcdn: Mlcdn, work: Path) -> None:
    with step("train four classifiers of handwritten digits, export them to ONNX") as found:
        digits = train(work)
        files = (digits.v1, digits.v2, digits.v3, digits.v4)
        v1, v2, v3, v4 = (hashlib.sha256(p.read_bytes()).hexdigest() for p in files)
        found.append(
            f"v1 logistic regression {v1[:12]}, v2 neural network {v2[:12]}, v3 the same, grown {v3[:12]},"
            f" v4 taught with slipped labels {v4[:12]}; {len(digits.labels)} held out"
        )
    with step("start three regions: Kafka, S3, a Valkey each, origin, streams, router, edges") as found:
        mlcdn("up", "--detach", timeout_s=280)
        found.append(", ".join(mlcdn.network()["regions"]))
    router = mlcdn.network()["router"]["http"]
    with step("publish v1 with its golden test, wait for every region's receipt") as found:
        _published(
            mlcdn.json("publish", MODEL, str(digits.v1), "--version", "v1", "--golden", str(digits.golden), "--wait"),
            found,
        )
    with step("wait until the routing table knows that every edge serves it") as found:
        found.append(", ".join(_routed(router)))
    with step("ask through the router for the held-out digits") as found:
        labels, caches = _ask_all(router, digits)
        accuracy = float((labels == digits.labels).mean())
        found.append(f"accuracy {accuracy:.3f}, {_hits(caches)} of {len(caches)} from a cache")
        promise(accuracy > 0.9, f"accuracy {accuracy} is not above 0.9")
    with step("ask again: the same answers, out of the caches") as found:
        again, caches = _ask_all(router, digits)
        found.append(f"{_hits(caches)} of {len(caches)} from a cache")
        promise(bool((again == labels).all()), "a cached answer differs from the computed one")
        promise(_hits(caches) == len(caches), "an answer asked for before did not come from a cache")
    with step(f"publish v2 under an open loop of {RATE:.0f} requests a second, without retries") as found:
        publish = ("publish", MODEL, str(digits.v2), "--version", "v2", "--wait")
        answers, released = asyncio.run(under_load(router, digits, RATE, lambda: mlcdn.json(*publish)))
        _published(released, found)
        check_load(answers, digits, {v1: digits.v1, v2: digits.v2}, found)
        promise(len(answers.by_digest) == 2, "the load did not see both versions")
    _bad_releases(mlcdn, work, digits, v2)
    waves = Waves(mlcdn, router, digits, RATE, work)
    with step("roll v3 out in waves under the load: 25 % of tokyo, then every region; its gates pass") as found:
        waves.good(v2, v3, found)
    with step("roll v4 out the same way: its shadow finds that it answers otherwise, and it is taken back") as found:
        waves.bad(v3, v4, found)
    with step("invalidate the model's predictions, with a receipt a node") as found:
        purge = mlcdn.json("invalidate", "--model", MODEL, "--reason", "demo", "--wait")
        found.append(", ".join(f"{r['node']} {r['applied_ms']:.0f} ms" for r in purge["receipts"]))
        promise(len(purge["receipts"]) == 3 and not purge["missing"], f"receipts: {purge}")
        _, caches = _ask_all(router, digits)
        promise(_hits(caches) == 0, f"{_hits(caches)} answers came from before the purge")
        found.append(f"asked again: 0 of {len(caches)} from a cache")
    _lose_an_edge(mlcdn, router, digits, v3)
    with step("roll back to v1") as found:
        _published(mlcdn.json("rollback", MODEL, "--to", "v1", "--reason", "demo", "--wait"), found)
        status = mlcdn.json("status", MODEL)
        promise({n["digest"] for n in status["nodes"]} == {v1}, "a node does not serve v1 after the rollback")
    with step("audit: the log judged again, every live node held against it; the story so far") as found:
        mlcdn("audit", "verify")
        found += mlcdn("audit", "story", MODEL).splitlines()


def _routed(router: str) -> list[str]:
    """The edges that the router names for the model, once there are three."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        answer = httpx.get(f"{router}/route", params={"model": MODEL}, trust_env=False).json()
        if answer["model_known"] and len(answer["edges"]) == 3:
            return [edge["node"] for edge in answer["edges"]]
        time.sleep(0.1)
    raise PromiseBroken("the routing table does not name three edges within 20 s")


def _published(released: dict[str, Any], found: list[str]) -> None:
    for node in released["nodes"]:
        phases = ", ".join(f"{k} {v:.0f}" for k, v in node["ms"].items())
        found.append(f"{node['node']}: {node['outcome']} (ms: {phases})")
    promise(len(released["nodes"]) == 3, f"{len(released['nodes'])} nodes reported, not 3")
    promise(all(n["outcome"] == "live" for n in released["nodes"]), f"not live everywhere: {released['nodes']}")


def _ask_all(router: str, digits: Digits) -> tuple[np.ndarray[Any, Any], list[str]]:
    """Every held-out digit by itself, through the router's redirect; its label, and its Cache-Status."""
    labels, caches = [], []
    with httpx.Client(follow_redirects=True, timeout=10, trust_env=False) as http:
        for row in digits.held_out:
            answer = http.post(f"{router}/v2/models/{MODEL}/infer", params=TOKYO, json=body(row[None]))
            promise(answer.status_code == 200, f"{answer.status_code} {answer.text[:200]}")
            labels.append(next(o for o in answer.json()["outputs"] if o["name"] == "label")["data"][0])
            caches.append(answer.headers["cache-status"])
    return np.array(labels), caches


def _hits(caches: list[str]) -> int:
    return sum("; hit" in said for said in caches)


def _bad_releases(mlcdn: Mlcdn, work: Path, digits: Digits, v2: str) -> None:
    with step("publish a broken file: refused before anything is uploaded") as found:
        broken = work / "broken.onnx"
        broken.write_bytes(digits.v2.read_bytes()[:-100])
        before = mlcdn.json("status", MODEL)["desired"]["position"]
        mlcdn("publish", MODEL, str(broken), "--version", "broken", expect=1)
        promise(mlcdn.json("status", MODEL)["desired"]["position"] == before, "a broken file reached the log")
        found.append("exit code 1, nothing in the log")
    with step("publish a good file that is corrupted in the store: nodes reject it, and it is taken back") as found:
        spoilt = work / "spoilt.onnx"
        spoilt.write_bytes(digits.v1.read_bytes() + _harmless())
        _published_then_corrupted(mlcdn, spoilt)
        halted = until_halted(mlcdn, 20)
        found.append(f"{halted['status']}: {halted['verdicts'][-1]['reason']}")
        promise(halted["stable"]["digest"] == v2, "the log does not want v2 again")
        status = mlcdn.json("status", MODEL)
        promise({n["digest"] for n in status["nodes"]} == {v2}, "v2 does not serve on")
        found.append("v2 serves on")


def _harmless() -> bytes:
    """A protobuf field of metadata (ModelProto.doc_string): another file, the same model."""
    said = b"published for the demo, then corrupted in the store"
    return b"\x32" + bytes([len(said)]) + said


def _published_then_corrupted(mlcdn: Mlcdn, file: Path) -> None:
    """Stops the agents, publishes, spoils the stored object, lets the agents go on."""
    nodes = [n for r in mlcdn.network()["regions"].values() for n in r["nodes"]]
    agents = [n["pids"]["agent"] for n in nodes]
    for pid in agents:
        os.kill(pid, signal.SIGSTOP)
    try:
        mlcdn("publish", MODEL, str(file), "--version", "spoilt")
        _spoil(mlcdn.network(), f"models/{MODEL}/{hashlib.sha256(file.read_bytes()).hexdigest()}.onnx")
    finally:
        for pid in agents:
            os.kill(pid, signal.SIGCONT)


def _spoil(network: dict[str, Any], key: str) -> None:
    import boto3
    from botocore.config import Config

    s3 = network["s3"]
    client = boto3.client(
        "s3",
        endpoint_url=s3["endpoint"],
        aws_access_key_id=s3["access_key"],
        aws_secret_access_key=s3["secret_key"],
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, proxies={}),
    )
    whole = bytearray(client.get_object(Bucket=s3["bucket"], Key=key)["Body"].read())
    whole[len(whole) // 2] ^= 0xFF
    client.put_object(Bucket=s3["bucket"], Key=key, Body=bytes(whole))


def _lose_an_edge(mlcdn: Mlcdn, router: str, digits: Digits, serving: str) -> None:
    with step("kill -9 one edge while a client asks: the router leaves it, it comes back by itself") as found:
        tokyo = mlcdn.network()["regions"]["tokyo"]["nodes"][0]
        os.kill(tokyo["pids"]["edge"], signal.SIGKILL)
        killed = time.monotonic()
        answered, asked, left = 0, 0, None
        with httpx.Client(follow_redirects=True, timeout=10, trust_env=False) as http, ThreadPoolExecutor(1) as beside:
            returning = beside.submit(_wait_live, mlcdn, "tokyo-1", serving, killed)
            while not returning.done() or time.monotonic() - killed < 3:
                row = digits.held_out[answered % len(digits.held_out)]
                region, tries = _persist(http, router, row, killed)
                answered, asked = answered + 1, asked + tries
                if left is None and region != "tokyo":
                    left = time.monotonic() - killed
            back = returning.result()
        found.append(f"{answered} questions, {answered} answers, {asked - answered} asked again on a broken connection")
        found.append(
            f"first answer from another region after {left:.2f} s"
            if left
            else "tokyo was back before the router left it"
        )
        found.append(f"tokyo-1 serves v3 again {back:.2f} s after it was killed")


def _persist(http: httpx.Client, router: str, row: Any, killed: float) -> tuple[str, int]:
    tries = 0
    while True:
        tries += 1
        try:
            answer = http.post(f"{router}/v2/models/{MODEL}/infer", params=TOKYO, json=body(row[None]))
        except httpx.TransportError:
            promise(time.monotonic() - killed < 30, "a client that asks again got no answer for 30 s")
            time.sleep(0.05)
            continue
        promise(answer.status_code == 200, f"{answer.status_code} {answer.text[:200]}")
        return answer.headers["mlcdn-region"], tries


def _wait_live(mlcdn: Mlcdn, node: str, digest: str, since: float) -> float:
    url = next(n["url"] for r in mlcdn.network()["regions"].values() for n in r["nodes"] if n["node"] == node)
    while time.monotonic() - since < 40:
        try:
            answer = httpx.get(f"{url}/v2/models/{MODEL}/ready", timeout=1, trust_env=False)
            if answer.status_code == 200 and answer.headers.get("mlcdn-digest") == digest:
                return time.monotonic() - since
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise PromiseBroken(f"{node} did not come back with {digest[:12]} within 40 s")
