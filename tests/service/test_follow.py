"""The follower on a real Kafka: every record once and in order, whatever stands in the log or befalls the broker."""

import asyncio
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mlcdn.local_stack.running import RunningStack
from schemas import codec, signing
from schemas.codec import Message
from schemas.errors import Refusal
from schemas.events import CacheInvalidated, EventRejected, Grant, TrustChanged
from schemas.names import Scope, ScopeKind
from schemas.topics import DEAD_LETTERS, INVALIDATIONS
from streams.folds import invalidations
from streams.folds.invalidations import Invalidations
from streams.follow import DeadLetters, Follower, FollowSpec, cell
from streams.log.local import LocalLog
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.record import Record
from streams.log.writer import Writer

ROOT_KEY, KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def make_topic(kafka: str, name: str, partitions: int = 1) -> None:
    admin = AdminClient({"bootstrap.servers": kafka})
    for made in admin.create_topics([NewTopic(name, partitions, 1, config=dict(INVALIDATIONS.config()))]).values():
        made.result(10)


def delete_topic(kafka: str, name: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka})
    for deleted in admin.delete_topics([name]).values():
        deleted.result(10)


def produce(kafka: str, topic: str, values: Sequence[bytes]) -> None:
    producer = Producer({"bootstrap.servers": kafka, "linger.ms": 0})
    for value in values:
        producer.produce(topic, value)
    assert producer.flush(15) == 0


async def until(condition: Callable[[], bool], seconds: float, what: str = "") -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, what or "not in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


@dataclass
class Seen:
    """A follower of one topic and what it handed over."""

    follower: Follower
    spec: FollowSpec
    letters: LocalLog
    records: list[Record] = field(default_factory=list)
    caught_up: list[int] = field(default_factory=list)
    recreated: list[str] = field(default_factory=list)

    @property
    def values(self) -> list[bytes | None]:
        return [r.value for r in self.records]

    def rejected(self) -> list[EventRejected]:
        found = [
            codec.decode(r.topic, r.key, r.value, r.headers).event for r in self.letters.read(DEAD_LETTERS.name, 0)
        ]
        return [event for event in found if isinstance(event, EventRejected)]


