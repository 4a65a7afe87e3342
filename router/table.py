"""The routing table as this router has it: the last one published, kept on disk for a start without Kafka.

Laws: a (term, number) at or below the one at hand is refused, unless the topic was made again; the table is never
dropped for its age, and its age is always told.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import structlog

from schemas.events import RoutedNode, RoutesPublished

log = structlog.get_logger(__name__)


class Table:
    """`received_at` is this process's monotonic clock, seconds; None for a table from the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.routes: RoutesPublished | None = None
        self.received_at: float | None = None
        self._load()

    @property
    def nodes(self) -> tuple[RoutedNode, ...]:
        return self.routes.nodes if self.routes is not None else ()

    def age_s(self, monotonic: float) -> float | None:
        """Seconds since a table came from the log; None when none has since the start."""
        return None if self.received_at is None else monotonic - self.received_at

    def offer(self, routes: RoutesPublished, monotonic: float) -> bool:
        """Takes a newer table; False for one that is not."""
        known = self.routes
        fresh_start = self.received_at is None
        if known is not None and not fresh_start and (routes.term, routes.number) <= (known.term, known.number):
            return False
        changed = known is None or known.nodes != routes.nodes
        self.routes, self.received_at = routes, monotonic
        if changed:
            self._save(routes)
        return True

    def _load(self) -> None:
        try:
            self.routes = msgspec.msgpack.decode(self._path.read_bytes(), type=RoutesPublished)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError, ValueError) as error:
            log.warning("the last table cannot be read", error=str(error))

    def _save(self, routes: RoutesPublished) -> None:
        temporary = self._path.with_suffix(".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.msgpack.encode(routes))
            os.replace(temporary, self._path)
        except OSError as error:
            # Routing goes on from memory; only a start without Kafka would miss it.
            log.warning("the table was not kept", error=str(error))
