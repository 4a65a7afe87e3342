"""The only import of onnxruntime, so that what must be true before and at that import is true everywhere.

Laws:
- Its telemetry is off before the library is loaded. onnxruntime 1.32 for Linux otherwise starts an uploader thread at
  import and keeps a database under the user's cache folder; `disable_telemetry_events()` does not end that thread, the
  variable keeps it from starting. (A fork of a process with that thread would also be unsafe.)
- Nothing it prints carries a path: it logs only fatal errors, and its messages pass through `reason_of`.
- The CPU provider is named, never implied: the wheel also carries one that calls remote services.

It must not know what a model is for.
"""

from __future__ import annotations

import os
import re
from typing import Final

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

__all__ = ["FAILURES", "LOG_FATAL", "InvalidArgument", "is_out_of_memory", "onnxruntime", "reason_of"]

LOG_FATAL: Final = 4
onnxruntime.set_default_logger_severity(LOG_FATAL)

InvalidArgument: type[Exception] = state.InvalidArgument
# Everything else the library raises: its own classes, which share no base but Exception, and Python's from the binding.
FAILURES: Final[tuple[type[Exception], ...]] = (
    state.EPFail,
    state.Fail,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoModel,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
    RuntimeError,
    ValueError,
    TypeError,
    MemoryError,
)

_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
_PLACE = re.compile(
    r"\S*/\S*\.(?:cc|h|hpp|cpp|cu)(?::\d+)?(?: [^\n]*?\)(?: const)?(?:::<lambda\(.*?\)>)?(?: \[with [^\]]*\])?)?\s*"
)
_PATH = re.compile(r"(?<![\w/.])/(?:[\w.+-]+/)+[\w.+-]*")
_MEMORY = re.compile(r"alloc|out of memory|BFCArena|can't start new thread", re.IGNORECASE)
_MAX_REASON: Final = 300


def reason_of(error: BaseException) -> str:
    """One line for a person: without error codes, source places, signatures or paths."""
    text = _PREFIX.sub("", str(error))
    text = _PATH.sub("(path)", _PLACE.sub("", text))
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= _MAX_REASON else text[: _MAX_REASON - 1] + "…"


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(_MEMORY.search(str(error)))
