"""What somebody who may write to Kafka can try, after the attacks that TUF names: each has its own reason, none acts."""

from __future__ import annotations

import msgspec
import pytest

from schemas import signing
from schemas.errors import Refusal
from schemas.events import CacheInvalidated, Event, TrustChanged
from schemas.names import Scope, ScopeKind
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds import invalidations, releases
from streams.folds.invalidations import Invalidations
from streams.folds.releases import Releases
from streams.log.record import Record
from tests.core.test_folds_control import (
    CONTROL,
    DIGESTS,
    NARROW,
    OPERATOR,
    ROOT,
    ROOTS,
    STRANGER,
    fold_releases,
    public,
    record,
    release,
    trust,
    without,
)

T = RELEASES.name
GOOD = record(T, 2, release("digits", 2, DIGESTS[1]), OPERATOR)
LOG = [record(T, 0, trust(CONTROL), ROOT), record(T, 1, release("digits", 1, DIGESTS[0]), OPERATOR), GOOD]
PURGE = CacheInvalidated(scopes=(Scope(ScopeKind.TAG, "t"),), author="op")


def again(taken: Record) -> Record:
    return msgspec.structs.replace(taken, offset=3)


def signed_as(taken: Record, other: Record) -> Record:
    """`taken` with the signature of `other`."""
    moved = (signing.SIGNATURE_HEADER, dict(other.headers)[signing.SIGNATURE_HEADER])
    return msgspec.structs.replace(taken, offset=3, headers=(*without(taken.headers, moved[0]), moved))


@pytest.mark.parametrize(
    ("attack", "forged", "refusal"),
    [
        ("replayed", again(GOOD), Refusal.SEQUENCE_NOT_HIGHER),
        ("rolled back", again(LOG[1]), Refusal.SEQUENCE_NOT_HIGHER),
        ("twin", record(T, 3, release("digits", 2, DIGESTS[2]), OPERATOR), Refusal.SEQUENCE_CONFLICT),
        (
            "mixed: event",
            signed_as(record(T, 3, release("digits", 3, DIGESTS[2]), OPERATOR), GOOD),
            Refusal.BAD_SIGNATURE,
        ),
        ("mixed: model", msgspec.structs.replace(GOOD, offset=3, key=b"spam"), Refusal.BAD_SIGNATURE),
        (
            "mixed: topic",
            msgspec.structs.replace(record(INVALIDATIONS.name, 3, trust(CONTROL), ROOT), topic=T),
            Refusal.BAD_SIGNATURE,
        ),
        ("wrong key: nobody's", record(T, 3, release("digits", 3, DIGESTS[2]), STRANGER), Refusal.UNKNOWN_KEY),
        ("wrong key: another model's", record(T, 3, release("spam", 3, DIGESTS[2]), NARROW), Refusal.KEY_NOT_ALLOWED),
        ("wrong key: a root's", record(T, 3, release("digits", 3, DIGESTS[2]), ROOT), Refusal.KEY_NOT_ALLOWED),
        ("unsigned", record(T, 3, release("digits", 3, DIGESTS[2]), None), Refusal.UNSIGNED),
    ],
    ids=lambda value: value if isinstance(value, str) and not isinstance(value, Refusal) else "",
)
def test_an_attack_on_releases_is_refused_with_its_reason(attack: str, forged: Record, refusal: Refusal) -> None:
    before = fold_releases(LOG)
    step = releases.fold(before, forged)
    assert step.refused is not None, attack
    assert step.refused.refusal is refusal
    assert releases.desired(step.state, None) == releases.desired(before, None)
    assert releases.desired(step.state, None)["digits"].digest == DIGESTS[1]


def test_a_replayed_purge_is_refused() -> None:
    state = Invalidations.initial(ROOTS)
    first = record(INVALIDATIONS.name, 1, PURGE, OPERATOR)
    for each in (record(INVALIDATIONS.name, 0, trust(("CacheInvalidated",)), ROOT), first):
        state = invalidations.fold(state, each).state
    step = invalidations.fold(state, msgspec.structs.replace(first, offset=2))
    assert step.refused is not None
    assert step.refused.refusal is Refusal.DUPLICATE


@pytest.mark.parametrize("topic", [RELEASES.name, INVALIDATIONS.name])
def test_a_replayed_grant_brings_no_revoked_key_back(topic: str) -> None:
    grant = record(topic, 0, trust(("ModelReleased", "CacheInvalidated")), ROOT)
    revoked = record(topic, 1, TrustChanged(grants=(), revoked=(public(OPERATOR),), author="root"), ROOT)
    says: Event = release("digits", 1, DIGESTS[0]) if topic == RELEASES.name else PURGE
    log = [grant, revoked, msgspec.structs.replace(grant, offset=2), record(topic, 3, says, OPERATOR)]
    assert refusals(topic, log) == [None, None, Refusal.DUPLICATE, Refusal.KEY_REVOKED]


def refusals(topic: str, log: list[Record]) -> list[Refusal | None]:
    """Why each record did not act, None for those that did."""
    state: Releases | Invalidations = (
        Releases.initial(ROOTS) if topic == RELEASES.name else Invalidations.initial(ROOTS)
    )  # fmt: skip
    found = []
    for each in log:
        step = releases.fold(state, each) if isinstance(state, Releases) else invalidations.fold(state, each)
        state = step.state
        found.append(step.refused.refusal if step.refused is not None else None)
    return found


def test_a_root_is_checked_whatever_an_earlier_check_is_said_to_have_found() -> None:
    forged = signed_as(record(T, 3, trust(("ModelRetired",)), ROOT), LOG[0])
    step = releases.fold(fold_releases(LOG), forged, True)
    assert step.refused is not None
    assert step.refused.refusal is Refusal.BAD_SIGNATURE


# Frozen, truncated and rewritten are said of a whole log, not of a record: tests/core/test_chain.py for what they are,
# tests/service/test_log_alarms.py for what a node does.
