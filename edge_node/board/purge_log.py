"""The purge log: one JSON line an invalidation, in position order. PURE.

Laws: only whole, readable lines count, and nothing after the first that is not; so a torn end is never half obeyed, and
whoever opens the log for writing cuts it off there. Reading a line twice does no harm: positions tell.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from streams.folds.invalidations import Purge

_DECODER = msgspec.json.Decoder(Purge)


def encode(purges: Iterable[Purge]) -> bytes:
    return b"".join(msgspec.json.encode(purge) + b"\n" for purge in purges)


def decode(data: bytes) -> tuple[list[Purge], int]:
    """The purges that `data` begins with, and how many of its bytes they take."""
    purges: list[Purge] = []
    taken = 0
    while (end := data.find(b"\n", taken)) >= 0:
        try:
            purges.append(_DECODER.decode(data[taken:end]))
        except msgspec.MsgspecError:
            break
        taken = end + 1
    return purges, taken
