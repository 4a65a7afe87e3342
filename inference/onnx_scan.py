"""A static look at ONNX bytes before onnxruntime sees them: refuse what it would accept and must not.

Laws:
- Nothing outside the bytes may be read because of them. onnxruntime follows a hard link to a secret, a file in the
  working directory and even a memory address (`*/_ORT_MEM_ADDR_/*`) that a tensor names as its external data: any such
  tensor is refused, wherever it stands; but for a weight of the main graph whose file the caller lists
  (external_data.py).
- The walk follows the descriptors of the schema, so a new field that can hold a tensor is walked without being named
  here; and a message with fields that this schema does not know is refused, because what was not read was not checked.
- onnxruntime picks its other format, a flatbuffer, by four bytes; such a file would pass the walk unread and is
  refused.
- What was scanned is what runs: a function of the model never stands in for an operator of onnxruntime.
- A refusal says what and where (tensor, node, attribute); never the location that was named, since that is a path.

It must not know onnxruntime, files or releases. The digest is the caller's to check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]
from onnx import TensorProto

from inference.external_data import DataNotListed, LargeWeight, Outside, is_external, named
from schemas.errors import ModelRefused

DEFAULT_DOMAIN: Final = "ai.onnx"
# What onnxruntime 1.32 supports; a newer one is refused by it too. A test holds this against the installed one.
MAX_OPSETS: Final = ((DEFAULT_DOMAIN, 28), ("ai.onnx.ml", 5), ("com.microsoft", 1))
MAX_IR_VERSION: Final = 14
MAX_PROTOBUF_BYTES: Final = 2**31 - 1

# Each runs a graph an unknown number of times, so how long a run takes is not known from how long one took.
CONTROL_FLOW: Final = frozenset(
    {"Loop", "Scan", "If", "SequenceMap", "BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"}
)
# Where onnxruntime keeps operators for its own rewrites. It prefers an operator it has to a function of the same name
# that a model brings, so a function there would be scanned, and something else would run. A test holds this against the
# installed one, which does not list the last.
INTERNAL_DOMAINS: Final = frozenset({"com.microsoft.nchwc", "com.ms.internal.nhwc", "org.pytorch.aten"})
# Operators of an allowed domain that name files or code outside the model.
NAMES_OUTSIDE: Final = frozenset({"EPContext", "PythonOp", "PythonOpGrad", "ATen", "ExternalGraph"})

# Types of which several share a byte.
_PACKED_BITS: Final = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
}

_MAGIC: Final = (
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "a zip archive"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x7fELF", "a program"),
    (0, b"{", "JSON text"),
    (0, b"version https://git-lfs", "a Git LFS pointer"),
    (4, b"ORTM", "a model in onnxruntime's own format"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    *((0, bytes((0x80, protocol)), "a pickle") for protocol in range(2, 6)),
)


class ScanLimits(msgspec.Struct, frozen=True):
    """How large an artifact may be; the memory of the machine is the trial's business."""

    max_file_bytes: int = MAX_PROTOBUF_BYTES
    max_initializer_bytes: int = MAX_PROTOBUF_BYTES
    max_nodes: int = 100_000
    max_ir_version: int = MAX_IR_VERSION
    max_opsets: tuple[tuple[str, int], ...] = MAX_OPSETS  # also the list of allowed operator domains


DEFAULT_LIMITS: Final = ScanLimits()
NO_FILES: Final[Mapping[str, int]] = MappingProxyType({})


class ModelSummary(msgspec.Struct, frozen=True):
    ir_version: int
    opsets: tuple[tuple[str, int], ...]
    node_count: int  # in every graph and function, however deep
    initializer_bytes: int  # as types and dimensions declare; attributes' tensors and external data included
    has_control_flow: bool
    producer: str
    zipmaps: tuple[tuple[str, tuple[int | str, ...]], ...]  # value name → class labels, in the order of the columns
    large: tuple[LargeWeight, ...]  # what has to be handed over by itself
    unranked: tuple[str, ...]  # inputs and outputs without a shape; onnxruntime reports them like scalars


