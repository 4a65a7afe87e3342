"""One ONNX model in memory: the bytes that were verified are the bytes that are loaded, and what they ask for is
checked.

Laws:
- The file is read once. Its SHA-256, the scan and the session see the same bytes, so no swap of the file falls between
  them; and so for each file of weights beside it (external_data.py).
- A session is made from bytes, with one provider, threads as told and without spinning.
- What the model says no to is the caller's fault (BadTensor); what breaks is ours (RunFailed). Neither message has a
  path.
- `run` is synchronous and may take long: call it in a thread, or in a loop only if the model was measured to be fast.

What a signature says and which tensors fit it is in onnx_signature.py. It must not know releases, caches, HTTP or batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from inference import datatypes, external_data
from inference.datatypes import FREE, TensorSpec
from inference.deadlines import WATCHDOG, Deadline
from inference.external_data import Beside, DataFile
from inference.onnx_scan import DEFAULT_LIMITS, ModelSummary, ScanLimits, scan
from inference.onnx_signature import bits, check_tensor, input_spec, output_spec, to_text
from inference.runtime import FAILURES, LOG_FATAL, InvalidArgument, is_out_of_memory, onnxruntime, reason_of
from schemas.errors import BadTensor, DeadlineExceeded, MlcdnError, ModelRefused

_NO_MEMORY = "not enough memory to load it"

Array = np.ndarray[Any, np.dtype[Any]]


class RunFailed(MlcdnError):
    """The model broke on an input that its signature allows."""

    status = 500

    def __init__(self, message: str, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class SessionSettings(msgspec.Struct, frozen=True):
    intra_op_threads: int = 1
    inter_op_threads: int = 1
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    # The arena keeps what a run needed for the next one; measured without effect on time at one thread.
    memory_arena: bool = True
    scan_limits: ScanLimits = DEFAULT_LIMITS


class OnnxModel:
    """Made by `load` or `from_bytes`. Runs may overlap: a session is safe to use from many threads."""

    def __init__(self, session: Any, digests: tuple[str, ...], summary: ModelSummary, size_bytes: int) -> None:
        self.sha256, self.digests = digests[0], digests  # the ONNX file's; all files'
        self.summary = summary
        self.size_bytes = size_bytes
        self._session: Any = session
        labels = dict(summary.zipmaps)
        unranked = frozenset(summary.unranked)
        required = [input_spec(node, unranked, False) for node in session.get_inputs()]
        overridable = [input_spec(node, unranked, True) for node in session.get_overridable_initializers()]
        self.inputs: tuple[TensorSpec, ...] = (*required, *overridable)
        self.outputs: tuple[TensorSpec, ...] = tuple(
            output_spec(node, unranked, labels.get(node.name)) for node in session.get_outputs()
        )
        self.output_names = tuple(spec.name for spec in self.outputs)
        self._inputs = {spec.name: spec for spec in self.inputs}
        self._outputs = {spec.name: spec for spec in self.outputs}
        # The names of the inputs' leading dimensions, where the exporter named them: rows share one, or are not rows.
        self.leading_names = frozenset(
            n.shape[0] for n in session.get_inputs() if n.shape and isinstance(n.shape[0], str)
        )
        self._strings = frozenset(s.name for s in self.inputs if s.datatype == "BYTES")
        self._binding = any(s.datatype == "BF16" for s in (*self.inputs, *self.outputs))
        # Most models need no translation of their outputs: they take the short way in `run`.
        self._translated = frozenset(s.name for s in self.outputs if s.labels is not None or s.datatype == "BYTES")

    @classmethod
    def load(
        cls, path: Path, sha256: str, settings: SessionSettings | None = None, files: Sequence[DataFile] = ()
    ) -> Self:
        """The ONNX file at `path`, with the listed `files` of weights."""
        settings = settings or SessionSettings()
        try:
            with path.open("rb") as file:
                # One byte more than allowed is enough to know; a growing file must not grow here.
                data = file.read(settings.scan_limits.max_file_bytes + 1)
        except OSError as error:
            raise ModelRefused(f"the file cannot be read: {error.strerror}") from error
        try:
            return cls.from_bytes(data, sha256, settings, external_data.read(files))
        except MemoryError as error:
            raise ModelRefused(_NO_MEMORY) from error

    @classmethod
    def from_bytes(
        cls, data: bytes, sha256: str, settings: SessionSettings | None = None, beside: Sequence[Beside] = ()
    ) -> Self:
        settings = settings or SessionSettings()
        actual = hashlib.sha256(data).hexdigest()
        if actual != sha256.lower():
            raise ModelRefused(f"its SHA-256 is {actual}, not {sha256.lower()}")
        try:
            summary = scan(data, settings.scan_limits, {file.name: len(file.content) for file in beside})
        except MemoryError as error:
            raise ModelRefused(_NO_MEMORY) from error
        for file in beside:
            if (found := hashlib.sha256(file.content).hexdigest()) != file.sha256:
                raise ModelRefused(f"the SHA-256 of its file {file.name} is {found}, not {file.sha256}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.intra_op_threads
        options.inter_op_num_threads = settings.inter_op_threads
        options.enable_cpu_mem_arena = settings.memory_arena
        options.log_severity_level = LOG_FATAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        if beside:
            # It copies what it needs while the session is made, and opens no file for a name that is not among these.
            options.add_external_initializers_from_files_in_memory(
                [file.name for file in beside],
                [file.content for file in beside],
                [len(file.content) for file in beside],
            )
            contents = {file.name: file.content for file in beside}
            make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
            values = [make(weight.array(contents[weight.file]), weight.onnx_type) for weight in summary.large]
            options.add_external_initializers([weight.tensor for weight in summary.large], values)
        try:
            session = onnxruntime.InferenceSession(data, options, providers=list(settings.providers))
        except (InvalidArgument, *FAILURES) as error:
            if is_out_of_memory(error):
                raise ModelRefused(_NO_MEMORY) from error
            raise ModelRefused(f"onnxruntime cannot load it: {reason_of(error)}") from error
        try:
            digests = (actual, *(file.sha256 for file in beside))
            return cls(session, digests, summary, len(data) + sum(len(file.content) for file in beside))
        except UnicodeError as error:
            raise ModelRefused("the name of an input or output is not UTF-8") from error

    def validate_inputs(self, inputs: Mapping[str, Array]) -> None:
        """BadTensor unless names, types, ranks, fixed dimensions and string elements are what the signature says."""
        for name in inputs:
            if name not in self._inputs:
                raise BadTensor(f"unknown input {name[:80]!r}; the model has {sorted(self._inputs)}")
        for spec in self.inputs:
            if spec.name in inputs:
                check_tensor(spec, inputs[spec.name])
            elif not spec.optional:
                raise BadTensor(f"input {spec.name!r} is missing")

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None, deadline: Deadline | None = None
    ) -> dict[str, Array]:
        """The wanted outputs by name. Inputs are those that `validate_inputs` passed."""
        session = self._session
        if session is None:
            raise RunFailed("the model is closed")
        names = self.output_names if outputs is None else outputs
        for name in names:
            if name not in self._outputs:
                raise BadTensor(f"unknown output {name[:80]!r}; the model has {list(self._outputs)}")
        feed = {name: to_text(name, a) if name in self._strings else a for name, a in inputs.items()}
        if deadline is None:
            values = self._call(session, names, feed, None)
        else:
            if deadline.passed:
                raise DeadlineExceeded("the deadline passed before the model ran")
            with WATCHDOG.watch(deadline) as watch:
                try:
                    values = self._call(session, names, feed, watch.options)
                except MlcdnError:
                    if watch.fired:
                        raise DeadlineExceeded("the model was stopped at its deadline") from None
                    raise
        if not self._translated:
            return dict(zip(names, values, strict=True))
        return {n: self._translate(n, v) if n in self._translated else v for n, v in zip(names, values, strict=True)}

    def warm(self, golden: Mapping[str, Array] | None = None, deadline: Deadline | None = None) -> None:
        """One run before traffic: on `golden` inputs, else on zeros, which a model may refuse without harm."""
        try:
            self.run(golden if golden is not None else self.zeros(), None, deadline)
        except (BadTensor, RunFailed):
            # Zeros are a guess (an empty string, an index out of range); a golden input is not.
            if golden is not None:
                raise

    def zeros(self, rows: int = 1) -> dict[str, Array]:
        """Required inputs full of zeros, `rows` in each free leading dimension and 1 in every other free one."""
        return {
            spec.name: np.full(
                [(rows if i == 0 else 1) if d == FREE else d for i, d in enumerate(spec.shape)],
                b"" if spec.datatype == "BYTES" else 0,
                dtype=spec.dtype,
            )
            for spec in self.inputs
            if not spec.optional
        }

    @property
    def is_open(self) -> bool:
        return self._session is not None

    def close(self) -> None:
        """Let the session go. A run in another thread ends first: it holds its own reference."""
        self._session = None

    def reopen(self, other: Self) -> None:
        """With the session of `other`, which is of the same bytes and gives it away."""
        if other.digests != self.digests:
            raise ValueError("another model's session")
        self._session, other._session = other._session, None

    def _call(self, session: Any, names: Sequence[str], feed: dict[str, Array], options: Any) -> list[Any]:
        try:
            if self._binding:
                return self._call_with_values(session, names, feed, options)
            values: list[Any] = session.run(names, feed, options)
            return values
        except InvalidArgument as error:
            raise BadTensor(f"the model refuses this input: {reason_of(error)}") from error
        except UnicodeError as error:
            raise RunFailed("the model's string output is not UTF-8") from error
        except FAILURES as error:
            if is_out_of_memory(error):
                raise RunFailed("not enough memory for this run", out_of_memory=True) from error
            raise RunFailed(f"the run failed: {reason_of(error)}") from error

    def _call_with_values(self, session: Any, names: Sequence[str], feed: dict[str, Array], options: Any) -> list[Any]:
        """The longer way (39 us instead of 9) that numpy's lack of bfloat16 makes necessary."""
        make = onnxruntime.OrtValue
        # Not np.ascontiguousarray, which makes one dimension of none.
        values = {
            name: make.ortvalue_from_numpy_with_onnx_type(np.asarray(array, order="C"), datatypes.BY_NAME["BF16"].onnx)
            if self._inputs[name].datatype == "BF16"
            else make.ortvalue_from_numpy(np.asarray(array, order="C"))
            for name, array in feed.items()
        }
        results = session.run_with_ort_values(names, values, options)
        return [
            bits(r) if self._outputs[n].datatype == "BF16" else r.numpy() for n, r in zip(names, results, strict=True)
        ]

    def _translate(self, name: str, value: Any) -> Array:
        spec = self._outputs[name]
        if spec.labels is None:
            flat = np.empty(value.shape, object)
            flat.ravel()[:] = [text.encode() for text in value.ravel()]
            return flat
        rows = [[row[label] for label in spec.labels] for row in value if row]
        return np.array(rows, spec.dtype).reshape(len(rows), len(spec.labels))
