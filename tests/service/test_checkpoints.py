"""Checkpoints over a real log: every way of reading gives one chain, and two jobs keep it vouched for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

from confluent_kafka import Producer

from mlcdn.identities import change_trust
from mlcdn.local_stack.running import RunningStack
from schemas import signing
from schemas.events import Grant, TrustChanged
from schemas.topics import INVALIDATIONS, RELEASES
from streams.folds import chain, invalidations, releases
from streams.folds.checkpoints import ChainWatch
from streams.folds.invalidations import Invalidations
from streams.folds.releases import Releases
from streams.follow import DeadLetters, Follower, FollowSpec
from streams.log.keys import generate, load_private, write_roots
from streams.log.local import LocalLog
from streams.log.reader import KafkaReader
from streams.log.record import Record
from streams.log.writer import Writer

TOPIC = INVALIDATIONS.name
ODD = [
    (None, None, []),
    (b"", b"", []),
    (b"k", b"v", [("a", b"1"), ("a", b"2"), ("a", None), ("", b"")]),
    (b"k", b"\xff" * 70_000, [("é", b"\x00")]),
    (None, b"v", [("ce_id", b"1")]),
]


def produce(kafka: str, topic: str) -> None:
    producer = Producer({"bootstrap.servers": kafka, "linger.ms": 50, "compression.type": "gzip"})
    for key, value, headers in ODD:
        producer.produce(topic, key=key, value=value, headers=list(headers))
    assert producer.flush(15) == 0


def chained(records: list[Record]) -> bytes:
    found = chain.start(TOPIC)
    for record in records:
        found = chain.link(found, record)
    return found


def test_faust_and_a_plain_reader_see_one_chain(stack: RunningStack, tmp_path: Path) -> None:
    kafka = stack.addresses.kafka
    reader = KafkaReader(kafka)
    brought: list[Record] = []
    spec = FollowSpec(topics=(TOPIC,), group="chain", instance="one", bootstrap=kafka, datadir=tmp_path)
    letters = DeadLetters(Writer(LocalLog(lambda: 0), source="/x"), node="n", region="r")

    async def follow() -> None:
        stop, enough = asyncio.Event(), asyncio.Event()
        follower = Follower(spec, reader, lambda record: None, lambda: None, letters)
        deliver = follower._intake.deliver

        async def delivered(record: Record) -> None:
            brought.append(record)
            if len(brought) == len(ODD):
                enough.set()
            await deliver(record)

        follower._intake.deliver = delivered  # type: ignore[method-assign]
        task = asyncio.create_task(follower.run(stop))
        async with asyncio.timeout(60):
            while not enough.is_set():
                # Appended until Faust, not the boot read or the watchdog's, has brought a whole round of them.
                await asyncio.to_thread(produce, kafka, TOPIC)
                await asyncio.sleep(1)
            stop.set()
            await task

    asyncio.run(follow())
    again = list(reader.read(TOPIC, 0, brought[0].offset, brought[-1].offset + 1))
    assert again == brought
    assert chained(again) == chained(brought)


def test_two_jobs_vouch_for_both_topics(stack: RunningStack, tmp_path: Path) -> None:
    kafka = stack.addresses.kafka
    root = load_private(generate(tmp_path, "root"))
    roots_file = write_roots(tmp_path / "roots.txt", {"root": root})
    roots = (root.public_key().public_bytes_raw(),)
    keys = [generate(tmp_path, label) for label in ("one", "two")]
    grants = tuple(
        Grant(public_key=load_private(k).public_key().public_bytes_raw(), label=k.stem, models=("*",),
              kinds=("LogCheckpoint",)) for k in keys
    )  # fmt: skip
    asyncio.run(change_trust(kafka, root, TrustChanged(grants=grants, author="root"), roots))
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "streams.jobs.checkpoints"],
            env={"MLCDN_KAFKA": kafka, "MLCDN_ROOT_KEYS": str(roots_file), "MLCDN_SIGNING_KEY": str(key),
                 "MLCDN_CHECKPOINT_S": "0.5", "MLCDN_CHECKPOINT_EXPIRES_S": "3"},
        )
        for key in keys
    ]  # fmt: skip
    reader = KafkaReader(kafka)
    try:
        give_up = time.monotonic() + 40
        watches: dict[str, ChainWatch] = {}
        while not all(w.last and w.position - w.last.position < 3 for w in watches.values()) or len(watches) < 2:
            assert time.monotonic() < give_up
            time.sleep(0.5)
            watches = {topic: watch(reader, topic, roots) for topic in (RELEASES.name, TOPIC)}
        time.sleep(2)
    finally:
        for job in jobs:
            job.terminate()
        assert [job.wait(15) for job in jobs] == [0, 0]
    for topic in watches:
        found = watch(reader, topic, roots)
        assert found.alarms(0, at_end=True) == {}
        signers = {signing.key_id(g.public_key) for g in grants}
        assert found.last is not None
        assert found.last.signer in signers


def watch(reader: KafkaReader, topic: str, roots: tuple[bytes, ...]) -> ChainWatch:
    found = ChainWatch(topic)
    state: Releases | Invalidations = (
        Releases.initial(roots) if topic == RELEASES.name else Invalidations.initial(roots)
    )  # fmt: skip
    for record in reader.read(topic, 0):
        step = releases.fold(state, record) if isinstance(state, Releases) else invalidations.fold(state, record)
        state = step.state
        found.take(record, step.envelope.event if step.envelope else None)
    return found
