"""What a worker knows of the board: what to serve, what was purged, and whether the agent knows it all.

Laws:
- `catch_up` is called before every look-up and again after every await, so an answer obeys each purge that had been
  applied when it was given. While the fence has not moved it costs two reads of shared memory (0.03 us each).
- The stamp is read before the purges it covers: what is read after it can only be more.
- Serving needs no board that can be read: what is known stays, and while purges cannot be read nothing cached counts.

It must not know caches, models in memory or requests.
"""

from __future__ import annotations

import time
from typing import Final

import structlog

from edge_node.board import HEARTBEAT, POLICY, PURGE, BoardFile, BoardReader, position_of
from schemas.topics import INVALIDATIONS
from streams.folds.invalidations import PurgeMap
from streams.folds.releases import desired_digest

HEARTBEAT_LATE_S: Final = 5.0

log = structlog.get_logger()


class BoardView:
    """One event loop owns it. `board` is another object whenever it changed; `purges` changes in `catch_up` only."""

    def __init__(self, reader: BoardReader) -> None:
        self._reader, self._fence = reader, reader.fence
        self.board: BoardFile | None = None
        self.purges = PurgeMap()
        # Whether every purge up to `stamp` is in `purges`.
        self.purges_known = True
        self._stamp, self._policy, self._generation, self._purge_offset = -1, -1, 0, 0
        self._digest: tuple[BoardFile, str] | None = None
        self.catch_up()

    def catch_up(self) -> int:
        """Obeys what the fence announces; returns the stamp that is obeyed from here on."""
        stamp, policy = self._fence[PURGE], self._fence[POLICY]
        if stamp != self._stamp or policy != self._policy:
            self._read(stamp, policy)
        return stamp

    @property
    def shared_tiers_count(self) -> bool:
        """Redis and disk hold entries from before this incarnation: they count once the agent has caught up."""
        return self._fence.caught_up and self.board is not None

    @property
    def slots(self) -> memoryview:
        """The fence, to read from."""
        return self._fence.slots

    @property
    def namespace(self) -> str:
        return self.board.log.namespace if self.board is not None else ""

    @property
    def heartbeat_age_s(self) -> float | None:
        """None before the agent's first."""
        beat = self._fence[HEARTBEAT]
        return max(0.0, time.time() - beat / 1e3) if beat else None

    @property
    def positions(self) -> dict[str, int]:
        """Last positions obeyed, by topic."""
        known = dict(self.board.positions) if self.board is not None else {}
        return known | {INVALIDATIONS.name: max(known.get(INVALIDATIONS.name, -1), position_of(self._stamp))}

    @property
    def log_alarms(self) -> dict[str, dict[str, str]]:
        """What the agent says is wrong with the log itself; read from the disk, so never on a request's path."""
        try:
            return self._reader.log_alarms()
        except OSError as error:
            log.error("log_memory_unreadable", cause=error.strerror)
            return {}

    @property
    def desired_digest(self) -> str:
        board = self.board
        if board is None:
            return desired_digest({})
        if self._digest is None or self._digest[0] is not board:
            self._digest = (board, desired_digest(board.desired))
        return self._digest[1]

    def _read(self, stamp: int, policy: int) -> None:
        try:
            if policy != self._policy:
                board = self._reader.load()
                if board is not None:
                    self.board, self._policy = board, policy
            if self.board is not None and self.board.generation != self._generation:
                # Another log: its positions start again, and entries of the old one are in another namespace.
                self.purges, self._purge_offset, self._generation = PurgeMap(), 0, self.board.generation
            purges, self._purge_offset = self._reader.read_purges(self._purge_offset)
        except OSError as error:
            self.purges_known = False
            log.error("board_unreadable", cause=error.strerror)
            return
        for purge in purges:
            self.purges.apply(purge)
        self.purges_known = self.board is not None or not policy
        self._stamp = stamp
