"""The test stack in containers: the same parts, names and ways to hurt them as `mlcdn.local_stack.running`.

Chosen by ``pytest --containers``; without a container engine that answers, what needs the stack is skipped with the reason.
Ports on the host are chosen once and bound, so that a part that is stopped and started again is found where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from mlcdn.local_stack.stack import StackAddresses, redis_part
from processes.ports import free_ports

KAFKA_IMAGE = "apache/kafka:4.3.1"
S3_IMAGE = "chrislusf/seaweedfs:4.48"
REDIS_IMAGE = "valkey/valkey:9.1"
BUCKET, ACCESS_KEY, SECRET_KEY = "mlcdn", "teststack", "teststacksecret"
READY_S = 90.0


def why_no_engine() -> str | None:
    """Why no container can be started; None when one can."""
    import docker
    from docker.errors import DockerException

    try:
        docker.from_env(timeout=3).ping()
    except DockerException as error:
        return f"no container engine answers: {error}"
    return None


class ContainerStack:
    """`addresses`, and the parts by the names that the local stack gives them."""

    def __init__(self, addresses: StackAddresses, parts: dict[str, Any], ready: dict[str, Callable[[], None]]) -> None:
        self.addresses = addresses
        self._parts, self._ready = parts, ready

    def stop_part(self, name: str) -> None:
        self._parts[name].get_wrapped_container().stop(timeout=10)

    def kill_part(self, name: str) -> None:
        self._parts[name].get_wrapped_container().kill()

    def start_part(self, name: str) -> None:
        self._parts[name].get_wrapped_container().start()
        until_ready(name, self._ready[name])

    def pause_part(self, name: str) -> None:
        self._parts[name].get_wrapped_container().pause()

    def resume_part(self, name: str) -> None:
        container = self._parts[name].get_wrapped_container()
        container.reload()
        if container.status == "paused":
            container.unpause()


def until_ready(name: str, ready: Callable[[], None]) -> None:
    """Whatever a part that still starts raises means: not yet."""
    end = time.monotonic() + READY_S
    while True:
        try:
            return ready()
        except Exception:
            if time.monotonic() > end:
                pytest.fail(f"{name} is not ready after {READY_S:g} s")
            time.sleep(0.3)


@contextmanager
def container_stack(directory: Path, regions: Sequence[str]) -> Iterator[ContainerStack]:
    """Skips when no engine answers."""
    reason = why_no_engine()
    if reason is not None:
        pytest.skip(reason)
    from testcontainers.core.container import DockerContainer

    kafka_port, s3_port, *redis_ports = free_ports(2 + len(regions))
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    identities = directory / "identities.json"
    identities.write_text(json.dumps({"identities": [identity]}))
    kafka = DockerContainer(KAFKA_IMAGE).with_bind_ports(kafka_port, kafka_port)
    for name, value in _kafka_settings(kafka_port).items():
        kafka = kafka.with_env(name, value)
    s3 = DockerContainer(S3_IMAGE).with_bind_ports(8333, s3_port)
    s3 = s3.with_volume_mapping(str(identities), "/identities.json", "ro")
    s3 = s3.with_command(f"mini -dir=/data -s3.config=/identities.json -bucket={BUCKET} -webdav=false -admin.ui=false")
    parts = {"kafka": kafka, "s3": s3}
    for region, port in zip(regions, redis_ports, strict=True):
        redis = DockerContainer(REDIS_IMAGE).with_bind_ports(6379, port)
        parts[redis_part(region)] = redis.with_command(
            'valkey-server --save "" --appendonly no --maxmemory 64mb --maxmemory-policy allkeys-lfu'
        )
    addresses = StackAddresses(
        kafka=f"127.0.0.1:{kafka_port}",
        s3_endpoint=f"http://127.0.0.1:{s3_port}",
        s3_bucket=BUCKET,
        s3_access_key=ACCESS_KEY,
        s3_secret_key=SECRET_KEY,
        redis={region: f"redis://127.0.0.1:{port}/0" for region, port in zip(regions, redis_ports, strict=True)},
    )
    ready: dict[str, Callable[[], None]] = {
        "kafka": lambda: _kafka_answers(addresses.kafka),
        "s3": lambda: _s3_answers(addresses),
    }
    for region in regions:
        ready[redis_part(region)] = lambda region=region: _redis_answers(addresses.redis[region])
    with ExitStack() as running:
        for part in parts.values():
            running.enter_context(part)
        for name, answers in ready.items():
            until_ready(name, answers)
        yield ContainerStack(addresses, parts, ready)


def _kafka_settings(port: int) -> dict[str, str]:
    return {
        "KAFKA_NODE_ID": "1",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_LISTENERS": f"PLAINTEXT://0.0.0.0:{port},CONTROLLER://localhost:9093",
        "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://127.0.0.1:{port}",
        "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "1",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
        "KAFKA_LOG_MESSAGE_TIMESTAMP_TYPE": "LogAppendTime",
    }


def _kafka_answers(address: str) -> None:
    admin = AdminClient({"bootstrap.servers": address, "log_level": 0})
    if len(admin.list_topics(timeout=2).brokers) != 1:
        raise KafkaException("no broker yet")
    for described in admin.describe_consumer_groups(["probe"], request_timeout=2).values():
        described.result(2)


def _s3_answers(addresses: StackAddresses) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=addresses.s3_endpoint,
        aws_access_key_id=addresses.s3_access_key,
        aws_secret_access_key=addresses.s3_secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=1, read_timeout=3, retries={"total_max_attempts": 1}, proxies={}),
    )
    client.put_object(Bucket=addresses.s3_bucket, Key="ready", Body=b"")


def _redis_answers(url: str) -> None:
    import redis

    with redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1) as client:
        client.ping()
