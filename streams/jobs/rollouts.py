"""The rollout job: watches every release that is under way, and signs what its gate says.

    python -m streams.jobs.rollouts

    releases → Rollout          which wave is in force, since when
    fleet    → Fleet            who serves it, who will not, what shadows found
    requests → Comparison       how it answers beside the stable release, since the wave began
    every TICK_S: judge → RolloutAdvanced | RolloutHalted, with the ranges that were read

Laws:
- Nothing is said before the log was read to its end. A wave's records are read from the first one after its beginning,
  whenever this job came to know of it, so a second job, or this one started again, comes to the same verdict.
- Two jobs do no harm: the first verdict on a wave counts. A job says nothing twice of one wave unless the log lost it.
- What was compared is stored before the verdict is appended, if the store takes it within ARCHIVE_S: requests are kept
  for a day. A store that is away delays no halt.
- A log that was made again, or that does not answer, is read anew.

It must not know what nodes do with a verdict.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
import structlog

from processes import logs
from processes.signals import stop_on_signals
from schemas import codec, signing
from schemas.errors import Conflict, EventRefused, MlcdnError, SettingsInvalid
from schemas.events import Evidence, Range
from schemas.settings import Settings, load
from schemas.topics import FLEET, RELEASES, REQUESTS
from streams.artifacts import ArtifactStore
from streams.folds import fleet, gates, releases
from streams.folds.comparison import Comparison
from streams.folds.fleet import Fleet
from streams.folds.releases import Releases
from streams.folds.rollouts import Rollout
from streams.jobs.archive import ARCHIVE_S, Archive, Store
from streams.jobs.broker_clock import BrokerClock
from streams.log.boot import read_to_watermark
from streams.log.keys import load_private, load_roots
from streams.log.producer import KafkaAppender
from streams.log.reader import KafkaReader
from streams.log.record import LogReader, Record, TopicPartition
from streams.log.writer import Writer

TICK_S: Final = 0.1
SAME_LOG_S: Final = 5.0
APPEND_S: Final = 5.0
RETRY_S: Final = 1.0
VERDICTS: Final = ("RolloutAdvanced", "RolloutHalted")
# A verdict that did not come back in the log in this time was lost, and is said again.
LOST_S: Final = 10.0
# Before a release: each worker has beaten once by then.
HEARD_MS: Final = 15_000

log = structlog.get_logger()

Wave = tuple[str, int, int]
"""Model, sequence, and the position of the record that began the wave."""


class _Watched:
    """One wave: what is compared, where each partition was begun, and when its verdict was last said."""

    def __init__(self, rollout: Rollout, starts: dict[TopicPartition, int]) -> None:
        self.comparison, self.starts = Comparison(gates.subject_of(rollout)), starts
        self.said_at = -LOST_S


class RolloutJob:
    """`boot` reads the log to its end, `take` one record more, `tick` judges. One event loop owns it."""

    def __init__(
        self,
        reader: LogReader,
        writer: Writer,
        roots: tuple[bytes, ...],
        keyid: str,
        store: Store | None,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader, self._writer, self._monotonic_s = reader, writer, monotonic_s
        self._archive = Archive(store, monotonic_s)
        self._keyid = keyid
        self._releases, self._fleet, self._clock = Releases.initial(roots), Fleet(), BrokerClock()
        self._next: dict[TopicPartition, int] = {}
        self._watched: dict[Wave, _Watched] = {}
        self._topics: dict[str, str] = {}

    def under_way(self) -> Iterable[Rollout]:
        for _, history in sorted(self._releases.models.items()):
            if history.rollout is not None and history.rollout.under_way:
                yield history.rollout

    async def boot(self) -> None:
        """Reads ``releases`` whole, and of the others what the rollouts under way need."""
        for topic in (RELEASES.name, FLEET.name, REQUESTS.name):
            self._topics[topic] = await asyncio.to_thread(self._reader.topic_id, topic)
        self._next |= await asyncio.to_thread(read_to_watermark, self._reader, RELEASES.name, self._fold)
        begun = [rollout.begun_ms for rollout in self.under_way()]
        heard = min(begun, default=0) - HEARD_MS if begun else None
        for topic, since_ms in ((FLEET.name, heard), (REQUESTS.name, None)):
            starts = {}
            for partition in range(await asyncio.to_thread(self._reader.partitions, topic)):
                starts[topic, partition] = await self._start(topic, partition, since_ms)
            self._next |= await asyncio.to_thread(read_to_watermark, self._reader, topic, self._fold, starts)
        await self._watch()

    async def follow(self) -> None:
        """Takes records as they come, until it is cancelled."""
        async for record in self._reader.tail(dict(self._next)):
            await self.take(record)

    async def take(self, record: Record) -> None:
        at = (record.topic, record.partition)
        if record.offset < self._next.get(at, 0):
            return
        self._fold(record)
        self._next[at] = record.offset + 1
        if record.topic == RELEASES.name:
            await self._watch()

    async def judge_until(self, stop: asyncio.Event) -> None:
        checked = self._monotonic_s()
        while not stop.is_set():
            try:
                await self.tick()
                if self._monotonic_s() - checked > SAME_LOG_S:
                    await self._same_log()
                    checked = self._monotonic_s()
            except Conflict:
                raise
            except MlcdnError as error:
                log.warning("verdict_not_written", error=str(error))
            await asyncio.sleep(TICK_S)

    async def tick(self) -> int:
        """Judges every wave in force; how many verdicts were appended."""
        now_ms, said = self._clock.now_ms(self._now()), 0
        for rollout in list(self.under_way()):
            watched = self._watched.get(_wave(rollout))
            if now_ms is None or watched is None or self._monotonic_s() - watched.said_at < LOST_S:
                continue
            judgement = gates.judge(rollout, watched.comparison, self._fleet, now_ms)
            if judgement.verdict is None or not self._may_sign(rollout):
                continue
            evidence = await self._complete(judgement.evidence, watched)
            event = gates.decided(rollout, judgement, evidence)
            assert event is not None
            watched.said_at = self._monotonic_s()
            await self._writer.append(event, causation_id=rollout.wanted.cause)
            log.info("verdict", model=event.model, step=event.step, verdict=event.verdict, reason=event.reason)
            said += 1
        return said

    def _may_sign(self, rollout: Rollout) -> bool:
        """A verdict that nobody may believe is not said."""
        grant = self._releases.trust.keys.get(self._keyid)
        if grant is not None and grant.may(*VERDICTS, model=rollout.wanted.model):
            return True
        self._watched[_wave(rollout)].said_at = self._monotonic_s()
        log.error("verdict_not_signed", model=rollout.wanted.model, cause="this job's key may not sign verdicts on it")
        return False

    def _fold(self, record: Record) -> None:
        self._clock.hear(record.timestamp_ms, self._now())
        # Who may not say what it says is dead-lettered by the agents, which read the same log.
        if record.topic == RELEASES.name:
            self._releases = releases.fold(self._releases, record).state
            return
        envelope = None
        if record.topic == FLEET.name:
            step = fleet.fold(self._fleet, record)
            self._fleet, envelope = step.state, step.envelope
        elif self._watched:
            try:
                envelope = codec.decode(record.topic, record.key, record.value, record.headers)
            except EventRefused:
                return
        if envelope is not None:
            for watched in self._watched.values():
                watched.comparison.take(record, envelope)

    async def _watch(self) -> None:
        """Begins what has begun, forgets what is over."""
        current = {_wave(rollout): rollout for rollout in self.under_way()}
        self._watched = {wave: watched for wave, watched in self._watched.items() if wave in current}
        for wave, rollout in current.items():
            if wave not in self._watched:
                self._watched[wave] = await self._begin(rollout)

    async def _begin(self, rollout: Rollout) -> _Watched:
        """With everything that was read past before the wave was known of."""
        starts: dict[TopicPartition, int] = {}
        for topic, since_ms in ((REQUESTS.name, rollout.since_ms), (FLEET.name, rollout.begun_ms - HEARD_MS)):
            for partition in range(await asyncio.to_thread(self._reader.partitions, topic)):
                starts[topic, partition] = await self._start(topic, partition, since_ms)
        watched = _Watched(rollout, starts)
        for (topic, partition), start in starts.items():
            end = self._next.get((topic, partition), 0)
            if start < end:
                await asyncio.to_thread(self._read_again, watched.comparison, topic, partition, start, end)
        return watched

    def _read_again(self, comparison: Comparison, topic: str, partition: int, start: int, end: int) -> None:
        for record in self._reader.read(topic, partition, start, end):
            take(comparison, record)

    async def _start(self, topic: str, partition: int, since_ms: int | None) -> int:
        if since_ms is None:
            return (await asyncio.to_thread(self._reader.watermarks, topic, partition))[1]
        return await asyncio.to_thread(self._reader.offset_at, topic, partition, max(0, since_ms))

    async def _complete(self, evidence: Evidence, watched: _Watched) -> Evidence:
        """With the ranges that were read, and the digest of what was compared, once it is stored."""
        ranges = [
            Range(topic=topic, partition=partition, start=start, end=max(start, self._next.get((topic, partition), 0)))
            for (topic, partition), start in sorted(watched.starts.items())
        ]
        archive = await self._archive.keep(watched.comparison)
        return msgspec.structs.replace(evidence, ranges=tuple(ranges), archive=archive)

    async def _same_log(self) -> None:
        for topic, known in self._topics.items():
            if await asyncio.to_thread(self._reader.topic_id, topic) != known:
                raise Conflict(f"{topic} was made again")

    def _now(self) -> int:
        return int(self._monotonic_s() * 1_000)


def take(comparison: Comparison, record: Record) -> None:
    """What cannot be decoded does not count."""
    try:
        comparison.take(record, codec.decode(record.topic, record.key, record.value, record.headers))
    except EventRefused:
        return


def _wave(rollout: Rollout) -> Wave:
    return (rollout.wanted.model, rollout.wanted.sequence, rollout.since_position)


async def run(settings: Settings) -> None:
    if settings.signing_key is None:
        raise SettingsInvalid("setting signing_key: verdicts are signed, so this job needs a private key file")
    key = load_private(settings.signing_key)
    writer = Writer(
        KafkaAppender(settings.kafka, client_id="mlcdn-rollouts", timeout_s=APPEND_S),
        source=f"/streams/{settings.node}",
        signing_key=key,
    )
    store = ArtifactStore(
        settings.s3_endpoint,
        settings.s3_bucket,
        settings.s3_access_key,
        settings.s3_secret_key.get_secret_value(),
        settings.s3_region,
        connect_timeout_s=ARCHIVE_S,
        read_timeout_s=ARCHIVE_S,
    )
    reader, roots = KafkaReader(settings.kafka), load_roots(settings.root_keys)
    keyid = signing.key_id(key.public_key().public_bytes_raw())
    async with stop_on_signals() as stop:
        try:
            while not stop.is_set():
                try:
                    await _watch_until(stop, RolloutJob(reader, writer, roots, keyid, store))
                except* MlcdnError as broken:
                    # Nodes serve on; what could not be judged is judged anew, from the log's start.
                    log.warning("rollouts_not_watched", error=str(broken.exceptions[0]))
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), RETRY_S)
        finally:
            await writer.close()


async def _watch_until(stop: asyncio.Event, job: RolloutJob) -> None:
    async with asyncio.TaskGroup() as group:
        await job.boot()
        following = group.create_task(job.follow())
        await job.judge_until(stop)
        following.cancel()


def main() -> None:
    try:
        settings = load()
        logs.configure(settings.log_level)
        asyncio.run(run(settings))
    except SettingsInvalid as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
