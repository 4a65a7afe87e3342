"""The board: where a node's agent and its workers meet. A directory, ``<dir>/board/``, and no message ever.

    lock                      held by the one writer, for its life
    models.json               what is wanted and what is served (`BoardFile`); replaced whole
    purges-<generation>….log  what has been invalidated, a JSON line each; appended to, named by models.json
    fence                     64 KiB of u64 slots that only rise: what a request looks at (`Fence`)

Laws:
- Write order: file, fsync, rename, fsync of the folder, then the fence. Who sees the fence moved finds what moved it.
- A reader sees the old file or the new one, whole. A crash between two steps is repaired when the writer opens again.
- One writer: a second one is refused (`Conflict`).

A worker that sees slot 1 moved loads models.json; one that sees slot 0 moved reads the purges; both before it answers.
"""

from edge_node.board.disk import Disk, RealDisk
from edge_node.board.fence import (
    CAUGHT_UP,
    FIRST_MODEL,
    HEARTBEAT,
    INCARNATION,
    POLICY,
    PURGE,
    SLOTS,
    Fence,
    position_of,
    stamp,
)
from edge_node.board.models_file import BoardFile, BoardModel, LogIdentity
from edge_node.board.reader import BoardReader
from edge_node.board.writer import BoardWriter

__all__ = [
    "CAUGHT_UP",
    "FIRST_MODEL",
    "HEARTBEAT",
    "INCARNATION",
    "POLICY",
    "PURGE",
    "SLOTS",
    "BoardFile",
    "BoardModel",
    "BoardReader",
    "BoardWriter",
    "Disk",
    "Fence",
    "LogIdentity",
    "RealDisk",
    "position_of",
    "stamp",
]
