"""How long a node takes to know a log: one that never saw it, and one that checked it in an earlier life.

    python -m bench.log_boot --kafka HOST:PORT --roots FILE

Reads the signed topics of a running Kafka through an agent's control, board and all, without a group; writes nothing to it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_node.agent.control import TOPICS, Control
from edge_node.board import INCARNATION, BoardWriter
from edge_node.board.log_memory import LogMemoryFile
from schemas.errors import EventRefused
from streams.log.keys import load_roots
from streams.log.reader import KafkaReader
from streams.log.writer import wall_clock_ms


@dataclass(frozen=True, slots=True)
class Boot:
    """`cpu_s` is of this process alone, reading included."""

    life: str
    records: int
    wall_s: float
    cpu_s: float

    @property
    def events_s(self) -> float:
        return self.records / self.cpu_s


def boots(kafka: str, roots: tuple[bytes, ...]) -> Iterator[Boot]:
    """The first life of a node, then its second."""
    with tempfile.TemporaryDirectory() as scratch:
        for life in ("first", "second"):
            board = BoardWriter(Path(scratch))
            board.fence.raise_to(INCARNATION, 1)
            try:
                yield _boot(life, KafkaReader(kafka), roots, board, LogMemoryFile(Path(scratch)))
            finally:
                board.close()


def _boot(life: str, reader: KafkaReader, roots: tuple[bytes, ...], board: BoardWriter, memory: LogMemoryFile) -> Boot:
    ids = {topic: reader.topic_id(topic) for topic in TOPICS}
    began, worked, records = time.perf_counter(), time.process_time(), 0
    control = Control(
        board,
        "bench",
        roots,
        lambda event, causation_id=None: None,
        fleet=lambda: {"node": "bench", "region": "bench", "worker": -1, "incarnation": 1},
        topic_ids=lambda: ids,
        now_ms=wall_clock_ms,
        on_desired=lambda desired, positions: None,
        memory=memory.read(),
    )
    for topic in TOPICS:
        for record in reader.read(topic, 0):
            records += 1
            try:
                control.on_record(record)
            except EventRefused:
                continue
    control.on_caught_up()
    found = Boot(life, records, time.perf_counter() - began, time.process_time() - worked)
    kept = control.to_remember()
    if not control.caught_up or kept is None:
        raise RuntimeError("the log changed between two lives")
    memory.write(kept)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kafka", required=True)
    parser.add_argument("--roots", required=True, type=Path)
    said = parser.parse_args()
    for boot in boots(said.kafka, load_roots(said.roots)):
        print(
            f"{boot.life:<7} {boot.records} records  {boot.wall_s:.2f} s  {boot.cpu_s:.2f} s of CPU"
            f"  {boot.events_s:,.0f} a second of CPU"
        )


if __name__ == "__main__":
    main()
