"""What every Kafka client of ours is told alike."""

from __future__ import annotations

import logging
from typing import Final

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
