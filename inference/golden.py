"""Golden files: inputs and the outputs that a model must give for them, as `.npz` without pickle.

Laws:
- Members are `input.<name>` and `output.<name>`, nothing else. Strings are fixed-width; they become BYTES.
- A file is not trusted: the size of its table of contents, the number of members, how each is packed, every declared
  size and every array header is checked before its data is read, so neither a bomb nor an object array is ever unpacked.
- NaN equals NaN; integers, booleans and strings must be equal; floats within `atol + rtol * |wanted|`.
- The first difference is named: output, index, wanted, got.

It must not know sessions, processes or releases.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import numpy as np

from inference.datatypes import FREE, TensorSpec
from schemas.errors import MlcdnError

Array = np.ndarray[Any, np.dtype[Any]]

RTOL: Final = 1e-3
ATOL: Final = 1e-5
_MAX_HEADER: Final = 4096
_MAX_ENTRY: Final = 1024  # bytes of the table of contents a member, on average
_END_BYTES: Final = 22
_LOCATOR_BYTES: Final = 20
# zipfile stops these where the declared size ends; bzip2 and LZMA it unpacks as far as they go: 558 bytes took 800 MiB.
_UNPACKED_IN_BOUNDS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGED: Final = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError, RuntimeError)


class GoldenRefused(MlcdnError):
    """A golden file that cannot be used: nothing is said about the model."""

    status = 422


class GoldenLimits(msgspec.Struct, frozen=True):
    max_members: int = 256
    max_bytes: int = 256 * 2**20  # of all arrays together, unpacked


class Golden(msgspec.Struct, frozen=True):
    inputs: dict[str, Array]
    outputs: dict[str, Array]


class Difference(msgspec.Struct, frozen=True):
    output: str
    index: tuple[int, ...]
    wanted: str
    got: str
    # What differs: "value", or "shape", "type", "missing" for the tensor as a whole (then `index` is empty).
    kind: str = "value"

    def __str__(self) -> str:
        place = f"{self.output}[{', '.join(map(str, self.index))}]" if self.index else self.output
        what = "" if self.kind == "value" else f"{self.kind} "
        return f"output {place}: wanted {what}{self.wanted}, got {what}{self.got}"


DEFAULT_LIMITS: Final = GoldenLimits()


def read_golden(source: Path | IO[bytes], limits: GoldenLimits = DEFAULT_LIMITS) -> Golden:
    try:
        with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
            _check_contents(file, limits)
            with zipfile.ZipFile(file) as archive:
                return _read(archive, limits)
    except GoldenRefused:
        raise
    except _DAMAGED as error:
        raise GoldenRefused(f"not a usable .npz file ({type(error).__name__})") from error


def write_golden(target: Path | IO[bytes], inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """What `read_golden` reads. BYTES lose trailing NULs, since the format's strings are fixed-width."""
    arrays = {f"input.{name}": _fixed_width(a) for name, a in inputs.items()}
    arrays |= {f"output.{name}": _fixed_width(a) for name, a in outputs.items()}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            # A fixed date, so that the same arrays make the same bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def compare(
    wanted: Mapping[str, Array], got: Mapping[str, Array], rtol: float = RTOL, atol: float = ATOL
) -> Difference | None:
    """The first difference, in the order of `wanted` and of the elements; None if there is none."""
    for name, want in wanted.items():
        if name not in got:
            return Difference(name, (), "present", "absent", "missing")
        have = got[name]
        if want.dtype.kind != have.dtype.kind:
            return Difference(name, (), str(want.dtype), str(have.dtype), "type")
        if want.shape != have.shape:
            return Difference(name, (), str(want.shape), str(have.shape), "shape")
        equal = (
            np.isclose(have.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol, equal_nan=True)
            if want.dtype.kind == "f"
            else want == have
        )
        if not np.all(equal):
            index = tuple(int(i) for i in np.unravel_index(int(np.argmin(equal)), want.shape))
            return Difference(name, index, _show(want[index]), _show(have[index]))
    return None


