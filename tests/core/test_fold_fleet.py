"""The fold of the fleet topic: who is alive, by receipt; what they reported."""

from __future__ import annotations

import itertools
from typing import Any
from zlib import crc32

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from schemas import codec
from schemas.errors import Refusal
from schemas.events import (
    AGENT,
    Event,
    Health,
    InvalidationApplied,
    Location,
    ModelSwapped,
    NodeBeat,
    NodeLeft,
    ServedModel,
    SwapFailed,
)
from schemas.topics import FLEET
from streams.folds import fleet, routes
from streams.folds.fleet import Fleet, WorkerState, phi
from streams.folds.routes import Doubt, Policy
from streams.folds.traffic import Traffic
from streams.log.record import Record

DIGEST = "ab" * 32
PARTITIONS = 3


def beat(node: str = "london-1", worker: int = 0, number: int = 1, incarnation: int = 1, **other: Any) -> NodeBeat:
    return NodeBeat(
        **{
            "node": node,
            "region": "london",
            "worker": worker,
            "incarnation": incarnation,
            "beat": number,
            "url": f"http://{node}:80",
            "location": Location(lat=51.5, lon=-0.1),
            "capacity": 0.0,
            "load": 0.25,
            "in_flight": 1,
            "queue": 0,
            "requests": 10,
            "errors": 0,
            "p50_ms": 1.0,
            "p99_ms": 2.0,
            "hits": {},
            "positions": {},
            "models": (served("digits"),),
            "desired_digest": "",
        }
        | other
    )


def served(name: str, state: str = "live", digest: str = DIGEST) -> ServedModel:
    return ServedModel(name=name, version="1", digest=digest, sequence=1, channel="stable", state=state)


def report(kind: type[ModelSwapped] | type[SwapFailed], sequence: int = 1, incarnation: int = 1) -> Event:
    said = {"previous_digest": "", "channel": "stable", "ms": {"load": 3.0}}
    return kind(
        node="london-1",
        region="london",
        worker=0,
        incarnation=incarnation,
        model="digits",
        version="1",
        sequence=sequence,
        digest=DIGEST,
        position=sequence,
        **(said if kind is ModelSwapped else {"phase": "load", "cause": "broken"}),
    )


def left(worker: int = 0, incarnation: int = 1) -> NodeLeft:
    return NodeLeft(node="london-1", region="london", worker=worker, incarnation=incarnation, cause="SIGTERM")


def record(event: Event, offset: int, at_ms: int, partition: int | None = None) -> Record:
    message = codec.encode(event, topic=FLEET.name, id=f"id-{offset}", source="/t", now_ms=0)
    return Record(
        topic=FLEET.name,
        partition=crc32(message.key) % PARTITIONS if partition is None else partition,
        offset=offset,
        timestamp_ms=at_ms,
        key=message.key,
        value=message.value,
        headers=message.headers,
    )


def folded(*records: Record, state: Fleet | None = None) -> Fleet:
    state = state or Fleet()
    for one in records:
        step = fleet.fold(state, one)
        assert step.refused is None
        state = step.state
    return state


def told(*events: tuple[int, Event]) -> Fleet:
    """The state after the events at their times, all of one node."""
    return folded(*(record(event, offset, at_ms, 0) for offset, (at_ms, event) in enumerate(events)))


def beats(*at_ms: int) -> WorkerState:
    return told(*((ms, beat(number=n)) for n, ms in enumerate(at_ms, 1))).workers["london-1/0"]


def table(state: Fleet, now_ms: int) -> dict[str, Any]:
    return {node.node: node for node in routes.derive(state, Traffic(), now_ms, Policy())}


events = st.one_of(
    st.builds(
        beat,
        node=st.sampled_from(["london-1", "tokyo-1", "paris-1"]),
        worker=st.integers(0, 1),
        number=st.integers(0, 5),
        incarnation=st.integers(0, 2),
    ),
    st.builds(report, st.sampled_from([ModelSwapped, SwapFailed]), st.integers(1, 3), st.integers(0, 2)),
    st.builds(left, st.integers(AGENT, 1), st.integers(0, 2)),
)


@st.composite
def topics(draw: st.DrawFn) -> list[Record]:
    """A topic in one order: offsets rise in each partition, broker time overall."""
    offsets: dict[int, int] = {}
    found = []
    for at_ms, event in enumerate(draw(st.lists(events, max_size=14))):
        partition = crc32(event.key.encode()) % PARTITIONS
        offsets[partition] = offsets.get(partition, -1) + 1
        found.append(record(event, offsets[partition], 1_000 * at_ms))
    return found


