"""A model that is not trusted, asked again and again in a child: whatever it does, it does there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from inference.compare import checked_values
from inference.limited import LimitedModel, Refused
from inference.packed import Output
from inference.trial_report import MIB, TrialLimits
from schemas.errors import ModelRefused
from tests import models
from tests.service.test_worker import V1, loop_bytes, truth

LIMITS = TrialLimits(run_s=0.5, memory_budget_bytes=256 * MIB)


def limited(folder: Path, data: bytes) -> LimitedModel:
    path = folder / "model.onnx"
    path.write_bytes(data)
    return LimitedModel(path, models.sha256(data), LIMITS)


def floats(name: str, *rows: list[float]) -> Output:
    array = np.array(rows, np.float32)
    return Output(name, "FP32", array.shape, memoryview(array.tobytes()))


def test_it_answers_as_the_model_and_refuses_what_the_model_refuses(tmp_path: Path) -> None:
    row = [0.5] * 32
    with limited(tmp_path, V1) as model:
        for _ in range(2):
            packed = model.ask([floats("features", row)], ["scores", "of another release"])
            assert isinstance(packed, bytes)
            assert np.allclose(checked_values(packed)["scores"], truth(V1, [row]), rtol=1e-3, atol=1e-4)
            for wrong in (
                [],
                [floats("other", row)],
                [floats("features", row[1:])],
                [Output("features", "FP32", (1, 32), memoryview(b"short"))],
                [Output("features", "FP32", (-1, 32), memoryview(b""))],
                [Output("features", "nonsense", (1,), memoryview(b""))],
            ):
                assert isinstance(model.ask(wrong, ["scores"]), Refused)
        pid = model.pid
        status = Path(f"/proc/{pid}/limits").read_text()
        assert "Max open files            16 " in status
        # What it knows of its caller: no variable but those of a trial, and a folder that is gone.
        assert os.readlink(f"/proc/{pid}/cwd").endswith("(deleted)")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ModelRefused, match="ended while it was asked"):
            model.ask([floats("features", row)], ["scores"])
    assert not Path(f"/proc/{pid}").exists()


def test_what_takes_too_long_or_too_much_is_refused_and_the_next_is_answered(tmp_path: Path) -> None:
    with limited(tmp_path, loop_bytes()) as model:
        endless, short = [floats("x", [1e15] * 4)], [floats("x", [3.0] * 4)]
        refused = model.ask(endless, ["y"])
        assert isinstance(refused, Refused) and "deadline" in refused.reason
        assert isinstance(model.ask(short, ["y"]), bytes)
    with limited(tmp_path, models.expand_bytes()) as model:
        refused = model.ask([floats("x", [1.0])], ["y"])
        assert isinstance(refused, Refused) and "memory" in refused.reason


def test_what_is_no_model_or_another_one_is_refused_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused), limited(tmp_path, b"no model"):
        pass
    with pytest.raises(ModelRefused, match="SHA-256"), LimitedModel(tmp_path / "model.onnx", "0" * 64):
        pass
    with pytest.raises(ModelRefused, match="cannot be opened"), LimitedModel(tmp_path / "gone.onnx", "0" * 64):
        pass
