"""The control folds: what any order, repetition or forgery of records may do to the state, and what it may not."""

import uuid
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import codec, names, signing
from schemas.errors import Refusal
from schemas.events import (
    Artifact,
    CacheInvalidated,
    Event,
    Grant,
    ModelReleased,
    ModelRetired,
    ModelRolledBack,
    Tensor,
    TrustChanged,
)
from schemas.names import Scope, ScopeKind
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds import invalidations, releases
from streams.folds.invalidations import Invalidations, Purge, PurgeMap, Standing
from streams.folds.releases import Releases
from streams.log.record import Record

# Fixed, so that a failing example is the same in the next run.
ROOT, OPERATOR, NARROW, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 5))
ROOTS = (ROOT.public_key().public_bytes_raw(),)
DIGESTS = [f"{n:064x}" for n in range(1, 4)]
MODELS = ["digits", "spam"]


def public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def record(topic: str, offset: int, event: Event, key: Ed25519PrivateKey | None, event_id: str | None = None) -> Record:
    """The event as it stands in the log, `key` None for unsigned."""
    message = codec.encode(
        event,
        topic=topic,
        id=event_id or str(uuid.UUID(int=offset + 1)),
        source="/operators/test",
        now_ms=1_700_000_000_000,
    )
    if key is not None:
        message = signing.sign(message, key)
    return at(offset, topic, message.key, message.value, message.headers)


def at(offset: int, topic: str, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]) -> Record:
    return Record(
        topic=topic,
        partition=0,
        offset=offset,
        timestamp_ms=1_700_000_000_000 + offset,
        key=key,
        value=value,
        headers=tuple(headers),
    )


def trust(kinds: tuple[str, ...]) -> TrustChanged:
    return TrustChanged(
        grants=(
            Grant(public_key=public(OPERATOR), label="operator", models=("*",), kinds=kinds),
            Grant(public_key=public(NARROW), label="narrow", models=("digits",), kinds=kinds),
        ),
        author="root",
    )


def release(model: str, sequence: int, digest: str) -> ModelReleased:
    return ModelReleased(
        model=model,
        version=f"v{sequence}",
        sequence=sequence,
        artifact=Artifact(
            sha256=digest,
            size_bytes=1,
            object_key=names.model_object_key(model, digest),
            chunk_size_bytes=65_536,
            chunk_sha256=(bytes(32),),
        ),
        inputs=(),
        outputs=(Tensor(name="y", datatype="FP32", shape=(-1,)),),
        created_at_ms=0,
        author="op",
    )


CONTROL = ("ModelReleased", "ModelRolledBack", "ModelRetired")
models, sequences, digests = st.sampled_from(MODELS), st.integers(1, 6), st.sampled_from(DIGESTS)
release_events = st.one_of(
    st.builds(release, models, sequences, digests),
    st.builds(
        lambda m, s, d: ModelRolledBack(model=m, version="back", sequence=s, to_digest=d, author="op"),
        models,
        sequences,
        digests,
    ),
    st.builds(lambda m, s: ModelRetired(model=m, sequence=s, author="op"), models, sequences),
)
signers = st.sampled_from([OPERATOR, OPERATOR, OPERATOR, NARROW, STRANGER, ROOT, None])


@st.composite
def release_logs(draw: st.DrawFn) -> list[Record]:
    """Trust, then anything: allowed or not, in any order of sequences, with the operator's key revoked somewhere."""
    said = draw(st.lists(st.tuples(release_events, signers), max_size=14))
    revoked_at = draw(st.none() | st.integers(0, len(said)))
    log = [record(RELEASES.name, 0, trust(CONTROL), ROOT)]
    for n, (event, key) in enumerate(said):
        if n == revoked_at:
            revoke = TrustChanged(grants=(), revoked=(public(OPERATOR),), author="root")
            log.append(record(RELEASES.name, len(log), revoke, ROOT))
        log.append(record(RELEASES.name, len(log), event, key))
    return log


def fold_releases(log: Sequence[Record], state: Releases | None = None) -> Releases:
    state = state or Releases.initial(ROOTS)
    for each in log:
        state = releases.fold(state, each).state
    return state


@given(release_logs(), st.data())
@settings(deadline=None)
def test_a_live_fold_a_replay_and_a_resumed_snapshot_agree(log: list[Record], data: st.DataObject) -> None:
    live = fold_releases(log)
    cut = data.draw(st.integers(0, len(log)))
    snapshot = msgspec.json.decode(msgspec.json.encode(fold_releases(log[:cut])), type=Releases)
    resumed = fold_releases(log, snapshot)
    assert releases.state_digest(resumed) == releases.state_digest(live) == releases.state_digest(fold_releases(log))
    assert live.position == log[-1].offset


