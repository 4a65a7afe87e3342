"""Whom a node asks for an artifact before the store, for how long, and with what proof."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_node.agent.peers import PROGRESS_BYTES_S, Neighbour, Patience, before, weight
from edge_node.peer_proof import key_of, proof, proves

NAMES = st.lists(st.text("abcdef0123456789-", min_size=1, max_size=6), min_size=1, max_size=8, unique=True)
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)


def region(names: list[str], live: dict[str, str] | None = None) -> list[Neighbour]:
    live = live or {}
    return [Neighbour(node=n, url=f"http://{n}", live=frozenset({live[n]} if n in live else ())) for n in names]


@given(NAMES, DIGESTS)
def test_exactly_one_node_of_a_region_begins_with_the_store_and_nobody_waits_in_a_circle(
    names: list[str], digest: str
) -> None:
    asks = {name: {p.node for p in before(digest, name, region(names)).peers} for name in names}
    assert sum(not peers for peers in asks.values()) == 1
    done: set[str] = set()
    for _ in names:
        done |= {name for name, peers in asks.items() if peers <= done}
    assert done == set(names)
    assert sorted(before(digest, name, region(names)).turn for name in names) == list(range(len(names)))


@given(NAMES, DIGESTS, st.data())
def test_who_has_it_is_asked_first_and_who_is_left_alone_is_not(
    names: list[str], digest: str, data: st.DataObject
) -> None:
    holder = data.draw(st.sampled_from(names))
    for name in set(names) - {holder}:
        asked = before(digest, name, region(names, {holder: digest}))
        assert asked.peers[0].node == holder
        assert asked.turn == len(asked.peers) - 1
        alone = before(digest, name, region(names, {holder: digest}), frozenset({holder}))
        assert holder not in {p.node for p in alone.peers}


@given(NAMES, DIGESTS, st.text("xyz", min_size=1, max_size=3))
def test_a_node_that_comes_moves_nobody_but_itself(names: list[str], digest: str, comes: str) -> None:
    old = sorted(names, key=lambda n: weight(digest, n))
    new = sorted([*names, comes], key=lambda n: weight(digest, n))
    assert [name for name in new if name != comes] == old


def test_many_artifacts_are_spread_over_the_region() -> None:
    names = ["a", "b", "c", "d"]
    firsts = [max(names, key=lambda n: weight(f"{digest:064x}", n)) for digest in range(1_000)]
    assert all(200 < firsts.count(name) < 300 for name in names)


def test_patience_is_renewed_by_progress_alone() -> None:
    step = int(3 * PROGRESS_BYTES_S)
    patience = Patience(since_s=100)
    assert not patience.over(103, 3, 1)
    assert patience.over(103.1, 3, 1)
    assert not patience.over(103.1, 3, 2), "the next in the order is more patient"
    assert patience.over(103.1, 3, 0), "one who has it is waited for as long as the first"
    crawled = patience.heard(step - 1, 102, 3)
    assert crawled == patience
    moved = patience.heard(step, 102, 3)
    assert not moved.over(105, 3, 1)
    assert moved.heard(step, 105, 3) == moved, "the same bytes twice are no progress"


def test_a_proof_is_good_for_these_bytes_of_this_node_only() -> None:
    key = key_of("secret")
    assert key is not None
    good = proof(key, "http://a:1", "d", 0, 9)
    assert proves(good, key, "http://a:1/", "d", 0, 9)
    for url, digest, first, last in (("http://b:1", "d", 0, 9), ("http://a:1", "e", 0, 9), ("http://a:1", "d", 0, 8)):
        assert not proves(good, key, url, digest, first, last)
    other = key_of("another")
    assert other is not None and not proves(good, other, "http://a:1", "d", 0, 9)
    assert not proves("é", key, "http://a:1", "d", 0, 9)
    assert key_of("") is None
