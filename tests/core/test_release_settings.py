"""The settings of a release as a document: one list of fields, one schema, and a clear no to what is neither."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from origin import release_settings
from origin.release_request import ReleaseRequest
from schemas.errors import BadInput
from schemas.events import Placement, TierUse

SCHEMA = release_settings.json_schema()
EVERYTHING = """
version = "2026-11"
reason = "weekly"
placement = "origin"
golden = "golden.npz"
rtol = 0.01
atol = 0
max_batch = 32
max_delay_us = 500
allow_signature_change = true
[cache]
ttl_s = 60
tiers = "never"
[limits]
deadline_ms = 100
"""


def read(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    path = tmp_path / "release.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return release_settings.read_toml(path)


def request(document: dict[str, Any]) -> ReleaseRequest:
    return release_settings.request(document, model="m", path=Path("m.onnx"), author="test")


def test_every_field_of_a_release_is_a_setting() -> None:
    wanted = {f.name for f in dataclasses.fields(ReleaseRequest)} - release_settings.APART
    assert set(SCHEMA["properties"]) == wanted
    assert request({}) == ReleaseRequest(model="m", path=Path("m.onnx"), author="test")


def test_a_file_says_a_release(tmp_path: Path) -> None:
    document = read(tmp_path, EVERYTHING)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    asked = request(document)
    assert (asked.version, asked.placement, asked.max_batch, asked.atol) == ("2026-11", Placement.ORIGIN, 32, 0.0)
    assert (asked.cache.ttl_s, asked.cache.tiers, asked.cache.stale_if_error_s) == (60.0, TierUse.NEVER, 300.0)
    # Beside the settings, wherever the command runs.
    assert asked.golden == tmp_path / "golden.npz"
    assert asked.limits.deadline_ms == 100 and asked.limits.max_queue == 256


def test_what_is_laid_over_wins_name_by_name(tmp_path: Path) -> None:
    over = {"version": "by hand", "cache": {"ttl_s": 5.0}}
    asked = request(release_settings.merged(read(tmp_path, EVERYTHING), over))
    assert (asked.version, asked.reason) == ("by hand", "weekly")
    assert (asked.cache.ttl_s, asked.cache.tiers) == (5.0, TierUse.NEVER)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ttl = 3", "unknown setting 'ttl'; did you mean 'cache.ttl_s'?"),
        ("[cache]\nttl_ms = 3", "unknown setting 'cache.ttl_ms'; did you mean 'cache.ttl_s'?"),
        ("[limits]\nzzz = 3", "unknown setting 'limits.zzz'; there are limits.deadline_ms, limits.max_queue"),
        ('model = "m"', "unknown setting 'model'; it comes with the act of publishing"),
        ('[cache]\nttl_s = "1"', r"Expected `float`, got `str` - at `\$.cache.ttl_s`"),
        ("[cache]\nttl_s = -1", "ttl_s -1.0 is not within"),
        ("rtol = nan", "golden.rtol nan is not within"),
        ("max_batch = 0", "batching.max_size 0 is not within"),
        ("max_delay_us = 2000000", "batching.max_delay_us 2000000 is not within"),
        ('placement = "moon"', "Invalid enum value 'moon'"),
        ("cache = 3", "Expected `object`, got `int`"),
        ("a = [", "Invalid value"),
        (b"\xff", "can't decode"),
        (b"#" * (release_settings.MAX_BYTES + 1), "has more than"),
    ],
)
def test_what_is_no_setting_is_named(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        request(read(tmp_path, text))


def test_a_file_that_is_none_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        release_settings.read_toml(tmp_path / "nowhere.toml")
    with pytest.raises(BadInput, match="are a table"):
        release_settings.checked([], "settings")


def test_the_schema_says_no_where_the_check_does(tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for text in (
        "ttl = 3",
        "[cache]\nttl_ms = 3",
        '[cache]\nttl_s = "1"',
        'placement = "moon"',
        "cache = 3",
        "golden = 1",
    ):
        import tomllib

        given = tomllib.loads(text)
        assert not validator.is_valid(given), text
        with pytest.raises(BadInput):
            release_settings.checked(given, "settings")
    defaults = msgspec.json.decode(msgspec.json.encode(release_settings.ReleaseSettings()))
    assert validator.is_valid(defaults)
    assert release_settings.checked(defaults, "settings") == defaults