@given(release_logs(), st.data())
@settings(deadline=None)
def test_records_delivered_again_change_nothing(log: list[Record], data: st.DataObject) -> None:
    state = Releases.initial(ROOTS)
    for n, each in enumerate(log):
        state = releases.fold(state, each).state
        for again in data.draw(st.lists(st.integers(0, n), max_size=3)):
            step = releases.fold(state, log[again])
            assert (step.state, step.envelope, step.refused) == (state, None, None)
    assert state == fold_releases(log)


@given(release_logs())
@settings(deadline=None)
def test_a_models_sequence_rises_and_what_is_wanted_was_brought_by_a_release(log: list[Record]) -> None:
    state = Releases.initial(ROOTS)
    for each in log:
        before, step = state, releases.fold(state, each)
        state = step.state
        if step.refused is not None:
            # A refused record moves the position and nothing else.
            assert state == msgspec.structs.replace(before, position=each.offset)
        for model, history in state.models.items():
            assert history.sequence >= (before.models[model].sequence if model in before.models else 1)
            if history.stable is not None:
                assert history.stable.digest in history.brought
                assert history.stable.model == model


@given(release_logs())
@settings(deadline=None)
def test_only_a_key_that_may_say_it_says_it(log: list[Record]) -> None:
    state = Releases.initial(ROOTS)
    for each in log:
        trusted = state.trust
        step = releases.fold(state, each)
        state = step.state
        if step.envelope is None:
            continue
        keyid = signing.signer(each.headers)
        if isinstance(step.envelope.event, TrustChanged):
            assert keyid == signing.key_id(ROOTS[0])
            continue
        grant = trusted.keys[keyid]
        assert grant.revoked_at is None
        assert step.envelope.event.kind in grant.kinds
        assert any(fnmatchcase(step.envelope.event.key, glob) for glob in grant.models)


def flip(data: bytes, where: int) -> bytes:
    at_byte, bit = divmod(where % (len(data) * 8), 8)
    return data[:at_byte] + bytes([data[at_byte] ^ (1 << bit)]) + data[at_byte + 1 :]


def without(headers: Sequence[tuple[str, Any]], name: str) -> list[tuple[str, Any]]:
    return [h for h in headers if h[0] != name]


@given(
    st.integers(0, 2**20), st.sampled_from(["value", "key", "signature", "ce_id", "ce_type", "ce_time", "ce_source"])
)
@settings(deadline=None)
def test_a_record_with_any_bit_flipped_never_acts(where: int, part: str) -> None:
    state = fold_releases([record(RELEASES.name, 0, trust(CONTROL), ROOT)])
    good = record(RELEASES.name, 1, release("digits", 1, DIGESTS[0]), OPERATOR)
    assert releases.fold(state, good).refused is None
    assert good.key is not None
    assert good.value is not None
    match part:
        case "value":
            forged = msgspec.structs.replace(good, value=flip(good.value, where))
        case "key":
            forged = msgspec.structs.replace(good, key=flip(good.key, where))
        case _:
            name = signing.SIGNATURE_HEADER if part == "signature" else part
            headers = tuple((k, flip(v, where) if k == name and v is not None else v) for k, v in good.headers)
            forged = msgspec.structs.replace(good, headers=headers)
    step = releases.fold(state, forged)
    assert step.refused is not None
    assert step.state == msgspec.structs.replace(state, position=1)


