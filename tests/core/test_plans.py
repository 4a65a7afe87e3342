"""Rollout plans as people write them: what is read, what is refused and in which words."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from origin import plans
from schemas.errors import BadInput
from schemas.events import Gates, Plan, Wave

WHOLE = """
[[waves]]
regions = ["tokyo"]
percent = 5
min_samples = 1000
hold_s = 60
max_wait_s = 3600

[[waves]]
regions = "all"

[gates]
max_error_rise = 0.02
"""


def test_a_file_is_a_plan(tmp_path: Path) -> None:
    file = tmp_path / "waves.toml"
    file.write_text(WHOLE)
    assert plans.read_toml(file) == Plan(
        waves=(Wave(regions=("tokyo",), percent=5, min_samples=1000, hold_s=60, max_wait_s=3600), Wave()),
        gates=Gates(max_error_rise=0.02),
    )


def test_safe_is_one_region_in_three_steps_and_then_the_rest() -> None:
    plan = plans.safe(["virginia", "london"])
    assert [(w.regions, w.percent) for w in plan.waves] == [
        (("london",), 5),
        (("london",), 25),
        (("london",), 100),
        ((), 100),
    ]
    assert all(w.min_samples and w.hold_s and w.max_wait_s for w in plan.waves)
    with pytest.raises(BadInput, match="no node was heard of"):
        plans.safe([])


REFUSED = [
    ("", "no waves"),
    ("waves = 3", r"\[\[waves\]\]"),
    ("[[waves]]\npercnt = 5\n[[waves]]", r"unknown name 'waves\[0\]\.percnt'; did you mean 'percent'\?"),
    ("[[waves]]\n[gate]", "unknown name 'gate'; did you mean 'gates'"),
    ("[[waves]]\n[gates]\nmax_p99 = 3", r"unknown name 'gates\.max_p99'; did you mean 'max_p99_ratio'"),
    ("[[waves]]\npercent = 'five'", r"Expected `float`, got `str` - at `\$\.waves\[0\]\.percent`"),
    ("[[waves]]\npercent = 500", "percent of a wave 500.0 is not within 0 to 100"),
    ("[[waves]]\npercent = 50", "the last wave of a plan is 100 percent of all regions"),
    ("[[waves]]\nregions = ['Tokyo']\n[[waves]]", "region 'Tokyo' is not of the form"),
    ("[[waves]]\nregions = 'tokyo'\n[[waves]]", r"at `\$\.waves\[0\]\.regions`"),
    ("[[waves]]\nmin_samples = -1", "min_samples -1 is not within"),
    ("[[waves]]\nhold_s = nan", "hold_s nan is not within"),
    ("[[waves]]\nhold_s = 60\nmax_wait_s = 30", "holds for 60 s cannot be judged within 30 s"),
    ("[[waves]\n", "Expected"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=[r[1] for r in REFUSED])
def test_what_is_no_plan_is_refused_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "waves.toml"
    file.write_text(text)
    with pytest.raises(BadInput, match=words):
        plans.read_toml(file)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neither all nor safe, and no file"):
        plans.read_toml(tmp_path / "sfe")
    (tmp_path / "latin").write_bytes(b"# na\xefve")
    with pytest.raises(BadInput):
        plans.read_toml(tmp_path / "latin")


def test_the_schema_says_what_the_check_says() -> None:
    check = Draft202012Validator(plans.json_schema())
    assert check.is_valid(tomllib.loads(WHOLE))
    assert not check.is_valid({"waves": [{"percnt": 5}]})
    assert not check.is_valid({"waves": [{"regions": "tokyo"}]})
    assert not check.is_valid({"gate": {}})
