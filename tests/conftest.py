"""What tests share: one stack a session, started when the first test asks for it.

``--containers`` runs the same tests over a stack in containers, where an engine answers.
"""

from collections.abc import Iterator

import pytest

from mlcdn.local_stack.running import RunningStack, running_stack
from streams.log.admin import TopicAdmin
from tests.container_stack import ContainerStack, container_stack

REGIONS = ("tokyo", "london", "virginia")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--containers", action="store_true", help="the stack in containers instead of out of wheels")


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """Real Kafka, S3 and Valkey on free ports, with the catalogue's topics. Who hurts a part heals it."""
    start = container_stack if request.config.getoption("--containers") else running_stack
    with start(tmp_path_factory.mktemp("stack"), REGIONS) as running:
        TopicAdmin(running.addresses.kafka).apply()
        yield running


@pytest.fixture(scope="session")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerStack]:
    """The stack in containers, whichever one the other tests run over; skipped, with the reason, without an engine."""
    with container_stack(tmp_path_factory.mktemp("containers"), REGIONS) as running:
        TopicAdmin(running.addresses.kafka).apply()
        yield running
