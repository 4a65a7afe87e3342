"""The release by hand that the README shows, line by line, as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlcdn.demo.command import Mlcdn

README = Path(__file__).parents[2] / "README.md"
# The suite's network stands for the one these would start and stop.
ELSEWHERE = ("make setup", ". .venv/bin/activate", "mlcdn up", "mlcdn down")


@pytest.mark.timeout(180)
def test_every_line_of_the_release_by_hand_runs(mlcdn: Mlcdn, tmp_path: Path) -> None:
    block = re.search(r"## A release by hand\n\n```\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    lines = [line for line in block.group(1).splitlines() if not line.startswith(ELSEWHERE)]
    assert len(lines) > 8
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", line],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "MLCDN_DIR": str(mlcdn.directory)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
