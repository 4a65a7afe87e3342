"""The demo's clients: an open loop that never retries, and answers recomputed from the digest they name."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

MODEL = "digits"


def body(rows: NDArray[np.float32]) -> dict[str, Any]:
    """Rows float32 [N, 64] as an Open Inference Protocol request."""
    tensor = {"name": "X", "datatype": "FP32", "shape": list(rows.shape), "data": [float(v) for v in rows.ravel()]}
    return {"inputs": [tensor]}


@dataclass(slots=True)
class Answers:
    """What an open loop saw. `wrong` are answers that the artifact they name would not give."""

    sent: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    by_digest: Counter[str] = field(default_factory=Counter)
    by_region: Counter[str] = field(default_factory=Counter)
    seen: list[tuple[int, str, int]] = field(default_factory=list)
    """Row number, digest, label that was answered."""
    latencies_ms: list[float] = field(default_factory=list)
    """In the order of `seen`: that in which the answers came."""
    seconds: float = 0.0

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.latencies_ms, share)) if self.latencies_ms else 0.0


async def open_loop(
    router: str,
    rows: NDArray[np.float32],
    places: Sequence[Mapping[str, str]],
    rate: float,
    stop: asyncio.Event,
) -> Answers:
    """Sends `rate` requests a second, on time whatever is still unanswered, to the edge the router names for each place.

    The edges are asked of the router every half second, so a change of route is followed; nothing is sent twice.
    """
    answers = Answers()
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=10, trust_env=False, limits=limits) as http:
        best = [await _best(http, router, place) for place in places]
        bodies = [httpx.Request("POST", "http://edge", json=body(row[None])).content for row in rows]
        began, asked_at = time.monotonic(), time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not stop.is_set():
                number = answers.sent
                answers.sent += 1
                edge = best[number % len(best)]
                group.create_task(_one(http, edge, number % len(rows), bodies[number % len(rows)], answers))
                if time.monotonic() - asked_at > 0.5:
                    asked_at = time.monotonic()
                    best = [await _best(http, router, place) for place in places]
                await asyncio.sleep(max(0.0, began + answers.sent / rate - time.monotonic()))
        answers.seconds = time.monotonic() - began
    return answers


async def _best(http: httpx.AsyncClient, router: str, place: Mapping[str, str]) -> str:
    answer = await http.get(f"{router}/route", params={"model": MODEL, **place})
    answer.raise_for_status()
    return str(answer.json()["edges"][0]["url"])


async def _one(http: httpx.AsyncClient, edge: str, row: int, content: bytes, answers: Answers) -> None:
    began = time.perf_counter()
    try:
        answer = await http.post(
            f"{edge}/v2/models/{MODEL}/infer",
            content=content,
            headers={"content-type": "application/json"},
        )
    except httpx.HTTPError as error:
        answers.failed += 1
        answers.failures.append(f"{edge}: {type(error).__name__} {error}")
        return
    answers.latencies_ms.append((time.perf_counter() - began) * 1000)
    if answer.status_code != 200:
        answers.failed += 1
        answers.failures.append(f"{edge}: {answer.status_code} {answer.text[:200]}")
        return
    digest = answer.headers["mlcdn-digest"]
    answers.by_digest[digest] += 1
    answers.by_region[answer.headers["mlcdn-region"]] += 1
    label = next(o for o in answer.json()["outputs"] if o["name"] == "label")["data"][0]
    answers.seen.append((row, digest, label))


class Recompute:
    """What each artifact answers, computed here with onnxruntime from the file that was published."""

    def __init__(self, artifacts: Mapping[str, Path], rows: NDArray[np.float32]) -> None:
        from inference.runtime import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._labels: dict[str, NDArray[np.int64]] = {}
        for digest, path in artifacts.items():
            session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
            self._labels[digest] = session.run(["label"], {"X": rows})[0]

    def wrong(self, seen: Sequence[tuple[int, str, int]]) -> int:
        """How many answers are not what the artifact they name gives; one of an unknown digest is wrong."""
        return sum(digest not in self._labels or int(self._labels[digest][row]) != label for row, digest, label in seen)
