"""Trials in real children: every bad artifact is a refusal with its reason, and the server goes on."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from inference.golden import write_golden
from inference.onnx_model import OnnxModel
from inference.trial import TrialLimits, TrialReport, TrialRunner, TrialUnavailable, run_trial
from inference.trial_report import MIB
from tests import models

FAST = TrialLimits(run_s=1.0, batch_check_s=0.1, wall_s=20.0)


class Runner:
    """A TrialRunner in a loop of its own thread, so that plain tests share one warm server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.trials: TrialRunner = self.call(self._make()).result(30)

    async def _make(self) -> TrialRunner:
        trials = TrialRunner(concurrency=2)
        await trials.start()
        return trials

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def written(self, data: bytes) -> Path:
        path = self.folder / f"{models.sha256(data)}.onnx"
        if not path.exists():  # a trial of the same bytes may be reading it
            path.write_bytes(data)
        return path

    def begin(self, data: bytes, limits: TrialLimits = FAST, **more: Any) -> Future[TrialReport]:
        return self.call(self.trials.trial(self.written(data), models.sha256(data), limits=limits, **more))

    def __call__(self, data: bytes, limits: TrialLimits = FAST, **more: Any) -> TrialReport:
        report: TrialReport = self.begin(data, limits, **more).result(30)
        return report

    def close(self) -> None:
        self.call(self.trials.close()).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    runner = Runner(tmp_path_factory.mktemp("trials"))
    pid = runner.trials.server_pid
    assert pid is not None
    yield runner
    runner.close()
    assert children_of(os.getpid(), "inference.trial_server") == []
    gc.collect()


def children_of(parent: int, words: str = "") -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it ended while we looked
            if int(fields[1]) == parent and fields[0] != "Z" and words in command:
                found.append(int(entry.name))
    return found


def eventually(check: Callable[[], bool], seconds: float = 5.0) -> bool:
    ends = time.monotonic() + seconds
    while not check():
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


def test_trials_give_way_to_what_serves(trial: Runner) -> None:
    assert os.getpriority(os.PRIO_PROCESS, trial.trials.server_pid or 0) > os.getpriority(os.PRIO_PROCESS, 0)


def test_a_good_model_passes_and_is_described(trial: Runner) -> None:
    report = trial(models.mlp_bytes(0))
    assert report.ok, report.reason
    assert (report.reason, report.golden, report.has_control_flow) == ("", "absent", False)
    assert [(s.name, s.datatype, s.shape) for s in report.inputs] == [("features", "FP32", (-1, 32))]
    assert [(s.name, s.datatype, s.shape) for s in report.outputs] == [("scores", "FP32", (-1, 8))]
    assert report.batchable, report.batchable_reason
    assert report.load_ms > 0
    assert report.run_ms is not None
    assert 0 < report.run_ms < 1000
    assert 10 * MIB < report.model_rss_bytes < report.peak_rss_bytes < 500 * MIB


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


