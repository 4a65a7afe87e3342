"""Runs the benchmarks that are named, or all; each on one network that is started once."""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path

from bench import audit, edge, purge, release, restart, swap
from mlcdn.demo.command import Mlcdn

BENCHES = {
    "release": release.run,
    "purge": purge.run,
    "swap": swap.run,
    "edge": edge.run,
    "restart": restart.run,
    "audit": audit.run,
}


def main(names: list[str]) -> int:
    unknown = [n for n in names if n not in BENCHES]
    if unknown:
        print(f"no bench {unknown[0]!r}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    print(f"{platform.platform()}, {platform.processor() or platform.machine()}, Python {platform.python_version()}")
    code = 0
    with tempfile.TemporaryDirectory(prefix="mlcdn-bench-") as work:
        mlcdn = Mlcdn(Path(work) / "net")
        mlcdn("up", "--detach", timeout_s=240)
        try:
            for name in names or list(BENCHES):
                print(f"\n== {name}")
                code |= BENCHES[name](mlcdn, Path(work))
        finally:
            mlcdn("down", "--wipe")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
