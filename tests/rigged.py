"""What a test does to Python processes that it does not run itself: another wall clock, a kill at an exact step, a release of
ours that knows fewer events.

    rig(folder, …) ──► variables for the process ──► Python imports sitecustomize.py from the folder before all else

Laws: no line of the product knows of it; a kill is SIGKILL by the process itself, right before it does what the step
names (a Python audit event: a rename, an open, a utime), and happens once; children inherit the rig.
It must not know what is promised of a process that it hurts.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_SITE = """
import json, os, signal, sys, time

_skew = int(os.environ.get("TEST_SKEW_S", "0")) * 10**9
if _skew:
    _time, _time_ns = time.time, time.time_ns
    time.time = lambda: _time() + _skew / 1e9
    time.time_ns = lambda: _time_ns() + _skew

_unknown = set(os.environ.get("TEST_UNKNOWN", "").split())
if _unknown and os.environ["TEST_PROCESS"] in sys.orig_argv:
    from schemas import codec
    codec.SCHEMAS = tuple(s for s in codec.SCHEMAS if s.kind not in _unknown)
    for _s in [s for s in codec.BY_ID.values() if s.kind in _unknown]:
        del codec.BY_ID[_s.id]

_plan = os.environ.get("TEST_KILL", "")

def _look(event, args):
    if event not in ("os.rename", "open", "os.utime") or not os.path.exists(_plan):
        return
    at = str(args[1] if event == "os.rename" else args[0])
    if at == _plan:
        return
    try:
        with open(_plan) as file:
            step = json.load(file)
        if event != step["event"] or not at.endswith(step["ends"]) or step["process"] not in sys.orig_argv:
            return
        if step["holds"]:
            with open(step["holds"]) as file:
                if step["text"] not in file.read():
                    return
        os.unlink(_plan)
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)

if _plan:
    sys.addaudithook(_look)
"""


@dataclass(frozen=True, slots=True)
class KillAt:
    """Before `process` (a module's name) does `event` to a path that `ends` so, while the file `holds` has `text` in it."""

    process: str
    event: str
    ends: str
    holds: Path | None = None
    text: str = ""


def rig(folder: Path, *, skew_s: int = 0, unknown: Collection[str] = (), process: str = "") -> dict[str, str]:
    """Environment variables. `unknown`: kinds of events that `process` has never heard of."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITE)
    variables = {"PYTHONPATH": str(folder), "TEST_KILL": str(_plan(folder)), "TEST_SKEW_S": str(skew_s)}
    return variables | ({"TEST_UNKNOWN": " ".join(unknown), "TEST_PROCESS": process} if unknown else {})


def arm(folder: Path, at: KillAt) -> None:
    half = folder / "plan.half"
    half.write_text(json.dumps({
        "process": at.process, "event": at.event, "ends": at.ends, "holds": str(at.holds or ""), "text": at.text,
    }))  # fmt: skip
    half.rename(_plan(folder))


def went_off(folder: Path) -> bool:
    return not _plan(folder).exists()


def _plan(folder: Path) -> Path:
    return folder / "plan"
