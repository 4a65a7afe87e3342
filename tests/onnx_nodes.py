"""The ONNX backend tests, held against one node: what onnxruntime answers in process, the node answers over HTTP.

A case is a model with its inputs and outputs, from the `onnx` package. Each ends in one verdict:

    PASSED   served, and its outputs are the shipped ones, asked in JSON and in binary
    AS ORT   served, and its outputs are onnxruntime's in process, where those are not the shipped ones
    REFUSED  refused at publish, for a reason that DESIGN knows
    FAILED   onnxruntime in process fails too: at loading (then the publish is refused), or at the run (then 400 or 500)
    WRONG    anything else

Laws: the node decides with what publishing and serving decide with; the reference is onnxruntime alone, and requests
are a stock client's. It must not know how a model is checked, loaded or encoded by the node.
"""

from __future__ import annotations

import asyncio
import ctypes
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from inference.runtime import LOG_FATAL, onnxruntime
from inference.trial import TrialRunner
from origin.publish import ReleaseRequest, released
from schemas.errors import MlcdnError, ModelRefused
from schemas.names import model_object_key
from streams.artifacts import describe
from tests.node_client import Arrays, AskFailed, NodeClient, texts
from tests.worker_process import WorkerProcess

SEED: Final = 20_260_101
FOLDERS: Final = ("simple", "pytorch-converted", "pytorch-operator")
READY_S: Final = 60.0
BATCH: Final = 50
# The only reasons for which a model that onnxruntime runs may be refused.
DESIGN: Final = (
    (re.compile(r"(?:in|out)put '.*' is a (?:optional\()?seq\("), "a sequence as input or output"),
    (re.compile(r"output '.*' is a optional\("), "an optional as output"),
    (re.compile(r"(?:in|out)put '.*' is a sparse_tensor\("), "a sparse tensor as input or output"),
    (re.compile(r"(?:in|out)put '.*' is a map\("), "a map as input or output"),
    (re.compile(r"(?:in|out)put '.*' is a tensor\(float8"), "an 8-bit float as input or output"),
    (re.compile(r"(?:in|out)put '.*' is a tensor\(u?int[24]\)"), "a 2- or 4-bit integer as input or output"),
    (re.compile(r"(?:in|out)put '.*' is a tensor\(float4"), "a 4-bit float as input or output"),
    (re.compile(r"(?:in|out)put '.*' is a tensor\(complex"), "a complex number as input or output"),
    (re.compile(r"is of an unknown domain"), "an operator of an unknown domain"),
)


_LIKE: Final = (
    (r".*Not equal to tolerance.*location mismatch.*", "an infinity elsewhere"),
    (r".*Not equal to tolerance.*", "values beyond onnx's tolerance"),
    (r"(?:Could not find an implementation|Failed to find kernel) for .*", "no CPU kernel for these types"),
    (r" node\. Name:.*", ""),
    (r"'[^']*'", "…"),
)


class Verdict(StrEnum):
    PASSED = "passed"
    AS_ORT = "as onnxruntime, which differs from the shipped outputs"
    REFUSED = "refused at publish, by design"
    FAILED = "fails in onnxruntime too"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Outcome:
    case: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """Arrays are onnx's own: bfloat16 of ml_dtypes, text as str; what is no tensor (a list, None) is as it was given."""

    name: str
    data: bytes
    inputs: dict[str, Any]
    wanted: dict[str, Any]
    rtol: float
    atol: float

    @property
    def values(self) -> tuple[Any, ...]:
        return (*self.inputs.values(), *self.wanted.values())

    @property
    def arrays(self) -> list[np.ndarray[Any, Any]]:
        return [value for value in self.values if isinstance(value, np.ndarray)]

    @property
    def has_tensors_only(self) -> bool:
        return all(isinstance(v, np.ndarray) for v in self.values)

    def differs(self, got: Mapping[str, Any], wanted: Mapping[str, Any] | None = None) -> str:
        """How the outputs differ from the shipped ones (or from `wanted`), by onnx's own comparison; empty if not."""
        wanted = self.wanted if wanted is None else wanted
        try:
            with warnings.catch_warnings(action="ignore"):
                Runner.assert_similar_outputs(list(wanted.values()), [got[n] for n in wanted], self.rtol, self.atol)
        except (AssertionError, AttributeError, TypeError) as error:
            return " ".join(str(error).split())[:200] or type(error).__name__
        return ""