def test_each_forgery_has_its_own_reason() -> None:
    state = fold_releases([record(RELEASES.name, 0, trust(CONTROL), ROOT)])
    good = record(RELEASES.name, 1, release("digits", 1, DIGESTS[0]), OPERATOR)
    other = record(RELEASES.name, 1, release("digits", 2, DIGESTS[1]), OPERATOR, str(uuid.UUID(int=99)))
    moved = dict(other.headers)[signing.SIGNATURE_HEADER]
    swapped = (*without(good.headers, signing.SIGNATURE_HEADER), (signing.SIGNATURE_HEADER, moved))
    from_other_topic = record(INVALIDATIONS.name, 1, trust(CONTROL), ROOT)
    for forged, refusal in (
        (msgspec.structs.replace(good, value=None), Refusal.TOMBSTONE),
        (msgspec.structs.replace(good, value=bytes(RELEASES.max_bytes + 1)), Refusal.TOO_LARGE),
        (record(RELEASES.name, 1, release("digits", 1, DIGESTS[0]), None), Refusal.UNSIGNED),
        (record(RELEASES.name, 1, release("digits", 1, DIGESTS[0]), STRANGER), Refusal.UNKNOWN_KEY),
        (record(RELEASES.name, 1, release("spam", 1, DIGESTS[0]), NARROW), Refusal.KEY_NOT_ALLOWED),
        (record(RELEASES.name, 1, release("digits", 1, DIGESTS[0]), ROOT), Refusal.KEY_NOT_ALLOWED),
        (record(RELEASES.name, 1, trust(CONTROL), OPERATOR), Refusal.KEY_NOT_ALLOWED),
        (msgspec.structs.replace(good, headers=swapped), Refusal.BAD_SIGNATURE),
        (msgspec.structs.replace(from_other_topic, topic=RELEASES.name), Refusal.BAD_SIGNATURE),
    ):
        step = releases.fold(state, forged)
        assert step.refused is not None
        assert step.refused.refusal is refusal
        # The next record is handled as if that one had not been there.
        following = releases.fold(step.state, msgspec.structs.replace(good, offset=2))
        assert following.refused is None


def test_of_two_releases_with_one_sequence_the_lower_position_wins_and_the_other_is_named() -> None:
    log = [
        record(RELEASES.name, 0, trust(CONTROL), ROOT),
        record(RELEASES.name, 1, release("digits", 1, DIGESTS[0]), OPERATOR),
        record(RELEASES.name, 2, release("digits", 1, DIGESTS[1]), OPERATOR),
        record(RELEASES.name, 3, release("digits", 1, DIGESTS[0]), OPERATOR),
    ]
    state = fold_releases(log[:2])
    conflict = releases.fold(state, log[2])
    assert conflict.refused is not None
    assert conflict.refused.refusal is Refusal.SEQUENCE_CONFLICT
    repeat = releases.fold(conflict.state, log[3])
    assert repeat.refused is not None
    assert repeat.refused.refusal is Refusal.SEQUENCE_NOT_HIGHER
    assert releases.desired(repeat.state, None)["digits"].digest == DIGESTS[0]


# -- invalidations

TAGS = ["user:1", "user:2", "eu"]
NAMES = [f"prediction:{m}:{k}" for m in MODELS for k in ("aa", "ab", "b")]
scopes = st.one_of(
    st.just(Scope(ScopeKind.ALL)),
    st.builds(lambda v: Scope(ScopeKind.KEY, v), st.sampled_from(NAMES)),
    st.builds(lambda v: Scope(ScopeKind.TAG, v), st.sampled_from(TAGS)),
    st.builds(lambda v: Scope(ScopeKind.MODEL, v), models),
    st.builds(lambda v, n: Scope(ScopeKind.PREFIX, v[:n]), st.sampled_from(NAMES), st.integers(1, 16)),
    st.builds(
        lambda v: Scope(ScopeKind.PATTERN, v), st.sampled_from(["*:aa", "prediction:digits:*", "*spam*", "?????*"])
    ),
)
entries = st.tuples(st.integers(-1, 12), st.sampled_from(NAMES), models, st.lists(st.sampled_from(TAGS), max_size=2))


@st.composite
def purge_lists(draw: st.DrawFn) -> list[Purge]:
    said = draw(st.lists(st.tuples(st.lists(scopes, min_size=1, max_size=3), st.booleans()), max_size=12))
    return [Purge(position=n, scopes=tuple(s), soft=soft, cause=str(n)) for n, (s, soft) in enumerate(said)]


def applied(purges: Sequence[Purge], into: PurgeMap | None = None) -> PurgeMap:
    into = into if into is not None else PurgeMap()
    for purge in purges:
        into.apply(purge)
    return into


def reaches(scope: Scope, name: str, model: str, tags: Sequence[str]) -> bool:
    match scope.kind:
        case ScopeKind.ALL:
            return True
        case ScopeKind.KEY:
            return name == scope.value
        case ScopeKind.TAG:
            return scope.value in tags
        case ScopeKind.MODEL:
            return model == scope.value
        case ScopeKind.PREFIX:
            return name.startswith(scope.value)
        case ScopeKind.PATTERN:
            return fnmatchcase(name, scope.value)


def standing_by_definition(purges: Sequence[Purge], as_of: int, name: str, model: str, tags: Sequence[str]) -> Standing:
    """Every purge after `as_of` whose scope the entry is in, one by one."""
    hit = [p for p in purges if p.position > as_of and any(reaches(s, name, model, tags) for s in p.scopes)]
    if any(not p.soft for p in hit):
        return Standing.HARD
    return Standing.SOFT if hit else Standing.VALID


