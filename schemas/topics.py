"""The topic catalogue: the only place that names a topic, its layout and what may stand in it. PURE.

Laws: `releases` and `invalidations` have one partition, because the log position is the clock of the CDN. Topics are
created from this table and never by auto-creation; what differs on the broker is drift and is reported.
Timestamps are the broker's (`LogAppendTime`), so no node's clock decides anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

DAY_MS: Final = 86_400_000


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic. `key` says what the record key is; `max_bytes` bounds a value; `kinds` are the events it may carry."""

    name: str
    key: str
    partitions: int
    retention_ms: int
    max_bytes: int
    kinds: frozenset[str]
    signed: bool = False
    compacted: bool = False

    def config(self) -> Mapping[str, str]:
        """The topic's broker configuration, as strings, exactly what `topics check` compares."""
        config = {
            "cleanup.policy": "compact" if self.compacted else "delete",
            "message.timestamp.type": "LogAppendTime",
            "max.message.bytes": str(self.max_bytes + 65_536),
            "compression.type": "producer",
        }
        if self.compacted:
            # A table read at boot: small segments, compacted soon, tombstones kept long enough to be seen.
            config |= {"segment.ms": "600000", "min.cleanable.dirty.ratio": "0.1", "delete.retention.ms": str(DAY_MS)}
        else:
            config |= {"retention.ms": str(self.retention_ms), "retention.bytes": "-1"}
        return config


RELEASES: Final = Topic(
    name="mlcdn.releases",
    key="model",
    partitions=1,
    retention_ms=-1,
    max_bytes=1_048_576,
    kinds=frozenset(
        {
            "ModelReleased",
            "ModelRolledBack",
            "ModelRetired",
            "RolloutAdvanced",
            "RolloutHalted",
            "RolloutPaused",
            "RolloutResumed",
            "RolloutAborted",
            "TrustChanged",
            "LogCheckpoint",
        },
    ),
    signed=True,
)
INVALIDATIONS: Final = Topic(
    # Kept for ever, because the trust that its records are judged by stands in it too (docs/decisions/0003).
    name="mlcdn.invalidations",
    key="scope",
    partitions=1,
    retention_ms=-1,
    max_bytes=1_048_576,
    kinds=frozenset({"CacheInvalidated", "TrustChanged", "LogCheckpoint"}),
    signed=True,
)
FLEET: Final = Topic(
    name="mlcdn.fleet",
    key="node",
    partitions=6,
    retention_ms=30 * DAY_MS,
    max_bytes=262_144,
    kinds=frozenset(
        {
            "NodeBeat",
            "ModelSwapped",
            "SwapFailed",
            "ArtifactRejected",
            "InvalidationApplied",
            "ShadowCompared",
            "NodeLeft",
        },
    ),
)
REQUESTS: Final = Topic(
    name="mlcdn.requests",
    key="node",
    partitions=6,
    retention_ms=DAY_MS,
    max_bytes=1_048_576,
    kinds=frozenset({"RequestBatch"}),
)
RECORDINGS: Final = Topic(
    name="mlcdn.recordings",
    key="model",
    partitions=6,
    retention_ms=DAY_MS,
    max_bytes=524_288,
    kinds=frozenset({"RequestRecorded"}),
)
ROUTES: Final = Topic(
    name="mlcdn.routes",
    key="global",
    partitions=1,
    retention_ms=-1,
    max_bytes=1_048_576,
    kinds=frozenset({"RoutesPublished"}),
    compacted=True,
)
DEAD_LETTERS: Final = Topic(
    name="mlcdn.dead_letters",
    key="topic",
    partitions=1,
    retention_ms=30 * DAY_MS,
    max_bytes=2_097_152,
    kinds=frozenset({"EventRejected"}),
)

TOPICS: Final[Mapping[str, Topic]] = {
    t.name: t for t in (RELEASES, INVALIDATIONS, FLEET, REQUESTS, RECORDINGS, ROUTES, DEAD_LETTERS)
}
