"""The engine with real models: what runs together, what is answered when something goes wrong, and where it runs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np
import pytest

from edge_node.serving.batches import Ask, Job
from edge_node.serving.controls import Controls
from edge_node.serving.engine import IN_LOOP_MOST, Engine
from edge_node.serving.placement import IN_LOOP_S, RunCost
from edge_node.serving.served import Prepared, Served
from inference.deadlines import Deadline
from inference.onnx_model import OnnxModel
from inference.packed import unpack
from schemas.errors import BadTensor, DeadlineExceeded, MlcdnError, NotReady, Overloaded
from schemas.events import Artifact, Batching, Limits, ModelReleased, Tensor
from schemas.names import model_object_key
from streams.folds.wanted import Wanted
from tests import models

TABLE = np.arange(20, dtype=np.float32).reshape(10, 2)


def gather_bytes() -> bytes:
    """`i` INT64 [N] → `row` FP32 [N, 2]; an index that the table lacks is refused by the run."""
    return models.model_bytes(
        [models.node("Gather", ["table", "i"], ["row"])],
        [models.value("i", models.INT64, ["n"])],
        [models.value("row", models.FLOAT, ["n", 2])],
        [models.numpy_helper.from_array(TABLE, "table")],
    )


def served(
    data: bytes, cost: RunCost | None = None, *, batchable: bool = True, max_size: int = 64, max_queue: int = 256
) -> Served:
    digest = models.sha256(data)
    released = ModelReleased(
        model="m",
        version="v1",
        sequence=1,
        artifact=Artifact(
            sha256=digest,
            size_bytes=len(data),
            object_key=model_object_key("m", digest),
            chunk_size_bytes=2**26,
            chunk_sha256=(bytes.fromhex(digest),),
        ),
        inputs=(),
        outputs=(Tensor(name="row", datatype="FP32", shape=(-1,)),),
        limits=Limits(max_queue=max_queue),
        batching=Batching(batchable=batchable, max_size=max_size),
        created_at_ms=0,
        author="tests",
    )
    wanted = Wanted(model="m", version="v1", sequence=1, position=1, cause="c", released=released)
    return Served(wanted, "stable", Prepared(OnnxModel.from_bytes(data, digest), cost or RunCost(1e-5)))


class Desk:
    """Submits, and keeps what became of it, in the order it came."""

    def __init__(self, threads: int = 2) -> None:
        self.engine = Engine("m", threads, lambda _: None)
        self.ended: list[tuple[int, Any]] = []
        self._more = asyncio.Event()

    def ask(self, what: Served, inputs: dict[str, Any], number: int, seconds: float = 5.0) -> None:
        ask = Ask(what, b"", inputs, None, Controls(as_of=0), 0, Deadline.after(seconds))

        def ended(outcome: bytes | MlcdnError) -> None:
            value = outcome if isinstance(outcome, MlcdnError) else unpack(outcome)[0].array
            self.ended.append((number, value))
            self._more.set()

        self.engine.submit([Job(ask, ended)])

    async def settled(self, count: int, seconds: float = 5.0) -> dict[int, Any]:
        async with asyncio.timeout(seconds):
            while len(self.ended) < count:
                self._more.clear()
                await self._more.wait()
        assert len(self.ended) == count
        return dict(self.ended)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Rows of every run, and whether it was in the loop's thread."""
    seen: list[tuple[int, bool]] = []
    original = OnnxModel.run

    def counted(model: OnnxModel, inputs: Any, *rest: Any, **named: Any) -> Any:
        seen.append((len(next(iter(inputs.values()))), threading.current_thread() is threading.main_thread()))
        return original(model, inputs, *rest, **named)

    monkeypatch.setattr(OnnxModel, "run", counted)
    return seen


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


def index(*values: int) -> dict[str, Any]:
    return {"i": np.array(values)}


def rows(*values: int) -> Any:
    return TABLE[list(values)]


