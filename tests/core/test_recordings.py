"""The last recorded requests of each region, and which release a replay asks."""

from __future__ import annotations

import itertools
import uuid
from typing import Any

import numpy as np
import pytest

from inference.datatypes import TensorSpec
from inference.packed import pack_outputs
from origin.replay import released_candidate
from schemas import codec
from schemas.errors import BadInput, NotFound
from schemas.events import (
    Artifact,
    Gates,
    Golden,
    ModelReleased,
    Plan,
    RecordedTensor,
    RequestRecorded,
    Tensor,
    Wave,
)
from schemas.names import golden_object_key, model_object_key
from schemas.topics import RECORDINGS
from streams.audit import recordings
from streams.audit.recordings import last_recorded
from streams.folds.releases import ModelHistory
from streams.log.local import LocalLog

DIGEST = "ab" * 32
SPECS = [TensorSpec("y", "FP32", (-1, 2))]


class Log:
    """Of recorded requests; each is told apart by its one value."""

    def __init__(self) -> None:
        clock = itertools.count()
        self.log = LocalLog(lambda: next(clock))

    def record(self, value: float, *, region: str = "tokyo", model: str = "digits", padding: int = 0) -> None:
        data = np.array([value], "<f4").tobytes() + b"\0" * 4 * padding
        event = RequestRecorded(
            node="n-1",
            region=region,
            worker=0,
            incarnation=1,
            model=model,
            sequence=1,
            digest=DIGEST,
            recorded_at_ms=0,
            inputs=(RecordedTensor(name="x", datatype="FP32", shape=(1, 1 + padding), data=data),),
            outputs=pack_outputs({"y": np.zeros((1, 2), np.float32)}, SPECS),
        )
        message = codec.encode(event, topic=RECORDINGS.name, id=str(uuid.uuid4()), source="/tests", now_ms=0)
        self.log.append_raw(message.topic, message.key, message.value, message.headers)

    def last(self, count: int, **more: Any) -> dict[str, list[float]]:
        return {
            sample.region: [float(np.frombuffer(r.event.inputs[0].data, "<f4")[0]) for r in sample.requests]
            for sample in last_recorded(self.log, "digits", count, **more)
        }


def test_the_newest_of_each_region_in_their_order_and_of_no_other_model() -> None:
    log = Log()
    for number in range(10):
        log.record(number, region=("tokyo", "london")[number % 2])
        log.record(-1, model="other")
    log.log.append_raw(RECORDINGS.name, b"digits", b"\0\0\0\0\x18junk")
    assert log.last(3) == {"london": [5, 7, 9], "tokyo": [4, 6, 8]}
    assert log.last(100, region="london") == {"london": [1, 3, 5, 7, 9]}
    assert log.last(3, region="oslo") == {}
    # One record each millisecond of this broker's clock, every other one of another model: up to the sixth of ours.
    assert log.last(100, until_ms=10) == {"london": [1, 3, 5], "tokyo": [0, 2, 4]}
    (tokyo,) = last_recorded(log.log, "digits", 3, "tokyo")
    (read,) = tokyo.ranges
    assert [r.offset for r in tokyo.requests] == list(range(read.start, read.end, 2)) and read.topic == RECORDINGS.name
    for wrong in (0, -1, recordings.MAX_LAST + 1):
        with pytest.raises(BadInput):
            last_recorded(log.log, "digits", wrong)


def test_what_is_held_of_a_region_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    for number in range(20):
        log.record(number, padding=1_000)
    monkeypatch.setattr(recordings, "MAX_REGION_BYTES", 5 * 4_500)
    assert log.last(20) == {"tokyo": [15, 16, 17, 18, 19]}


def release(version: str, sequence: int, **more: Any) -> ModelReleased:
    digest = f"{sequence:02x}" * 32
    return ModelReleased(
        model="digits",
        version=version,
        sequence=sequence,
        artifact=Artifact(
            sha256=digest,
            size_bytes=1,
            object_key=model_object_key("digits", digest),
            chunk_size_bytes=2**26,
            chunk_sha256=(bytes(32),),
        ),
        inputs=(Tensor(name="x", datatype="FP32", shape=(-1, 1)),),
        outputs=(Tensor(name="y", datatype="FP32", shape=(-1, 2)),),
        created_at_ms=0,
        author="tests",
        **more,
    )


def test_a_replay_asks_the_newest_release_of_a_version_and_judges_as_it_says() -> None:
    golden = Golden(object_key=golden_object_key("digits", DIGEST), sha256=DIGEST, rtol=0.5, atol=0.25)
    plan = Plan(waves=(Wave(),), gates=Gates(max_disagreement=0.125))
    brought = [release("v1", 1), release("v2", 2), release("v2", 3, golden=golden, plan=plan)]
    history = ModelHistory(sequence=3, brought={r.digest: r for r in brought})
    found = released_candidate(history, "digits", "v2")
    assert (found.digest, found.tolerances, found.gates.max_disagreement) == (brought[2].digest, (0.5, 0.25), 0.125)
    assert released_candidate(history, "digits", "v1").gates == Gates()
    for nothing, version in ((history, "v9"), (history, None), (None, None)):
        with pytest.raises(NotFound):
            released_candidate(nothing, "digits", version)
