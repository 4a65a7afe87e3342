"""What happens to one record: dropped, handled, or handled after the gap before it was read.

Laws: a partition's records are handled in order, each once in the life of the process, whoever brings them (the boot
read, Faust, a gap read, the watchdog's read): each feeder began at or below the position, so what is below it now is
known, and what is at it or above is next. The position moves after the handler, in one step of the event loop. No
exception leaves this room but the log's own: a handler that raises makes a dead letter (after the fifth exception Faust
stops a topic for good, and says nothing).

It must not know Faust, groups or commits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog

from schemas.errors import EventRefused, MlcdnError, Refusal
from streams.follow.dead_letters import DeadLetters
from streams.log.record import LogReader, Record
from streams.log.record import TopicPartition as At

log = structlog.get_logger(__name__)


class Intake:
    """`positions` are the next to be handled, `delivered` the next that Faust owes.

    `judged` are positions below which an earlier life of this process has written its dead letters already.
    """

    def __init__(self, reader: LogReader, on_record: Callable[[Record], None], dead_letters: DeadLetters) -> None:
        self._reader, self._on_record, self._dead_letters = reader, on_record, dead_letters
        self.positions: dict[At, int] = {}
        self.delivered: dict[At, int] = {}
        self.judged: dict[At, int] = {}

    def take(self, record: Record) -> None:
        """One record of an ordered read that began at or below the position."""
        at = (record.topic, record.partition)
        if record.offset < self.positions[at]:
            return
        refused = self._refusal(record)
        if refused is not None:
            again = record.offset < self.judged.get(at, 0)
            if self._dead_letters.reject(record, refused, again=again) and refused.__cause__ is not None:
                log.error("handler failed", topic=at[0], offset=record.offset, exc_info=refused.__cause__)
        self.positions[at] = record.offset + 1

    async def deliver(self, record: Record) -> None:
        """One record from Faust, which may repeat records and has been seen to leave some out."""
        at = (record.topic, record.partition)
        if at not in self.positions:
            # A partition that was added since: it is found, and read from its start, by the next attempt.
            return
        if record.offset > self.positions[at] and not await self._fill_gap(at, record.offset):
            return
        self.delivered[at] = max(self.delivered.get(at, 0), record.offset + 1)
        # Still above the position after the gap was read: what lay between was compacted or deleted.
        self.take(record)

    def forget(self, topic: str) -> None:
        """The topic's positions mean nothing any more."""
        for known in (self.positions, self.delivered, self.judged):
            for at in [at for at in known if at[0] == topic]:
                del known[at]

    def raise_to(self, lows: Mapping[At, int]) -> None:
        """Below its low watermark a partition holds nothing to wait for."""
        for at, low in lows.items():
            if self.positions[at] < low:
                log.error("records were deleted before they were read", topic=at[0], start=self.positions[at], end=low)
                self.positions[at] = low

    def _refusal(self, record: Record) -> EventRefused | None:
        try:
            self._on_record(record)
        except EventRefused as refused:
            return refused
        # Whatever a handler's bug may be, the next record must be handled.
        except Exception as error:  # noqa: BLE001 (becomes a dead letter, with its traceback in the log)
            failed = EventRefused(Refusal.HANDLER_FAILED, f"{type(error).__name__}: {error}")
            failed.__cause__ = error
            return failed
        return None

    async def _fill_gap(self, at: At, end: int) -> bool:
        """False when the log could not be read: the position stays, and the next record or the watchdog tries again."""
        topic, partition = at
        start = self.positions[at]
        log.info("reading a gap", topic=topic, partition=partition, start=start, end=end)
        try:
            missed = await asyncio.to_thread(lambda: list(self._reader.read(topic, partition, start, end)))
        except MlcdnError as error:
            log.warning("gap not read", topic=topic, partition=partition, error=str(error))
            return False
        # The topic may have been forgotten meanwhile.
        if at not in self.positions:
            return False
        for record in missed:
            self.take(record)
        return True
