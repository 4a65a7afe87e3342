"""The suite's network loses everything but its log, its objects and its keys, and comes back by `mlcdn up` to what it was, a
rollout in mid-way included: what was in force is in the log, and every seat of every worker follows from that.

It has other addresses afterwards, as after any start.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlcdn.demo.command import Mlcdn

# The wave stays: nobody judges it before an hour is over.
PLAN = """
[[waves]]
regions = ["tokyo"]
percent = 50
hold_s = 3600
max_wait_s = 0
[[waves]]
"""
KEPT = {"keys", "stack"}
KEPT_OF_STACK = {"kafka", "s3"}
SERVED_S = 30.0

Seats = set[tuple[str, str, str, str, float]]
"""Region, worker, seat, digest, percent."""


@pytest.mark.timeout(180)
def test_the_log_the_objects_and_the_keys_are_the_network(
    mlcdn: Mlcdn, model_files: dict[str, Path], tmp_path: Path
) -> None:
    plan = tmp_path / "waves.toml"
    plan.write_text(PLAN)
    mlcdn("publish", "whole", str(model_files["v1"]), "--version", "v1", "--wait")
    mlcdn("publish", "halfway", str(model_files["v1"]), "--version", "v1", "--wait")
    mlcdn("publish", "halfway", str(model_files["v2"]), "--version", "v2", "--plan", str(plan))
    document, position = mlcdn.network(), mlcdn.json("audit", "state")["position"]
    seats = told(mlcdn, document)
    until_served(mlcdn, seats)
    before = mlcdn("audit", "state", "--at", str(position), "--json")
    assert {(region, seat, percent) for region, _, seat, _, percent in seats if "halfway" in seat} == {
        *((region, "halfway", 100.0) for region in document["regions"]), ("tokyo", "halfway@candidate", 50.0)
    }  # fmt: skip

    lose_everything(mlcdn, document)
    workers = len(document["regions"]["tokyo"]["nodes"][0]["pids"]["workers"])
    mlcdn("up", "--detach", "--regions", ",".join(document["regions"]), "--workers", str(workers), timeout_s=120)

    until_served(mlcdn, seats)
    tokyo = mlcdn.network()["regions"]["tokyo"]["nodes"][0]["url"]
    halfway = httpx.get(f"{tokyo}/health", trust_env=False).json()["models"]["halfway"]
    assert halfway["candidate"]["percent"] == 50
    assert mlcdn("audit", "state", "--at", str(position), "--json") == before, "told and reported, to the last byte"
    assert mlcdn.json("audit", "state")["desired_digest"] == json.loads(before)["desired_digest"]
    shown = mlcdn.json("rollout", "show", "halfway")
    assert (shown["status"], shown["step"]) == ("rolling", 0)
    mlcdn("audit", "verify")
    # And it is steered as before.
    mlcdn("rollout", "abort", "halfway", "--reason", "enough")
    mlcdn("publish", "whole", str(model_files["v3"]), "--version", "v3", "--wait")


def told(mlcdn: Mlcdn, document: dict[str, Any]) -> Seats:
    """What every worker should serve, by the log."""
    return {
        (region, f"{node['node']}/{worker}", seat_of(s["wanted"]["model"], s["channel"]), digest, s["percent"])
        for region, part in document["regions"].items()
        for s in mlcdn.json("audit", "state", "--region", region)["told"]
        for digest in (s["wanted"]["released"]["artifact"]["sha256"],)
        for node in part["nodes"]
        for worker in range(len(node["pids"]["workers"]))
    }


def until_served(mlcdn: Mlcdn, seats: Seats) -> None:
    give_up = time.monotonic() + SERVED_S
    while (found := served(mlcdn)) != seats:
        assert time.monotonic() < give_up, found ^ seats
        time.sleep(0.2)


def served(mlcdn: Mlcdn) -> Seats:
    return {
        (n["region"], f"{n['node']}/{n['worker']}", seat_of(model["model"], n["channel"]), n["digest"], n["percent"])
        for model in mlcdn.json("status")
        for n in model["nodes"]
        if n["state"] in ("live", "forwarded")
    }


def seat_of(model: str, channel: str) -> str:
    return model if channel == "stable" else f"{model}@{channel}"


def lose_everything(mlcdn: Mlcdn, document: dict[str, Any]) -> None:
    """kill -9 for every process, and no file left but Kafka's, S3's and the keys."""
    pids = processes(document)
    # The parent's first, so that nobody starts again what dies.
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    give_up = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    for folder, kept in ((mlcdn.directory, KEPT), (mlcdn.directory / "stack", KEPT_OF_STACK)):
        for path in folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    (mlcdn.directory / "stack" / "kafka" / "server.properties").unlink()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{document['router']['http']}/health", trust_env=False)


def processes(document: dict[str, Any]) -> list[int]:
    """Every process that the network names, its parent first."""
    named = [document["pids"]["up"], *document["pids"].values()]
    for region in document["regions"].values():
        for node in region["nodes"]:
            named += [node["pids"]["edge"], node["pids"]["agent"], *node["pids"]["workers"]]
    return list(dict.fromkeys(pid for pid in named if pid))
