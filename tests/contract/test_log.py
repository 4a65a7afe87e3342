"""Both logs, one contract: what is appended stands at its position, and is read back from there, in order."""

import asyncio
import socket
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from mlcdn.local_stack.running import RunningStack
from processes.ports import free_port
from schemas.codec import Message
from schemas.errors import BadInput, NotFound, Unreachable
from schemas.topics import RELEASES
from streams.log.boot import read_to_watermark
from streams.log.local import LocalLog
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.record import Appender, LogReader, Record


@dataclass
class Log:
    """A log with a topic of one partition and one of three, both empty."""

    single: str
    wide: str
    reader: LogReader
    make_appender: Callable[[], Appender]
    recreate: Callable[[], None]

    def session(self, work: Callable[[Appender], Coroutine[Any, Any, None]]) -> None:
        """Runs `work` with an appender that is closed afterwards."""

        async def run() -> None:
            appender = self.make_appender()
            try:
                await work(appender)
            finally:
                await appender.close()

        asyncio.run(run())


def create(kafka: str, **partitions: int) -> None:
    admin = AdminClient({"bootstrap.servers": kafka})
    topics = [NewTopic(topic, count, 1, config=dict(RELEASES.config())) for topic, count in partitions.items()]
    for created in admin.create_topics(topics).values():
        created.result(10)
    until(lambda: set(partitions) <= set(admin.list_topics(timeout=5).topics))


def delete(kafka: str, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka})
    for deleted in admin.delete_topics([topic]).values():
        deleted.result(10)
    until(lambda: topic not in admin.list_topics(timeout=5).topics)


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


