"""A log in memory with a rollout on it: keys, a release before, workers that beat, requests in batches."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from schemas import names, signing
from schemas.events import (
    TIERS,
    Artifact,
    ArtifactRejected,
    Event,
    Grant,
    Location,
    ModelRef,
    ModelReleased,
    ModelSwapped,
    NodeBeat,
    OnFailure,
    Plan,
    RequestBatch,
    ServedModel,
    ShadowCompared,
    SwapFailed,
    Tensor,
    TrustChanged,
)
from schemas.topics import RELEASES
from streams.audit.control import At, fold_releases
from streams.folds.releases import ModelHistory
from streams.folds.rollouts import Rollout
from streams.jobs.rollouts import RolloutJob
from streams.log.local import LocalLog
from streams.log.writer import Appended, Writer

ROOT, OPERATOR, JOB = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 4))
ROOTS = (ROOT.public_key().public_bytes_raw(),)
JOB_ID = signing.key_id(JOB.public_key().public_bytes_raw())
V1, V2, V3 = (f"{n:064x}" for n in (1, 2, 3))
OPERATOR_KINDS = ("ModelReleased", "ModelRolledBack", "RolloutPaused", "RolloutResumed", "RolloutAborted")
JOB_KINDS = ("RolloutAdvanced", "RolloutHalted", "LogCheckpoint")


def grant(key: Ed25519PrivateKey, label: str, kinds: tuple[str, ...]) -> Grant:
    return Grant(public_key=key.public_key().public_bytes_raw(), label=label, models=("*",), kinds=kinds)


class Scene:
    """`now_ms` is the broker's clock and everybody's; it moves when it is told to."""

    def __init__(self) -> None:
        self.now_ms = 1_700_000_000_000
        self.log = LocalLog(lambda: self.now_ms)
        self.beats = 0
        self.say(ROOT, TrustChanged(
            grants=(grant(OPERATOR, "operator", OPERATOR_KINDS), grant(JOB, "jobs", JOB_KINDS)), author="root"
        ))  # fmt: skip

    def say(self, key: Ed25519PrivateKey | None, event: Event) -> Appended:
        topic = RELEASES.name if key is not None else None
        return asyncio.run(self.writer(key).append(event, topic=topic))

    def writer(self, key: Ed25519PrivateKey | None) -> Writer:
        return Writer(self.log, source="/operators/op", signing_key=key, now_ms=lambda: self.now_ms)

    def release(self, sequence: int, digest: str, plan: Plan = Plan(), **more: Any) -> Appended:  # noqa: B008 - frozen
        artifact = Artifact(
            sha256=digest,
            size_bytes=1,
            object_key=names.model_object_key("m", digest),
            chunk_size_bytes=65_536,
            chunk_sha256=(bytes(32),),
        )
        return self.say(OPERATOR, ModelReleased(
            model="m", version=f"v{sequence}", sequence=sequence, artifact=artifact, inputs=(),
            outputs=(Tensor(name="y", datatype="FP32", shape=(-1,)),), plan=plan, created_at_ms=0, author="op", **more,
        ))  # fmt: skip

    def beat(
        self, sequence: int, digest: str, *, node: str = "n-1", region: str = "tokyo", state: str = "live"
    ) -> None:
        self.beats += 1
        served = ServedModel(
            name="m", version="v", digest=digest, sequence=sequence, channel="candidate", state=state, error=""
        )
        self.say(None, NodeBeat(
            node=node, region=region, worker=0, incarnation=1, beat=self.beats, url="http://n",
            location=Location(lat=0, lon=0), capacity=0, load=0, in_flight=0, queue=0, requests=0, errors=0, p50_ms=0,
            p99_ms=0, hits={}, positions={}, models=(served,), desired_digest="",
        ))  # fmt: skip

    def report(self, kind: type[Event], sequence: int, digest: str, node: str = "n-1", **more: Any) -> None:
        worker = -1 if kind is ArtifactRejected else 0
        said: dict[str, Any] = {"phase": "trial", "cause": "broken"} if kind in (ArtifactRejected, SwapFailed) else {}
        if kind is ArtifactRejected:
            said["retrying"] = False
        if kind is ModelSwapped:
            said = {"previous_digest": "", "channel": "candidate", "ms": {}}
        self.say(None, kind(
            node=node, region="tokyo", worker=worker, incarnation=1, model="m", version="v", sequence=sequence,
            digest=digest, position=1, **(said | more),
        ))  # fmt: skip

    def requests(
        self, digest: str, rows: int, *, failed: int = 0, status: int = 503, ms: float = 1.0, tier: str = "model",
        region: str = "tokyo",
    ) -> Appended:  # fmt: skip
        statuses = np.full(rows, 200, "<u2")
        statuses[:failed] = status
        return self.say(None, RequestBatch(
            node="n-1", region=region, worker=0, incarnation=1, started_at_ms=0, rows=rows,
            models=(ModelRef(name="other", version="v", digest=digest), ModelRef(name="m", version="v", digest=digest)),
            start_offset_us=np.zeros(rows, "<u4").tobytes(), latency_us=np.full(rows, ms * 1e3).astype("<u4").tobytes(),
            tier=np.full(rows, TIERS.index(tier), "u1").tobytes(), status=statuses.tobytes(),
            model=np.full(rows, 1, "<u2").tobytes(), request_bytes=np.zeros(rows, "<u4").tobytes(),
            response_bytes=np.zeros(rows, "<u4").tobytes(), key_hash=np.zeros(rows, "<u8").tobytes(), dropped=0,
        ))  # fmt: skip

    def shadow(
        self, rows: int, disagreements: int, *, failed: int = 0, top1: tuple[int, int] = (0, 0), region: str = "tokyo"
    ) -> None:
        self.say(None, ShadowCompared(
            node="n-1", region=region, worker=0, incarnation=1, model="m", sequence=2, stable_digest=V1,
            candidate_digest=V2, started_at_ms=0, rows=rows, disagreements=disagreements, max_difference=0.0,
            top1_rows=top1[0], top1_agreements=top1[1], failed=failed, skipped=0,
        ))  # fmt: skip

    @property
    def history(self) -> ModelHistory:
        return fold_releases(self.log, ROOTS, At())[0].models["m"]

    @property
    def rollout(self) -> Rollout:
        rollout = self.history.rollout
        assert rollout is not None
        return rollout

    def job(self, store: Any = None) -> RolloutJob:
        return RolloutJob(self.log, self.writer(JOB), ROOTS, JOB_ID, store, monotonic_s=lambda: self.now_ms / 1e3)


__all__ = ["V1", "V2", "V3", "OnFailure", "Scene"]
