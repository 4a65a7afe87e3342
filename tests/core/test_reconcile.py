"""Plans: what follows from what is and what is wanted, as tables, and as a law over crashes at any step."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_node.agent.incarnation import corrected
from edge_node.agent.reconcile import (
    Activate,
    Actual,
    Collect,
    Desired,
    Failure,
    Fetch,
    Forward,
    Retire,
    Step,
    StoredFile,
    Trial,
    errors,
    failed,
    needs,
    next_retry_ms,
    plan,
    proof_of,
)
from edge_node.board import FIRST_MODEL, BoardModel
from schemas.events import Artifact, File, Golden, ModelReleased, Placement, Tensor
from schemas.names import data_object_key, golden_object_key, model_object_key
from streams.folds.releases import ModelHistory, Releases
from streams.folds.wanted import Channel, Seated, Wanted

RUNTIME = "onnxruntime 1"
NOW = 1_000_000


def wanted(model: str = "m", sequence: int = 1, digest: int = 1, *, golden: bool = False, **fields: Any) -> Wanted:
    sha256 = f"{digest:064x}"
    proof = f"{digest + 1_000:064x}"
    released = ModelReleased(
        model=model,
        version=str(sequence),
        sequence=sequence,
        artifact=Artifact(
            sha256=sha256,
            size_bytes=10,
            object_key=model_object_key(model, sha256),
            chunk_size_bytes=65_536,
            chunk_sha256=(bytes(32),),
        ),
        inputs=(),
        outputs=(Tensor(name="y", datatype="FP32", shape=(-1, 1)),),
        golden=Golden(object_key=golden_object_key(model, proof), sha256=proof) if golden else None,
        created_at_ms=1,
        author="a",
        **fields,
    )
    return Wanted(
        model=model, version=str(sequence), sequence=sequence, position=sequence, cause="c", released=released
    )


def on_board(w: Wanted) -> BoardModel:
    forwarded = w.released.placement is Placement.ORIGIN
    return BoardModel(wanted=w, path=None if forwarded else w.digest, slot=FIRST_MODEL, forwarded=forwarded)


def sat(w: Wanted) -> Seated:
    return Seated(wanted=w)


def desired(*wants: Wanted, retired: frozenset[str] = frozenset()) -> Desired:
    return Desired(seats={w.model: sat(w) for w in wants}, known=retired | {w.model for w in wants})


def actual(**fields: Any) -> Actual:
    return Actual(**({"runtime": RUNTIME, "disk_bytes": 10**9, "now_ms": NOW} | fields))


V1, V2 = wanted(sequence=1, digest=1), wanted(sequence=2, digest=2)
GOLDEN = wanted(sequence=2, digest=2, golden=True)
BACK = wanted(sequence=3, digest=1)
FORWARDED = wanted(sequence=2, digest=2, placement=Placement.ORIGIN)
SERVING_V1 = {"m": on_board(V1)}
PROVEN = frozenset({proof_of(V1, RUNTIME), proof_of(V2, RUNTIME)})


@pytest.mark.parametrize(
    ("have", "want", "steps"),
    [
        pytest.param(actual(), desired(), (), id="nothing is wanted"),
        pytest.param(actual(), desired(V1), (Fetch(sat(V1)),), id="new on an empty disk"),
        pytest.param(actual(verified=needs(V1)), desired(V1), (Trial(sat(V1)),), id="a kill after the download"),
        pytest.param(
            actual(verified=needs(V1), proofs=PROVEN), desired(V1), (Activate(sat(V1)),), id="a kill after the trial"
        ),
        pytest.param(actual(models=SERVING_V1, verified=needs(V1), proofs=PROVEN), desired(V1), (), id="a redelivery"),
        pytest.param(
            actual(models=SERVING_V1), desired(V1), (Fetch(sat(V1)),), id="served, not yet verified in this life"
        ),
        pytest.param(actual(models=SERVING_V1, verified=needs(V1)), desired(V2), (Fetch(sat(V2)),), id="a successor"),
        pytest.param(
            actual(models={"m": on_board(V2)}, verified=needs(V1) | needs(V2), proofs=PROVEN),
            desired(BACK),
            (Activate(sat(BACK)),),
            id="a rollback moves a pointer",
        ),
        pytest.param(
            actual(verified=needs(V2), proofs=PROVEN),
            desired(GOLDEN),
            (Fetch(sat(GOLDEN)),),
            id="its golden file is missing",
        ),
        pytest.param(
            actual(verified=needs(GOLDEN), proofs=PROVEN),
            desired(GOLDEN),
            (Trial(sat(GOLDEN)),),
            id="other golden outputs",
        ),
        pytest.param(
            actual(verified=needs(V1), proofs=frozenset({proof_of(V1, "onnxruntime 0")})),
            desired(V1),
            (Trial(sat(V1)),),
            id="proven on another runtime",
        ),
        pytest.param(actual(), desired(FORWARDED), (Forward(sat(FORWARDED)),), id="placed at the origin"),
        pytest.param(actual(models={"m": on_board(FORWARDED)}), desired(FORWARDED), (), id="forwarded already"),
        pytest.param(actual(busy=frozenset({V1.digest})), desired(V1), (), id="a step under way"),
        pytest.param(actual(models=SERVING_V1), desired(retired=frozenset({"m"})), (Retire("m"),), id="retired"),
        pytest.param(actual(), desired(retired=frozenset({"m"})), (), id="retired and gone"),
        pytest.param(actual(models=SERVING_V1), desired(), (), id="the log was made again: unknown serves on"),
        pytest.param(
            actual(models=SERVING_V1, failures={"m": Failure(wanted=V2, phase="verify", cause="x")}),
            desired(V2),
            (),
            id="refused for good",
        ),
        pytest.param(
            actual(failures={"m": Failure(wanted=V1, phase="download", cause="x", retry_at_ms=NOW + 1)}),
            desired(V1),
            (),
            id="its pause is not over",
        ),
        pytest.param(
            actual(failures={"m": Failure(wanted=V1, phase="download", cause="x", retry_at_ms=NOW)}),
            desired(V1),
            (Fetch(sat(V1)),),
            id="its pause is over",
        ),
        pytest.param(
            actual(failures={"m": Failure(wanted=V1, phase="verify", cause="x")}),
            desired(V2),
            (Fetch(sat(V2)),),
            id="another release after a refused one",
        ),
    ],
)
def test_the_next_step(have: Actual, want: Desired, steps: tuple[Step, ...]) -> None:
    assert plan(have, want) == steps


def stored(digest: str, size: int, used_ms: int) -> StoredFile:
    return StoredFile(name=f"{digest}.onnx", digest=digest, size=size, used_ms=used_ms)


def test_the_least_recently_used_go_first_and_what_is_needed_stays() -> None:
    active, following, before = V1, V2, f"{3:064x}"
    old, newer = f"{4:064x}", f"{5:064x}"
    have = actual(
        models={"m": on_board(active)},
        verified=needs(active) | needs(following),
        busy=frozenset({V1.digest, V2.digest}),
        previous={"m": frozenset({before})},
        stored=tuple(
            stored(digest, 100, used)
            for used, digest in enumerate([active.digest, following.digest, before, old, newer])
        ),
        disk_bytes=450,
    )
    assert plan(have, desired(following)) == (Collect((f"{old}.onnx",)),)
    tight = msgspec.structs.replace(have, disk_bytes=0)
    assert plan(tight, desired(following)) == (Collect((f"{old}.onnx", f"{newer}.onnx")),)


def test_a_disk_without_room_for_what_is_wanted_gives_up_the_oldest_first() -> None:
    old, newer = f"{4:064x}", f"{5:064x}"
    have = actual(
        models={"m": on_board(V1)},
        verified=needs(V1),
        stored=(stored(newer, 6, 2), stored(V1.digest, 10, 0), stored(old, 6, 1)),
        free_bytes=4,
    )
    assert plan(have, desired(V2)) == (Collect((f"{old}.onnx",)), Fetch(sat(V2))), "10 bytes are wanted, 4 are free"
    assert plan(msgspec.structs.replace(have, free_bytes=-1), desired(V2))[0] == Collect(
        (f"{old}.onnx", f"{newer}.onnx")
    )
    assert plan(msgspec.structs.replace(have, begun={V2.digest: 10}), desired(V2)) == (Fetch(sat(V2)),), (
        "its room is taken"
    )
    short = msgspec.structs.replace(have, begun={V2.digest: 5})
    assert plan(short, desired(V2))[0] == Collect((f"{old}.onnx",)), "5 more are wanted"
    assert plan(msgspec.structs.replace(have, free_bytes=-9), desired(V1)) == (), "a full disk alone empties nothing"


def test_all_files_of_a_release_are_fetched_kept_and_counted() -> None:
    data, other = f"{77:064x}", f"{99:064x}"
    part = Artifact(
        sha256=data,
        size_bytes=30,
        object_key=data_object_key("m", data),
        chunk_size_bytes=65_536,
        chunk_sha256=(bytes(32),),
    )
    many = wanted(sequence=2, digest=2, files=(File(name="w.data", artifact=part),))
    onnx = many.released.artifact.sha256
    assert needs(many) == {onnx, data} and many.digest not in needs(many)
    half = actual(verified=frozenset({onnx}))
    assert plan(half, desired(many)) == (Fetch(sat(many)),)
    assert plan(actual(verified=needs(many)), desired(many)) == (Trial(sat(many)),)
    proven = frozenset({proof_of(many, RUNTIME)})
    assert plan(actual(verified=needs(many), proofs=proven), desired(many)) == (Activate(sat(many)),)
    # The proof of one set of weights is none of another's.
    assert proof_of(many, RUNTIME) != proof_of(V2, RUNTIME)
    full = actual(
        models={"m": on_board(many)},
        verified=needs(many),
        proofs=proven,
        stored=(
            stored(onnx, 10, 0),
            StoredFile(name=f"{data}.data", digest=data, size=30, used_ms=0),
            stored(other, 5, 9),
        ),
        disk_bytes=0,
    )
    assert plan(full, desired(many)) == (Collect((f"{other}.onnx",)),)
    # 40 bytes are wanted, of which the data's part has 12.
    tight = actual(stored=(stored(other, 5, 9),), begun={data: 12}, free_bytes=28)
    assert plan(tight, desired(many)) == (Fetch(sat(many)),)
    assert plan(msgspec.structs.replace(tight, free_bytes=27), desired(many))[0] == Collect((f"{other}.onnx",))


def test_what_a_rollback_would_go_back_to_is_known_from_the_log() -> None:
    """An agent that was started again has not seen what was served before."""
    v1, v2, v3 = (wanted(sequence=n, digest=n, golden=n == 2) for n in (1, 2, 3))
    brought = {w.digest: w.released for w in (v1, v2, v3)}
    state = msgspec.structs.replace(
        Releases.initial(()), models={"m": ModelHistory(sequence=3, brought=brought, stable=v3)}
    )
    want = Desired.of(state, "r")
    assert want.previous == {"m": needs(v2)}
    have = actual(
        models={"m": on_board(v3)},
        verified=needs(v3),
        stored=tuple(stored(digest, 10, 0) for w in (v1, v2, v3) for digest in sorted(needs(w))),
        disk_bytes=0,
    )
    assert plan(have, want) == (Collect((f"{v1.digest}.onnx",)),)
    only = msgspec.structs.replace(state, models={"m": ModelHistory(sequence=1, brought={}, stable=v1)})
    assert Desired.of(only, "r").previous == {"m": frozenset()}


def test_one_report_a_release_and_cause_and_pauses_that_double() -> None:
    failure: Failure | None = None
    news, pauses = [], []
    for cause in ["away", "away", "broken", "away", "away"]:
        failure, new = failed(failure, V1, "download", cause, retryable=True, now_ms=NOW, random=0.999999)
        news.append(new)
        assert failure.retry_at_ms is not None
        pauses.append(failure.retry_at_ms - NOW)
    assert news == [True, False, True, False, False]
    assert pauses == [499, 999, 1999, 3999, 3999]
    for _ in range(200):
        failure, _ = failed(failure, V1, "download", "away", retryable=True, now_ms=NOW, random=0.0)
    assert failure is not None
    assert failure.retry_at_ms == NOW + 2_000  # half of the longest pause: jitter is over its upper half
    other, new = failed(failure, V2, "download", "away", retryable=False, now_ms=NOW, random=0.5)
    assert (other.attempts, other.retry_at_ms, new) == (1, None, True)


def test_when_to_look_again_and_what_the_board_says() -> None:
    passing = Failure(wanted=V1, phase="download", cause="away", retry_at_ms=NOW + 7)
    final = Failure(wanted=wanted("n"), phase="golden", cause="differs")
    failures = {"m": passing, "n": final}
    assert next_retry_ms(failures, frozenset()) == NOW + 7
    assert next_retry_ms(failures, frozenset({"m"})) is None
    assert errors(failures, desired(V1, wanted("n"))) == {"m": "download: away", "n": "golden: differs"}
    assert errors(failures, desired(V2)) == {}  # of a release that nobody wants any more


@pytest.mark.parametrize(
    ("current", "heard", "then"),
    [(1, 0, 1), (1, 1, 2), (1, 7, 8), (5, 5, 5), (5, 4, 5), (5, 6, 7)],
    ids=["fresh", "wiped, heard once", "wiped", "this life", "the life before", "restored from an old copy"],
)
def test_an_incarnation_rises_above_what_was_heard(current: int, heard: int, then: int) -> None:
    assert corrected(current, heard) == then


class World:
    """Does steps as the driver does: what a step leaves is on disk, and a crash forgets the rest."""

    def __init__(self) -> None:
        self.models: dict[str, BoardModel] = {}
        self.on_disk: set[str] = set()
        self.verified: set[str] = set()
        self.proofs: set[Any] = set()
        self.downloads: list[str] = []

    def actual(self) -> Actual:
        return actual(
            models=dict(self.models), verified=frozenset(self.verified), proofs=frozenset(self.proofs), busy=frozenset()
        )

    def do(self, step: Step) -> None:
        match step:
            case Fetch(seated=Seated(wanted=w)):
                if w.digest not in self.on_disk:
                    self.downloads.append(w.digest)
                self.on_disk |= needs(w)
                self.verified |= needs(w)
            case Trial(seated=Seated(wanted=w)):
                assert needs(w) <= self.verified, "nothing unverified is tried"
                self.proofs.add(proof_of(w, RUNTIME))
            case Activate(seated=Seated(wanted=w)):
                assert needs(w) <= self.verified, "nothing unverified is activated"
                assert proof_of(w, RUNTIME) in self.proofs, "nothing untried is activated"
                self.models[w.model] = on_board(w)
            case Forward(seated=Seated(wanted=w)):
                self.models[w.model] = on_board(w)
            case Retire(seat=name):
                del self.models[name]
            case Collect():
                raise AssertionError("the disk is large")

    def crash(self) -> None:
        self.verified.clear()

    def settle(self, want: Desired) -> None:
        for _ in range(20):
            steps = plan(self.actual(), want)
            if not steps:
                return
            for step in steps:
                self.do(step)
        raise AssertionError("plans do not come to an end")


def test_a_replay_of_200_releases_is_one_download_and_a_redelivery_none() -> None:
    world = World()
    releases = [wanted(sequence=i, digest=i) for i in range(1, 201)]
    world.settle(desired(releases[-1]))  # a fold leaves the last one
    assert world.downloads == [releases[-1].digest]
    world.settle(desired(releases[-1]))
    world.crash()
    world.settle(desired(releases[-1]))
    assert world.downloads == [releases[-1].digest]


RELEASES = st.builds(
    wanted,
    model=st.sampled_from(["a", "b", "c"]),
    sequence=st.integers(1, 50),
    digest=st.integers(1, 5),
    golden=st.booleans(),
    placement=st.sampled_from([Placement.EDGE, Placement.AUTO, Placement.ORIGIN]),
)
LOGS = st.builds(
    lambda wants, gone: desired(*(w for w in wants if w.model not in gone), retired=frozenset(gone)),
    st.lists(RELEASES, max_size=5),
    st.sets(st.sampled_from(["a", "b", "c"])),
)


@settings(max_examples=200, deadline=None)
@given(logs=st.lists(st.tuples(LOGS, st.integers(0, 12)), min_size=1, max_size=6))
def test_whatever_was_cut_short_the_next_plans_come_to_the_same_end(logs: list[tuple[Desired, int]]) -> None:
    """A crash after any number of steps of each log; between crashes a model that was served is always served."""
    world = World()
    for want, steps in logs:
        served = world.models.keys() - (want.known - want.seats.keys())
        for _ in range(steps):
            todo = plan(world.actual(), want)
            if not todo:
                break
            world.do(todo[0])
            assert served <= world.models.keys(), "the old release stays until the new one is there"
        world.crash()
    last = logs[-1][0]
    world.settle(last)
    assert {m: sat(b.wanted) for m, b in world.models.items() if m in last.seats} == last.seats
    assert not world.models.keys() & (last.known - last.seats.keys())


def candidate(w: Wanted, percent: float = 5.0) -> Seated:
    return Seated(wanted=w, channel=Channel.CANDIDATE, percent=percent)


def on_seats(*seats: Seated) -> dict[str, BoardModel]:
    return {s.seat: msgspec.structs.replace(on_board(s.wanted), channel=s.channel, percent=s.percent) for s in seats}


def told(*seats: Seated) -> Desired:
    return Desired(seats={s.seat: s for s in seats}, known=frozenset({"m"}))


V3 = wanted(sequence=3, digest=3)


@pytest.mark.parametrize(
    ("have", "want", "verified", "steps"),
    [
        pytest.param([sat(V1)], [sat(V1), candidate(V2)], [V1, V2], (Activate(candidate(V2)),), id="it is seated"),
        pytest.param(
            [sat(V1), candidate(V2)],
            [sat(V1), candidate(V2, 50)],
            [V1, V2],
            (Activate(candidate(V2, 50)),),
            id="another share",
        ),
        pytest.param([sat(V1), candidate(V2)], [sat(V1)], [V1, V2], (Retire("m@candidate"),), id="it is taken back"),
        pytest.param(
            [sat(V1), candidate(V2)],
            [sat(V2)],
            [V1, V2],
            (Retire("m@candidate"), Activate(sat(V2))),
            id="it is the stable release",
        ),
        pytest.param(
            [sat(V1), candidate(V2)], [sat(V2)], [V1], (Fetch(sat(V2)),), id="and its bytes are not known good"
        ),
        pytest.param(
            [sat(V1), candidate(V2)],
            [sat(V1), candidate(V3)],
            [V1, V2],
            (Retire("m@candidate"), Fetch(candidate(V3))),
            id="another follows it",
        ),
        pytest.param(
            [candidate(V1, 100)], [candidate(V2, 100)], [V1], (Fetch(candidate(V2, 100)),), id="alone, and followed"
        ),
        pytest.param(
            [candidate(V1, 100)],
            [candidate(V2, 100)],
            [V1, V2],
            (Activate(candidate(V2, 100)),),
            id="alone, and its successor is ready",
        ),
        pytest.param(
            [candidate(V1, 100)], [sat(V2)], [V1], (Fetch(sat(V2)),), id="alone, and a stable one is on its way"
        ),
        pytest.param(
            [candidate(V1, 100)],
            [sat(V2)],
            [V1, V2],
            (Retire("m@candidate"), Activate(sat(V2))),
            id="alone, until the stable one is seated",
        ),
        pytest.param([candidate(V1, 100)], [], [V1], (Retire("m@candidate"),), id="alone, and taken back"),
        pytest.param([sat(V2), candidate(V2)], [sat(V2)], [V2], (Retire("m@candidate"),), id="it is on both seats"),
    ],
)
def test_a_seat_for_a_candidate(
    have: list[Seated], want: list[Seated], verified: list[Wanted], steps: tuple[Step, ...]
) -> None:
    now = actual(
        models=on_seats(*have),
        verified=frozenset().union(*map(needs, verified)),
        proofs=frozenset(proof_of(w, RUNTIME) for w in verified),
    )
    assert plan(now, told(*want)) == steps