@pytest.fixture(params=["local", "kafka"])
def log(request: pytest.FixtureRequest) -> Log:
    single, wide = (f"contract-{uuid.uuid4().hex[:8]}" for _ in range(2))
    if request.param == "local":
        local = LocalLog(lambda: time.time_ns() // 1_000_000, {single: 1, wide: 3})
        return Log(single, wide, local, lambda: local, lambda: local.recreate(single))
    kafka = request.getfixturevalue("stack").addresses.kafka
    create(kafka, **{single: 1, wide: 3})

    def recreate() -> None:
        delete(kafka, single)
        create(kafka, **{single: 1})

    return Log(single, wide, KafkaReader(kafka), lambda: KafkaAppender(kafka, client_id="contract"), recreate)


def message(topic: str, number: int, **changes: Any) -> Message:
    plain = {"key": f"k{number}".encode(), "value": b"v%d" % number, "headers": (("n", b"%d" % number),)}
    return Message(topic=topic, **(plain | changes))


def values(records: Iterator[Record]) -> list[bytes | None]:
    return [r.value for r in records]


# -- positions


def test_an_empty_topic_has_watermarks_at_zero_and_nothing_to_read(log: Log) -> None:
    assert log.reader.watermarks(log.single, 0) == (0, 0)
    assert list(log.reader.read(log.single, 0)) == []
    assert log.reader.offset_at(log.single, 0, 0) == 0


def test_append_returns_the_position_and_the_brokers_time_and_reading_gives_the_same_record(log: Log) -> None:
    async def work(appender: Appender) -> None:
        before = time.time_ns() // 1_000_000
        appended = [await appender.append(message(log.single, n)) for n in range(3)]
        after = time.time_ns() // 1_000_000
        assert [r.offset for r in appended] == [0, 1, 2]
        assert [r.topic for r in appended] == [log.single] * 3
        assert all(before - 1 <= r.timestamp_ms <= after + 1 for r in appended)
        assert await asyncio.to_thread(lambda: list(log.reader.read(log.single, 0))) == appended

    log.session(work)
    assert log.reader.watermarks(log.single, 0) == (0, 3)


def test_a_read_has_a_start_and_an_end_and_both_may_lie_outside(log: Log) -> None:
    async def work(appender: Appender) -> None:
        for n in range(5):
            await appender.append(message(log.single, n))

    log.session(work)
    assert values(log.reader.read(log.single, 0, 2)) == [b"v2", b"v3", b"v4"]
    assert values(log.reader.read(log.single, 0, 1, 3)) == [b"v1", b"v2"]
    assert values(log.reader.read(log.single, 0, 3, 99)) == [b"v3", b"v4"]
    assert values(log.reader.read(log.single, 0, 5)) == []
    assert values(log.reader.read(log.single, 0, 99)) == []


def test_offset_at_is_the_first_position_at_or_after_the_time(log: Log) -> None:
    appended: list[Record] = []

    async def work(appender: Appender) -> None:
        for n in range(3):
            appended.append(await appender.append(message(log.single, n)))
            await asyncio.sleep(0.005)

    log.session(work)
    first, second, third = (r.timestamp_ms for r in appended)
    assert log.reader.offset_at(log.single, 0, first - 1_000) == 0
    assert log.reader.offset_at(log.single, 0, second) == 1
    assert log.reader.offset_at(log.single, 0, second + 1) == 2
    assert log.reader.offset_at(log.single, 0, third + 1_000) == 3


def test_bytes_headers_repeated_headers_and_an_empty_value_survive(log: Log) -> None:
    headers = (("a", b"1"), ("a", b"2"), ("b", b""), ("c", bytes(range(256))))

    async def work(appender: Appender) -> None:
        await appender.append(message(log.single, 0, value=b"", headers=headers))

    log.session(work)
    [record] = log.reader.read(log.single, 0)
    assert (record.key, record.value, record.headers) == (b"k0", b"", headers)


def test_one_key_is_one_partition_and_the_boot_read_merges_by_time(log: Log) -> None:
    appended: list[Record] = []

    async def work(appender: Appender) -> None:
        for n in range(30):
            appended.append(await appender.append(message(log.wide, n, key=b"k%d" % (n % 7))))
            await asyncio.sleep(0.002)

    log.session(work)
    assert log.reader.partitions(log.wide) == 3
    assert len({(r.key, r.partition) for r in appended}) == 7
    read: list[Record] = []
    following = read_to_watermark(log.reader, log.wide, read.append)
    assert read == sorted(appended, key=lambda r: (r.timestamp_ms, r.partition, r.offset))
    assert following == {(log.wide, p): sum(r.partition == p for r in appended) for p in range(3)}
    again: list[Record] = []
    read_to_watermark(log.reader, log.wide, again.append, {at: max(0, end - 1) for at, end in following.items()})
    assert len(again) == sum(end > 0 for end in following.values())


# -- offers


def test_offered_messages_stand_in_the_log_in_their_order(log: Log) -> None:
    async def work(appender: Appender) -> None:
        assert all(appender.offer(message(log.single, n)) for n in range(500))

    log.session(work)
    assert values(log.reader.read(log.single, 0)) == [b"v%d" % n for n in range(500)]


def test_concurrent_appends_get_each_a_position_of_its_own(log: Log) -> None:
    async def work(appender: Appender) -> None:
        appended = await asyncio.gather(*(appender.append(message(log.single, n)) for n in range(200)))
        assert sorted(r.offset for r in appended) == list(range(200))
        by_offset = {r.offset: r.value for r in appended}
        assert values(log.reader.read(log.single, 0)) == [by_offset[o] for o in range(200)]

    log.session(work)


# -- tails


def test_a_tail_gives_what_stands_and_then_what_comes_in_order(log: Log) -> None:
    async def work(appender: Appender) -> None:
        for n in range(3):
            await appender.append(message(log.single, n))
        tail = log.reader.tail({(log.single, 0): 1})
        seen = [await asyncio.wait_for(anext(tail), 10) for _ in range(2)]
        for n in range(3, 6):
            appended = await appender.append(message(log.single, n))
            began = time.monotonic()
            seen.append(await asyncio.wait_for(anext(tail), 10))
            assert time.monotonic() - began < 1.0
            assert seen[-1] == appended
        await tail.aclose()
        assert [r.offset for r in seen] == [1, 2, 3, 4, 5]

    log.session(work)


def test_a_tail_of_several_partitions_gives_every_record_once(log: Log) -> None:
    async def work(appender: Appender) -> None:
        tail = log.reader.tail({(log.wide, p): 0 for p in range(3)})
        for n in range(60):
            appender.offer(message(log.wide, n))
        seen = [await asyncio.wait_for(anext(tail), 10) for _ in range(60)]
        await tail.aclose()
        assert {r.value for r in seen} == {b"v%d" % n for n in range(60)}
        for p in range(3):
            offsets = [r.offset for r in seen if r.partition == p]
            assert offsets == list(range(len(offsets)))

    log.session(work)


def test_tails_do_not_share_anything_and_a_closed_one_leaves_no_thread(log: Log) -> None:
    async def work(appender: Appender) -> None:
        before = threading.active_count()
        tails = [log.reader.tail({(log.single, 0): 0}) for _ in range(2)]
        await appender.append(message(log.single, 0))
        await appender.append(message(log.single, 1))
        assert [(await asyncio.wait_for(anext(t), 10)).offset for t in tails] == [0, 0]
        await tails[0].aclose()
        assert (await asyncio.wait_for(anext(tails[1]), 10)).offset == 1
        await tails[1].aclose()
        # The loop's own pool may have grown by the thread that waited for each tail to end.
        assert not [t for t in threading.enumerate() if t.name == "log-tail"], before

    log.session(work)


def test_a_tail_gives_thousands_of_records_without_losing_one(log: Log) -> None:
    # More than one full batch of the Kafka reader, and more than its queue has room for.
    count = 9_000

    async def work(appender: Appender) -> None:
        for n in range(count):
            assert appender.offer(message(log.single, n))
        tail = log.reader.tail({(log.single, 0): 0})
        await asyncio.sleep(0.3)
        async with asyncio.timeout(20):
            offsets = [(await anext(tail)).offset for _ in range(count)]
        await tail.aclose()
        assert offsets == list(range(count))

    log.session(work)


# -- what is not there


def test_a_missing_topic_or_partition_is_not_found(log: Log) -> None:
    for ask in (
        lambda: log.reader.topic_id("nobody-made-this"),
        lambda: log.reader.partitions("nobody-made-this"),
        lambda: log.reader.watermarks("nobody-made-this", 0),
        lambda: log.reader.watermarks(log.single, 1),
        lambda: log.reader.offset_at("nobody-made-this", 0, 0),
        lambda: list(log.reader.read("nobody-made-this", 0)),
    ):
        with pytest.raises(NotFound):
            ask()


def test_appending_to_a_missing_topic_is_not_found_and_nothing_is_created(log: Log) -> None:
    async def work(appender: Appender) -> None:
        with pytest.raises(NotFound):
            await asyncio.wait_for(appender.append(message("nobody-made-this", 0)), 40)

    log.session(work)
    with pytest.raises(NotFound):
        log.reader.topic_id("nobody-made-this")


def test_a_topic_that_is_made_again_has_another_id_and_is_empty(log: Log) -> None:
    async def work(appender: Appender) -> None:
        await appender.append(message(log.single, 0))

    log.session(work)
    before = log.reader.topic_id(log.single)
    assert log.reader.topic_id(log.single) == before
    log.recreate()
    assert log.reader.topic_id(log.single) != before
    assert log.reader.watermarks(log.single, 0) == (0, 0)


# -- a log that does not answer


def local_away() -> tuple[LocalLog, str]:
    log = LocalLog(lambda: 0, {"t": 1})
    log.fail_next(10_000)
    return log, "t"


def test_a_log_that_is_away_refuses_appends_and_counts_offers_local() -> None:
    log, topic = local_away()

    async def work() -> None:
        with pytest.raises(Unreachable):
            await log.append(message(topic, 0))
        assert not any(log.offer(message(topic, n)) for n in range(3))

    asyncio.run(work())
    assert log.dropped == 3
    assert list(log.read(topic, 0)) == []


def test_kafka_away_is_unreachable_in_bounded_time_for_every_question() -> None:
    reader = KafkaReader(f"127.0.0.1:{free_port()}", timeout_s=0.5)
    for ask in (
        lambda: reader.topic_id("t"),
        lambda: reader.partitions("t"),
        lambda: reader.watermarks("t", 0),
        lambda: reader.offset_at("t", 0, 0),
        lambda: list(reader.read("t", 0)),
    ):
        began = time.monotonic()
        with pytest.raises(Unreachable):
            ask()
        assert time.monotonic() - began < 3


def test_a_broker_that_takes_connections_and_never_answers_is_unreachable_in_bounded_time() -> None:
    async def work(bootstrap: str) -> None:
        appender = KafkaAppender(bootstrap, client_id="contract", timeout_s=1)
        began = time.monotonic()
        with pytest.raises(Unreachable):
            await appender.append(message("t", 0))
        assert time.monotonic() - began < 4
        await appender.close()

    with socket.create_server(("127.0.0.1", 0)) as hole:
        asyncio.run(work(f"127.0.0.1:{hole.getsockname()[1]}"))


def test_a_full_queue_drops_at_once_and_every_drop_is_counted() -> None:
    async def work() -> None:
        appender = KafkaAppender(f"127.0.0.1:{free_port()}", client_id="contract", queue_messages=10, timeout_s=60)
        slowest = 0.0
        taken = []
        for n in range(1_000):
            began = time.perf_counter()
            taken.append(appender.offer(message("t", n)))
            slowest = max(slowest, time.perf_counter() - began)
        assert taken == [True] * 10 + [False] * 990
        assert appender.dropped == 990
        assert slowest < 0.25
        with pytest.raises(Unreachable, match="full"):
            await appender.append(message("t", 0))
        began = time.monotonic()
        await appender.close()
        assert time.monotonic() - began < 9
        assert appender.dropped == 1_001

    asyncio.run(work())


def test_what_was_offered_while_kafka_was_away_arrives_when_it_is_back(stack: RunningStack) -> None:
    topic = f"contract-{uuid.uuid4().hex[:8]}"
    kafka = stack.addresses.kafka
    create(kafka, **{topic: 1})

    async def work() -> None:
        appender = KafkaAppender(kafka, client_id="contract")
        await appender.append(message(topic, 0))
        await asyncio.to_thread(stack.kill_part, "kafka")
        try:
            assert all(appender.offer(message(topic, n)) for n in range(1, 200))
        finally:
            await asyncio.to_thread(stack.start_part, "kafka")
        last = await asyncio.wait_for(appender.append(message(topic, 200)), 20)
        assert last.offset == 200
        assert appender.dropped == 0
        await appender.close()

    asyncio.run(work())
    assert values(KafkaReader(kafka).read(topic, 0)) == [b"v%d" % n for n in range(201)]


def test_a_record_that_kafka_refuses_is_bad_input_and_the_next_is_taken(stack: RunningStack) -> None:
    async def work() -> None:
        appender = KafkaAppender(stack.addresses.kafka, client_id="contract")
        with pytest.raises(BadInput):
            await appender.append(message(RELEASES.name, 0, value=bytes(3_000_000)))
        assert not appender.offer(message(RELEASES.name, 0, value=bytes(3_000_000)))
        assert appender.dropped == 2
        await appender.close()

    asyncio.run(work())
