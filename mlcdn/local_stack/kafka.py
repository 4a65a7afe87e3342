"""Kafka: one KRaft node that is broker and controller, started on a plain JVM without its shell scripts.

Laws:
1. `meta.properties` is written by us (a format JVM would cost a second) and never rewritten: it is the identity of the
   data beside it. Everything else is derived anew at each start, so ports may change and data stays.
2. The command of a start and of the AOT cache's training differ in one option only, or the cache is ignored.
3. Ready means that a client's first produce and its first group join are fast: the broker answers with our cluster's
   id, then takes an idempotent record, then knows its group coordinator.

It must not know the topics.
"""

import asyncio
import base64
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from processes.ports import LOOPBACK
from processes.supervisor import Child

_JVM = (
    "-Xms32m",
    "-Xmx256m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Xlog:aot*=off,cds*=off",
    "--sun-misc-unsafe-memory-access=allow",
    # A healthy start prints nothing; these two loggers warn in every one.
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.controller.QuorumController=error",
    "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.clients.NetworkClient=error",
)

# Only what differs from the defaults because this is one small node: single replicas, single internal partitions,
# single threads; a short broker session, so that a restart after SIGKILL takes 3 s and not 12; a cleaner buffer of
# 2 MB, because the default of 128 MB is touched at once (142 MB resident instead of 285). The append time is the
# broker's, so that ages never mix the clocks of two machines.
_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
log.message.timestamp.type=LogAppendTime
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
num.network.threads=1
num.io.threads=2
background.threads=1
log.cleaner.dedupe.buffer.size=2097152
log.cleaner.io.buffer.size=65536
log.index.size.max.bytes=1048576
"""

_PROBE_PREFIX = "local-stack-probe-"
_RETRY_SOON = {"reconnect.backoff.ms": 20, "reconnect.backoff.max.ms": 100, "retry.backoff.ms": 20, "log_level": 0}


@dataclass(frozen=True, slots=True)
class Java:
    """What a start needs beside its data: the virtual machine, the jars in a fixed order, the AOT cache if any."""

    executable: Path
    jars: tuple[Path, ...]
    aot_cache: Path | None = None

    def command(self, *options: str) -> list[str]:
        class_path = ":".join(map(str, self.jars))
        return [str(self.executable), *_JVM, *options, "-cp", class_path, "kafka.Kafka"]


def configure(directory: Path, port: int, controller_port: int) -> Path:
    """Writes the configuration of a start, and the identity if there is none yet. Returns the file for the command."""
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    identity = data / "meta.properties"
    if not identity.exists():
        text = f"version=1\ncluster.id={_new_id()}\nnode.id=1\ndirectory.id={_new_id()}\n"
        half = data / ".meta.properties.half"
        half.write_text(text)
        half.rename(identity)
    properties = directory / "server.properties"
    properties.write_text(_PROPERTIES.format(host=LOOPBACK, port=port, controller_port=controller_port, data=data))
    return properties


def child(name: str, directory: Path, java: Java, port: int, controller_port: int, log: Path) -> Child:
    properties = configure(directory, port, controller_port)
    options = [f"-XX:AOTCache={java.aot_cache}"] if java.aot_cache is not None else []
    cluster = cluster_id(directory)

    async def ready() -> None:
        await answers(f"{LOOPBACK}:{port}", cluster)

    return Child(
        name=name,
        argv=[*java.command(*options), str(properties)],
        cwd=directory,
        ready=ready,
        ready_timeout_s=60,
        stop_timeout_s=20,
        log=log,
    )


def cluster_id(directory: Path) -> str:
    lines = (directory / "data" / "meta.properties").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)["cluster.id"]


async def answers(bootstrap: str, cluster: str) -> None:
    """Law 3; raises until it holds."""
    host, port = bootstrap.rsplit(":", 1)
    # A refused connect costs nothing, while a Kafka client would go on trying in the background.
    _, writer = await asyncio.open_connection(host, int(port))
    writer.close()
    await asyncio.to_thread(_warm_up, bootstrap, cluster)


def _warm_up(bootstrap: str, cluster: str) -> None:
    from confluent_kafka import Producer
    from confluent_kafka.admin import AdminClient
    from confluent_kafka.cimpl import NewTopic

    admin = AdminClient({"bootstrap.servers": bootstrap, **_RETRY_SOON})
    metadata = admin.list_topics(timeout=1)
    if str(metadata.cluster_id) != cluster:  # declared as None in the client's stubs
        raise ConnectionError(f"{bootstrap} belongs to the cluster {metadata.cluster_id}")
    if len(metadata.brokers) != 1:
        raise ConnectionError("the broker has not registered yet")
    topic = _PROBE_PREFIX + secrets.token_hex(4)
    abandoned = [name for name in metadata.topics if name.startswith(_PROBE_PREFIX)]
    for created in admin.create_topics([NewTopic(topic, 1, 1)], operation_timeout=2, request_timeout=5).values():
        created.result()
    try:
        refused: list[object] = []
        producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 0, **_RETRY_SOON})
        producer.produce(topic, b"ready", on_delivery=lambda error, _: refused.append(error) if error else None)
        if producer.flush(10) or refused:
            raise ConnectionError(f"a first record was not taken: {refused}")
        for described in admin.describe_consumer_groups(["local-stack-probe"], request_timeout=2).values():
            described.result()
    finally:
        for deleted in admin.delete_topics([topic, *abandoned], operation_timeout=2, request_timeout=5).values():
            deleted.result()


def _new_id() -> str:
    """16 random bytes in the form Kafka reads; one that begins with a dash would be taken for an option."""
    while True:
        made = base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")
        if not made.startswith("-"):
            return made