@asynccontextmanager
async def following(
    kafka: str,
    topic: str,
    directory: Path,
    *,
    on_record: Callable[[Record], None] = lambda _: None,
    like: Seen | None = None,
) -> AsyncIterator[Seen]:
    """Follows until the block ends; `like` an earlier one: the same group and member, as after a restart."""
    spec = FollowSpec(
        topics=(topic,),
        group=f"follow-{uuid.uuid4().hex[:8]}",
        instance="one",
        bootstrap=kafka,
        datadir=directory,
    )
    if like is not None:
        spec = replace(like.spec, bootstrap=kafka)
    letters = LocalLog(lambda: time.time_ns() // 1_000_000)
    dead_letters = DeadLetters(Writer(letters, source="/regions/tokyo/nodes/t1"), node="t1", region="tokyo")

    def handle(record: Record) -> None:
        seen.records.append(record)
        on_record(record)

    follower = Follower(
        spec,
        KafkaReader(kafka, timeout_s=2),
        handle,
        lambda: seen.caught_up.append(len(seen.records)),
        dead_letters,
        lambda name: seen.recreated.append(name),  # noqa: PLW0108 (seen is made below)
    )
    seen = Seen(follower, spec, letters)
    stop = asyncio.Event()
    running = asyncio.create_task(follower.run(stop))
    try:
        yield seen
    finally:
        stop.set()
        began = time.monotonic()
        await asyncio.wait_for(running, 20)
        assert time.monotonic() - began < 5


async def live(seen: Seen, kafka: str, topic: str) -> None:
    """Waits until records come through Faust, by sending some: a boot takes about two seconds."""
    await until(lambda: seen.follower.caught_up, 15, "never caught up")
    marker = f"marker-{uuid.uuid4().hex}".encode()
    await until(lambda: bool(seen.follower._intake.delivered), 20, "no app")
    produce(kafka, topic, [marker])
    await until(lambda: marker in seen.values, 20, "the marker never came")
    high = KafkaReader(kafka).watermarks(topic, 0)[1]
    await until(lambda: seen.follower._intake.delivered[(topic, 0)] >= high, 20, "Faust never delivered")


@pytest.fixture
def topic(stack: RunningStack) -> str:
    name = f"follow-{uuid.uuid4().hex[:8]}"
    make_topic(stack.addresses.kafka, name)
    return name


def test_history_then_live_records_once_in_order_and_again_after_a_restart(
    stack: RunningStack, topic: str, tmp_path: Path
) -> None:
    kafka = stack.addresses.kafka
    history = [b"h%d" % n for n in range(1_000)]
    produce(kafka, topic, history)

    async def work() -> None:
        async with following(kafka, topic, tmp_path) as first:
            await until(lambda: first.follower.caught_up, 15)
            assert first.caught_up == [1_000]
            await live(first, kafka, topic)
            for n in range(20):
                produce(kafka, topic, [b"l%d" % n])
                await until(lambda n=n: first.values[-1] == b"l%d" % n, 5)
            assert [r.offset for r in first.records] == list(range(1_021))
            assert first.follower.positions == {(topic, 0): 1_021}
            assert first.follower.rebuilds == 0
        async with following(kafka, topic, tmp_path, like=first) as second:
            await live(second, kafka, topic)
            assert second.records[:1_021] == first.records
            assert [r.offset for r in second.records] == list(range(1_022))

    asyncio.run(work())


# -- poison


def signed(event: CacheInvalidated | TrustChanged, key: Ed25519PrivateKey = KEY) -> Message:
    message = codec.encode(
        event, topic=INVALIDATIONS.name, id=str(uuid.uuid4()), source="/operators/test", now_ms=1_700_000_000_000
    )
    return signing.sign(message, key)


def purge(tag: str) -> CacheInvalidated:
    return CacheInvalidated(scopes=(Scope(ScopeKind.TAG, tag),), author="test")


def altered(message: Message, value: bytes | None) -> tuple[bytes, bytes | None, list[tuple[str, bytes]]]:
    return message.key, value, list(message.headers)


def resigned(message: Message, value: bytes) -> Message:
    bare = tuple(h for h in message.headers if not h[0].startswith("mlcdn-"))
    return signing.sign(Message(topic=message.topic, key=message.key, value=value, headers=bare), KEY)


def poison() -> dict[str, tuple[Refusal, tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]]]:
    good = signed(purge("poisoned"))
    unsigned = [h for h in good.headers if not h[0].startswith("mlcdn-")]
    stranger = signed(purge("poisoned"), Ed25519PrivateKey.generate())
    future = resigned(good, b"\x00" + (9_999).to_bytes(4, "big") + good.value[5:])
    trailing = resigned(good, good.value + b"\x00" * 9)
    return {
        "garbage": (Refusal.UNSIGNED, (b"\xff", b"\xde\xad\xbe\xef" * 40, [])),
        "nothing": (Refusal.UNSIGNED, (None, b"", [])),
        "tombstone": (Refusal.TOMBSTONE, altered(good, None)),
        "unsigned": (Refusal.UNSIGNED, (good.key, good.value, unsigned)),
        "another value under a good signature": (Refusal.BAD_SIGNATURE, altered(good, good.value[:-1] + b"x")),
        "a stranger's signature": (Refusal.UNKNOWN_KEY, altered(stranger, stranger.value)),
        "unknown schema id": (Refusal.UNKNOWN_SCHEMA, altered(future, future.value)),
        "trailing bytes": (Refusal.MALFORMED, altered(trailing, trailing.value)),
        "a header flood": (Refusal.UNSIGNED, (b"k", good.value, [(f"h{n}", b"x") for n in range(1_000)])),
    }


