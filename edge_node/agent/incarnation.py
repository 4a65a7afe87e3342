"""The node's incarnation, when the disk forgot it: a counter that must rise above whatever the fleet last heard.

The parent raises slot 4 of the fence by one at every start, and that is enough as long as the disk is kept. A node
whose disk was wiped or restored begins too low, and its reports would be taken for those of an earlier life.
"""

from __future__ import annotations

from typing import Final

from schemas import codec
from schemas.errors import EventRefused
from schemas.events.fleet import FleetEvent
from schemas.topics import FLEET
from streams.log.record import LogReader

# Records read from the end of each partition: the last ones of a node that was away for a moment, and for a day.
WINDOWS: Final = (1_000, 50_000)


def corrected(current: int, heard: int) -> int:
    """The incarnation to go on with. PURE.

    `heard` may be this very life, except in its first incarnation: a fresh disk cannot tell, and one more does no harm.
    """
    first = current == 1 and heard == 1
    return heard + 1 if heard > current or first else current


def last_heard(reader: LogReader, node: str) -> int:
    """The highest incarnation of the node that the end of ``mlcdn.fleet`` tells of; 0 for none. Blocks."""
    key = node.encode()
    for window in WINDOWS:
        heard = 0
        for partition in range(reader.partitions(FLEET.name)):
            low, high = reader.watermarks(FLEET.name, partition)
            for record in reader.read(FLEET.name, partition, max(low, high - window), high):
                if record.key != key:
                    continue
                try:
                    event = codec.decode(record.topic, record.key, record.value, record.headers).event
                except EventRefused:
                    continue
                if isinstance(event, FleetEvent):
                    heard = max(heard, event.incarnation)
        if heard:
            return heard
    return 0