class _Step:
    """One message on the way down, and how it was reached; a place is spelled out only when something is refused."""

    __slots__ = ("message", "parent")

    def __init__(self, message: Any, parent: _Step | None) -> None:
        self.message = message
        self.parent = parent

    @property
    def is_weight(self) -> bool:
        """Whether it is an initializer of the main graph itself."""
        graph = self.parent
        return (
            graph is not None
            and isinstance(graph.message, onnx.GraphProto)
            and graph.parent is not None
            and isinstance(graph.parent.message, onnx.ModelProto)
        )

    def place(self) -> str:
        words = []
        step: _Step | None = self
        while step is not None and step.parent is not None:
            kind = step.message.DESCRIPTOR.name.removesuffix("Proto").lower()
            name = getattr(step.message, "name", "") or getattr(step.message, "op_type", "")
            words.append(f"{kind} {_quoted(name)}" if name else kind)
            step = step.parent
        return " in ".join(words)


def scan(data: bytes, limits: ScanLimits = DEFAULT_LIMITS, files: Mapping[str, int] = NO_FILES) -> ModelSummary:
    """What the model says about itself; ModelRefused if it must not be loaded. `files` are listed for external data: their
    sizes by name."""
    model = _parse(data, limits)
    opsets = _check_versions(model, limits)
    domains = {domain for domain, _ in limits.max_opsets}
    functions = {(f.domain, f.name) for f in model.functions}
    nodes = tensor_bytes = 0
    outside = Outside(files)
    control_flow = False
    for step in _walk(model):
        message = step.message
        if len(UnknownFieldSet(message)):
            raise ModelRefused(f"damaged, or from a newer exporter: unknown fields in {step.place() or 'the model'}")
        if isinstance(message, TensorProto):
            if is_external(message):
                if not files or not step.is_weight:
                    reason = f"external data is not allowed: {step.place()}"
                    raise DataNotListed(reason, named(model.graph.initializer) if step.is_weight else ())
                outside.take(message, _declared_bytes(step), step.place())
                continue
            tensor_bytes += _declared_bytes(step)
            if tensor_bytes > limits.max_initializer_bytes:
                raise ModelRefused(f"its tensors hold more than {limits.max_initializer_bytes} bytes")
        elif isinstance(message, onnx.NodeProto):
            nodes += 1
            if nodes > limits.max_nodes:
                raise ModelRefused(f"it has more than {limits.max_nodes} nodes")
            control_flow = control_flow or message.op_type in CONTROL_FLOW
            _check_operator(step, domains, functions)
    outside.check(model.graph.initializer)
    return ModelSummary(
        ir_version=model.ir_version,
        opsets=opsets,
        node_count=nodes,
        initializer_bytes=tensor_bytes + outside.bytes,
        large=tuple(outside.large),
        has_control_flow=control_flow,
        producer=f"{_text(model.producer_name)} {_text(model.producer_version)}".strip()[:100],
        zipmaps=tuple(_zipmaps(model.graph)),
        unranked=tuple(
            _text(value.name)
            for value in (*model.graph.input, *model.graph.output)
            if not value.type.tensor_type.HasField("shape")
            and not value.type.optional_type.elem_type.tensor_type.HasField("shape")
        ),
    )


def _parse(data: bytes, limits: ScanLimits) -> Any:
    if not data:
        raise ModelRefused("the file is empty")
    if len(data) > limits.max_file_bytes:
        raise ModelRefused(f"the file has {len(data)} bytes, more than the {limits.max_file_bytes} allowed")
    for offset, magic, what in _MAGIC:
        if data.startswith(magic, offset):
            raise ModelRefused(f"not an ONNX model but {what}")
    if data[:256].lstrip().startswith(b"<"):
        raise ModelRefused("not an ONNX model but HTML or XML text")
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        # protobuf has one exception for both; a good model must not be called damaged where memory was short.
        if "alloc failed" in str(error):
            raise MemoryError from error
        raise ModelRefused("not a whole ONNX model: the bytes are truncated, damaged or of another format") from None
    if model.ir_version < 1 or not model.HasField("graph") or not model.graph.output:
        raise ModelRefused("not a whole ONNX model: it has no version, no graph or no output")
    return model


