"""Runs the benchmarks that are named, or all; each on one network that is started once."""

from __future__ import annotations

import argparse
import functools
import platform
import sys
import tempfile
from pathlib import Path

from bench import audit, edge, fetch, memory, onnx_nodes, purge, release, restart, slow_neighbour, swap, workers
from bench.servers import PEERS
from mlcdn.demo.command import Mlcdn

BENCHES = {
    "release": release.run,
    "purge": purge.run,
    "swap": swap.run,
    "edge": edge.run,
    "slow_neighbour": slow_neighbour.run,
    "workers": workers.run,
    "memory": memory.run,
    "restart": restart.run,
    "audit": audit.run,
    "fetch": fetch.run,
    "onnx_nodes": onnx_nodes.run,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
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
    code = 0
    with tempfile.TemporaryDirectory(prefix="mlcdn-bench-") as work:
        mlcdn = Mlcdn(Path(work) / "net")
        mlcdn("up", "--detach", timeout_s=240)
        try:
            for name in given.names or list(BENCHES):
                print(f"\n== {name}")
                code |= benches[name](mlcdn, Path(work))
        finally:
            mlcdn("down", "--wipe")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
