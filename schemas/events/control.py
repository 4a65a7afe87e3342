"""What publishers and operators say: releases, rollbacks, retirements, invalidations. All signed. PURE."""

from __future__ import annotations

import hashlib
from enum import StrEnum

import msgspec

from schemas import names
from schemas.errors import BadInput
from schemas.events.event import Event
from schemas.events.rollouts import MAX_SEQUENCE, OnFailure, Plan, Recording
from schemas.names import Scope

MAX_SCOPES = 1_000
MAX_FILES = 256


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable file in the object store; `chunk_sha256` lists the raw 32-byte digests of its chunks in order."""

    sha256: str
    size_bytes: int
    object_key: str
    chunk_size_bytes: int
    chunk_sha256: tuple[bytes, ...]

    def __post_init__(self) -> None:
        names.digest(self.sha256)
        names.object_key(self.object_key)
        names.within(self.size_bytes, 1, 2**40, "size_bytes")
        names.within(self.chunk_size_bytes, 65_536, 2**30, "chunk_size_bytes")
        wanted = -(-self.size_bytes // self.chunk_size_bytes)
        if len(self.chunk_sha256) != wanted or any(len(c) != 32 for c in self.chunk_sha256):
            raise BadInput(f"an artifact of {self.size_bytes} bytes has {wanted} chunk digests of 32 bytes")


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output. `datatype` is an Open Inference Protocol name; -1 in `shape` is a free dimension.

    A request may leave out an input that is `optional`; one that is not `ranked` has any number of dimensions.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    optional: bool = False
    ranked: bool = True

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= 512:
            raise BadInput("a tensor's name has 1 to 512 characters")
        if len(self.shape) > 16 or any(d < -1 for d in self.shape):
            raise BadInput(f"tensor {self.name}: at most 16 dimensions, each at least -1")


class Placement(StrEnum):
    EDGE = "edge"
    ORIGIN = "origin"
    AUTO = "auto"


class TierUse(StrEnum):
    """Whether caches outside a worker are asked and filled: AUTO while a look-up costs less than the model."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class CachePolicy(msgspec.Struct, frozen=True, kw_only=True):
    enabled: bool = True
    ttl_s: float = 300.0
    stale_while_revalidate_s: float = 30.0
    stale_if_error_s: float = 300.0
    tiers: TierUse = TierUse.AUTO

    def __post_init__(self) -> None:
        for field in ("ttl_s", "stale_while_revalidate_s", "stale_if_error_s"):
            names.within(getattr(self, field), 0, 90 * 86_400, field)


class Batching(msgspec.Struct, frozen=True, kw_only=True):
    batchable: bool = False
    max_size: int = 64
    max_delay_us: int = 0

    def __post_init__(self) -> None:
        names.within(self.max_size, 1, 65_536, "batching.max_size")
        names.within(self.max_delay_us, 0, 1_000_000, "batching.max_delay_us")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    deadline_ms: int = 5_000
    max_queue: int = 256

    def __post_init__(self) -> None:
        names.within(self.deadline_ms, 1, 600_000, "limits.deadline_ms")
        names.within(self.max_queue, 1, 100_000, "limits.max_queue")


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    object_key: str
    sha256: str
    rtol: float = 1e-3
    atol: float = 1e-5

    def __post_init__(self) -> None:
        names.object_key(self.object_key)
        names.digest(self.sha256)
        names.within(self.rtol, 0, 1e6, "golden.rtol")
        names.within(self.atol, 0, 1e30, "golden.atol")


class File(msgspec.Struct, frozen=True, kw_only=True):
    """External data of a model: what its ONNX file calls it, and its bytes."""

    name: str
    artifact: Artifact

    def __post_init__(self) -> None:
        names.file_name(self.name)


class ModelReleased(Event, frozen=True, kw_only=True):
    """A version of a model exists and should be served."""

    model: str
    version: str
    sequence: int
    artifact: Artifact
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    placement: Placement = Placement.EDGE
    memory_bytes: int = 0
    cache: CachePolicy = CachePolicy()
    batching: Batching = Batching()
    limits: Limits = Limits()
    golden: Golden | None = None
    plan: Plan = Plan()
    on_failure: OnFailure = OnFailure.ROLLBACK
    shadow_percent: float = 0.0
    record: Recording = Recording()
    files: tuple[File, ...] = ()
    created_at_ms: int
    author: str
    reason: str = ""

    def __post_init__(self) -> None:
        _release(self.model, self.sequence, self.author, self.reason)
        names.label(self.version, "version")
        names.within(self.memory_bytes, 0, 2**50, "memory_bytes")
        if not self.outputs or len(self.inputs) > 256 or len(self.outputs) > 256:
            raise BadInput("a model has at least one output and at most 256 inputs and outputs")
        if self.artifact.object_key != names.model_object_key(self.model, self.artifact.sha256):
            raise BadInput("the artifact's key is not the content-addressed key of its model and digest")
        names.within(self.shadow_percent, 0, 100, "shadow_percent")
        names.within(len(self.files), 0, MAX_FILES, "number of files")
        if len({file.name for file in self.files}) != len(self.files):
            raise BadInput("two files of a model have one name")
        for file in self.files:
            if file.artifact.object_key != names.data_object_key(self.model, file.artifact.sha256):
                raise BadInput(f"file {file.name}: its key is not the content-addressed key of its model and digest")

    @property
    def key(self) -> str:
        return self.model

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What it is served from: the ONNX file, then its data."""
        return (self.artifact, *(file.artifact for file in self.files))

    @property
    def digest(self) -> str:
        """What answers: the ONNX file's SHA-256, or, where there are more files, one over the digests of all."""
        if not self.files:
            return self.artifact.sha256
        parts = sorted(f"{file.artifact.sha256} {file.name}" for file in self.files)
        return hashlib.sha256("\n".join(("mlcdn.files.v1", self.artifact.sha256, *parts)).encode()).hexdigest()


class ModelRolledBack(Event, frozen=True, kw_only=True):
    """An artifact that an earlier release brought should be served again; `version` is that release's label."""

    model: str
    version: str
    sequence: int
    to_digest: str
    author: str
    reason: str = ""

    def __post_init__(self) -> None:
        _release(self.model, self.sequence, self.author, self.reason)
        names.label(self.version, "version")
        names.digest(self.to_digest)

    @property
    def key(self) -> str:
        return self.model


class ModelRetired(Event, frozen=True, kw_only=True):
    model: str
    sequence: int
    author: str
    reason: str = ""

    def __post_init__(self) -> None:
        _release(self.model, self.sequence, self.author, self.reason)

    @property
    def key(self) -> str:
        return self.model


class CacheInvalidated(Event, frozen=True, kw_only=True):
    """Entries in `scopes` whose inputs were read before this event's position are no longer fresh."""

    scopes: tuple[Scope, ...]
    soft: bool = False
    author: str
    reason: str = ""

    def __post_init__(self) -> None:
        _who(self.author, self.reason)
        names.within(len(self.scopes), 1, MAX_SCOPES, "number of scopes")

    @property
    def key(self) -> str:
        return str(self.scopes[0])


def _who(author: str, reason: str) -> None:
    names.label(author, "author")
    names.text(reason, "reason")


def _release(model: str, sequence: int, author: str, reason: str) -> None:
    names.name(model, "model")
    names.within(sequence, 1, MAX_SEQUENCE, "sequence")
    _who(author, reason)
