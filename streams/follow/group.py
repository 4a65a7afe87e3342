"""The group's committed positions: where Faust begins, and nothing that correctness rests on. Best effort, bounded.

A commit from outside is refused while a member of an earlier life still holds the group (up to its session timeout
after a kill -9): then Faust begins lower, and what is known is dropped.

It asks as a consumer that never joins. An admin client has no group, and librdkafka kills the process when one is told
that the group's coordinator is elsewhere, as after a broker's restart (librdkafka issue 5040).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import structlog
from confluent_kafka import Consumer, KafkaException, TopicPartition

from streams.follow.app import FollowSpec
from streams.log.client import QUIET, forward_logs
from streams.log.record import TopicPartition as At

log = structlog.get_logger(__name__)

_TIMEOUT_S: Final = 5.0


class GroupPositions:
    """Blocking: call it from a thread."""

    def __init__(self, spec: FollowSpec) -> None:
        self._group, self._topics = spec.group, spec.topics
        self._settings: dict[str, Any] = {
            **QUIET,
            "bootstrap.servers": spec.bootstrap,
            **spec.security,
            "group.id": spec.group,
            "enable.auto.commit": False,
            "socket.timeout.ms": int(_TIMEOUT_S * 1e3),
        }

    def committed(self) -> dict[At, int]:
        try:
            with self._consumer() as consumer:
                listed = [consumer.list_topics(topic, timeout=_TIMEOUT_S).topics[topic] for topic in self._topics]
                asked = [TopicPartition(str(topic.topic), number) for topic in listed for number in topic.partitions]
                found = consumer.committed(asked, timeout=_TIMEOUT_S) if asked else []
        except KafkaException as error:
            log.info("committed positions not read", group=self._group, error=error.args[0].str())
            return {}
        return {(p.topic, p.partition): p.offset for p in found if p.error is None and p.offset >= 0}

    def commit(self, positions: Mapping[At, int]) -> bool:
        wanted = [TopicPartition(topic, partition, position) for (topic, partition), position in positions.items()]
        try:
            with self._consumer() as consumer:
                done = consumer.commit(offsets=wanted, asynchronous=False) if wanted else []
            refused = [p.error for p in done or () if p.error is not None]
        except KafkaException as error:
            refused = [error.args[0]]
        if refused:
            log.info("positions not committed", group=self._group, error=refused[0].str())
        return not refused

    @contextmanager
    def _consumer(self) -> Iterator[Consumer]:
        consumer = Consumer(self._settings, logger=forward_logs())
        try:
            yield consumer
        finally:
            consumer.close()
