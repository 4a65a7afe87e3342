"""What a request's headers ask of the caches, and what an answer's headers say of them. No I/O.

    asked   Cache-Control: no-cache | no-store | only-if-cached | max-age=N · mlcdn-tags · mlcdn-deadline-ms
            mlcdn-cohort · mlcdn-tenant · traceparent
    said    Cache-Status (RFC 9211) · Age · mlcdn-model · mlcdn-digest · mlcdn-position · mlcdn-cache-key

Laws: a directive that is not understood is ignored, as RFC 9111 has it; a header of ours that is wrong is refused. With
Authorization in play it is part of the key, so no answer to one caller is given to another; a tenant's name counts only
where a setting says that a gateway sets it.

It must not know models, tiers' insides or bodies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from schemas.errors import BadInput

MAX_TAGS: Final = 32
MAX_TAG: Final = 256
MAX_COHORT: Final = 256
MAX_DEADLINE_MS: Final = 600_000
_READ: Final = frozenset(
    {
        b"cache-control",
        b"traceparent",
        b"authorization",
        b"mlcdn-tenant",
        b"mlcdn-tags",
        b"mlcdn-deadline-ms",
        b"mlcdn-cohort",
    }
)
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Controls(msgspec.Struct, frozen=True, kw_only=True):
    """`as_of` is the fence's stamp from before any input was read; `cohort` is empty where the request names none."""

    as_of: int
    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age_s: int | None = None
    tags: frozenset[str] = frozenset()
    deadline_ms: int | None = None
    tenant: str = ""
    cohort: str = ""
    traceparent: str = ""


class Consulted(msgspec.Struct, frozen=True):
    """One tier and what it came to: `hit`, or why the request went further (RFC 9211's words)."""

    tier: str
    hit: bool
    forward: str = "uri-miss"
    ttl_s: int | None = None
    stored: bool = False
    collapsed: bool = False
    detail: str = ""

    def __str__(self) -> str:
        parts = [f"mlcdn-{self.tier}", "hit" if self.hit else f"fwd={self.forward}"]
        if self.ttl_s is not None:
            parts.append(f"ttl={self.ttl_s}")
        parts += [word for word, on in (("stored", self.stored), ("collapsed", self.collapsed)) if on]
        if self.detail:
            parts.append(f'detail="{self.detail}"')
        return "; ".join(parts)


def controls_of(raw: Iterable[tuple[bytes, bytes]], as_of: int, *, gateway: bool = False) -> Controls:
    """`raw` are a request's headers, names in lower case. One that is there twice is one list (RFC 9110, section 5.3).

    `gateway`: somebody trusted stands before us and says in `mlcdn-tenant` whose request it is.
    """
    asked: dict[bytes, bytes] = {}
    for name, value in raw:
        if name in _READ:
            asked[name] = asked[name] + b"," + value if name in asked else value
    if not asked:
        return Controls(as_of=as_of)
    headers = {name.decode(): value.decode("latin-1") for name, value in asked.items()}
    directives = [d.strip().lower() for d in headers.get("cache-control", "").split(",")]
    ages = [
        int(d[8:])
        for d in directives
        if d.startswith("max-age=") and d[8:].isascii() and d[8:].isdigit() and len(d) < 20
    ]
    traceparent = headers.get("traceparent", "")
    return Controls(
        as_of=as_of,
        no_cache="no-cache" in directives or ages == [0],
        no_store="no-store" in directives,
        only_if_cached="only-if-cached" in directives,
        max_age_s=min(ages, default=None),
        tags=_tags(headers.get("mlcdn-tags", "")),
        deadline_ms=_deadline(headers.get("mlcdn-deadline-ms")),
        tenant=_tenant(headers.get("mlcdn-tenant", "") if gateway else "", headers.get("authorization", "")),
        cohort=_cohort(headers.get("mlcdn-cohort")),
        traceparent=traceparent if _TRACEPARENT.fullmatch(traceparent) else "",
    )


def cache_status(trail: Sequence[Consulted]) -> str:
    """Nearest the origin first: the order that RFC 9211 wants, and the reverse of the order they were asked in."""
    return ", ".join(str(consulted) for consulted in reversed(trail))


def _tenant(named: str, authorization: str) -> str:
    """Whose answers these are. Callers whom a gateway counts as one tenant share them, whatever their credentials."""
    if named:
        return f"tenant {named}"
    return hashlib.blake2b(authorization.encode(), digest_size=16).hexdigest() if authorization else ""


def _tags(value: str) -> frozenset[str]:
    tags = frozenset(value.replace(",", " ").split())
    if len(tags) > MAX_TAGS or any(len(t) > MAX_TAG or not t.isprintable() for t in tags):
        raise BadInput(f"mlcdn-tags takes at most {MAX_TAGS} tags of at most {MAX_TAG} printable characters")
    return tags


def _cohort(value: str | None) -> str:
    if value is None:
        return ""
    if not (0 < len(value) <= MAX_COHORT and value.isprintable()):
        raise BadInput(f"mlcdn-cohort is 1 to {MAX_COHORT} printable characters")
    return value


def _deadline(value: str | None) -> int | None:
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and 0 < len(value) < 8 and 0 < int(value) <= MAX_DEADLINE_MS):
        raise BadInput(f"mlcdn-deadline-ms is a whole number of milliseconds from 1 to {MAX_DEADLINE_MS}")
    return int(value)