def node_cases() -> list[Case]:
    """In the order of their names; some draw their inputs, so the seed is theirs too."""
    with warnings.catch_warnings(action="ignore"):
        np.random.seed(SEED)
        loaded = load_model_tests(kind="node")
    return sorted((_case(test) for test in loaded), key=lambda case: case.name)


def model_cases() -> list[Case]:
    """Models that come as files, most of them exports of PyTorch; one case for each set of inputs."""
    tests = [test for kind in FOLDERS for test in load_model_tests(kind=kind)]
    made = [_case_of(test, data) for test in tests for data in Path(test.model_dir).glob("test_data_set_*")]
    return sorted(made, key=lambda case: case.name)


def _case_of(test: Any, data: Path) -> Case:
    content = (data.parent / "model.onnx").read_bytes()
    graph = onnx.ModelProto.FromString(content).graph
    sides: list[dict[str, Any]] = []
    for infos, side in ((graph.input, "input"), (graph.output, "output")):
        files = [data / f"{side}_{index}.pb" for index in range(len(infos))]
        # Inputs after those that have a file are weights: models of old versions list them too.
        pairs = [(info, file.read_bytes()) for info, file in zip(infos, files, strict=True) if file.exists()]
        sides.append({info.name: _native(_parsed(info.type, raw)) for info, raw in pairs})
    return Case(f"{test.name}/{data.name[-1]}", content, *sides, test.rtol, test.atol)


def _parsed(kind: onnx.TypeProto, raw: bytes) -> Any:
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(raw))
    return TensorProto.FromString(raw)


KINDS: Final[Mapping[str, Callable[[Case], bool]]] = {
    "no inputs": lambda case: not case.inputs,
    "no element": lambda case: any(a.size == 0 for a in case.arrays),
    "scalar": lambda case: any(a.ndim == 0 for a in case.arrays),
    "many dimensions": lambda case: any(a.ndim > 4 for a in case.arrays),
    "not finite": lambda case: any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in case.arrays),
    "text": lambda case: any(a.dtype.kind == "O" for a in case.arrays),
    "truth": lambda case: any(a.dtype.kind == "b" for a in case.arrays),
    "bfloat16": lambda case: any(a.dtype == ml_dtypes.bfloat16 for a in case.arrays),
    "float16": lambda case: any(a.dtype == np.float16 for a in case.arrays),
    "64-bit integer": lambda case: any(a.dtype == np.uint64 for a in case.arrays),
    "several outputs": lambda case: len(case.wanted) > 2,
    "no tensor": lambda case: not case.has_tensors_only,
    "optional": lambda case: "optional" in case.name,
    "control flow": lambda case: re.match("test_(loop|if|scan|sequence_map)", case.name) is not None,
    "training": lambda case: re.match("test_(training|adam|adagrad|momentum|nesterov)", case.name) is not None,
    "machine learning": lambda case: "ai_onnx_ml" in case.name,
    "many values of a fixed size": lambda case: case.name.startswith("test_mish"),
    "sums that alignment changes": lambda case: case.name.startswith("test_reduce_log_sum_default"),
    "range of bfloat16": lambda case: case.name.startswith("test_range_bfloat16"),
}


def sample(all_cases: Sequence[Case], size: int, a_kind: int = 6) -> list[Case]:
    """Seeded: of each kind so many, and of all the rest as many as are wanting."""
    rng = random.Random(SEED)
    chosen: dict[str, Case] = {}
    for of_kind in KINDS.values():
        there = [case for case in all_cases if of_kind(case)]
        chosen |= {case.name: case for case in rng.sample(there, min(a_kind, len(there)))}
    rest = [case for case in all_cases if case.name not in chosen]
    chosen |= {case.name: case for case in rng.sample(rest, max(0, size - len(chosen)))}
    return sorted(chosen.values(), key=lambda case: case.name)


def _case(test: Any) -> Case:
    ((inputs, outputs),) = test.data_sets
    graph = test.model.graph
    return Case(
        test.name,
        test.model.SerializeToString(),
        {info.name: _native(value) for info, value in zip(graph.input, inputs, strict=True)},
        {info.name: _native(value) for info, value in zip(graph.output, outputs, strict=True)},
        test.rtol,
        test.atol,
    )


