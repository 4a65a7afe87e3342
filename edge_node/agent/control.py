"""What the node knows of the two control topics, and the way of an invalidation to the fence.

    releases       record → fold → `Desired` → the installer
    invalidations  record → fold → purge log → slot 0 of the fence → InvalidationApplied, with its milliseconds

Laws:
- A purge is on the board before its record counts as handled; when the disk takes none it is kept and tried again, and
  no receipt is given before it is there.
- Slot 3 says *caught up* only when every purge up to the high watermark is on the board. Until then purges are
  gathered: on a fresh node they are written in one go.
- A record that this node refused in an earlier life is not dead-lettered again.

It must not know Faust, artifacts or workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import structlog

from edge_node.agent.reconcile import Desired
from edge_node.agent.rejections import Say
from edge_node.board import CAUGHT_UP, INCARNATION, BoardWriter, LogIdentity
from schemas import codec
from schemas.errors import EventRefused
from schemas.events import InvalidationApplied
from schemas.metrics import gauge
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds import invalidations, releases
from streams.folds.invalidations import Invalidations, Purge, PurgeMap
from streams.folds.releases import Releases
from streams.log.record import Record

TOPICS: Final = (RELEASES.name, INVALIDATIONS.name)
# A purge log several times as long as what it says is written anew.
COMPACT_ABOVE_BYTES: Final = 16 * 2**20
_BYTES_PER_PURGE: Final = 512

log = structlog.get_logger()


class Control:
    """One event loop owns it. `on_record`, `on_caught_up` and `on_recreated` are what a follower calls."""

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
    ) -> None:
        self._board, self._node, self._roots, self._say = board, node, roots, say
        self._fleet, self._topic_ids, self._now_ms, self._on_desired = fleet, topic_ids, now_ms, on_desired
        self._releases = Releases.initial(roots)
        self._invalidations = Invalidations.initial(roots)
        self._map = PurgeMap()
        self._pending: list[tuple[Purge, int]] = []
        self.caught_up = False
        self._desired = Desired()

    @property
    def positions(self) -> dict[str, int]:
        return {RELEASES.name: self._releases.position, INVALIDATIONS.name: self._invalidations.position}

    def on_record(self, record: Record) -> None:
        """Folds one record; raises EventRefused for one that must not act."""
        topic = record.topic
        refused = self._release(record) if topic == RELEASES.name else self._invalidation(record)
        gauge("mlcdn_log_position").labels(topic).set(record.offset)
        if self.caught_up:
            if topic == RELEASES.name:
                self._desired = Desired.of(self._releases, self._fleet()["region"])
            self._on_desired(self._desired, self.positions)
        if refused is not None and record.offset > self._folded_before(topic):
            raise refused

    def on_caught_up(self) -> None:
        """Everything up to the high watermarks is folded: it goes on the board, then slot 3 says so."""
        ids = self._topic_ids()
        identity = LogIdentity(
            releases_id=ids[RELEASES.name],
            invalidations_id=ids[INVALIDATIONS.name],
            catalogue=codec.catalogue_digest(),
        )
        self._board.begin(self._node, identity)
        self.caught_up = True
        self.flush()
        self._desired = Desired.of(self._releases, self._fleet()["region"])
        self._on_desired(self._desired, self.positions)
        log.info("caught_up", positions=self.positions, models=len(self._releases.models))

    def on_recreated(self, topic: str) -> None:
        """The topic was deleted and made again: what it said is folded anew, and until then nothing is planned."""
        self.caught_up = False
        self._on_desired(None, self.positions)
        if topic == RELEASES.name:
            self._releases = Releases.initial(self._roots)
        else:
            self._invalidations, self._map = Invalidations.initial(self._roots), PurgeMap()
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

    def compact(self) -> bool:
        """Begins a shorter purge log when the old one is long for what it says. The caller holds the board."""
        wanted = max(COMPACT_ABOVE_BYTES, 4 * len(self._map) * _BYTES_PER_PURGE)
        if not self.caught_up or self._pending or self._board.purge_bytes <= wanted:
            return False
        self._board.compact_purges(self._map.purges())
        return True

    def _folded_before(self, topic: str) -> int:
        """How far an earlier life came in the very same topic."""
        file = self._board.file
        if file is None or self.caught_up:
            return -1
        known = file.log.releases_id if topic == RELEASES.name else file.log.invalidations_id
        return file.positions.get(topic, -1) if known == self._topic_ids().get(topic) else -1

    def _release(self, record: Record) -> EventRefused | None:
        step = releases.fold(self._releases, record)
        self._releases = step.state
        return step.refused

    def _invalidation(self, record: Record) -> EventRefused | None:
        step = invalidations.fold(self._invalidations, record)
        self._invalidations = step.state
        purge = invalidations.purge_of(step)
        if purge is not None:
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