def test_poison_is_a_dead_letter_within_a_second_and_the_next_event_acts_within_another(
    stack: RunningStack, tmp_path: Path
) -> None:
    kafka, topic = stack.addresses.kafka, INVALIDATIONS.name
    # The fold reads the catalogue's topic: this test alone writes to it.
    start = KafkaReader(kafka).watermarks(topic, 0)[1]
    states = [Invalidations.initial((ROOT_KEY.public_key().public_bytes_raw(),))]
    purged: list[str] = []

    def fold(record: Record) -> None:
        step = invalidations.fold(states[-1], record)
        states[-1] = step.state
        if step.refused is not None:
            raise step.refused
        found = invalidations.purge_of(step)
        if found is not None:
            purged.extend(scope.value for scope in found.scopes)
            if "crash the handler" in purged[-1]:
                raise RuntimeError("a bug in a handler")

    producer = Producer({"bootstrap.servers": kafka, "linger.ms": 0})

    def send(key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]]) -> None:
        producer.produce(topic, value, key, headers=headers)
        assert producer.flush(5) == 0

    async def work() -> None:
        async with following(kafka, topic, tmp_path, on_record=fold) as seen:
            await until(lambda: seen.follower.caught_up, 15)
            grant = Grant(
                public_key=KEY.public_key().public_bytes_raw(), label="test", models=("*",), kinds=("CacheInvalidated",)
            )
            trust = signed(TrustChanged(grants=(grant,), author="root"), ROOT_KEY)
            send(trust.key, trust.value, list(trust.headers))
            await until(lambda: bool(states[-1].trust.keys), 10)
            await until(lambda: seen.follower._intake.delivered.get((topic, 0), 0) > start, 10)
            slowest = 0.0
            for name, (refusal, (key, value, headers)) in poison().items():
                before = len(seen.rejected())
                send(key, value, headers)
                slowest = max(
                    slowest, await until(lambda b=before: len(seen.rejected()) > b, 1, f"{name} not rejected")
                )
                letter = seen.rejected()[-1]
                assert (letter.refusal, letter.value, letter.record_key) == (refusal, value, key), name
                good = signed(purge(f"after {name}"))
                send(good.key, good.value, list(good.headers))
                slowest = max(slowest, await until(lambda n=name: purged[-1:] == [f"after {n}"], 1, f"after {name}"))
            assert "poisoned" not in purged
            assert slowest < 1.0
            # A handler that raises, more often than Faust would forgive.
            for n in range(8):
                bug = signed(purge(f"crash the handler {n}"))
                send(bug.key, bug.value, list(bug.headers))
            last = signed(purge("the end"))
            send(last.key, last.value, list(last.headers))
            # Eight tracebacks cost the time: the tests' console logger draws them with every frame's source.
            await until(lambda: purged[-1] == "the end", 4, "a failing handler stopped the stream")
            assert [r.refusal for r in seen.rejected()[-8:]] == [Refusal.HANDLER_FAILED] * 8
            assert seen.follower.rebuilds == 0
            await asyncio.sleep(1.5)  # Faust commits what it was handed
        # A restart judges the same, and does not write the same letters again.
        states.append(Invalidations.initial(states[0].trust.roots))
        live_digest = states[0]
        async with following(kafka, topic, tmp_path, on_record=fold, like=seen) as again:
            await until(lambda: again.follower.caught_up, 15)
            assert states[-1] == live_digest
            assert again.rejected() == []

    asyncio.run(work())


