"""The fold of the requests topic: ten seconds of counts a node, by the broker's clock."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import codec
from schemas.events import NO_MODEL, TIERS, RequestBatch
from schemas.topics import REQUESTS
from streams.folds import traffic
from streams.folds.traffic import Traffic, window
from streams.log.record import Record

T0 = 1_700_000_000_000


def batch(
    latencies_us: list[int],
    *,
    tiers: list[str] | None = None,
    statuses: list[int] | None = None,
    node: str = "tokyo-1",
    started_at_ms: int = 0,
    dropped: int = 0,
) -> RequestBatch:
    rows = len(latencies_us)
    zeros = np.zeros(rows, "<u8")
    return RequestBatch(
        node=node,
        region="tokyo",
        worker=0,
        incarnation=1,
        started_at_ms=started_at_ms,
        rows=rows,
        models=(),
        start_offset_us=zeros.astype("<u4").tobytes(),
        latency_us=np.array(latencies_us, "<u4").tobytes(),
        tier=bytes(TIERS.index(tier) for tier in tiers or ["model"] * rows),
        status=np.array(statuses or [200] * rows, "<u2").tobytes(),
        model=np.full(rows, NO_MODEL, "<u2").tobytes(),
        request_bytes=zeros.astype("<u4").tobytes(),
        response_bytes=zeros.astype("<u4").tobytes(),
        key_hash=zeros.tobytes(),
        dropped=dropped,
    )


def record(event: RequestBatch, offset: int, at_ms: int) -> Record:
    message = codec.encode(event, topic=REQUESTS.name, id=f"id-{offset}", source="/t", now_ms=0)
    return Record(
        topic=REQUESTS.name,
        partition=0,
        offset=offset,
        timestamp_ms=at_ms,
        key=message.key,
        value=message.value,
        headers=message.headers,
    )


def folded(*records: Record, state: Traffic | None = None) -> Traffic:
    state = state or Traffic()
    for one in records:
        step = traffic.fold(state, one)
        assert step.refused is None
        state = step.state
    return state


def test_counts_shares_and_rate() -> None:
    state = folded(
        record(batch([100] * 4, tiers=["memory", "disk", "model", "none"], statuses=[200, 200, 200, 500]), 0, T0),
        record(batch([100] * 4, tiers=["redis", "origin", "model", "none"], statuses=[200] * 3 + [404]), 1, T0 + 2_000),
    )
    seen = window(state, "tokyo-1", T0 + 4_000)
    assert (seen.requests, seen.errors) == (8, 1)
    assert seen.error_rate == pytest.approx(1 / 8)
    assert seen.hit_rate == pytest.approx(3 / 6)
    assert seen.rate == pytest.approx(2.0)
    assert dict(zip(TIERS, seen.tiers, strict=True))["none"] == 2
    assert window(state, "london-1", T0) == traffic.Window()


def test_what_is_older_than_the_window_counts_no_more() -> None:
    state = folded(*(record(batch([50]), s, T0 + 1_000 * s) for s in range(30)))
    assert window(state, "tokyo-1", T0 + 29_500).requests == 10
    assert window(state, "tokyo-1", T0 + 34_500).requests == 5
    assert window(state, "tokyo-1", T0 + 60_000) == traffic.Window()
    assert len(state.nodes["tokyo-1"]) == 10


@pytest.mark.parametrize("skew_ms", [-600_000, 600_000])
def test_a_nodes_clock_changes_nothing(skew_ms: int) -> None:
    plain = folded(*(record(batch([50], started_at_ms=T0), n, T0 + 500 * n) for n in range(20)))
    skewed = folded(*(record(batch([50], started_at_ms=T0 + skew_ms), n, T0 + 500 * n) for n in range(20)))
    assert plain == skewed


def test_a_broker_clock_set_back_begins_a_new_window() -> None:
    state = folded(record(batch([50] * 9), 0, T0 + 600_000), record(batch([50]), 1, T0))
    assert window(state, "tokyo-1", T0).requests == 1


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 15_000)), max_size=12))
def test_a_record_that_comes_again_changes_nothing(said: list[tuple[int, int]]) -> None:
    records = [record(batch([10] * rows), n, T0 + at) for n, (rows, at) in enumerate(said)]
    once = folded(*records)
    state = Traffic()
    for n, one in enumerate(records):
        state = folded(one, *records[: n + 1], state=state)
    assert state == once


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=300))
def test_percentiles_are_within_an_eighth(latencies_us: list[int]) -> None:
    seen = window(folded(record(batch(latencies_us), 0, T0)), "tokyo-1", T0)
    for share, found in ((50, seen.p50_ms), (99, seen.p99_ms)):
        true = float(np.percentile(np.maximum(latencies_us, 1), share, method="inverted_cdf")) / 1e3
        assert found == pytest.approx(true, rel=0.126)


def test_a_refused_record_moves_the_position_only() -> None:
    good = record(batch([1]), 0, T0)
    step = traffic.fold(
        Traffic(), Record(topic=good.topic, partition=0, offset=7, timestamp_ms=T0, key=None, value=b"x")
    )
    assert step.refused is not None
    assert step.state == Traffic(positions={0: 7})


def test_nodes_are_bounded_the_quietest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "NODES_KEPT", 2)
    names = ["a-1", "b-1", "a-1", "c-1"]
    state = folded(*(record(batch([1], node=node), n, T0) for n, node in enumerate(names)))
    assert set(state.nodes) == {"a-1", "c-1"}


def test_lost_rows_are_summed_and_clamped() -> None:
    state = folded(record(batch([1], dropped=5), 0, T0), record(batch([1], dropped=2**62), 1, T0))
    assert window(state, "tokyo-1", T0).rows_lost == 5 + 2**40