def _native(value: Any) -> Any:
    if isinstance(value, TensorProto):
        value = numpy_helper.to_array(value)
    if value is None or isinstance(value, list):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "OSU":
        text = [each.decode() if isinstance(each, bytes) else str(each) for each in array.ravel()]
        return texts(text, array.shape)
    return array


@dataclass(frozen=True, slots=True)
class Reference:
    """What onnxruntime answers in process to the same bytes, or why it does not."""

    outputs: Arrays | None
    loads: bool
    reason: str = ""


def reference(case: Case) -> Reference:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = LOG_FATAL
    try:
        session = onnxruntime.InferenceSession(case.data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes share no base
        return Reference(None, False, f"{type(error).__name__}: {error}")
    names = [each.name for each in session.get_outputs()]
    try:
        if any(isinstance(v, np.ndarray) and v.dtype.type.__module__ == "ml_dtypes" for v in case.values):
            feed = {name: _ort_value(array) for name, array in case.inputs.items()}
            values = [_array_of(v) for v in session.run_with_ort_values(names, feed)]
        else:
            values = session.run(names, case.inputs)
    except Exception as error:
        return Reference(None, True, f"{type(error).__name__}: {error}")
    return Reference(dict(zip(names, values, strict=True)), True)


def _ort_value(array: np.ndarray[Any, Any]) -> Any:
    make = onnxruntime.OrtValue
    whole = np.array(array, order="C")
    if whole.dtype.type.__module__ == "ml_dtypes":
        kind = onnx.helper.np_dtype_to_tensor_dtype(whole.dtype)
        return make.ortvalue_from_numpy_with_onnx_type(whole.view(f"u{whole.dtype.itemsize}"), kind)
    return make.ortvalue_from_numpy(whole)


def _array_of(value: Any) -> Any:
    if value.data_type() == "tensor(bfloat16)":
        # Through memory that both know, since the library hands out no array of it.
        target = np.zeros(value.shape(), np.uint16)
        ctypes.memmove(target.ctypes.data, value.data_ptr(), value.tensor_size_in_bytes())
        return target.view(ml_dtypes.bfloat16)
    return value.numpy() if value.is_tensor() else value


class NodesWorker(WorkerProcess):
    """A worker that serves what a publisher would release, under generated names, and a client that asks it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, max_body_bytes=64 * 2**20)
        self._scratch = directory / "scratch"
        self._scratch.mkdir()
        self._count = 0
        self.client = NodeClient(self.port)

    async def publish(self, trials: TrialRunner, data: bytes) -> str:
        """The name under which the board has it. Refuses what publishing refuses, for its reasons."""
        self._count += 1
        name = f"case_{self._count}"
        path = self._scratch / f"{name}.onnx"
        path.write_bytes(data)
        artifact = describe(path, lambda digest: model_object_key(name, digest))
        report = await trials.trial(path, artifact.sha256)
        path.unlink()
        if not report.ok:
            raise ModelRefused(report.reason)
        event = released(ReleaseRequest(model=name, path=path, author="tests"), artifact, report, None)
        self.node.release(
            data,
            model=name,
            version=event.version,
            batchable=event.batching.batchable,
            inputs=event.inputs,
            outputs=event.outputs,
        )
        return name

    def __exit__(self, *of: Any) -> None:
        self.client.close()
        super().__exit__(*of)


def run(chosen: Sequence[Case], worker: NodesWorker) -> list[Outcome]:
    """In batches: so many are released, waited for, asked and retired together."""
    return asyncio.run(_run(chosen, worker))


async def _run(chosen: Sequence[Case], worker: NodesWorker) -> list[Outcome]:
    outcomes: list[Outcome] = []
    async with TrialRunner() as trials:
        for start in range(0, len(chosen), BATCH):
            batch = chosen[start : start + BATCH]
            published = await asyncio.gather(*(_publish(case, worker, trials) for case in batch))
            outcomes += [judge(case, name, worker.client) for case, name in zip(batch, published, strict=True)]
            for name in published:
                if isinstance(name, str):
                    worker.node.retire(name)
    return outcomes


async def _publish(case: Case, worker: NodesWorker, trials: TrialRunner) -> str | MlcdnError:
    try:
        return await worker.publish(trials, case.data)
    except MlcdnError as error:
        return error


def judge(case: Case, name: str | MlcdnError, client: NodeClient) -> Outcome:
    """`name` is the model to ask, or why it was refused."""
    known = reference(case)
    if isinstance(name, MlcdnError):
        return _judge_refusal(case, known, name)
    if reason := client.await_ready(name, READY_S):
        return Outcome(case.name, Verdict.WRONG, reason)
    if not case.has_tensors_only:
        return Outcome(case.name, Verdict.WRONG, "served, though an input or output is no tensor")
    inputs, outputs = client.signature(name)
    if list(outputs) != list(case.wanted) or not set(case.inputs) <= set(inputs):
        return Outcome(case.name, Verdict.WRONG, f"its signature is {inputs} → {outputs}")
    if known.outputs is None:
        return _judge_failure(case, name, client, inputs, known.reason)
    answers: list[Arrays] = []
    try:
        if "BF16" not in (*inputs.values(), *outputs.values()):
            answers.append(client.ask_json(name, case.inputs, inputs))
        answers.append(client.ask_binary(name, case.inputs, inputs, list(outputs)))
    except AskFailed as error:
        return Outcome(case.name, Verdict.WRONG, str(error))
    for answer in answers:
        if difference := _unlike(answer, known.outputs):
            if _is_random(case, known.outputs):
                return Outcome(case.name, Verdict.AS_ORT, "random")
            return Outcome(case.name, Verdict.WRONG, f"not as onnxruntime: {difference}")
    differs = next(filter(None, map(case.differs, answers)), "")
    return Outcome(case.name, Verdict.AS_ORT if differs else Verdict.PASSED, differs)


def _judge_refusal(case: Case, known: Reference, refused: MlcdnError) -> Outcome:
    for pattern, reason in DESIGN:
        if pattern.search(str(refused)):
            return Outcome(case.name, Verdict.REFUSED, reason)
    if known.outputs is None and not known.loads:
        return Outcome(case.name, Verdict.FAILED, f"at publish: {refused}")
    return Outcome(case.name, Verdict.WRONG, f"refused: {refused}; onnxruntime: {known.reason or 'runs it'}")


def _judge_failure(case: Case, name: str, client: NodeClient, inputs: Mapping[str, str], reason: str) -> Outcome:
    try:
        client.ask_binary(name, case.inputs, inputs, list(case.wanted))
    except AskFailed as error:
        verdict = Verdict.FAILED if error.status in (400, 500) else Verdict.WRONG
        return Outcome(case.name, verdict, f"at the run: {error}")
    return Outcome(case.name, Verdict.WRONG, f"served, though onnxruntime in process says {reason}")


def _unlike(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first output that is not equal to the last bit; any NaN is like any other, as JSON has one only."""
    for name, want in wanted.items():
        have = got[name]
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            return f"{name!r} is {have.dtype} {have.shape}, not {want.dtype} {want.shape}"
        # -0.0 equals 0.0, but its sign must come through too.
        equal = have == want
        if want.dtype.kind == "f" or want.dtype == ml_dtypes.bfloat16:
            equal = np.where(np.isnan(want), np.isnan(have), equal & (np.signbit(have) == np.signbit(want)))
        if not np.all(equal):
            at = tuple(int(i) for i in np.unravel_index(int(np.argmin(equal)), want.shape))
            return f"{name!r}{list(at)} is {have[at]}, not {want[at]}"
    return ""


def _is_random(case: Case, first: Arrays) -> bool:
    """onnxruntime itself does not say the same twice."""
    again = reference(case).outputs
    return again is None or bool(_unlike(again, first))


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Counts by verdict, then by reason, then all that is wrong."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    yield f"{len(outcomes)} cases: " + ", ".join(f"{verdict} {counts[verdict]}" for verdict in Verdict)
    for verdict in (Verdict.REFUSED, Verdict.AS_ORT, Verdict.FAILED):
        reasons = Counter(_kind(outcome.reason) for outcome in outcomes if outcome.verdict is verdict)
        for reason, count in reasons.most_common():
            yield f"  {verdict}: {count} × {reason}"
    for outcome in outcomes:
        if outcome.verdict is Verdict.WRONG:
            yield f"  wrong: {outcome.case}: {outcome.reason}"


def _kind(reason: str) -> str:
    """Without names, numbers and places, so that like reasons count together."""
    for pattern, kind in _LIKE:
        reason = re.sub(pattern, kind, reason)
    return reason[:110]
