"""A storm: a hundred models released in one moment, twenty of them broken, Kafka killed in the middle; another model is asked
all the while on every node.

The broken ones come as far as a node: ten are spoilt in the store after they were uploaded, ten have a golden file that
their answers do not match; each is the second release of its model. Floor: the other eighty live on every node, every
broken one rejected with its reason and taken back, no request failed. Reach: p99 of the other model at most twice what it is
without, on the first node, which has a core with all it does in the storm; the rest of the network, the other nodes and the
client share the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import boto3
import httpx
import msgspec
import numpy as np

from bench import cores
from bench.figures import line, model
from bench.loads import Mixed
from bench.open_loop import Seen, open_loop
from bench.servers import wait_answers
from inference.golden import write_golden
from mlcdn.cli.receipts import store_of
from mlcdn.cli.target import Target
from mlcdn.demo.command import Mlcdn
from schemas import codec
from schemas.events import ArtifactRejected, Golden, ModelReleased, Tensor
from schemas.names import golden_object_key, model_object_key
from schemas.topics import FLEET, RELEASES
from streams.artifacts import describe
from streams.audit.control import At, fold_releases
from streams.folds.rollouts import Status

LIVE: Final = "bench-storm"
COUNT: Final = 100
SPOILT: Final = range(10)
UNLIKE: Final = range(10, 20)
RATE: Final = 100.0
USUAL_S: Final = 6.0
WARM_S: Final = 3.0
# Of the good ones that the first node has when Kafka is killed.
MIDDLE: Final = 30
OVER_S: Final = 120.0
REACH: Final = 2.0


@dataclass(slots=True)
class Storm:
    """What was released, and what became of it."""

    first: list[ModelReleased]
    releases: list[ModelReleased]
    kafka_away_s: float = 0.0
    over_s: float = 0.0
    standing: str = ""


def run(mlcdn: Mlcdn, work: Path) -> int:
    live = model(work / "storm-live.onnx", 5_000)
    mlcdn("publish", LIVE, str(live), "--wait")
    nodes = [n["url"] for region in mlcdn.network()["regions"].values() for n in region["nodes"]]
    for url in nodes:
        wait_answers(f"{url}/v2/models/{LIVE}/infer", "oip", live)
    target = Target.at(mlcdn.directory)
    storm = _prepared(target, work)
    document = mlcdn.network()
    everywhere, (server, rest) = sorted(os.sched_getaffinity(0)), cores.two_cores()
    measured = [p.pid for p in cores.tree(document["regions"]["tokyo"]["nodes"][0]["pids"]["edge"])]
    network = [p.pid for p in cores.tree(document["pids"]["up"])]
    cores.pin([pid for pid in network if pid not in measured], everywhere[1:])
    cores.pin(measured, {server})
    os.sched_setaffinity(0, {rest})
    try:
        usual, during = asyncio.run(_run(mlcdn, target, storm, nodes))
    finally:
        os.sched_setaffinity(0, everywhere)
        cores.pin([p.pid for p in cores.tree(document["pids"]["up"])], everywhere)
    return _report(target, storm, nodes, usual, during)


def _prepared(target: Target, work: Path) -> Storm:
    """Everything uploaded, nothing said; then some of it spoilt."""
    store, path = store_of(target), work / "storm.onnx"
    golden = work / "storm.npz"
    write_golden(golden, {"features": np.ones((1, 32), np.float32)}, {"scores": np.full((1, 8), 1e6, np.float32)})
    proof = hashlib.sha256(golden.read_bytes()).hexdigest()
    store.put_bytes(golden_object_key("storm", proof), golden.read_bytes())

    def release(number: int, seed: int, sequence: int) -> ModelReleased:
        name = f"storm-{number:03}"
        artifact = describe(model(path, seed), lambda digest: model_object_key(name, digest))
        store.put(artifact, path)
        return ModelReleased(
            model=name,
            version=f"v{sequence}",
            sequence=sequence,
            artifact=artifact,
            inputs=(Tensor(name="features", datatype="FP32", shape=(-1, 32)),),
            outputs=(Tensor(name="scores", datatype="FP32", shape=(-1, 8)),),
            created_at_ms=time.time_ns() // 1_000_000,
            author=target.settings.author,
        )

    s3 = boto3.client(
        "s3",
        endpoint_url=target.settings.s3_endpoint,
        aws_access_key_id=target.settings.s3_access_key,
        aws_secret_access_key=target.settings.s3_secret_key.get_secret_value(),
        region_name=target.settings.s3_region,
    )
    broken = [*SPOILT, *UNLIKE]
    first = [release(number, 6_000 + number, 1) for number in broken]
    releases = [release(number, 7_000 + number, 2 if number in broken else 1) for number in range(COUNT)]
    for number in SPOILT:
        key = releases[number].artifact.object_key
        whole = bytearray(store.get(key, 2**30))
        whole[len(whole) // 2] ^= 1
        # Not by the store's own hand, which looks at what it puts.
        s3.put_object(Bucket=target.settings.s3_bucket, Key=key, Body=bytes(whole))
    for number in UNLIKE:
        wrong = Golden(object_key=golden_object_key("storm", proof), sha256=proof)
        releases[number] = msgspec.structs.replace(releases[number], golden=wrong)
    return Storm(first, releases)


async def _run(mlcdn: Mlcdn, target: Target, storm: Storm, nodes: list[str]) -> tuple[list[Seen], list[Seen]]:
    writer = target.writer()
    await asyncio.gather(*map(writer.append, storm.first))
    await _until(lambda: _serve(nodes, storm.first), "the first releases of the broken ones")
    await _asked(nodes, WARM_S)
    usual = await _asked(nodes, USUAL_S)
    stop = asyncio.Event()
    load = [asyncio.create_task(_open_loop(url, stop)) for url in nodes]
    began = time.monotonic()
    try:
        await asyncio.gather(*map(writer.append, storm.releases))
        await writer.close()
        good = [r for number, r in enumerate(storm.releases) if number not in (*SPOILT, *UNLIKE)]
        await _until(lambda: _count(nodes[0], good) >= MIDDLE, "the first of the storm")
        os.kill(mlcdn.network()["pids"]["kafka"], signal.SIGKILL)
        killed = time.monotonic()
        await _until(lambda: _kafka_answers(target), "Kafka's return")
        storm.kafka_away_s = time.monotonic() - killed
        await _until(lambda: _serve(nodes, good), "the good ones")
        await _until(lambda: _halted(target, storm), "the verdicts on the broken ones")
        await _until(lambda: _serve(nodes, storm.first), "what was before the broken ones")
        storm.over_s = time.monotonic() - began
    except TimeoutError as error:
        storm.standing = str(error)
    finally:
        stop.set()
        during = list(await asyncio.gather(*load))
    return usual, during


async def _asked(nodes: list[str], seconds: float) -> list[Seen]:
    stop = asyncio.Event()
    load = [asyncio.create_task(_open_loop(url, stop)) for url in nodes]
    await asyncio.sleep(seconds)
    stop.set()
    return list(await asyncio.gather(*load))


async def _open_loop(url: str, stop: asyncio.Event) -> Seen:
    return await open_loop(f"{url}/v2/models/{LIVE}/infer", Mixed(), RATE, stop)


async def _until(what: Any, said: str) -> None:
    end = time.monotonic() + OVER_S
    while not await asyncio.to_thread(what):
        if time.monotonic() > end:
            raise TimeoutError(f"{said}: not within {OVER_S:g} s")
        await asyncio.sleep(0.5)


def _models(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/health", timeout=10, trust_env=False).json()["models"]
    return found


def _count(url: str, releases: list[ModelReleased]) -> int:
    there = _models(url)
    served = {(name, said["version"]) for name, said in there.items() if said["state"] == "live"}
    return len(served & {(r.model, r.version) for r in releases})


def _serve(nodes: list[str], releases: list[ModelReleased]) -> bool:
    return all(_count(url, releases) == len(releases) for url in nodes)


def _kafka_answers(target: Target) -> bool:
    try:
        return target.reader.watermarks(RELEASES.name, 0)[1] > 0
    except Exception:  # noqa: BLE001 (whatever it says, it is not back)
        return False


def _halted(target: Target, storm: Storm) -> bool:
    found = fold_releases(target.reader, target.roots, At())[0].models
    rollouts = [found[storm.releases[number].model].rollout for number in (*SPOILT, *UNLIKE)]
    return all(rollout is not None and rollout.status is Status.HALTED for rollout in rollouts)


def _report(target: Target, storm: Storm, nodes: list[str], usual: list[Seen], during: list[Seen]) -> int:
    failed = sum(seen.failed for seen in during)
    sent = sum(len(seen.answers) for seen in during)
    late = np.quantile([ms for seen in during for ms in seen.late_ms], 0.99)
    print(f"{COUNT} releases at once, {len(SPOILT) + len(UNLIKE)} broken, on {len(nodes)} nodes; "
          + (f"over after {storm.over_s:.1f} s, Kafka away for {storm.kafka_away_s:.1f} s of them"
             if not storm.standing else storm.standing))  # fmt: skip
    said = Counter(_rejections(target, storm))
    phases = Counter(phase for _, _, phase in said)
    print(f"rejected: {dict(phases)}, by {len({name for name, _, _ in said})} of {len(SPOILT) + len(UNLIKE)} models; "
          f"most by one node of one release {max(said.values(), default=0)}")  # fmt: skip
    print(f"{sent} requests of another model, {failed} failed; the client itself was late by p99 {late:.1f} ms")
    for name, few in (("usual", usual), ("in the storm", during)):
        line(f"the other nodes, {name}", [a.ms for seen in few[1:] for a in seen.answers], "ms")
    base, now = ([a.ms for a in some[0].answers] for some in (usual, during))
    line("the first node, usual", base, "ms")
    line("the first node, in the storm", now, "ms")
    ratio = float(np.quantile(now, 0.99) / np.quantile(base, 0.99))
    print(f"ratio: p99 in the storm / usual {ratio:.2f} (reach ≤ {REACH:g}: {'met' if ratio <= REACH else 'not met'})")
    named = {name for name, _, _ in said} == {storm.releases[n].model for n in (*SPOILT, *UNLIKE)}
    return int(bool(storm.standing) or failed > 0 or not named or max(said.values(), default=0) > 1)


def _rejections(target: Target, storm: Storm) -> list[tuple[str, str, str]]:
    """Model, node and phase, of every rejection of a release of the storm that is not to be tried again."""
    digests = {r.artifact.sha256: r.model for r in storm.releases}
    found = []
    for partition in range(FLEET.partitions):
        for r in target.reader.read(FLEET.name, partition):
            event = codec.decode(r.topic, r.key, r.value, r.headers).event
            if isinstance(event, ArtifactRejected) and event.digest in digests and not event.retrying:
                found.append((event.model, event.node, event.phase))
    return found
