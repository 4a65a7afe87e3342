"""What every event is. PURE."""

from __future__ import annotations

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all events. `key` is the Kafka record key of its topic."""

    @property
    def key(self) -> str:
        raise TypeError(f"{type(self).__name__} names no record key: it is no event of a topic")

    @property
    def kind(self) -> str:
        """The event's name, as in ``ce_type`` and in the topic catalogue."""
        return type(self).__name__
