"""Whom a candidate answers: the share that was asked for, the same cohorts every time, and nobody sent back."""

from __future__ import annotations

import hashlib
import math
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.serving.cohorts import BUCKETS, Split, input_cohort, named_cohort

KEYS = [input_cohort([hashlib.blake2b(b"%d" % n, digest_size=16).digest()]) for n in range(10_000)]
NAMES = [named_cohort(f"user-{n}") for n in range(10_000)]
PERCENTS = st.floats(0, 100, allow_nan=False)


@pytest.mark.parametrize("cohorts", [KEYS, NAMES], ids=["inputs", "names"])
@pytest.mark.parametrize("percent", [1, 5, 25, 50, 99.5])
def test_the_share_is_within_a_percent_of_what_was_asked_for(percent: float, cohorts: list[bytes]) -> None:
    shares = []
    for sequence in range(1, 9):
        split = Split("digits", sequence, percent)
        shares.append(100 * sum(split.takes(cohort) for cohort in cohorts) / len(cohorts))
    # Cohorts fall where they fall: 10,000 of them are within 0.5 of 50 percent in two rollouts of three.
    by_chance = math.sqrt(percent * (100 - percent) / len(cohorts))
    assert all(abs(share - percent) < 4 * by_chance for share in shares), shares
    assert abs(statistics.median(shares) - percent) < 1
    assert sum(abs(share - percent) < 1 for share in shares) >= 7


@given(st.binary(max_size=40), st.integers(1, 2**53), st.lists(PERCENTS, min_size=2, max_size=8).map(sorted))
def test_raising_the_percentage_sends_nobody_back(cohort: bytes, sequence: int, percents: list[float]) -> None:
    taken = [Split("digits", sequence, percent).takes(cohort) for percent in percents]
    assert all(after or not before for before, after in pairwise(taken))


@given(st.binary(max_size=40), PERCENTS)
def test_it_is_the_same_in_every_process(cohort: bytes, percent: float) -> None:
    one, other = Split("digits", 3, percent), Split("digits", 3, percent)
    assert one.takes(cohort) == other.takes(cohort) and one.bucket(cohort) == other.bucket(cohort) < BUCKETS


def test_buckets_are_those_that_every_version_of_this_program_draws() -> None:
    split = Split("digits", 3, 50)
    assert [split.bucket(named_cohort("a")), split.bucket(input_cohort([bytes(16)]))] == [5972, 6152]


def test_the_edges_of_a_share() -> None:
    assert not any(Split("digits", 1, 0).takes(key) for key in KEYS)
    assert all(Split("digits", 1, 100).takes(key) for key in KEYS)
    for percent, buckets in ((1.1, 110), (0.29, 29), (0.01, 1), (0.001, 1), (99.99, 9_999)):
        split = Split("digits", 1, percent)
        assert all(split.takes(key) == (split.bucket(key) < buckets) for key in KEYS), percent


def test_another_release_and_another_model_ask_other_cohorts_first() -> None:
    first = {key for key in KEYS if Split("digits", 1, 10).takes(key)}
    for other in (Split("digits", 2, 10), Split("faces", 1, 10)):
        both = sum(other.takes(key) for key in first) / len(first)
        assert 0.05 < both < 0.15
