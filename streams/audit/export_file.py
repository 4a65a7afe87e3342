"""An export into a file, which may be killed at any moment and goes on where it was.

    FILE          the lines; being written, it may end in half a line
    FILE.resume   the plan, and a point up to which the file stands on the disk; gone once the export is complete

1. The plan is written before the file is made. 2. Lines are appended. 3. Every few seconds: the file is flushed to the disk,
then the point replaces the one before in one rename. 4. To go on: lines after the point are counted, half a line
is cut off. 5. Complete: the file is flushed, then the point goes.

Laws: what is left behind at any moment leads to the same bytes as a run without an end; a file that is there is never
replaced; one process writes. It must not know what a line says beyond its first three fields.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from schemas.errors import BadInput, Conflict
from streams.audit.export import Place, Plan, line, told
from streams.log.record import LogReader

_POINT_S: Final = 2.0
_LINES: Final = 1_000


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The first `size` bytes of the file are `lines` whole lines, and `positions` are what comes next, as in the plan.

    `asked` are the words that led to the plan.
    """

    version: int = 1
    asked: tuple[str, ...]
    plan: Plan
    size: int = 0
    lines: int = 0
    positions: tuple[int, ...]

    def by_place(self) -> dict[Place, int]:
        return {part.place: at for part, at in zip(self.plan.parts, self.positions, strict=True)}


class _Begin(msgspec.Struct):
    topic: str
    partition: int
    position: int


def resumable(path: Path) -> Path:
    return path.with_name(path.name + ".resume")


def is_begun(path: Path) -> bool:
    """Whether there is an export into `path`, complete or not."""
    return path.exists() or resumable(path).exists()


def begin(path: Path, what: Plan, asked: tuple[str, ...] = ()) -> None:
    """1. `Conflict` if there is such a file, or an export that was not ended."""
    for there in (path, resumable(path)):
        if there.exists():
            raise Conflict(f"{there} is there already; --resume goes on with an export")
    _keep(path, Point(asked=asked, plan=what, positions=tuple(part.start for part in what.parts)))


def read_point(path: Path) -> Point | None:
    """Where an export into `path` was; None if there is none, or it is complete."""
    try:
        raw = resumable(path).read_bytes()
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(raw, type=Point)
    except msgspec.DecodeError as error:
        raise BadInput(f"{resumable(path)} is no point to go on from: {error}") from None


def carry_on(path: Path, reader: LogReader) -> int:
    """2 to 5: exports what is still to come, and returns how many lines the file has."""
    with _only_writer(path) as file:
        point = _caught_up(path, file)
        positions, lines, size = point.by_place(), point.lines, point.size
        due = time.monotonic() + _POINT_S
        waiting: list[bytes] = []
        for said in told(reader, point.plan, positions):
            waiting.append(line(said))
            record = said.record
            positions[record.topic, record.partition] = record.offset + 1
            if len(waiting) < _LINES:
                continue
            size, lines = size + _write(file, waiting), lines + len(waiting)
            waiting.clear()
            if time.monotonic() > due:
                os.fsync(file)
                point = _point(point, size, lines, positions)
                _keep(path, point)
                due = time.monotonic() + _POINT_S
        _write(file, waiting)
        os.fsync(file)
        resumable(path).unlink()
        return lines + len(waiting)


def _write(file: int, lines: list[bytes]) -> int:
    said = memoryview(b"".join(lines))
    size = len(said)
    while said:
        said = said[os.write(file, said) :]
    return size


def _point(before: Point, size: int, lines: int, positions: dict[Place, int]) -> Point:
    at = tuple(positions[part.place] for part in before.plan.parts)
    return msgspec.structs.replace(before, size=size, lines=lines, positions=at)


@contextmanager
def _only_writer(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
    except BlockingIOError:
        raise Conflict(f"another process writes {path}") from None
    finally:
        os.close(file)


def _caught_up(path: Path, file: int) -> Point:
    """4. The point moved to the last whole line of the file, and the file cut there."""
    point = read_point(path)
    if point is None:
        raise Conflict(f"{path} is complete")
    if (size := os.fstat(file).st_size) < point.size:
        raise Conflict(f"{path} has {size} bytes of the {point.size} that were written: it was cut or replaced")
    positions, at, lines = point.by_place(), point.size, point.lines
    with path.open("rb") as written:
        written.seek(at)
        for said in written:
            if not said.endswith(b"\n"):
                break
            try:
                first = msgspec.json.decode(said, type=_Begin)
            except msgspec.DecodeError:
                # After the point nothing was promised: a machine that died leaves holes.
                break
            positions[first.topic, first.partition] = first.position + 1
            at, lines = at + len(said), lines + 1
    os.ftruncate(file, at)
    return _point(point, at, lines, positions)


def _keep(path: Path, point: Point) -> None:
    final = resumable(path)
    half = final.with_name(final.name + ".half")
    with half.open("wb") as file:
        file.write(msgspec.json.encode(point))
        file.flush()
        os.fsync(file.fileno())
    half.replace(final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