@given(topics(), st.data())
def test_duplicates_and_any_order_of_the_partitions_fold_to_the_same_state(
    topic: list[Record], data: st.DataObject
) -> None:
    replayed = folded(*topic)
    queues = [[r for r in topic if r.partition == p] for p in range(PARTITIONS)]
    live, delivered = Fleet(), []
    while any(queues):
        queue = data.draw(st.sampled_from([q for q in queues if q]))
        delivered.append(queue.pop(0))
        again = data.draw(st.lists(st.sampled_from(delivered), max_size=2))
        live = folded(delivered[-1], *again, state=live)
    assert live == replayed


def test_a_refused_record_moves_the_position_only() -> None:
    state = told((0, beat()))
    step = fleet.fold(state, msgspec.structs.replace(record(beat(number=2), 1, 5, 0), value=b"junk"))
    assert step.refused is not None
    assert step.refused.refusal is Refusal.MALFORMED
    assert step.state == msgspec.structs.replace(state, positions={0: 1})


def test_a_late_report_of_an_earlier_life_changes_nothing() -> None:
    state = told((0, beat(incarnation=4)), (10, beat(incarnation=3, number=99)), (20, report(ModelSwapped, 1, 3)))
    assert state.workers["london-1/0"].beat.incarnation == 4
    assert not state.reports


def test_a_worker_started_again_within_an_incarnation_begins_a_new_rhythm() -> None:
    state = told((0, beat(number=50)), (1_000, beat(number=51)), (9_000, beat(number=1)), (10_000, beat(number=2)))
    worker = state.workers["london-1/0"]
    assert worker.beat.beat == 2
    assert worker.received_ms == 10_000
    assert worker.intervals_ms == (1_000,)


def test_the_agents_farewell_is_every_workers_and_a_new_life_ends_it() -> None:
    two = [(0, beat(worker=0)), (1, beat(worker=1))]
    gone = told(*two, (2, left(AGENT)))
    assert table(gone, 100)["london-1"].health is Health.LEFT
    one_gone = told(*two, (2, left(0)))
    assert table(one_gone, 100)["london-1"].health is Health.ALIVE
    back = told(*two, (2, left(AGENT)), (3, beat(incarnation=2)))
    assert table(back, 100)["london-1"].health is Health.ALIVE


def test_the_last_report_of_a_release_counts_and_applied_only_rises() -> None:
    applied = [
        InvalidationApplied(node="london-1", region="london", worker=AGENT, incarnation=1, position=p, ms=1.0)
        for p in (5, 4)
    ]
    state = told((0, report(SwapFailed)), (1, report(ModelSwapped)), (2, applied[0]), (3, applied[1]))
    (said,) = state.reports.values()
    assert (said.outcome, said.ms) == ("live", {"load": 3.0})
    assert state.applied["london-1"].position == 5


def test_reports_are_bounded_oldest_first(monkeypatch: Any) -> None:
    monkeypatch.setattr(fleet, "REPORTS_KEPT", 3)
    state = told(*((n, report(ModelSwapped, n)) for n in range(1, 6)))
    assert [sequence for *_, sequence in state.reports] == [3, 4, 5]


def test_phi_rises_with_silence_and_dies_within_three_beats() -> None:
    worker = beats(*range(0, 20_000, 1_000))
    last = worker.received_ms
    rising = [phi(worker, last + ms) for ms in range(0, 10_000, 100)]
    assert rising == sorted(rising)
    assert phi(worker, last + 1_100) < 1
    assert phi(worker, last + 1_900) >= Policy().phi_suspect
    assert phi(worker, last + 2_500) >= Policy().phi_dead
    assert phi(worker, last + 10**9) == fleet.PHI_MAX


def test_phi_waits_longer_for_an_irregular_node() -> None:
    regular, irregular = beats(*range(0, 16_000, 1_000)), beats(0, 400, 2_000, 2_500, 4_600, 5_000, 7_000, 7_300, 9_400)
    assert phi(irregular, irregular.received_ms + 2_500) < phi(regular, regular.received_ms + 2_500)