@pytest.mark.parametrize(("cost", "in_loop"), [(1e-5, True), (1.0, False)])
def test_what_came_in_one_turn_runs_together_and_each_gets_its_own_rows(
    runs: list[tuple[int, bool]], cost: float, in_loop: bool
) -> None:
    async def scenario() -> None:
        desk, model = Desk(), served(gather_bytes(), RunCost(cost))
        asked = [(1,), (2, 3), (4, 5, 6), (7,)]
        for number, values in enumerate(asked):
            desk.ask(model, index(*values), number)
        assert not desk.ended and model.in_flight == 4
        found = await desk.settled(4)
        for number, values in enumerate(asked):
            assert np.array_equal(found[number], rows(*values))
        assert runs == [(7, in_loop)] and model.in_flight == 0
        desk.engine.close()

    run(scenario)


def test_no_batch_is_larger_than_it_may_be_and_order_is_kept(runs: list[tuple[int, bool]]) -> None:
    async def scenario() -> None:
        desk, model = Desk(), served(gather_bytes(), max_size=4)
        for number in range(6):
            desk.ask(model, index(number, number), number)
        desk.ask(model, index(*range(9)), 6)
        await desk.settled(7)
        assert [size for size, _ in runs] == [4, 4, 4, 9], "one that is larger alone runs alone"
        assert [number for number, _ in desk.ended] == list(range(7))
        desk.engine.close()

    run(scenario)


def test_what_does_not_fit_together_runs_apart(runs: list[tuple[int, bool]]) -> None:
    """Other outputs, another inner shape, another release, no rows at all, or a model that may not."""

    async def scenario() -> None:
        square = models.model_bytes(
            [models.node("Mul", ["x", "x"], ["y"])],
            [models.value("x", models.FLOAT, ["n", "k"])],
            [models.value("y", models.FLOAT, ["n", "k"])],
        )
        desk, one, other = Desk(), served(square), served(square)
        alone = served(square, batchable=False)
        shapes = [
            (one, (1, 2)),
            (one, (2, 2)),
            (one, (1, 3)),
            (other, (1, 2)),
            (one, (0, 2)),
            (alone, (1, 2)),
            (alone, (1, 2)),
        ]
        for number, (model, shape) in enumerate(shapes):
            desk.ask(model, {"x": np.full(shape, number, np.float32)}, number)
        found = await desk.settled(len(shapes))
        for number, (_, shape) in enumerate(shapes):
            assert found[number].shape == shape and np.all(found[number] == number**2)
        assert sorted(size for size, _ in runs) == [0, 1, 1, 1, 1, 3]
        desk.engine.close()

    run(scenario)


def test_one_bad_row_is_its_own_requests_error_alone(runs: list[tuple[int, bool]]) -> None:
    async def scenario() -> None:
        desk, model = Desk(), served(gather_bytes())
        for number, value in enumerate((1, 99, 3)):
            desk.ask(model, index(value), number)
        found = await desk.settled(3)
        assert isinstance(found[1], BadTensor)
        assert np.array_equal(found[0], rows(1)) and np.array_equal(found[2], rows(3))
        assert [size for size, _ in runs] == [3, 1, 1, 1]
        assert not any(in_loop for _, in_loop in runs[1:]), "what went wrong once is tried beside the loop"
        assert model.in_flight == 0
        desk.engine.close()

    run(scenario)


def test_a_short_deadline_in_company_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    original = OnnxModel.run

    def slow(model: OnnxModel, inputs: Any, outputs: Any = None, deadline: Deadline | None = None) -> Any:
        time.sleep(0.1)
        return original(model, inputs, outputs, deadline)

    monkeypatch.setattr(OnnxModel, "run", slow)

    async def scenario() -> None:
        desk, model = Desk(), served(gather_bytes(), RunCost(1.0))
        desk.ask(model, index(1), 1, seconds=0.05)
        desk.ask(model, index(2), 2)
        began = time.monotonic()
        await desk.settled(1)
        assert desk.ended[0][0] == 1 and isinstance(desk.ended[0][1], DeadlineExceeded)
        assert time.monotonic() - began < 0.09, "its answer does not wait for the run"
        assert np.array_equal((await desk.settled(2))[2], rows(2))
        desk.engine.close()

    run(scenario)


