"""What a verdict was judged by, kept in the object store: requests are kept for a day, verdicts for ever.

Law: a store that is away, or slow, delays no verdict: it has ARCHIVE_S, and then is left alone for a while.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from schemas import names
from schemas.errors import MlcdnError
from streams.folds.comparison import Comparison

ARCHIVE_S: Final = 1.0
LEFT_ALONE_S: Final = 10.0

log = structlog.get_logger()


class Store(Protocol):
    def put_bytes(self, key: str, data: bytes) -> bool: ...


class Archive:
    """One event loop owns it. Without a store it keeps nothing."""

    def __init__(self, store: Store | None, monotonic_s: Callable[[], float]) -> None:
        self._store, self._monotonic_s = store, monotonic_s
        self._away_until = 0.0

    async def keep(self, comparison: Comparison) -> str:
        """The SHA-256 of what was kept; empty where nothing was."""
        if self._store is None or self._monotonic_s() < self._away_until:
            return ""
        model = comparison.subject.model
        data = await asyncio.to_thread(comparison.archive)
        digest = hashlib.sha256(data).hexdigest()
        try:
            async with asyncio.timeout(ARCHIVE_S):
                await asyncio.to_thread(self._store.put_bytes, names.evidence_object_key(model, digest), data)
        except (MlcdnError, TimeoutError) as error:
            log.warning("evidence_not_archived", model=model, error=str(error))
            self._away_until = self._monotonic_s() + LEFT_ALONE_S
            return ""
        return digest
