"""Append → live: a 1 MB model on every node, by the slowest worker's report; and seen from outside, by asking each node.

run      three regions of one node: floor worst ≤ 1.5 s
run_ten  five regions of two nodes, a network of its own: reach worst ≤ 2 s, reported and seen
"""

from __future__ import annotations

import http.client
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from bench.figures import line, model
from mlcdn.cli.target import Target
from mlcdn.demo.command import Mlcdn
from schemas.topics import RELEASES

ROUNDS = 50
FLOOR_MS = 1_500
TEN: Final = ("tokyo", "london", "virginia", "sydney", "mumbai")
TEN_REACH_MS: Final = 2_000
LOOK_S: Final = 0.025
SEEN_S: Final = 10.0


def run(mlcdn: Mlcdn, work: Path) -> int:
    live, wall = [], []
    for seed in range(ROUNDS):
        path = model(work / "release.onnx", seed, hidden=470)
        released = mlcdn.json("publish", "bench-release", str(path), "--version", f"v{seed}", "--wait")
        live.append(max(n["ms"]["total"] for n in released["nodes"]))
        wall.append(released["wall_ms"])
    line("append → live on 3 nodes", live, "ms")
    line("publish command, trial and upload included", wall, "ms")
    print(f"ratio: worst / floor {max(live) / FLOOR_MS:.2f}")
    return int(max(live) > FLOOR_MS)


def run_ten(_: Mlcdn, work: Path) -> int:
    mlcdn = Mlcdn(work / "ten-net")
    mlcdn("up", "--detach", "--regions", ",".join(TEN), "--nodes", "2", timeout_s=300)
    try:
        return _ten(mlcdn, work)
    finally:
        mlcdn("down", "--wipe")


def _ten(mlcdn: Mlcdn, work: Path) -> int:
    urls = [node["url"] for region in mlcdn.network()["regions"].values() for node in region["nodes"]]
    reader, live, seen = Target.at(mlcdn.directory).reader, [], []
    for seed in range(ROUNDS):
        path = model(work / "ten.onnx", 10_000 + seed, hidden=470)
        with Outside("bench-ten", urls) as outside:
            released = mlcdn.json("publish", "bench-ten", str(path), "--version", f"v{seed}", "--wait")
            outside.until(released["digest"])
        position = released["position"]
        [appended] = reader.read(RELEASES.name, 0, position, position + 1)
        live.append(max(n["ms"]["total"] for n in released["nodes"]))
        seen.append(outside.last(released["digest"]) - appended.timestamp_ms)
    line(f"append → live on {len(urls)} nodes, reported", live, "ms")
    line(f"append → live on {len(urls)} nodes, seen from outside", seen, "ms")
    worst = max(*live, *seen)
    print(f"ratio: worst / reach {worst / TEN_REACH_MS:.2f}")
    return int(worst > TEN_REACH_MS)


class Outside:
    """Asks every node again and again which digest it has, and keeps when each was first heard, by the wall clock."""

    def __init__(self, name: str, urls: list[str]) -> None:
        self._name, self._heard = name, {url: dict[str, float]() for url in urls}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url,)) for url in urls]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def until(self, digest: str) -> None:
        """Returns once every node has said it."""
        end = time.monotonic() + SEEN_S
        while not all(digest in heard for heard in self._heard.values()):
            if time.monotonic() > end:
                raise TimeoutError(f"not every node says {digest}")
            time.sleep(LOOK_S)

    def last(self, digest: str) -> float:
        """Unix milliseconds at which the last of them was first heard to say it."""
        return max(heard[digest] for heard in self._heard.values())

    def _ask(self, url: str) -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
        while not self._stop.wait(LOOK_S):
            connection.request("GET", f"/v2/models/{self._name}/ready")
            answer = connection.getresponse()
            answer.read()
            if answer.status == 200:
                self._heard[url].setdefault(answer.headers["mlcdn-digest"], time.time() * 1000)
        connection.close()