def _check_versions(model: Any, limits: ScanLimits) -> tuple[tuple[str, int], ...]:
    if model.ir_version > limits.max_ir_version:
        raise ModelRefused(
            f"its IR version {model.ir_version} is above {limits.max_ir_version}, the newest served here"
        )
    if not model.opset_import:
        raise ModelRefused("not a whole ONNX model: it imports no operator set")
    newest = dict(limits.max_opsets)
    for owner in (model, *model.functions):
        for opset in owner.opset_import:
            domain = _text(opset.domain) or DEFAULT_DOMAIN
            if not 1 <= opset.version <= newest.get(domain, 2**31):
                known = newest.get(domain, "any")
                raise ModelRefused(
                    f"operator set {_quoted(domain)} {opset.version} is not supported, newest is {known}"
                )
    return tuple(sorted((_text(o.domain) or DEFAULT_DOMAIN, int(o.version)) for o in model.opset_import))


def _check_operator(step: _Step, domains: set[str], functions: set[tuple[str, str]]) -> None:
    node = step.message
    if (node.domain or DEFAULT_DOMAIN) in domains:
        if node.op_type in NAMES_OUTSIDE:
            raise ModelRefused(f"operator {_quoted(node.op_type)} refers to things outside the model: {step.place()}")
        return
    # A function of the model may stand in any domain of its own: its body is in the bytes and is walked like the rest.
    if (node.domain, node.op_type) not in functions or node.domain in INTERNAL_DOMAINS:
        operator = _quoted(f"{_text(node.domain)}.{_text(node.op_type)}")
        raise ModelRefused(f"operator {operator} is of an unknown domain: {step.place()}; known are {sorted(domains)}")


def _declared_bytes(step: _Step) -> int:
    # Not ByteSize(), which serializes: 90 ms for 100 MB. onnxruntime refuses a tensor that declares more than it holds.
    tensor = step.message
    if any(size < 0 for size in tensor.dims):
        raise ModelRefused(f"a negative dimension: {step.place()}")
    if tensor.data_type == TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    try:
        bits = _PACKED_BITS.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError, TypeError):
        raise ModelRefused(f"element type {tensor.data_type} is unknown: {step.place()}") from None
    return -(-int(math.prod(tensor.dims)) * bits // 8)


def _holders() -> frozenset[str]:
    """The message types through which a tensor or a node can be reached, from the schema itself."""
    targets = {TensorProto.DESCRIPTOR.full_name, onnx.NodeProto.DESCRIPTOR.full_name}
    children: dict[str, set[str]] = {}
    todo = [onnx.ModelProto.DESCRIPTOR]
    while todo:
        kind = todo.pop()
        if kind.full_name not in children:
            types = [field.message_type for field in kind.fields if field.message_type is not None]
            children[kind.full_name] = {t.full_name for t in types}
            todo += types
    reached = set(targets)
    while grown := {name for name, below in children.items() if below & reached} - reached:
        reached |= grown
    return frozenset(reached)


_HOLDERS: Final = _holders()


def _walk(model: Any) -> Iterator[_Step]:
    # Parsing stops at a depth of 100 messages, so no model makes this stack deep; wide it may be.
    todo = [_Step(model, None)]
    while todo:
        step = todo.pop()
        yield step
        if isinstance(step.message, TensorProto):
            continue  # holds no message that could hold one; listing its fields would copy its data
        for field, value in step.message.ListFields():
            if field.message_type is not None and field.message_type.full_name in _HOLDERS:
                todo.extend(_Step(child, step) for child in (value if field.is_repeated else (value,)))


def _zipmaps(graph: Any) -> Iterator[tuple[str, tuple[int | str, ...]]]:
    for node in graph.node:
        if node.op_type == "ZipMap" and node.domain == "ai.onnx.ml" and len(node.output) == 1:
            for attribute in node.attribute:
                if attribute.name == "classlabels_int64s" and attribute.ints:
                    yield _text(node.output[0]), tuple(attribute.ints)
                elif attribute.name == "classlabels_strings" and attribute.strings:
                    yield _text(node.output[0]), tuple(_text(s) for s in attribute.strings)


def _text(name: str | bytes) -> str:
    """protobuf hands out a name that is not UTF-8 as bytes."""
    return name if isinstance(name, str) else name.decode("utf-8", "replace")


def _quoted(name: str | bytes) -> str:
    name = _text(name)
    return repr(name if len(name) <= 120 else name[:119] + "…")
