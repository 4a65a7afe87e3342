"""The benches as one run: nothing that one of them comes to keeps the others from running, or is left unsaid."""

import re
from pathlib import Path

import pytest

from bench.__main__ import BENCHES, run_all
from bench.servers import MISSING
from mlcdn.demo.command import Mlcdn

MAKEFILE = Path(__file__).parents[2] / "Makefile"


def test_each_runs_whatever_the_others_come_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []

    def ends(name: str, code: int) -> int:
        ran.append(name)
        if name == "breaks":
            raise RuntimeError("it broke")
        return code

    benches = {
        "lacks": lambda _, __: ends("lacks", MISSING),
        "breaks": lambda _, __: ends("breaks", 0),
        "holds": lambda _, __: ends("holds", 0),
    }
    mlcdn = Mlcdn(tmp_path)
    assert run_all(["lacks", "breaks", "holds"], benches, mlcdn, tmp_path) == 1
    assert ran == ["lacks", "breaks", "holds"]
    said = capsys.readouterr().out
    assert "RuntimeError: it broke" in said
    assert said.splitlines()[-3:] == [
        "lacks: lacks a peer or a tool, named above",
        "breaks: does not hold",
        "holds: holds",
    ]
    assert run_all(["lacks", "holds"], benches, mlcdn, tmp_path) == MISSING
    assert run_all(["holds"], benches, mlcdn, tmp_path) == 0


def test_make_has_a_target_for_each() -> None:
    line = re.search(r"^BENCHES := (.*)$", MAKEFILE.read_text(), re.MULTILINE)
    assert line is not None and line.group(1).split() == list(BENCHES)
