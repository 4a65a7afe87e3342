"""Runs the benchmarks that are named, or all, the quick ones first; each on one network that is started once.

    0  every figure was had and holds · 1  one was not had, or is not what is promised · 3  a peer or a tool is missing

Laws: no bench keeps another from running, whatever became of it; the last lines say what became of each.
"""

from __future__ import annotations

import argparse
import functools
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import (
    audit,
    edge,
    fetch,
    memory,
    onnx_nodes,
    purge,
    release,
    restart,
    rollback,
    rollout,
    slow_neighbour,
    storm,
    swap,
    workers,
)
from bench.servers import MISSING, PEERS
from mlcdn.demo.command import Mlcdn

Bench = Callable[[Mlcdn, Path], int]

# The quick ones first.
BENCHES: dict[str, Bench] = {
    "purge": purge.run,
    "onnx_nodes": onnx_nodes.run,
    "restart": restart.run,
    "release": release.run,
    "rollback": rollback.run,
    "rollout": rollout.run,
    "slow_neighbour": slow_neighbour.run,
    "workers": workers.run,
    "swap": swap.run,
    "storm": storm.run,
    "release_ten": release.run_ten,
    "fetch": fetch.run,
    "memory": memory.run,
    "audit": audit.run,
    "edge": edge.run,
}
SAID = {0: "holds", 1: "does not hold", MISSING: "lacks a peer or a tool, named above"}


def run_all(names: list[str], benches: Mapping[str, Bench], mlcdn: Mlcdn, work: Path) -> int:
    """Each of them, whatever becomes of the others; the worst of their codes."""
    codes: dict[str, int] = {}
    for name in names:
        print(f"\n== {name}", flush=True)
        try:
            codes[name] = benches[name](mlcdn, work)
        except Exception:  # noqa: BLE001 (shown, and the bench has not held; the others are to run)
            traceback.print_exc(file=sys.stdout)
            codes[name] = 1
    print("\n" + "\n".join(f"{name}: {SAID[code]}" for name, code in codes.items()))
    return 1 if 1 in codes.values() else max(codes.values(), default=0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHES)}; all when none is named")
    parser.add_argument(
        "--peers", default="nginx,mosec", help=f"edge: which of {','.join(PEERS)} (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="edge: rounds (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="edge: seconds a reading (default %(default)s)")
    parser.add_argument(
        "--events", type=int, default=audit.EVENTS, help="audit: events in the log (default %(default)s)"
    )
    given = parser.parse_args(arguments)
    peers = tuple(name for name in given.peers.split(",") if name)
    for kind, asked, known in (("bench", given.names, BENCHES), ("peer", peers, PEERS)):
        for name in asked:
            if name not in known:
                parser.error(f"no {kind} {name!r}; there are {', '.join(known)}")
    if given.rounds < 1 or given.seconds < 1:
        parser.error("at least one round of one second")
    options = edge.Options(peers, given.rounds, given.seconds)
    benches = BENCHES | {
        "edge": functools.partial(edge.run, options=options),
        "audit": functools.partial(audit.run, events=given.events),
    }
    print(f"{platform.platform()}, {platform.processor() or platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="mlcdn-bench-") as work:
        mlcdn = Mlcdn(Path(work) / "net")
        mlcdn("up", "--detach", timeout_s=240)
        try:
            return run_all(given.names or list(BENCHES), benches, mlcdn, Path(work))
        finally:
            mlcdn("down", "--wipe")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