@given(purge_lists(), st.lists(entries, min_size=1, max_size=20))
def test_the_map_says_of_every_entry_what_the_purges_say_one_by_one(purges: list[Purge], looked_up: list[Any]) -> None:
    purged = applied(purges)
    for entry in looked_up:
        assert purged.standing(*entry) is standing_by_definition(purges, *entry)


@given(purge_lists(), st.integers(1, 4), st.integers(1, 2), st.lists(entries, min_size=1, max_size=20))
def test_a_collapsed_map_purges_more_and_never_less(
    purges: list[Purge], max_scopes: int, max_patterns: int, looked_up: list[Any]
) -> None:
    small = applied(purges, PurgeMap(max_scopes=max_scopes, max_patterns=max_patterns))
    assert len(small) <= max_scopes + 1
    for entry in looked_up:
        assert small.standing(*entry) >= standing_by_definition(purges, *entry)
    # What was read after the last purge is valid, however small the map.
    assert small.standing(small.last, NAMES[0], MODELS[0], TAGS) is Standing.VALID


@given(purge_lists(), st.integers(1, 20), st.lists(entries, min_size=1, max_size=20))
def test_a_map_rebuilt_from_its_purges_is_equal(purges: list[Purge], max_scopes: int, looked_up: list[Any]) -> None:
    first = applied(purges, PurgeMap(max_scopes=max_scopes))
    again = applied(first.purges())
    for entry in looked_up:
        assert again.standing(*entry) is first.standing(*entry)
    assert again.purges() == first.purges()


@given(purge_lists(), st.data())
def test_purges_applied_again_change_nothing(purges: list[Purge], data: st.DataObject) -> None:
    once, often = applied(purges), PurgeMap()
    for n, purge in enumerate(purges):
        often.apply(purge)
        for again in data.draw(st.lists(st.integers(0, n), max_size=3)):
            often.apply(purges[again])
    assert often.purges() == once.purges()
    assert often.last == once.last


@st.composite
def invalidation_logs(draw: st.DrawFn) -> list[Record]:
    """Trust, then invalidations by whoever, some of them appended twice with the id they had."""
    said = draw(
        st.lists(
            st.tuples(st.lists(scopes, min_size=1, max_size=2), st.booleans(), signers, st.integers(0, 6)), max_size=10
        )
    )
    log = [record(INVALIDATIONS.name, 0, trust(("CacheInvalidated",)), ROOT)]
    for found, soft, key, number in said:
        event = CacheInvalidated(scopes=tuple(found), soft=soft, author="op")
        log.append(record(INVALIDATIONS.name, len(log), event, key, str(uuid.UUID(int=1_000 + number))))
    return log


def fold_invalidations(
    log: Sequence[Record], see: Callable[[Record, Any], None] = lambda *_: None
) -> tuple[Invalidations, PurgeMap]:
    state, purged = Invalidations.initial(ROOTS), PurgeMap()
    for each in log:
        step = invalidations.fold(state, each)
        state = step.state
        see(each, step)
        purge = invalidations.purge_of(step)
        if purge is not None:
            purged.apply(purge)
    return state, purged


@given(invalidation_logs())
@settings(deadline=None)
def test_invalidations_replay_to_the_same_digest_and_deliveries_again_change_nothing(log: list[Record]) -> None:
    digest = invalidations.state_digest(*fold_invalidations(log))
    doubled = [each for n, each in enumerate(log) for each in (each, log[n // 2])]
    assert invalidations.state_digest(*fold_invalidations(doubled)) == digest
    assert invalidations.state_digest(*fold_invalidations(log)) == digest


@given(invalidation_logs())
@settings(deadline=None)
def test_an_id_acts_once_and_a_key_without_the_right_never(log: list[Record]) -> None:
    acted: list[str] = []

    def see(each: Record, step: Any) -> None:
        purge = invalidations.purge_of(step)
        if purge is None:
            return
        acted.append(purge.cause)
        keyid = dict(each.headers)[signing.KEYID_HEADER]
        assert keyid in {signing.key_id(public(k)).encode() for k in (OPERATOR, NARROW)}
        if keyid == signing.key_id(public(NARROW)).encode():
            assert set(purge.scopes) == {Scope(ScopeKind.MODEL, "digits")}

    fold_invalidations(log, see)
    assert len(acted) == len(set(acted))
