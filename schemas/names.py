"""Names and small values: the only place that says what a valid one looks like. PURE.

A name is safe in a path, a Kafka key, a metric label and a log line, so nothing further down escapes it.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final

import msgspec

from schemas.errors import BadInput

NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
OBJECT_KEY: Final = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*){1,7}")
FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
LABEL_MAX: Final = 128
TEXT_MAX: Final = 2048
SCOPE_MAX: Final = 512
_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f]")


def name(value: str, what: str = "name") -> str:
    """A model, node, region or key label: ``[a-z0-9][a-z0-9._-]{0,62}``."""
    if not NAME.fullmatch(value) or ".." in value:
        raise BadInput(f"{what} {value[:80]!r} is not of the form [a-z0-9][a-z0-9._-]{{0,62}}")
    return value


def digest(value: str, what: str = "digest") -> str:
    """A SHA-256 in lower-case hex."""
    if not DIGEST.fullmatch(value):
        raise BadInput(f"{what} {value[:80]!r} is not a SHA-256 in lower-case hex")
    return value


def object_key(value: str) -> str:
    """A key relative to the configured bucket: never a URL, never a way out of its prefix."""
    if len(value) > 256 or not OBJECT_KEY.fullmatch(value) or ".." in value:
        raise BadInput(f"object key {value[:80]!r} is not a relative key of plain names")
    return value


def label(value: str, what: str) -> str:
    """A free label such as a version: printable, at most 128 characters, not empty."""
    if not 0 < len(value) <= LABEL_MAX or not value.isprintable():
        raise BadInput(f"{what} must be 1 to {LABEL_MAX} printable characters")
    return value


def text(value: str, what: str) -> str:
    """A person's words: at most 2,048 characters, no control characters but newline and tab."""
    if len(value) > TEXT_MAX or _CONTROL.search(value):
        raise BadInput(f"{what} must be at most {TEXT_MAX} characters without control characters")
    return value


def within(value: float, low: float, high: float, what: str) -> None:
    """Refuses NaN too: it is within nothing."""
    if not low <= value <= high:
        raise BadInput(f"{what} {value!r} is not within {low:g} to {high:g}")


class ScopeKind(StrEnum):
    KEY = "key"
    PREFIX = "prefix"
    PATTERN = "pattern"
    TAG = "tag"
    MODEL = "model"
    ALL = "all"


class Scope(msgspec.Struct, frozen=True, order=True):
    """What an invalidation reaches.

    `key`, `prefix` and `pattern` (a glob) match the human name of an entry, such as ``prediction:<model>:<hex>``;
    `tag` matches one of its tags; `model` covers ``model:<m>:*``, ``prediction:<m>:*`` and ``embedding:<m>:*``.
    """

    kind: ScopeKind
    value: str = ""

    def __post_init__(self) -> None:
        if self.kind is ScopeKind.ALL:
            if self.value:
                raise BadInput("scope `all` takes no value")
        elif self.kind is ScopeKind.MODEL:
            name(self.value, "model")
        elif not 0 < len(self.value) <= SCOPE_MAX or not self.value.isprintable():
            raise BadInput(f"scope {self.kind} must be 1 to {SCOPE_MAX} printable characters")

    def __str__(self) -> str:
        return f"{self.kind}={self.value}" if self.value else str(self.kind)


def model_object_key(model: str, sha256: str) -> str:
    """Content-addressed: the same bytes are one object, and a key never changes its bytes."""
    return f"models/{name(model, 'model')}/{digest(sha256)}.onnx"


def golden_object_key(model: str, sha256: str) -> str:
    return f"golden/{name(model, 'model')}/{digest(sha256)}.npz"


def data_object_key(model: str, sha256: str) -> str:
    return f"models/{name(model, 'model')}/{digest(sha256)}.data"


def evidence_object_key(model: str, sha256: str) -> str:
    return f"evidence/{name(model, 'model')}/{digest(sha256)}.zz"


def file_name(value: str) -> str:
    """A plain file name beside an ONNX file: no folder, nothing hidden."""
    if not FILE_NAME.fullmatch(value):
        raise BadInput(f"file name {value[:80]!r} is not of the form [A-Za-z0-9_][A-Za-z0-9._-]{{0,127}}")
    return value


def prediction_name(model: str, key: str) -> str:
    return f"prediction:{model}:{key}"
