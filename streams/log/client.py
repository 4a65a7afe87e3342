"""What every Kafka client of ours is told alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Final

from confluent_kafka.admin import AdminClient

Settings = Mapping[str, str | int | float | bool]

QUIET: Final[dict[str, str | int | float | bool]] = {
    # Errors come as exceptions and through the logger; the library's own lines on stderr would bypass its rate limit.
    "log_level": 4,
    "socket.keepalive.enable": True,
    "broker.address.family": "v4",
    "allow.auto.create.topics": False,
}


def forward_logs() -> logging.Logger:
    """The logger that librdkafka writes to; `processes.logs` limits its rate."""
    return logging.getLogger("librdkafka")


def admin_client(settings: Settings) -> AdminClient:
    """One a broker for the life of the process; safe to use from any thread.

    It is never let go: a client whose question just timed out may be found by the garbage collector in its own thread,
    where its call-back runs, and a client that is destroyed there aborts the process.
    """
    return _admin_client(tuple(sorted(settings.items())))


@cache
def _admin_client(settings: tuple[tuple[str, str | int | float | bool], ...]) -> AdminClient:
    return AdminClient(dict(settings), logger=forward_logs())
