"""What tests share: one local stack a session, started when the first test asks for it."""

from collections.abc import Iterator

import pytest

from mlcdn.local_stack.running import RunningStack, running_stack
from streams.log.admin import TopicAdmin


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """Real Kafka, S3 and Valkey on free ports, with the catalogue's topics. Who hurts a part heals it."""
    with running_stack(tmp_path_factory.mktemp("stack"), ["tokyo", "london", "virginia"]) as running:
        TopicAdmin(running.addresses.kafka).apply()
        yield running