HOSTILE = """
import asyncio, sys
from aiokafka import AIOKafkaProducer

class Name(str):
    def encode(self, *_):
        return bytes([0xFF, 0xFE])

async def main(kafka, topic):
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()
    await producer.send_and_wait(topic, b"hostile", b"k", headers=[(Name("x"), b"1")])
    await producer.stop()

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_header_name_that_no_client_can_read_stops_nobody(
    stack: RunningStack, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # aiokafka refuses the whole batch for ever, so Faust never gets past it; one such record, from anybody who may
    # append, would have cut every node off from the log.
    kafka = stack.addresses.kafka
    monkeypatch.setattr(cell, "STALL_S", 3.0)
    # Only the pure Python encoder of aiokafka lets such a name through.
    environment = os.environ | {"AIOKAFKA_NO_EXTENSIONS": "1"}

    async def work() -> None:
        async with following(kafka, topic, tmp_path) as seen:
            await live(seen, kafka, topic)
            writing = await asyncio.create_subprocess_exec(sys.executable, "-c", HOSTILE, kafka, topic, env=environment)
            await until(lambda: seen.values[-1:] == [b"hostile"], 10)
            assert seen.records[-1].headers == ()
            assert await writing.wait() == 0
            produce(kafka, topic, [b"next"])
            await until(lambda: seen.values[-1] == b"next", 2, "the next record was not handled")
            await until(lambda: seen.follower.rebuilds == 1, 10, "the stalled app was not replaced")
            await live(seen, kafka, topic)
            assert [r.offset for r in seen.records] == list(range(len(seen.records)))

    asyncio.run(work())


# -- the broker goes away


def test_a_killed_broker_comes_back_and_nothing_is_lost_or_handled_twice(
    stack: RunningStack, topic: str, tmp_path: Path
) -> None:
    kafka = stack.addresses.kafka

    async def work() -> None:
        async with following(kafka, topic, tmp_path) as seen:
            await live(seen, kafka, topic)
            appender = KafkaAppender(kafka, client_id="follow-test")
            before = len(seen.records)
            sent = [b"%d" % n for n in range(200)]
            messages = [Message(topic=topic, key=b"k", value=value, headers=()) for value in sent]
            assert all(appender.offer(message) for message in messages[:50])
            await asyncio.to_thread(stack.kill_part, "kafka")
            assert all(appender.offer(message) for message in messages[50:])
            await asyncio.sleep(2)
            await asyncio.to_thread(stack.start_part, "kafka")
            await until(lambda: len(seen.records) >= before + 200, 5, "not caught up 5 s after the return")
            await appender.close()
            assert appender.dropped == 0
            assert seen.values[before:] == sent
            await live(seen, kafka, topic)
            offsets = [r.offset for r in seen.records]
            assert offsets == list(range(len(offsets)))

    asyncio.run(work())


def test_a_broker_that_is_down_at_the_start_is_waited_for(stack: RunningStack, topic: str, tmp_path: Path) -> None:
    kafka = stack.addresses.kafka
    produce(kafka, topic, [b"a", b"b"])

    async def work() -> None:
        await asyncio.to_thread(stack.kill_part, "kafka")
        async with following(kafka, topic, tmp_path) as seen:
            await asyncio.sleep(1.5)
            assert not seen.follower.caught_up
            await asyncio.to_thread(stack.start_part, "kafka")
            await until(lambda: seen.follower.caught_up, 5, "not caught up 5 s after Kafka appeared")
            assert seen.values == [b"a", b"b"]

    asyncio.run(work())


def test_stopping_while_the_broker_is_down_takes_a_bounded_time(
    stack: RunningStack, topic: str, tmp_path: Path
) -> None:
    kafka = stack.addresses.kafka

    async def work() -> None:
        try:
            async with following(kafka, topic, tmp_path) as seen:
                await live(seen, kafka, topic)
                await asyncio.to_thread(stack.kill_part, "kafka")
                await asyncio.sleep(0.5)
        finally:
            await asyncio.to_thread(stack.start_part, "kafka")

    asyncio.run(work())


# -- the log is not what it was


def test_a_topic_made_again_is_told_and_read_from_its_start(stack: RunningStack, topic: str, tmp_path: Path) -> None:
    kafka = stack.addresses.kafka
    produce(kafka, topic, [b"old%d" % n for n in range(5)])

    async def work() -> None:
        async with following(kafka, topic, tmp_path) as seen:
            await live(seen, kafka, topic)
            before = len(seen.records)
            await asyncio.to_thread(delete_topic, kafka, topic)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(make_topic, kafka, topic)
            await asyncio.to_thread(produce, kafka, topic, [b"new0", b"new1"])
            await until(lambda: seen.values[before:] == [b"new0", b"new1"], 15)
            assert seen.recreated == [topic]
            await until(lambda: seen.caught_up == [5, before + 2], 5)
            await live(seen, kafka, topic)

    asyncio.run(work())


def test_a_missing_topic_is_waited_for(stack: RunningStack, tmp_path: Path) -> None:
    kafka, name = stack.addresses.kafka, f"follow-{uuid.uuid4().hex[:8]}"

    async def work() -> None:
        async with following(kafka, name, tmp_path) as seen:
            await asyncio.sleep(1)
            assert not seen.follower.caught_up
            await asyncio.to_thread(make_topic, kafka, name)
            await asyncio.to_thread(produce, kafka, name, [b"first"])
            await until(lambda: seen.values == [b"first"], 8)

    asyncio.run(work())