def test_a_backlog_after_an_outage_of_the_broker_is_no_rhythm() -> None:
    """Beats 11 to 70 waited a minute for the broker and came in one batch."""
    times = [*range(0, 10_000, 1_000), *[70_000] * 60, *range(71_000, 75_000, 1_000)]
    worker = beats(*times)
    assert phi(worker, worker.received_ms + 1_100) < 1
    assert phi(worker, worker.received_ms + 3_000) >= Policy().phi_dead


def test_lost_beats_are_not_one_long_interval() -> None:
    state = told((0, beat(number=1)), (1_000, beat(number=2)), (5_000, beat(number=6)))
    assert state.workers["london-1/0"].intervals_ms == (1_000, 1_000)


@given(st.lists(st.integers(-5_000, 200_000), min_size=1, max_size=80), st.integers(-(10**6), 10**12))
def test_phi_is_always_a_number_from_0_to_100(times: list[int], now_ms: int) -> None:
    assert 0 <= phi(beats(*itertools.accumulate(times)), now_ms) <= fleet.PHI_MAX


def test_a_node_is_as_well_as_its_best_worker_and_serves_what_all_of_them_do() -> None:
    state = told(
        (0, beat(worker=0, number=1, models=(served("digits"), served("old")))),
        (10_000, beat(worker=1, models=(served("digits"), served("new"), served("none", "pending", "")))),
        (10_001, beat(worker=0, number=2, models=(served("digits"), served("new", "loading", "")))),
    )
    node = table(state, 10_100)["london-1"]
    assert node.health is Health.ALIVE
    assert [model.name for model in node.models] == ["digits"]
    alone = table(state, 10_001 + 60_000)["london-1"]
    assert alone.health is Health.DEAD


def test_a_worker_of_an_earlier_incarnation_is_no_part_of_the_node() -> None:
    state = told((0, beat(worker=1, draining=True)), (1, beat(worker=0, incarnation=2, in_flight=7)))
    assert table(state, 2)["london-1"].in_flight == 7


def test_draining_is_when_all_workers_drain() -> None:
    one = told((0, beat(worker=0, draining=True)), (1, beat(worker=1)))
    both = told((0, beat(worker=0, draining=True)), (1, beat(worker=1, draining=True)))
    assert table(one, 2)["london-1"].health is Health.ALIVE
    assert table(both, 2)["london-1"].health is Health.DRAINING


def test_the_dead_and_the_gone_are_forgotten_in_the_end() -> None:
    policy = Policy()
    dead, gone = told((0, beat())), told((0, beat()), (1, left()))
    assert table(dead, policy.forget_dead_ms)
    assert not table(dead, policy.forget_dead_ms + 1)
    assert table(gone, policy.forget_left_ms)
    assert not table(gone, policy.forget_left_ms + 1)


def test_a_node_the_new_writer_has_not_heard_of_stays_as_dead() -> None:
    nodes = routes.derive(told((0, beat())), Traffic(), 100, Policy())
    (kept,) = routes.kept_from(nodes, ())
    assert kept.health is Health.DEAD
    assert routes.kept_from(nodes, nodes) == nodes


def test_a_flapping_node_changes_state_once_a_window() -> None:
    policy = Policy(settle_ms=3_000)
    (well,) = routes.derive(told((0, beat())), Traffic(), 100, policy)
    ill = msgspec.structs.replace(well, health=Health.DEAD)
    doubts: dict[str, Doubt] = {}
    shown = []
    for now_ms in range(0, 12_000, 500):
        node = ill if now_ms < 6_000 and now_ms // 500 % 2 else well
        (steady,), doubts = routes.settled((node,), doubts, now_ms, policy)
        shown.append(steady.health)
    assert shown[0] is Health.ALIVE
    assert Health.ALIVE not in shown[1:17]  # last ill at 5.5 s, so not before 8.5 s
    assert set(shown[17:]) == {Health.ALIVE}
    assert not doubts


def test_a_table_changes_materially_by_standing_or_by_much() -> None:
    (node,) = routes.derive(told((0, beat())), Traffic(), 100, Policy())
    changed = routes.changed_materially
    assert not changed((node,), (msgspec.structs.replace(node, phi=0.4, rate=12.0, load=0.3),))
    assert changed((node,), (msgspec.structs.replace(node, load=0.9),))
    assert changed((node,), (msgspec.structs.replace(node, health=Health.SUSPECT),))
    assert changed((node,), ())
    assert changed((node,), (msgspec.structs.replace(node, models=()),))
