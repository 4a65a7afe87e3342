"""What commands write: tables and lines for people, one JSON document for programs, progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from streams.log.record import LogReader, Record, TopicPartition

BAR_AFTER_S: Final = 1.0
_BAR_EVERY: Final = 4_096

# Not a terminal: a table goes to a file or a program, and must not be folded at an invented width.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]


def document(value: Any) -> None:
    """One JSON document, keys in the order they were made."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    out.print(drawn)


def say(line: str) -> None:
    out.print(line, markup=False)


def progress(line: str) -> None:
    err.print(line, style="dim", markup=False)


@contextmanager
def watched(reader: LogReader, topics: Iterable[str], *, shown: bool) -> Iterator[LogReader]:
    """The reader, with a bar on stderr for as long as its reads last: on a terminal, and once they have lasted a second."""
    if not (shown and err.is_terminal):
        yield reader
        return
    places = [(topic, partition) for topic in topics for partition in range(reader.partitions(topic))]
    total = sum(high - low for low, high in (reader.watermarks(*place) for place in places))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=err, transient=True)
    task = bar.add_task("records", total=total)
    watching = _Watched(reader, bar, task)
    try:
        yield watching
    finally:
        bar.stop()


class _Watched:
    """A reader that counts what it reads."""

    def __init__(self, reader: LogReader, bar: Progress, task: Any) -> None:
        self._reader, self._bar, self._task = reader, bar, task
        self._due = time.monotonic() + BAR_AFTER_S

    def read(self, topic: str, partition: int, start: int = 0, end: int | None = None) -> Iterator[Record]:
        count = 0
        for record in self._reader.read(topic, partition, start, end):
            count += 1
            if count % _BAR_EVERY == 0:
                self._advance(_BAR_EVERY)
            yield record
        self._advance(count % _BAR_EVERY)

    def _advance(self, count: int) -> None:
        self._bar.advance(self._task, count)
        if not self._bar.live.is_started and time.monotonic() > self._due:
            self._bar.start()

    def topic_id(self, topic: str) -> str:
        return self._reader.topic_id(topic)

    def partitions(self, topic: str) -> int:
        return self._reader.partitions(topic)

    def watermarks(self, topic: str, partition: int) -> tuple[int, int]:
        return self._reader.watermarks(topic, partition)

    def offset_at(self, topic: str, partition: int, timestamp_ms: int) -> int:
        return self._reader.offset_at(topic, partition, timestamp_ms)

    def tail(self, starts: Mapping[TopicPartition, int]) -> AsyncGenerator[Record]:
        return self._reader.tail(starts)
