"""The demo's hands: the `mlcdn` program itself, as a user would call it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class PromiseBroken(Exception):
    """What the demo says did not come true."""


@dataclass(frozen=True, slots=True)
class Mlcdn:
    """`directory` is the local network's; every call is a process of its own."""

    directory: Path

    def __call__(self, *arguments: str, expect: int = 0, timeout_s: float = 180) -> str:
        """Runs ``mlcdn ARGUMENTS --dir DIRECTORY`` and returns stdout; another exit code breaks a promise."""
        done = subprocess.run(
            [sys.executable, "-m", "mlcdn", *arguments, "--dir", str(self.directory)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != expect:
            said = (done.stderr or done.stdout).strip()[-2_000:]
            raise PromiseBroken(f"mlcdn {' '.join(arguments)}: exit code {done.returncode}, not {expect}\n{said}")
        return done.stdout

    def json(self, *arguments: str, expect: int = 0, timeout_s: float = 180) -> Any:
        return json.loads(self(*arguments, "--json", expect=expect, timeout_s=timeout_s))

    def network(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.directory / "network.json").read_text())
        return document


def promise(holds: bool, what: str) -> None:
    """Ends the demo when something it promises is not so."""
    if not holds:
        raise PromiseBroken(what)
