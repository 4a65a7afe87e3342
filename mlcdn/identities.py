"""The local network's keys: a root and one each for operator, origin and stream jobs; topics made, trust written and read back.

A change of trust goes to both signed topics, because each is judged by what stands in itself (docs/decisions/0003).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from schemas import signing
from schemas.errors import Conflict
from schemas.events import Grant, TrustChanged
from schemas.topics import INVALIDATIONS, RELEASES
from streams.audit.control import At, fold_invalidations, fold_releases
from streams.folds.trust import Trust
from streams.log.admin import TopicAdmin
from streams.log.keys import generate, load_private, load_roots, write_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer

OPERATOR_KINDS: Final = (
    "ModelReleased",
    "ModelRolledBack",
    "ModelRetired",
    "RolloutPaused",
    "RolloutResumed",
    "RolloutAborted",
    "CacheInvalidated",
)
# The stream jobs' own: what they say can stop a release or let it go on, and never brings in an artifact.
JOB_KINDS: Final = ("RolloutAdvanced", "RolloutHalted", "LogCheckpoint")


@dataclass(frozen=True, slots=True)
class Identities:
    """Files: `roots` holds public keys, the others one private key each."""

    roots: Path
    root: Path
    operator: Path
    origin: Path
    jobs: Path


def key_files(directory: Path) -> Identities:
    """Makes whatever keys are missing."""
    root, operator, origin, jobs = (_key(directory, label) for label in ("root", "operator", "origin", "jobs"))
    roots = directory / "roots.txt"
    if not roots.exists():
        write_roots(roots, {"root": load_private(root)})
    return Identities(roots=roots, root=root, operator=operator, origin=origin, jobs=jobs)


async def grant_first(identities: Identities, kafka: str) -> None:
    """Grants each key but the root's, where the log does not have it. The topics must be there."""
    grants = tuple(
        Grant(
            public_key=load_private(path).public_key().public_bytes_raw(),
            label=label,
            models=("*",),
            kinds=kinds,
        )
        for label, path, kinds in (
            ("operator", identities.operator, OPERATOR_KINDS),
            ("origin", identities.origin, OPERATOR_KINDS),
            ("jobs", identities.jobs, JOB_KINDS),
        )
    )
    await change_trust(
        kafka,
        load_private(identities.root),
        TrustChanged(grants=grants, author="mlcdn-up", reason="the local network's first keys"),
        load_roots(identities.roots),
        only_if_missing=True,
    )


async def ensure_identities(directory: Path, kafka: str, progress: Callable[[str], None]) -> Identities:
    """Makes the topics, and whatever keys and grants are missing. Safe to call again."""
    found = key_files(directory)
    for line in await asyncio.to_thread(TopicAdmin(kafka).apply):
        progress(line)
    await grant_first(found, kafka)
    return found


async def change_trust(
    kafka: str,
    root: Ed25519PrivateKey,
    event: TrustChanged,
    roots: tuple[bytes, ...],
    *,
    only_if_missing: bool = False,
) -> None:
    """Appends the change to both signed topics and reads back that each fold took it; `Conflict` when one did not."""
    reader = KafkaReader(kafka)
    appender = KafkaAppender(kafka, client_id="mlcdn-trust")
    writer = Writer(appender, source=f"/operators/{event.author}", signing_key=root)
    try:
        for topic in (RELEASES.name, INVALIDATIONS.name):
            if only_if_missing and _granted(await asyncio.to_thread(_trust, reader, topic, roots), event):
                continue
            await writer.append(event, topic=topic)
            if not _granted(await asyncio.to_thread(_trust, reader, topic, roots), event):
                raise Conflict(f"{topic} did not take the change of trust: is the key that signed it a root there?")
    finally:
        await appender.close()


def _trust(reader: KafkaReader, topic: str, roots: tuple[bytes, ...]) -> Trust:
    if topic == RELEASES.name:
        return fold_releases(reader, roots, At())[0].trust
    return fold_invalidations(reader, roots, None)[0].trust


def _granted(trust: Trust, event: TrustChanged) -> bool:
    for grant in event.grants:
        known = trust.keys.get(signing.key_id(grant.public_key))
        if known is None or (known.models, known.kinds, known.revoked_at) != (grant.models, grant.kinds, None):
            return False
    revoked = (trust.keys.get(signing.key_id(key)) for key in event.revoked)
    return all(known is not None and known.revoked_at is not None for known in revoked)


def _key(directory: Path, label: str) -> Path:
    path = directory / f"{label}.key"
    return path if path.exists() else generate(directory, label)
