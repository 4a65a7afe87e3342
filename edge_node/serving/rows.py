"""Answered requests as rows, cheap to write one by one and taken apart in columns.

    a row   started_ns · latency_ns · cells, three items of one flat list: 0.2 us, and no object of its own
    cells   tier, status, model, sizes and key hash, packed; the same for every repeat of one answer, so packed once

Laws: writing a row is one `extend`; everything else happens when a batch is taken, in numpy (80 ns a row). A value that
its column cannot hold becomes the largest that it can. It must not know who reads the columns.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import numpy as np

from schemas.events import NO_MODEL, TIERS, ModelRef
from schemas.events.traffic import COLUMNS

TIER_INDEX: Final = {tier: index for index, tier in enumerate(TIERS)}
_PACKED: Final = ("tier", "status", "model", "request_bytes", "response_bytes", "key_hash")
_CELLS: Final = struct.Struct("<BHHIIQ")
_DTYPE: Final = np.dtype([(name, f"<u{COLUMNS[name]}") for name in _PACKED])
_U32: Final = 2**32 - 1
_A_ROW: Final = 3

Column = np.ndarray[Any, np.dtype[Any]]


class Taken(msgspec.Struct, frozen=True):
    """A batch of rows in columns; `models` are those that the column `model` counts from 0 on."""

    started_ns: int
    rows: int
    columns: Mapping[str, Column]
    models: tuple[ModelRef, ...]


class Rows:
    """One event loop owns it. `extend` is the list's own: ``extend((started_ns, latency_ns, cells))``."""

    def __init__(self) -> None:
        self._flat: list[Any] = []
        self.extend = self._flat.extend
        self._refs: dict[ModelRef, int] = {}

    def __len__(self) -> int:
        return len(self._flat) // _A_ROW

    def cells(self, tier: str, status: int, model: int, request_bytes: int, response_bytes: int, key: bytes) -> bytes:
        """`model` as `index_of` gave it."""
        return _CELLS.pack(
            TIER_INDEX[tier],
            status,
            model,
            min(request_bytes, _U32),
            min(response_bytes, _U32),
            int.from_bytes(key[:8], "little"),
        )

    def take(self, most: int) -> Taken | None:
        """The oldest rows; None where there are none."""
        flat = self._flat[: most * _A_ROW]
        if not flat:
            return None
        # In place: the doors hold on to the list.
        del self._flat[: most * _A_ROW]
        rows = len(flat) // _A_ROW
        started = np.fromiter(flat[0::_A_ROW], np.int64, rows)
        latency = np.fromiter(flat[1::_A_ROW], np.int64, rows)
        packed = np.frombuffer(b"".join(flat[2::_A_ROW]), _DTYPE)
        first = int(started.min())
        columns: dict[str, Column] = {name: packed[name] for name in _PACKED}
        columns["start_offset_us"] = np.minimum((started - first) // 1_000, _U32).astype("<u4")
        columns["latency_us"] = np.clip(latency // 1_000, 0, _U32).astype("<u4")
        columns["model"], models = self._local(packed["model"])
        return Taken(first, rows, columns, models)

    def discard(self, most: int) -> int:
        """Forgets the oldest rows; how many."""
        count = min(most, len(self))
        del self._flat[: count * _A_ROW]
        return count

    def index_of(self, model: ModelRef | None) -> int:
        if model is None:
            return NO_MODEL
        index = self._refs.get(model)
        if index is None:
            if len(self._refs) >= NO_MODEL:
                return NO_MODEL
            index = self._refs[model] = len(self._refs)
        return index

    def _local(self, column: Column) -> tuple[Column, tuple[ModelRef, ...]]:
        """Indexes of this process as indexes of the batch's own list."""
        refs = list(self._refs)
        used, local = np.unique(column, return_inverse=True)
        known = used[used != NO_MODEL]
        local = np.where(column == NO_MODEL, NO_MODEL, local).astype("<u2")
        return local, tuple(refs[index] for index in known)
