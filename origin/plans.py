"""Rollout plans as people write them: `all`, `safe`, or a TOML file.

    [[waves]]                       in order
    regions = ["tokyo"]             or "all", the default
    percent = 5                     of the requests of those regions; 100 by default
    min_samples = 1000              requests that the candidate must have answered
    hold_s = 60                     how long the wave lasts at least
    max_wait_s = 3600               how long its gate may stay open; 0 is for ever

    [gates]                         what the candidate may do worse than the stable release
    max_error_rise = 0.01           share of failed requests
    max_p99_ratio = 1.5             99th percentile of latency, or
    p99_slack_ms = 5                milliseconds above the stable release's, whichever is more
    compare = "top1"                what makes two answers differ: their largest score, where they have any, or "values"
    max_disagreement = 0.01         share of compared answers that differ
    min_compared = 100              answers to compare before drift is judged

Laws: an unknown name is refused with the nearest known one; the schema that is printed is the one that is checked. The
last wave is every request of every region. It must not know options or the log.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from schemas.errors import BadInput
from schemas.events import Gates, Plan, Wave

ALL_REGIONS: Final = "all"
AT_ONCE: Final = Plan()
MAX_BYTES: Final = 1_048_576
SAFE_PERCENTS: Final = (5.0, 25.0, 100.0)
SAFE_SAMPLES: Final = 100
SAFE_HOLD_S: Final = 60.0
SAFE_WAIT_S: Final = 3_600.0


def safe(regions: Sequence[str]) -> Plan:
    """The first region at 5, 25 and 100 percent, a minute each at least, then all the others. `BadInput` without one."""
    if not regions:
        raise BadInput("the plan `safe` begins with one region, and no node was heard of: name waves in a file instead")
    first = sorted(regions)[0]
    waves = [_safe_wave((first,), percent) for percent in SAFE_PERCENTS]
    return Plan(waves=(*waves, _safe_wave((), 100.0)))


def plan_of(document: object, where: str) -> Plan:
    """The plan that a document of tables describes; `BadInput` says which name or value is none."""
    if not isinstance(document, dict):
        raise BadInput(f"{where}: a plan is a table with waves and gates")
    _no_strangers(document, Plan, where, "")
    waves = document.get("waves", [])
    if not isinstance(waves, list) or not all(isinstance(wave, dict) for wave in waves):
        raise BadInput(f"{where}: waves are [[waves]], one table each")
    for number, wave in enumerate(waves):
        _no_strangers(wave, Wave, where, f"waves[{number}].")
    if isinstance(gates := document.get("gates", {}), dict):
        _no_strangers(gates, Gates, where, "gates.")
    everywhere = [wave | {"regions": []} if wave.get("regions") == ALL_REGIONS else wave for wave in waves]
    try:
        plan = msgspec.convert(document | {"waves": everywhere}, Plan)
    except (msgspec.ValidationError, BadInput) as error:
        raise BadInput(f"{where}: {error}") from None
    if not plan.waves:
        raise BadInput(f"{where}: a plan of no waves is `all`")
    return plan


def read_toml(path: Path) -> Plan:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise BadInput(f"{path} has more than {MAX_BYTES} bytes")
        return plan_of(tomllib.loads(data.decode()), str(path))
    except OSError as error:
        raise BadInput(f"plan {str(path)!r} is neither all nor safe, and no file: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise BadInput(f"{path}: {error}") from None


def document(plan: Plan) -> dict[str, Any]:
    """As a settings file would say it."""
    said: dict[str, Any] = msgspec.to_builtins(plan)
    return said


def json_schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a plan file, closed at every depth as the check is."""
    (own,), parts = msgspec.json.schema_components([Plan], ref_template="#/$defs/{name}")
    for part in parts.values():
        part["additionalProperties"] = False
        part.pop("description", None)
    regions = parts["Wave"]["properties"]["regions"]
    parts["Wave"]["properties"]["regions"] = {"default": ALL_REGIONS, "anyOf": [{"const": ALL_REGIONS}, {
        key: value for key, value in regions.items() if key != "default"
    }]}  # fmt: skip
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **own, "$defs": parts}


def _no_strangers(table: dict[str, Any], kind: type[msgspec.Struct], where: str, path: str) -> None:
    known = [field.encode_name for field in msgspec.structs.fields(kind)]
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise BadInput(f"{where}: unknown name {path + name!r}; {meant}")


def _safe_wave(regions: tuple[str, ...], percent: float) -> Wave:
    return Wave(regions=regions, percent=percent, min_samples=SAFE_SAMPLES, hold_s=SAFE_HOLD_S, max_wait_s=SAFE_WAIT_S)