def check_names(golden: Golden, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """GoldenRefused if the file names what the model does not have, or wants a shape that it never gives."""
    known = {spec.name: spec for spec in outputs}
    for name in golden.inputs:
        if name not in {spec.name for spec in inputs}:
            raise GoldenRefused(f"the golden file has input {name!r}, the model does not")
    for name, array in golden.outputs.items():
        if name not in known:
            raise GoldenRefused(f"the golden file has output {name!r}, the model does not")
        spec = known[name]
        fits = len(spec.shape) == array.ndim and all(
            w in (FREE, a) for w, a in zip(spec.shape, array.shape, strict=False)
        )
        if spec.ranked and not fits:
            raise GoldenRefused(f"golden output {name!r} has shape {array.shape}, the model gives {spec.shape}")


def _check_contents(file: IO[bytes], limits: GoldenLimits) -> None:
    # zipfile makes an object of every entry before they can be counted: 2 GB for a table of 200 MB.
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_BYTES - _LOCATOR_BYTES))
    locator, end = (tail := file.read())[:-_END_BYTES], tail[-_END_BYTES:]
    if len(end) < _END_BYTES or not end.startswith(b"PK\x05\x06") or not end.endswith(b"\0\0"):
        raise GoldenRefused("not a usable .npz file (it does not end like one)")
    if locator.startswith(b"PK\x06\x07"):
        # A second, 64-bit end would be believed instead; files of our size have none.
        raise GoldenRefused("not a usable .npz file (its table of contents is for a larger one)")
    table_bytes = int.from_bytes(end[12:16], "little")
    if table_bytes > limits.max_members * _MAX_ENTRY:
        raise GoldenRefused(f"its table of contents has {table_bytes} bytes, too much for {limits.max_members} arrays")


def _read(archive: zipfile.ZipFile, limits: GoldenLimits) -> Golden:
    members = archive.infolist()
    if len(members) > limits.max_members:
        raise GoldenRefused(f"more than {limits.max_members} arrays")
    if sum(member.file_size for member in members) > limits.max_bytes:
        raise GoldenRefused(f"more than {limits.max_bytes} bytes when unpacked")
    if any(member.compress_type not in _UNPACKED_IN_BOUNDS for member in members):
        raise GoldenRefused("its members must be stored or deflated")
    arrays: dict[str, dict[str, Array]] = {"input": {}, "output": {}}
    for member in members:
        side, _, name = member.filename.removesuffix(".npy").partition(".")
        if side not in arrays or not name or not member.filename.endswith(".npy"):
            raise GoldenRefused(f"unknown member {member.filename[:100]!r}; arrays are input.NAME and output.NAME")
        if name in arrays[side]:
            raise GoldenRefused(f"{side} {name[:100]!r} is there twice")
        with archive.open(member) as stream:
            arrays[side][name] = _read_array(stream, member.file_size, f"{side} {name[:100]!r}")
    if not arrays["output"]:
        raise GoldenRefused("no output to compare with")
    return Golden(arrays["input"], arrays["output"])


def _read_array(stream: IO[bytes], size: int, what: str) -> Array:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise GoldenRefused(f"{what}: unknown array format {version}")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream, max_header_size=_MAX_HEADER)
    if dtype.hasobject or dtype.names is not None or dtype.kind not in "biufSU":
        raise GoldenRefused(f"{what}: arrays of {dtype} are not read")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != size - stream.tell():
        raise GoldenRefused(f"{what}: its header declares {wanted} bytes, the file has {size - stream.tell()}")
    data = stream.read(wanted)
    if len(data) != wanted or stream.read(1):
        raise GoldenRefused(f"{what}: truncated")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return _bytes(array) if dtype.kind in "SU" else np.ascontiguousarray(array, dtype.newbyteorder("="))


def _bytes(array: Array) -> Array:
    result = np.empty(array.shape, object)
    result.reshape(-1)[:] = [e.encode() if isinstance(e, str) else bytes(e) for e in array.reshape(-1).tolist()]
    return result


def _fixed_width(array: Array) -> Array:
    if array.dtype != object:
        return array
    encoded = [e if isinstance(e, bytes) else str(e).encode() for e in array.reshape(-1)]
    return np.array(encoded or [b""], "S")[: len(encoded)].reshape(array.shape)


def _show(value: Any) -> str:
    return repr(value.item() if isinstance(value, np.generic) else value)[:100]