GOOD = models.mlp_bytes(3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (GOOD[: len(GOOD) // 2], "truncated"),
        (b"PK\x03\x04" + GOOD, "zip"),
        (b"\x80\x04\x95" + GOOD, "pickle"),
        (b"<html>404</html>", "HTML"),
        (models.model_bytes([models.node("Nope", ["x"], ["y"])], [], [models.value("y", 1, ["N"])]), "cannot load"),
        (
            models.model_bytes(
                [models.node("Op", ["x"], ["y"], domain="custom")],
                [models.value("x", 1, ["N"])],
                [models.value("y", 1, ["N"])],
            ),
            "unknown domain",
        ),
        (models.model_bytes([], [], [models.value("y", 1, ["N"])], opset=999), "999"),
        (models.expand_bytes(), "memory"),
        (models.endless_loop_bytes(), "longer than 1 s"),
    ],
    ids=str.split("empty half zip pickle html unknown-operator custom-operator opset expand loop"),
)
def test_bad_artifacts_are_refused_with_a_reason(trial: Runner, data: bytes, words: str) -> None:
    report = trial(data)
    assert not report.ok
    assert words in report.reason
    assert "/" not in report.reason
    assert trial(GOOD).ok


def test_other_bytes_under_the_name_are_refused(trial: Runner, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for other in (flipped(GOOD, len(GOOD) // 2), models.mlp_bytes(4), GOOD + b"\0"):
        path.write_bytes(other)
        report = trial.call(trial.trials.trial(path, models.sha256(GOOD), limits=FAST)).result(30)
        assert not report.ok
        assert "SHA-256" in report.reason


def test_external_data_is_refused_wherever_it_is(trial: Runner, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "same").write_bytes(secret.read_bytes())
    (tmp_path / "link").symlink_to(secret)
    os.link(secret, tmp_path / "hard")
    for location in (f"../{tmp_path.name}/secret", str(secret), "link", "hard", "same"):
        data = models.external_bytes(location)
        path = tmp_path / "m.onnx"
        path.write_bytes(data)
        report = trial.call(trial.trials.trial(path, models.sha256(data), limits=FAST)).result(30)
        assert not report.ok
        assert report.reason == "external data is not allowed: tensor 'secret' in graph 'graph'"


def test_what_is_not_a_file_is_refused(trial: Runner, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path, "regular"), (tmp_path / "pipe", "regular"), (tmp_path / "none", "cannot be opened")):
        report = trial.call(trial.trials.trial(path, models.sha256(b""), limits=FAST)).result(30)
        assert not report.ok
        assert words in report.reason
        assert str(tmp_path) not in report.reason
    good = trial.written(GOOD)
    absent = trial.call(trial.trials.trial(good, models.sha256(GOOD), tmp_path / "none", limits=FAST)).result(30)
    assert absent.reason == "the golden file cannot be opened: No such file or directory"


def test_limits_end_a_child_and_are_its_reason(trial: Runner) -> None:
    loop = models.endless_loop_bytes()
    cpu = trial(loop, TrialLimits(cpu_s=1, run_s=60, wall_s=20))
    assert cpu.reason == "it used more than 1 s of CPU time"
    wall = trial(loop, TrialLimits(cpu_s=60, run_s=60, wall_s=0.5))
    assert wall.reason == "the trial took longer than 0.5 s"
    assert 450 < wall.trial_ms < 3000
    big = models.big_model_bytes(40 * MIB, 0)
    space = trial(big, TrialLimits(memory_factor=1, memory_budget_bytes=16 * MIB))
    assert "memory" in space.reason or "crashed" in space.reason
    for mib in (2, 4, 8):
        tight = trial(GOOD, TrialLimits(memory_factor=0, memory_budget_bytes=mib * MIB))
        assert not tight.ok
        assert "memory" in tight.reason or "crashed" in tight.reason
    files = trial(GOOD, TrialLimits(open_files=4))
    assert not files.ok
    assert trial(GOOD).ok


def test_golden_files(trial: Runner, tmp_path: Path) -> None:
    model = OnnxModel.from_bytes(GOOD, models.sha256(GOOD))
    x = {"features": np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)}
    y = model.run(x)
    path = tmp_path / "golden.npz"
    write_golden(path, x, y)
    assert trial(GOOD, golden_path=path).golden == "passed"
    wrong = {"scores": y["scores"].copy()}
    wrong["scores"][2, 1] += 1
    write_golden(path, x, wrong)
    report = trial(GOOD, golden_path=path)
    assert (report.ok, report.golden) == (False, "failed")
    assert report.reason.startswith("golden test failed: output scores[2, 1]: wanted ")
    assert report.inputs, "a refused model is still described"
    assert trial(GOOD, golden_path=path, atol=1.1).ok
    for inputs, outputs, words in (
        ({"features": x["features"][:, :5]}, y, "dimension 1"),
        ({"x": x["features"]}, y, "has input 'x'"),
        (x, {"z": y["scores"]}, "has output 'z'"),
    ):
        write_golden(path, inputs, outputs)
        report = trial(GOOD, golden_path=path)
        assert (report.ok, report.golden) == (False, "failed")
        assert words in report.reason
    path.write_bytes(b"\x80\x04K\x01.")
    assert "not a usable .npz" in trial(GOOD, golden_path=path).reason


def test_a_model_of_nans_is_valid(trial: Runner, tmp_path: Path) -> None:
    path = tmp_path / "nan.npz"
    write_golden(path, {"x": np.ones((2, 4), np.float32)}, {"y": np.full((2, 4), np.nan, np.float32)})
    report = trial(models.nan_bytes(), golden_path=path)
    assert report.ok, report.reason
    assert report.golden == "passed"


@pytest.mark.parametrize(
    ("data", "yes", "words"),
    [
        (models.identity_bytes(), True, ""),
        (models.identity_bytes(models.STRING), True, ""),
        (models.zipmap_bytes(["b", "a"]), True, ""),
        (models.mean_over_rows_bytes(), False, "differs between alone and among"),
        (models.identity_bytes(shape=(1, 4)), False, "does not lead with a free dimension"),
        (models.identity_bytes(shape=()), False, "does not lead with a free dimension"),
        (
            models.model_bytes(
                [models.node("Reshape", ["x", "to"], ["y"])],
                [models.value("x", 1, ["N", 4])],
                [models.value("y", 1, [None, 1])],
                [helper.make_tensor("to", models.INT64, [2], [-1, 1])],
            ),
            False,
            "has 4 rows for 1",
        ),
        (
            models.model_bytes(
                [models.node("RandomNormalLike", ["x"], ["y"])],
                [models.value("x", 1, ["N", 4])],
                [models.value("y", 1, ["N", 4])],
            ),
            False,
            "differs",
        ),
        (
            models.model_bytes(
                [models.node("MatMul", ["a", "b"], ["y"])],
                [models.value("a", 1, ["N", 4]), models.value("b", 1, ["M", 4])],
                [models.value("y", 1, ["N", 4])],
            ),
            False,
            "different dimensions",
        ),
    ],
    ids=str.split("identity strings zipmap mean fixed scalar more-rows random two-names"),
)
def test_which_models_may_share_a_run(trial: Runner, data: bytes, yes: bool, words: str) -> None:
    report = trial(data)
    assert report.ok, report.reason
    assert report.batchable is yes
    assert words in report.batchable_reason


def test_a_lone_row_may_need_a_twin(trial: Runner) -> None:
    """The matrix kernel of one row may round otherwise, by processor; then a pair must be found to agree."""
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.standard_normal((64, 10)).astype(np.float32), "w")
    data = models.model_bytes(
        [models.node("MatMul", ["x", "w"], ["y"])],
        [models.value("x", 1, ["N", 64])],
        [models.value("y", 1, ["N", 10])],
        [weights],
    )
    report = trial(data)
    assert report.ok
    assert report.batchable or report.batchable_if_padded
    assert not (report.batchable and report.batchable_if_padded)
    mean = trial(models.mean_over_rows_bytes())
    assert not mean.batchable_if_padded


def test_golden_rows_decide_where_random_ones_are_refused(trial: Runner, tmp_path: Path) -> None:
    # Rows of any length are accepted by the signature, only 7 by the model.
    data = models.model_bytes(
        [models.node("Add", ["x", "w"], ["y"])],
        [models.value("x", 1, ["N", None])],
        [models.value("y", 1, ["N", None])],
        [helper.make_tensor("w", 1, [7], [1.0] * 7)],
    )
    alone = trial(data)
    assert alone.ok
    assert alone.run_ms is None
    assert not alone.batchable
    x = np.arange(14, dtype=np.float32).reshape(2, 7)
    write_golden(tmp_path / "g.npz", {"x": x}, {"y": x + 1})
    known = trial(data, golden_path=tmp_path / "g.npz")
    assert known.golden == "passed"
    assert known.batchable, known.batchable_reason
    assert known.run_ms is not None


def test_a_child_is_bound(trial: Runner) -> None:
    """Seen from outside, while it runs."""
    pending = trial.begin(models.endless_loop_bytes(), TrialLimits(run_s=2, cpu_s=7, open_files=12))
    server = trial.trials.server_pid
    assert server is not None
    assert eventually(lambda: len(children_of(server)) == 1)
    child = Path(f"/proc/{children_of(server)[0]}")
    assert eventually(lambda: _limit(child, "Max cpu time") == 7)
    assert _limit(child, "Max open files") == 12
    assert _limit(child, "Max file size") == 0
    assert _limit(child, "Max core file size") == 0
    assert 100 * MIB < _limit(child, "Max address space") < 4096 * MIB
    assert (child / "cwd").readlink().name.endswith("(deleted)")
    assert eventually(lambda: all(fd.readlink().as_posix().startswith(("/dev/null", "pipe:")) for fd in _files(child)))
    networks = (child / "ns/net").readlink(), Path("/proc/self/ns/net").readlink()
    report = pending.result(30)
    assert report.reason == "a run took longer than 2 s"
    if report.network_isolated:
        assert networks[0] != networks[1]


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _limit(process: Path, name: str) -> int:
    for line in (process / "limits").read_text().splitlines():
        if line.startswith(name):
            soft = line[len(name) :].split()[0]
            return -1 if soft == "unlimited" else int(soft)
    raise AssertionError(name)


def _files(process: Path) -> list[Path]:
    return list((process / "fd").iterdir())


def test_secrets_of_the_caller_do_not_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLCDN_SIGNING_KEY", "c2VjcmV0")

    async def scenario() -> bytes:
        async with TrialRunner() as trials:
            return await asyncio.to_thread(Path(f"/proc/{trials.server_pid}/environ").read_bytes)

    environment = asyncio.run(scenario())
    assert b"OMP_NUM_THREADS=1" in environment
    assert b"MLCDN_SIGNING_KEY" not in environment


def test_trials_run_side_by_side_and_no_more_than_allowed(trial: Runner) -> None:
    pending = [trial.begin(models.endless_loop_bytes(), TrialLimits(run_s=0.6)) for _ in range(3)]
    server = trial.trials.server_pid
    assert server is not None
    most = 0
    while not all(p.done() for p in pending):
        most = max(most, len(children_of(server)))
        time.sleep(0.01)
    assert most == 2
    assert {p.result().reason for p in pending} == {"a run took longer than 0.6 s"}


def test_a_cancelled_trial_ends_its_child(trial: Runner) -> None:
    pending = trial.begin(models.endless_loop_bytes(), TrialLimits(run_s=30))
    server = trial.trials.server_pid
    assert server is not None
    assert eventually(lambda: len(children_of(server)) == 1)
    pending.cancel()
    assert eventually(lambda: not children_of(server))
    assert trial(GOOD).ok


def test_a_server_that_dies_is_replaced_and_its_children_die(tmp_path: Path) -> None:
    loop, path = models.endless_loop_bytes(), tmp_path / "loop.onnx"
    path.write_bytes(loop)
    good = tmp_path / "good.onnx"
    good.write_bytes(GOOD)

    async def scenario() -> None:
        async with TrialRunner() as trials:
            pending = asyncio.create_task(trials.trial(path, models.sha256(loop), limits=TrialLimits(run_s=1.5)))
            first = trials.server_pid
            assert first is not None
            assert await asyncio.to_thread(eventually, lambda: bool(children_of(first)))
            children = children_of(first)
            os.kill(first, signal.SIGKILL)
            assert await asyncio.to_thread(eventually, lambda: not _exists(children[0]))
            # What it had begun is asked again of the next.
            report = await pending
            assert report.reason == "a run took longer than 1.5 s"
            assert trials.server_pid not in (None, first)
            assert (await trials.trial(good, models.sha256(GOOD), limits=FAST)).ok

    asyncio.run(scenario())
    gc.collect()


def test_closing_ends_everything_at_once(tmp_path: Path) -> None:
    loop, path = models.endless_loop_bytes(), tmp_path / "loop.onnx"
    path.write_bytes(loop)

    async def scenario() -> None:
        trials = TrialRunner()
        pending = asyncio.create_task(trials.trial(path, models.sha256(loop), limits=TrialLimits(run_s=30)))
        await trials.start()
        server = trials.server_pid
        assert server is not None
        assert await asyncio.to_thread(eventually, lambda: bool(children_of(server)))
        children = children_of(server)
        started = time.monotonic()
        await trials.close()
        assert time.monotonic() - started < 3
        assert not _exists(children[0])
        with pytest.raises(TrialUnavailable):
            await pending
        with pytest.raises(TrialUnavailable, match="closed"):
            await trials.trial(path, models.sha256(loop))

    asyncio.run(scenario())
    gc.collect()


def test_one_trial_for_a_command(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(GOOD)
    before = children_of(os.getpid())
    assert run_trial(path, models.sha256(GOOD), limits=FAST).ok
    assert not run_trial(path, models.sha256(b""), limits=FAST).ok
    assert children_of(os.getpid()) == before


def test_the_network_is_gone_wherever_the_kernel_allows_it(trial: Runner) -> None:
    ask = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000 | 0x40000000) != 0)"
    allowed = subprocess.run([sys.executable, "-c", ask], check=False).returncode == 0
    assert trial(GOOD).network_isolated is allowed