def test_an_endless_run_is_ended_and_keeps_no_other_model_from_running() -> None:
    async def scenario() -> None:
        looping, quick = Desk(threads=1), Desk()
        endless = served(models.endless_loop_bytes(), RunCost(1.0), batchable=False)
        fast = served(gather_bytes())
        looping.ask(endless, endless.model.zeros() if endless.model else {}, 0, seconds=0.3)
        await asyncio.sleep(0.05)
        began = time.monotonic()
        quick.ask(fast, index(3), 0)
        await quick.settled(1)
        assert time.monotonic() - began < 0.2
        found = await looping.settled(1, 2.0)
        assert isinstance(found[0], DeadlineExceeded)
        # Its only thread is free again.
        looping.ask(fast, index(4), 1)
        assert np.array_equal((await looping.settled(2, 2.0))[1], rows(4))
        looping.engine.close()
        quick.engine.close()

    run(scenario)


def test_while_a_thread_is_busy_the_next_batch_grows(
    runs: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = OnnxModel.run

    def slow(model: OnnxModel, *rest: Any, **named: Any) -> Any:
        time.sleep(0.05)
        return counted(model, *rest, **named)

    monkeypatch.setattr(OnnxModel, "run", slow)

    async def scenario() -> None:
        desk, model = Desk(threads=1), served(gather_bytes(), RunCost(0.05))
        desk.ask(model, index(0), 0)
        for number in range(1, 9):
            await asyncio.sleep(0.003)
            desk.ask(model, index(number), number)
        await desk.settled(9)
        assert [size for size, _ in runs] == [1, 8]
        desk.engine.close()

    run(scenario)


def test_the_queue_is_bounded_in_front_of_threads_and_in_the_loop() -> None:
    async def scenario() -> None:
        desk, slow = Desk(threads=1), served(gather_bytes(), RunCost(1.0), batchable=False, max_queue=3)
        for number in range(4):
            desk.ask(slow, index(1), number)
        with pytest.raises(Overloaded):
            desk.ask(slow, index(1), 4)
        await desk.settled(4)
        quick = served(gather_bytes(), max_queue=3)
        for number in range(IN_LOOP_MOST):
            desk.ask(quick, index(1), 10 + number)
        with pytest.raises(Overloaded):
            desk.ask(quick, index(1), 5)
        await desk.settled(4 + IN_LOOP_MOST)
        desk.engine.close()

    run(scenario)


def test_a_closed_engine_ends_what_waits_and_takes_nothing() -> None:
    async def scenario() -> None:
        desk, model = Desk(), served(gather_bytes())
        desk.ask(model, index(1), 0)
        desk.engine.close()
        assert isinstance((await desk.settled(1))[0], NotReady) and model.in_flight == 0
        with pytest.raises(NotReady):
            desk.ask(model, index(1), 1)

    run(scenario)


def costs(cost: RunCost, seconds: Sequence[float], batch: int = 1) -> RunCost:
    for one in seconds:
        cost.observe(batch, one)
    return cost


def test_a_model_runs_where_its_cost_says() -> None:
    assert RunCost(IN_LOOP_S / 2).in_loop and not RunCost(IN_LOOP_S).in_loop
    assert not RunCost(1e-6, may_run_in_loop=False).in_loop
    assert not costs(RunCost(1e-6, may_run_in_loop=False), [1e-6] * 50).in_loop, "control flow never"
    assert costs(RunCost(1e-4), [0.05]).in_loop, "one slow run is chance"
    assert not costs(RunCost(1e-4), [0.05] * 20).in_loop, "twenty are not"
    near = costs(RunCost(IN_LOOP_S * 1.2), [IN_LOOP_S * 0.8] * 50)
    assert not near.in_loop, "near the border it stays where it is"
    assert costs(near, [IN_LOOP_S / 4] * 50).in_loop


def test_a_batch_in_the_loop_is_as_large_as_fits() -> None:
    cost = RunCost.measured(20e-6, 32, 20e-6 + 31 * 5e-6)
    assert cost.of(1) == pytest.approx(20e-6) and cost.of(32) == pytest.approx(175e-6)
    assert cost.rows_in_loop(1_000) == pytest.approx((IN_LOOP_S - 15e-6) / 5e-6, abs=1)
    assert cost.rows_in_loop(64) == 64
    assert RunCost(IN_LOOP_S * 0.9, IN_LOOP_S).rows_in_loop(64) == 1
    assert RunCost.measured(1e-5).rows_in_loop(64) == 64
