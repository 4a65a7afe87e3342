"""Frames and verdicts: bytes from strangers, and what an entry may still be used for."""

from __future__ import annotations

import pickle
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.caching.entry import Entry, EntryRefused, as_of_in, is_whole, pack, unpack
from edge_node.caching.lookup import MAX_CLOCK_LEAD_MS, Verdict, judge
from schemas.names import Scope, ScopeKind
from streams.folds.invalidations import Purge, PurgeMap

KEY = bytes(range(16))
SPACE = "0123456789abcdef"
NOW = 1_700_000_000_000


def entry(**changes: Any) -> Entry:
    whole: dict[str, Any] = {
        "key": KEY,
        "model": "digits",
        "version": "v1",
        "digest": "d" * 64,
        "as_of": 7,
        "stored_at_ms": NOW,
        "fresh_until_ms": NOW + 1_000,
        "stale_until_ms": NOW + 2_000,
        "error_until_ms": NOW + 3_000,
        "tags": ("user:1", "país"),
        "body": b"[1,2]",
    }
    return Entry(**whole | changes)


def read(data: bytes, key: bytes = KEY, digest: str = "d" * 64, namespace: str = SPACE) -> Entry:
    return unpack(data, key=key, digest=digest, namespace=namespace)


@given(st.integers(-1, 2**63), st.binary(max_size=200), st.lists(st.text(max_size=5), max_size=3))
def test_a_frame_gives_back_what_it_was_made_of(as_of: int, body: bytes, tags: list[str]) -> None:
    one = entry(as_of=as_of, body=body, tags=tuple(tags))
    assert read(pack(one, SPACE)) == one
    assert as_of_in(pack(one, SPACE)) == as_of and is_whole(pack(one, SPACE))


@given(st.integers(-1, 2**62), st.integers(-1, 2**62))
def test_positions_in_frames_compare_as_bytes(one: int, two: int) -> None:
    first, second = pack(entry(as_of=one), SPACE)[8:16], pack(entry(as_of=two), SPACE)[8:16]
    assert (first < second) == (one < two) and (first == second) == (one == two)


def test_no_flipped_bit_and_no_cut_is_taken() -> None:
    data = pack(entry(), SPACE)
    for at in range(len(data) * 8):
        torn = bytearray(data)
        torn[at // 8] ^= 1 << at % 8
        with pytest.raises(EntryRefused):
            read(bytes(torn))
    for length in range(len(data)):
        with pytest.raises(EntryRefused):
            read(data[:length])
        assert not is_whole(data[:length])
    with pytest.raises(EntryRefused, match="length"):
        read(data + b"\0")


@given(st.binary(max_size=300))
def test_foreign_bytes_are_refused_with_a_word(data: bytes) -> None:
    with pytest.raises(EntryRefused) as refused:
        read(data)
    assert refused.value.reason.replace("_", "").isalpha()


def test_what_is_whole_but_not_what_was_asked_for_is_refused() -> None:
    data = pack(entry(), SPACE)
    for reason, asked in {
        "other_key": {"key": bytes(16)},
        "other_digest": {"digest": "e" * 64},
        "other_log": {"namespace": "fedcba9876543210"},
    }.items():
        with pytest.raises(EntryRefused) as refused:
            read(data, **asked)  # type: ignore[arg-type]
        assert refused.value.reason == reason
    with pytest.raises(EntryRefused, match="foreign"):
        read(pickle.dumps(entry()))
    with pytest.raises(ValueError, match="as_of"):
        pack(entry(as_of=-2), SPACE)


def purged(position: int, *scopes: Scope, soft: bool = False) -> PurgeMap:
    purges = PurgeMap()
    purges.apply(Purge(position=position, scopes=scopes, soft=soft, cause=""))
    return purges


EVERYTHING = Scope(ScopeKind.ALL)


@pytest.mark.parametrize(
    ("after_ms", "verdict"),
    [
        (0, Verdict.FRESH),
        (999, Verdict.FRESH),
        (1_000, Verdict.STALE),
        (1_999, Verdict.STALE),
        (2_000, Verdict.STALE_IF_ERROR),
        (2_999, Verdict.STALE_IF_ERROR),
        (3_000, Verdict.EXPIRED),
        (-MAX_CLOCK_LEAD_MS, Verdict.FRESH),
        (-MAX_CLOCK_LEAD_MS - 1, Verdict.FUTURE),
    ],
)
def test_windows_follow_each_other(after_ms: int, verdict: Verdict) -> None:
    assert judge(entry(), now_ms=NOW + after_ms, purges=PurgeMap()) is verdict


def test_a_hard_purge_of_any_of_its_scopes_ends_an_entry() -> None:
    for scope in (
        EVERYTHING,
        Scope(ScopeKind.MODEL, "digits"),
        Scope(ScopeKind.TAG, "user:1"),
        Scope(ScopeKind.KEY, entry().name),
        Scope(ScopeKind.PREFIX, "prediction:dig"),
        Scope(ScopeKind.PATTERN, "prediction:*"),
    ):
        assert judge(entry(as_of=7), now_ms=NOW, purges=purged(8, scope)) is Verdict.PURGED
        assert judge(entry(as_of=8), now_ms=NOW, purges=purged(8, scope)) is Verdict.FRESH
    assert judge(entry(), now_ms=NOW, purges=purged(8, Scope(ScopeKind.TAG, "user:2"))) is Verdict.FRESH


def test_a_soft_purge_ends_freshness_only() -> None:
    purges = purged(8, EVERYTHING, soft=True)
    at = [judge(entry(), now_ms=NOW + after, purges=purges) for after in (0, 2_000, 3_000)]
    assert at == [Verdict.STALE, Verdict.STALE_IF_ERROR, Verdict.EXPIRED]


def test_a_request_may_want_it_younger() -> None:
    assert judge(entry(), now_ms=NOW + 500, purges=PurgeMap(), max_age_ms=500) is Verdict.FRESH
    assert judge(entry(), now_ms=NOW + 501, purges=PurgeMap(), max_age_ms=500) is Verdict.TOO_OLD


def test_each_verdict_says_whether_it_answers() -> None:
    assert [v for v in Verdict if v.answers] == [Verdict.FRESH, Verdict.STALE]
    assert Verdict.STALE_IF_ERROR not in [v for v in Verdict if v.refused]
    assert len([v for v in Verdict if v.refused]) == len(Verdict) - 3


def test_entries_are_values() -> None:
    with pytest.raises(AttributeError):
        entry().as_of = 9  # type: ignore[misc]
    assert msgspec.structs.replace(entry(), as_of=9) != entry()
