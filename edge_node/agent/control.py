"""What the node knows of the two control topics, and the way of an invalidation to the fence.

    releases       record → fold → `Desired` → the installer
    invalidations  record → fold → purge log → slot 0 of the fence → InvalidationApplied, with its milliseconds

Laws:
- A purge is on the board before its record counts as handled; when the disk takes none it is kept and tried again, and
  no receipt is given before it is there.
- Slot 3 says *caught up* only when every purge up to the high watermark is on the board. Until then purges are
  gathered: on a fresh node they are written in one go.
- A record that this node refused in an earlier life is not dead-lettered again.
- While the releases topic is not the log it was, or disputes itself, what is desired stays what it was before, and what is
  served with it. Purges act in any case, once their signatures hold: they only take away. A topic whose positions are used
  a second time begins a generation of the board, in which nothing cached before counts.
- What was read without checking signatures, because an earlier life had, acts only once it is known to be the same log.

It must not know Faust, artifacts or workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog

from edge_node.agent.log_watch import LogWatch
from edge_node.agent.reconcile import Desired
from edge_node.agent.rejections import Say
from edge_node.board import CAUGHT_UP, INCARNATION, BoardWriter, LogIdentity
from edge_node.board.log_memory import LogMemory
from schemas import codec
from schemas.errors import EventRefused
from schemas.events import InvalidationApplied
from schemas.metrics import gauge
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds import invalidations, releases
from streams.folds.checkpoints import Alarm
from streams.folds.invalidations import Invalidations, Purge, PurgeMap
from streams.folds.releases import Releases
from streams.log.record import Record

TOPICS: Final = (RELEASES.name, INVALIDATIONS.name)
# A purge log several times as long as what it says is written anew.
COMPACT_ABOVE_BYTES: Final = 16 * 2**20
_BYTES_PER_PURGE: Final = 512

log = structlog.get_logger()


class Control:
    """One event loop owns it. `on_record`, `on_caught_up` and `on_recreated` are what a follower calls.

    `memory` is what an earlier life left. Once `doubted`, all that was read is good for nothing: what `to_remember` gives is
    to be written, and another life to begin.
    """

    def __init__(
        self,
        board: BoardWriter,
        node: str,
        roots: tuple[bytes, ...],
        say: Say,
        *,
        fleet: Callable[[], dict[str, Any]],
        topic_ids: Callable[[], dict[str, str]],
        now_ms: Callable[[], int],
        on_desired: Callable[[Desired | None, dict[str, int]], None],
        memory: LogMemory | None = None,
    ) -> None:
        self._board, self._node, self._roots, self._say = board, node, roots, say
        self._fleet, self._topic_ids, self._now_ms, self._on_desired = fleet, topic_ids, now_ms, on_desired
        self._releases = Releases.initial(roots)
        self._invalidations = Invalidations.initial(roots)
        self._map = PurgeMap()
        self._pending: list[tuple[Purge, int]] = []
        # Event ids of what the log has at the position of the board's last purge, once that was read.
        self._last_found: str | None = None
        self.caught_up = self.doubted = False
        memory = memory or LogMemory()
        self._watches = {topic: LogWatch(topic, memory.topics.get(topic)) for topic in TOPICS}
        self._alarms, self._alarms_new = memory.alarms, False
        # What the releases topic last said while it could be believed; None where that was in an earlier life.
        self._good: Releases | None = None
        self._desired: Desired | None = None

    @property
    def positions(self) -> dict[str, int]:
        """Of the last records obeyed."""
        good = self._good.position if self._good is not None else -1
        return {RELEASES.name: good, INVALIDATIONS.name: self._invalidations.position}

    def on_record(self, record: Record) -> None:
        """Folds one record; raises EventRefused for one that must not act."""
        topic = record.topic
        known = self._watches[topic].signature(record, self._topic_ids().get(topic, ""))
        refused = self._release(record, known) if topic == RELEASES.name else self._invalidation(record, known)
        if self.caught_up:
            gauge("mlcdn_log_position").labels(topic).set(record.offset)
            if topic == RELEASES.name:
                self._want()
            self._on_desired(self._desired, self.positions)
        if refused is not None and record.offset > self._folded_before(topic):
            raise refused

    def on_caught_up(self) -> None:
        """Everything up to the high watermarks is folded: it goes on the board, then slot 3 says so."""
        ids = self._topic_ids()
        releases_watch, purges_watch = self._watches[RELEASES.name], self._watches[INVALIDATIONS.name]
        was = self._board.file.log if self._board.file is not None else None
        same = [
            releases_watch.settle(ids[RELEASES.name], was.releases_id if was else None),
            purges_watch.settle(ids[INVALIDATIONS.name], was.invalidations_id if was else None, self._purge_lost()),
        ]
        if not all(same):
            log.error("not_the_log_that_was_checked", same=dict(zip(TOPICS, same, strict=True)))
            self.doubted = True
            return
        identity = LogIdentity(
            releases_id=releases_watch.identity,
            invalidations_id=purges_watch.identity,
            catalogue=codec.catalogue_digest(),
        )
        self._board.begin(self._node, identity)
        self.caught_up = True
        self.flush()
        if releases_watch.another:
            self._good = None
        elif not releases_watch.holds:
            self._good = self._releases
        self._want()
        self.look()
        for topic, state in ((RELEASES.name, self._releases), (INVALIDATIONS.name, self._invalidations)):
            gauge("mlcdn_log_position").labels(topic).set(state.position)
        self._on_desired(self._desired, self.positions)
        log.info("caught_up", positions=self.positions, models=len(self._releases.models))

    def on_recreated(self, topic: str) -> None:
        """The topic was deleted and made again: what it said is folded anew, and until then nothing is planned."""
        self.caught_up = False
        self._on_desired(None, self.positions)
        self._watches[topic].begin_again()
        if topic == RELEASES.name:
            self._releases, self._good = Releases.initial(self._roots), None
        else:
            self._invalidations, self._map, self._last_found = Invalidations.initial(self._roots), PurgeMap(), None
            self._pending.clear()

    def flush(self) -> None:
        """Puts gathered purges on the board; called again until the disk takes them."""
        if not self.caught_up:
            return
        if self._pending:
            try:
                new = {purge.position for purge in self._board.append_purges(purge for purge, _ in self._pending)}
            except OSError as error:
                log.error("purges_not_written", waiting=len(self._pending), error=error.strerror)
                return
            self._receipts([(purge, at) for purge, at in self._pending if purge.position in new])
            self._pending.clear()
        self._board.fence.raise_to(CAUGHT_UP, self._board.fence[INCARNATION])

    def look(self) -> None:
        """Says which alarms are in force; a line in the log whenever one begins or ends."""
        if not self.caught_up:
            return
        found = {topic: watch.alarms(self._now_ms()) for topic, watch in self._watches.items()}
        for topic in TOPICS:
            for reason in Alarm:
                what, was = found[topic].get(reason), str(reason) in self._alarms.get(topic, {})
                gauge("mlcdn_log_alarm").labels(topic, str(reason)).set(what is not None)
                if what is not None and not was:
                    log.error("log_alarm", topic=topic, reason=str(reason), what=what)
                if what is None and was:
                    log.warning("log_alarm_over", topic=topic, reason=str(reason))
        said = {topic: {str(reason): what for reason, what in by.items()} for topic, by in found.items() if by}
        self._alarms_new |= said != self._alarms
        self._alarms = said

    def to_remember(self) -> LogMemory | None:
        """What the next life is to know, when it is worth a write."""
        worth = self._alarms_new or any(watch.worth_remembering for watch in self._watches.values())
        if not self.doubted and not (self.caught_up and worth):
            return None
        self._alarms_new = False
        return LogMemory(
            topics={topic: watch.remember(checked=not self.doubted) for topic, watch in self._watches.items()},
            alarms=self._alarms,
        )

    def compact(self) -> bool:
        """Begins a shorter purge log when the old one is long for what it says. The caller holds the board."""
        wanted = max(COMPACT_ABOVE_BYTES, 4 * len(self._map) * _BYTES_PER_PURGE)
        if not self.caught_up or self._pending or self._board.purge_bytes <= wanted:
            return False
        purges = self._map.purges()
        if purges and purges[-1].position == self._board.last_purge:
            purges[-1] = msgspec.structs.replace(purges[-1], cause=self._board.last_cause)
        self._board.compact_purges(purges)
        return True

    def _purge_lost(self) -> bool:
        """Whether the log has not, or no longer, at its position what was obeyed last."""
        last = self._board.last_cause
        return last != "" and self._last_found != last

    def _folded_before(self, topic: str) -> int:
        """How far an earlier life came in the very same topic."""
        file = self._board.file
        if file is None or self.caught_up:
            return -1
        known = file.log.releases_id if topic == RELEASES.name else file.log.invalidations_id
        return file.positions.get(topic, -1) if known == self._topic_ids().get(topic) else -1

    def _want(self) -> None:
        self._desired = Desired.of(self._good, self._fleet()["region"]) if self._good is not None else None

    def _release(self, record: Record, known: bool | None) -> EventRefused | None:
        step = releases.fold(self._releases, record, known)
        self._releases = step.state
        watch = self._watches[RELEASES.name]
        watch.take(record, step.envelope.event if step.envelope else None, step.refused)
        if not watch.holds:
            self._good = self._releases
        return step.refused

    def _invalidation(self, record: Record, known: bool | None) -> EventRefused | None:
        step = invalidations.fold(self._invalidations, record, known)
        self._invalidations = step.state
        event = step.envelope.event if step.envelope else None
        self._watches[INVALIDATIONS.name].take(record, event, step.refused)
        purge = invalidations.purge_of(step)
        if purge is not None:
            if not self.caught_up and purge.position == self._board.last_purge:
                self._last_found = purge.cause
            self._map.apply(purge)
            self._pending.append((purge, record.timestamp_ms))
            self.flush()
        return step.refused

    def _receipts(self, applied: list[tuple[Purge, int]]) -> None:
        """A receipt says that all purges up to its position are obeyed: one will do for those of a boot."""
        for purge, appended_ms in applied[-1:]:
            ms = max(0.0, float(self._now_ms() - appended_ms))
            self._say(
                InvalidationApplied(**self._fleet(), position=purge.position, ms=ms),
                causation_id=purge.cause,
            )
