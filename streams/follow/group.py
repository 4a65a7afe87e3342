"""The group's committed positions: where Faust begins, and nothing that correctness rests on. Best effort, bounded.

A commit from outside is refused while a member of an earlier life still holds the group (up to its session timeout
after a kill -9): then Faust begins lower, and what is known is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import structlog
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition

from streams.follow.app import FollowSpec
from streams.log.client import QUIET, admin_client
from streams.log.record import TopicPartition as At

log = structlog.get_logger(__name__)

_TIMEOUT_S: Final = 5.0


class GroupPositions:
    """Blocking: call it from a thread."""

    def __init__(self, spec: FollowSpec) -> None:
        self._group = spec.group
        settings = {**QUIET, "bootstrap.servers": spec.bootstrap, **spec.security}
        self._admin = admin_client(settings)

    def committed(self) -> dict[At, int]:
        asked = ConsumerGroupTopicPartitions(self._group)
        try:
            found = self._admin.list_consumer_group_offsets([asked], request_timeout=_TIMEOUT_S)[self._group].result()
        except KafkaException as error:
            log.info("committed positions not read", group=self._group, error=error.args[0].str())
            return {}
        return {(p.topic, p.partition): p.offset for p in found.topic_partitions or () if p.offset >= 0}

    def commit(self, positions: Mapping[At, int]) -> bool:
        wanted = ConsumerGroupTopicPartitions(
            self._group,
            [TopicPartition(topic, partition, position) for (topic, partition), position in positions.items()],
        )
        try:
            changed = self._admin.alter_consumer_group_offsets([wanted], request_timeout=_TIMEOUT_S)
            refused = [p.error for p in changed[self._group].result().topic_partitions or () if p.error is not None]
        except KafkaException as error:
            refused = [error.args[0]]
        if refused:
            log.info("positions not committed", group=self._group, error=refused[0].str())
        return not refused
