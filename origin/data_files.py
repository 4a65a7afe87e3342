"""The files of weights that a model names, found beside its ONNX file and described.

Laws: a file is taken by its plain name, out of the model's own folder, and only where it is a regular file of no other
name: a link of either kind may lead to what nobody meant to release. It must not know trials, stores or logs.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from inference.external_data import DataFile
from schemas import names
from schemas.errors import ModelRefused
from schemas.events import File
from streams.artifacts import describe


def described(path: Path, model: str, wanted: Sequence[str]) -> tuple[File, ...]:
    """The files of those names beside `path`; `ModelRefused` where one is not there or is no plain file."""
    for name in wanted:
        _check(path.parent / names.file_name(name))
    return tuple(
        File(
            name=name,
            artifact=describe(path.parent / name, lambda digest: names.data_object_key(model, digest)),
        )
        for name in wanted
    )


def beside(path: Path, files: Sequence[File]) -> tuple[DataFile, ...]:
    """Where they lie until they are stored."""
    return tuple(
        DataFile(file.name, str(path.parent / file.name), file.artifact.sha256, file.artifact.size_bytes)
        for file in files
    )


def _check(path: Path) -> None:
    try:
        found = path.lstat()
    except OSError as error:
        raise ModelRefused(f"the file {path.name} that it names is not beside it: {error.strerror}") from None
    if stat.S_ISLNK(found.st_mode):
        raise ModelRefused(f"{path.name} is a symbolic link")
    if not stat.S_ISREG(found.st_mode):
        raise ModelRefused(f"{path.name} is not a regular file")
    if found.st_nlink > 1:
        raise ModelRefused(f"{path.name} is a hard link: the same file has {found.st_nlink} names")
