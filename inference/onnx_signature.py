"""A session's signature in our words, and the tensors that cross it: which may go in, how text and bfloat16 do.

Laws:
- What cannot be served is refused when the model is loaded (ModelRefused); what does not fit is the caller's fault
  (BadTensor), and the message names the input.
- BYTES are UTF-8, as ONNX has it; anything else is refused, because onnxruntime would change it.

It must not know sessions, runs or deadlines.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from inference import datatypes
from inference.datatypes import FREE, TensorSpec
from schemas.errors import BadTensor, ModelRefused

Array = np.ndarray[Any, np.dtype[Any]]


def input_spec(node: Any, unranked: frozenset[str], overridable: bool) -> TensorSpec:
    kind = datatypes.of_tensor(node.type)
    if kind is None:
        raise ModelRefused(f"input {node.name!r} is a {node.type}, which cannot be served")
    optional = overridable or node.type.startswith("optional(")
    ranked = node.name not in unranked
    return TensorSpec(node.name, kind.name, _shape(node, ranked), optional=optional, ranked=ranked)


def output_spec(node: Any, unranked: frozenset[str], labels: tuple[int | str, ...] | None) -> TensorSpec:
    kind = datatypes.of_tensor(node.type)
    if kind is not None:
        ranked = node.name not in unranked
        return TensorSpec(node.name, kind.name, _shape(node, ranked), ranked=ranked)
    kind = datatypes.of_zipmap(node.type)
    if kind is None or labels is None:
        raise ModelRefused(f"output {node.name!r} is a {node.type}, which cannot be served")
    return TensorSpec(node.name, kind.name, (FREE, len(labels)), labels=labels)


def _shape(node: Any, ranked: bool) -> tuple[int, ...]:
    if not ranked and not node.shape:
        return (FREE,)
    return tuple(d if isinstance(d, int) and d >= 0 else FREE for d in node.shape)


def check_tensor(spec: TensorSpec, array: Array) -> None:
    if array.dtype != spec.dtype:
        raise BadTensor(f"input {spec.name!r} is {array.dtype}, the model takes {spec.datatype} ({spec.dtype})")
    if not spec.ranked:
        return
    if array.ndim != len(spec.shape):
        raise BadTensor(f"input {spec.name!r} has {array.ndim} dimensions, the model takes {len(spec.shape)}")
    for index, (actual, wanted) in enumerate(zip(array.shape, spec.shape, strict=True)):
        if wanted not in (FREE, actual):
            raise BadTensor(f"input {spec.name!r} has {actual} in dimension {index}, the model takes {wanted}")


def to_text(name: str, array: Array) -> Array:
    text = np.empty(array.shape, object)
    flat = text.reshape(-1)
    for index, element in enumerate(array.reshape(-1)):
        if isinstance(element, bytes):
            try:
                flat[index] = element.decode()
            except UnicodeDecodeError:
                raise BadTensor(f"input {name!r}, element {index}: not UTF-8, which ONNX strings are") from None
        elif isinstance(element, str) and _is_utf8(element):
            flat[index] = element
        elif isinstance(element, str):
            raise BadTensor(f"input {name!r}, element {index}: a lone surrogate is no text")
        else:
            # onnxruntime would take str() of anything, and so answer for b'a' what it answers for "b'a'".
            raise BadTensor(f"input {name!r}, element {index}: {type(element).__name__} is neither bytes nor str")
    return text


def _is_utf8(text: str) -> bool:
    # Only a surrogate has no UTF-8 form; nearly all text says so at once.
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def bits(value: Any) -> Array:
    """A copy of a bfloat16 tensor as uint16; the library offers no other way to it."""
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(raw, np.uint16).reshape(value.shape())
