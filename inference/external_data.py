"""Weights that lie beside an ONNX file: what a tensor may say of them, and the files themselves.

Laws:
- A tensor names a listed file by its plain name and a range within it, and nothing else: no address, no folder, no packed
  weights of onnxruntime's own.
- Files are read whole into memory of ours and onnxruntime is given that memory, so what was verified is what is loaded,
  whatever happens to the files meanwhile; no name in a model leads onnxruntime to a file system.
- Tensors together take no more than the files have: a small file is not read as a thousand large tensors.
- Who looks for names is told plain ones only; any other stays unsaid, since it is a path.

It must not know graphs, onnxruntime or releases.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
import numpy as np
from onnx import TensorProto, helper

from schemas.errors import ModelRefused
from schemas.events import File
from schemas.events.control import MAX_FILES
from schemas.names import FILE_NAME

DATA: Final = "data"
_NUMBER: Final = re.compile("[0-9]{1,15}")
_SAID: Final = ("location", "offset", "length")
_KEYS: Final = frozenset({*_SAID, "checksum"})
LARGE_BYTES: Final = 2**31
_READ_BYTES: Final = 16 * 2**20
# What a tensor may hold itself, and one whose data is elsewhere may not.
_OWN: Final = tuple(
    f.name for f in TensorProto.DESCRIPTOR.fields if f.name.endswith("_data") and f.name != "external_data"
)


class DataFile(msgspec.Struct, frozen=True):
    """A file of weights: what the model calls it, where it lies, and what it must hold."""

    name: str
    path: str
    sha256: str
    size_bytes: int


class Beside(msgspec.Struct, frozen=True):
    """A file of weights in memory. `content` is not yet verified."""

    name: str
    sha256: str
    content: bytearray


class LargeWeight(msgspec.Struct, frozen=True):
    """A tensor of 2 GiB and more. onnxruntime copies smaller ones into its graph; this it is to be given as a value."""

    tensor: str
    file: str
    offset: int
    size_bytes: int
    onnx_type: int
    dims: tuple[int, ...]

    def array(self, content: bytearray) -> np.ndarray[Any, np.dtype[Any]]:
        """Its elements, where they lie in the file's content; numpy's type of another size than the element's is refused."""
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(self.onnx_type))
        if dtype.itemsize * math.prod(self.dims) != self.size_bytes:
            raise ModelRefused(f"{self.tensor[:80]!r} is too large for its element type")
        plain = np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" or dtype.num >= 256 else dtype
        found = np.frombuffer(content, plain, math.prod(self.dims), self.offset).reshape(self.dims)
        return np.require(found, requirements="A")


class DataNotListed(ModelRefused):
    """External data where none, or another, is listed. `names` are the plain ones that the model asks for."""

    def __init__(self, reason: str, names: tuple[str, ...]) -> None:
        super().__init__(reason)
        self.names = names


def is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL or tensor.external_data)


def named(tensors: Iterable[Any]) -> tuple[str, ...]:
    """The files that the tensors name, each a plain name; none where one is not, or there are too many."""
    found = {entry.value for t in tensors if is_external(t) for entry in t.external_data if entry.key == "location"}
    plain = len(found) <= MAX_FILES and all(isinstance(name, str) and FILE_NAME.fullmatch(name) for name in found)
    return tuple(sorted(found)) if plain else ()


class Outside:
    """What a model's tensors take of the listed files, whose `sizes` are by name."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._named: set[str] = set()
        self.bytes = 0
        self.large: list[LargeWeight] = []

    def take(self, tensor: Any, declared_bytes: int, place: str) -> None:
        """ModelRefused where the tensor's reference is not one to a part of a listed file."""
        said = {entry.key: entry.value for entry in tensor.external_data}
        whole = tensor.data_location == TensorProto.EXTERNAL and len(said) == len(tensor.external_data)
        if not whole or not said.keys() <= _KEYS:
            raise ModelRefused(f"its reference to external data is not one that is served here: {place}")
        if any(getattr(tensor, field) for field in _OWN):
            raise ModelRefused(f"it holds data and refers to external data: {place}")
        # Text that is not UTF-8 comes as bytes.
        name, offset, length = (
            str(said.get(k, other)) for k, other in zip(_SAID, ("", "0", declared_bytes), strict=True)
        )
        if name not in self._sizes:
            shown = f"external data in {name!r}" if FILE_NAME.fullmatch(name) else "external data"
            raise ModelRefused(f"{shown}, which is not listed: {place}")
        if not _NUMBER.fullmatch(offset) or not _NUMBER.fullmatch(length) or int(length) != declared_bytes:
            raise ModelRefused(f"its part of {name} is not the {declared_bytes} bytes that its shape needs: {place}")
        if int(offset) + declared_bytes > self._sizes[name]:
            raise ModelRefused(f"its part of {name} ends behind the file's {self._sizes[name]} bytes: {place}")
        self._named.add(name)
        self.bytes += declared_bytes
        if declared_bytes >= LARGE_BYTES:
            dims = tuple(tensor.dims)
            self.large.append(LargeWeight(tensor.name, name, int(offset), declared_bytes, tensor.data_type, dims))

    def check(self, weights: Iterable[Any]) -> None:
        """After the last of them; `weights` are all of the model's, external or not."""
        if self.bytes > (size := sum(self._sizes.values())):
            raise ModelRefused(f"its tensors take {self.bytes} bytes of files that have {size}")
        if unused := sorted(self._sizes.keys() - self._named):
            raise ModelRefused(f"the file {unused[0]} is listed, and no tensor names it")
        # What is handed over by its name has it alone.
        names = Counter(weight.name for weight in weights) if self.large else Counter()
        if any(names[weight.tensor] != 1 for weight in self.large):
            raise ModelRefused("two weights of the model have one name")


def stored(files: Iterable[File], folder: Path) -> tuple[DataFile, ...]:
    """A release's files where artifacts are kept: under their digests."""
    return tuple(
        DataFile(
            file.name, str(stored_at(file.artifact.sha256, folder)), file.artifact.sha256, file.artifact.size_bytes
        )
        for file in files
    )


def stored_at(sha256: str, folder: Path) -> Path:
    return folder / f"{sha256}.{DATA}"


def read(files: Iterable[DataFile]) -> tuple[Beside, ...]:
    """All of them, from where they lie."""
    found = []
    for file in files:
        try:
            with open(file.path, "rb", buffering=0, opener=_opened) as opened:
                found.append(content(file, opened))
        except OSError as error:
            raise ModelRefused(f"the file {file.name} cannot be read: {error.strerror}") from error
    return tuple(found)


def content(file: DataFile, opened: BinaryIO) -> Beside:
    """Its bytes, in memory that nobody else writes."""
    found = os.fstat(opened.fileno()).st_size
    if found != file.size_bytes:
        raise ModelRefused(f"the file {file.name} has {found} bytes, not {file.size_bytes}")
    content = bytearray(found)
    view, read = memoryview(content), 0
    while read < found:
        count = opened.readinto(view[read : read + _READ_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise ModelRefused(f"the file {file.name} became shorter while it was read")
        read += count
    view.release()
    return Beside(file.name, file.sha256, content)


def _opened(path: str, flags: int) -> int:
    # Nothing that is put in a file's place may lead elsewhere, or wait.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
