"""The parts in containers do what ours out of wheels do. ``pytest --containers`` runs every other test over them too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mlcdn.identities import ensure_identities
from origin.publish import Publisher, ReleaseRequest
from streams.artifacts import ArtifactStore, FetchOptions
from streams.audit.control import At, fold_releases
from streams.log.admin import TopicAdmin
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.writer import Writer
from tests.container_stack import ContainerStack
from tests.models import mlp_bytes

pytestmark = pytest.mark.docker


def test_the_topics_are_as_catalogued(containers: ContainerStack) -> None:
    assert TopicAdmin(containers.addresses.kafka).drift() == []


def test_a_release_lands_and_outlives_the_broker(containers: ContainerStack, tmp_path: Path) -> None:
    a = containers.addresses
    identities = asyncio.run(ensure_identities(tmp_path / "keys", a.kafka, lambda _: None))
    roots = load_roots(identities.roots)
    store = ArtifactStore(a.s3_endpoint, a.s3_bucket, a.s3_access_key, a.s3_secret_key, "us-east-1")
    path = tmp_path / "model.onnx"
    path.write_bytes(mlp_bytes(1))

    async def publish() -> str:
        appender = KafkaAppender(a.kafka, client_id="test")
        writer = Writer(appender, source="/operators/test", signing_key=load_private(identities.operator))
        try:
            publisher = Publisher(store, writer, KafkaReader(a.kafka), roots)
            return (await publisher.publish(ReleaseRequest(model="contained", path=path, author="test"))).digest
        finally:
            await appender.close()

    digest = asyncio.run(publish())
    containers.kill_part("kafka")
    containers.start_part("kafka")
    wanted = fold_releases(KafkaReader(a.kafka), roots, At())[0].models["contained"].wanted
    assert wanted is not None
    assert wanted.digest == digest
    store.fetch(wanted.released.artifact, tmp_path / "got", FetchOptions(deadline_s=30))
    assert (tmp_path / "got").read_bytes() == path.read_bytes()
