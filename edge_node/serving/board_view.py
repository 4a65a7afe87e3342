"""What a worker knows of the board: what to serve, what was purged, and whether the agent knows it all.

Laws:
- `catch_up` is called before every look-up and again after every await, so an answer obeys each purge that had been
  applied when it was given. While the fence has not moved it costs one read of shared memory (0.03 us).
- The stamp is read before the purges it covers: what is read after it can only be more.
- Serving needs no board that can be read: what is known stays, and while purges cannot be read nothing cached counts.

It must not know caches, models in memory or requests.
"""

from __future__ import annotations

import time
from typing import Final

import structlog

from edge_node.board import BoardFile, BoardReader, Fence, position_of
from schemas.errors import MlcdnError
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds.invalidations import PurgeMap

PURGES, POLICY, HEARTBEAT, CAUGHT_UP, INCARNATION = range(5)
HEARTBEAT_LATE_S: Final = 5.0

log = structlog.get_logger()


class BoardView:
    """One event loop owns it. `purges` is live: it changes in `catch_up` and nowhere else."""

    def __init__(self, reader: BoardReader, fence: Fence) -> None:
        self._reader, self._fence = reader, fence
        self.board: BoardFile | None = None
        self.purges = PurgeMap()
        self.stamp = 0
        # False while the purges that the fence announces cannot be read.
        self.purges_known = True
        self._purge_offset = 0
        self._policy = -1
