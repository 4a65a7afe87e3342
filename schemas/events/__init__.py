"""Events: frozen, validated when made, named in the past tense. PURE.

An event that exists is valid: ranges and names are checked on construction, types when it is decoded. `KINDS` is the
closed list of what can be said; the codec, the topic catalogue and the tests are held against it.
"""

from __future__ import annotations

from typing import Final

from schemas.events.control import (
    Artifact,
    Batching,
    CacheInvalidated,
    CachePolicy,
    Golden,
    Grant,
    Limits,
    LogCheckpoint,
    ModelReleased,
    ModelRetired,
    ModelRolledBack,
    Placement,
    Tensor,
    TierUse,
    TrustChanged,
)
from schemas.events.event import Event
from schemas.events.fleet import (
    AGENT,
    ArtifactRejected,
    InvalidationApplied,
    Location,
    ModelSwapped,
    NodeBeat,
    NodeLeft,
    ServedModel,
    SwapFailed,
)
from schemas.events.traffic import (
    NO_MODEL,
    TIERS,
    EventRejected,
    Header,
    Health,
    ModelRef,
    RequestBatch,
    RoutedModel,
    RoutedNode,
    RoutesPublished,
)

KINDS: Final[dict[str, type[Event]]] = {
    kind.__name__: kind
    for kind in (
        TrustChanged,
        ModelReleased,
        ModelRolledBack,
        ModelRetired,
        CacheInvalidated,
        LogCheckpoint,
        NodeBeat,
        ModelSwapped,
        SwapFailed,
        ArtifactRejected,
        InvalidationApplied,
        NodeLeft,
        RequestBatch,
        RoutesPublished,
        EventRejected,
    )
}

__all__ = [
    "AGENT",
    "KINDS",
    "NO_MODEL",
    "TIERS",
    "Artifact",
    "ArtifactRejected",
    "Batching",
    "CacheInvalidated",
    "CachePolicy",
    "Event",
    "EventRejected",
    "Golden",
    "Grant",
    "Header",
    "Health",
    "InvalidationApplied",
    "Limits",
    "Location",
    "LogCheckpoint",
    "ModelRef",
    "ModelReleased",
    "ModelRetired",
    "ModelRolledBack",
    "ModelSwapped",
    "NodeBeat",
    "NodeLeft",
    "Placement",
    "RequestBatch",
    "RoutedModel",
    "RoutedNode",
    "RoutesPublished",
    "ServedModel",
    "SwapFailed",
    "Tensor",
    "TierUse",
    "TrustChanged",
]
