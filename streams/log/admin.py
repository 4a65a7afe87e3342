"""The topics as the catalogue wants them: created, corrected, compared. Never deleted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined] # the package's stub forgets to export them
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from schemas.errors import MlcdnError, Unreachable
from schemas.topics import TOPICS
from streams.log.client import QUIET, admin_client

_TIMEOUT_S: Final = 15.0
_LISTED_PAUSE_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Drift:
    """One thing on the broker that is not as catalogued."""

    topic: str
    what: str
    wanted: str
    found: str

    def __str__(self) -> str:
        return f"{self.topic}: {self.what} is {self.found}, not {self.wanted}"


class TopicAdmin:
    """`replication` is for topics it creates; -1 takes the broker's default."""

    def __init__(self, bootstrap: str, *, security: Mapping[str, str] | None = None, replication: int = -1) -> None:
        self._bootstrap, self._replication = bootstrap, replication
        self._admin = admin_client({**QUIET, "bootstrap.servers": bootstrap, **(security or {})})

    def apply(self) -> list[str]:
        """Creates what is missing and sets what differs; a line for each change."""
        created = self._create_missing()
        self._wait_until_known()
        done = [f"created {name}" for name in created]
        for drift in self.drift():
            if drift.what == "partitions":
                if int(drift.found) < int(drift.wanted):
                    grown = self._admin.create_partitions([NewPartitions(drift.topic, int(drift.wanted))])
                    self._wait(grown[drift.topic])
                    done.append(f"grew {drift.topic} to {drift.wanted} partitions")
                continue
            entry = ConfigEntry(drift.what, drift.wanted, incremental_operation=AlterConfigOpType.SET)
            resource = ConfigResource(ResourceType.TOPIC, drift.topic, incremental_configs=[entry])
            [altered] = self._admin.incremental_alter_configs([resource], request_timeout=_TIMEOUT_S).values()
            self._wait(altered)
            done.append(f"set {drift.topic} {drift.what}={drift.wanted}")
        return done

    def drift(self) -> list[Drift]:
        """What differs from the catalogue, in its order."""
        there = self._layout()
        missing = [Drift(name, "topic", "there", "missing") for name in TOPICS if name not in there]
        shape = [
            Drift(name, "partitions", str(topic.partitions), str(there[name]))
            for name, topic in TOPICS.items()
            if name in there and there[name] != topic.partitions
        ]
        return missing + shape + [d for name in TOPICS if name in there for d in self._config_drift(name)]

    def _create_missing(self) -> list[str]:
        there = self._layout()
        wanted = [
            NewTopic(t.name, num_partitions=t.partitions, replication_factor=self._replication, config=dict(t.config()))
            for t in TOPICS.values()
            if t.name not in there
        ]
        if not wanted:
            return []
        created = []
        for name, future in self._admin.create_topics(wanted, operation_timeout=_TIMEOUT_S).items():
            try:
                self._wait(future)
                created.append(name)
            except KafkaException as error:
                # Another process was faster: the topic is there, which is all that was asked for.
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise self._translated(error) from error
        return created

    def _wait_until_known(self) -> None:
        """A broker acknowledges a topic a moment before it lists it."""
        give_up = time.monotonic() + _TIMEOUT_S
        while missing := TOPICS.keys() - self._layout().keys():
            if time.monotonic() > give_up:
                raise Unreachable("Kafka", self._bootstrap, f"it does not list {', '.join(sorted(missing))}")
            time.sleep(_LISTED_PAUSE_S)

    def _layout(self) -> dict[str, int]:
        try:
            listed = self._admin.list_topics(timeout=_TIMEOUT_S).topics
        except KafkaException as error:
            raise self._translated(error) from error
        return {name: len(topic.partitions) for name, topic in listed.items()}

    def _config_drift(self, name: str) -> list[Drift]:
        [described] = self._admin.describe_configs(
            [ConfigResource(ResourceType.TOPIC, name)],
            request_timeout=_TIMEOUT_S,
        ).values()
        found = self._wait(described)
        return [
            Drift(name, key, value, str(found[key].value))
            for key, value in TOPICS[name].config().items()
            if found[key].value != value
        ]

    def _wait(self, future: object) -> dict[str, ConfigEntry]:
        try:
            return future.result(_TIMEOUT_S)  # type: ignore[attr-defined, no-any-return]
        except KafkaException as error:
            if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                raise
            raise self._translated(error) from error

    def _translated(self, error: KafkaException) -> MlcdnError:
        return Unreachable("Kafka", self._bootstrap, error.args[0].str())
