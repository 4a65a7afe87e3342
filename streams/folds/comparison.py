"""A candidate beside the stable release: what each answered, over one wave's time and regions. PURE.

Laws: a record counts once, however often it is read, and in whatever order; a row counts for the release whose artifact
answered it; what was answered before the wave began, by the broker's clock, or in another region, does not count.

Failed are answers of status 429, and of 500 and above: a candidate that is too slow for its queue fails its clients as
one that breaks. Refused are those of another status of 400 and above: what the stable release takes and a candidate does
not is no fault of its clients. Latencies are those of answers that were computed: a candidate's caches are cold, and the stable
release's are not. It must not know thresholds or verdicts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, Final, Self

import msgspec
import numpy as np
import numpy.typing as npt

from schemas.codec import Envelope
from schemas.errors import BadInput
from schemas.events import TIERS, Compare, RequestBatch, ShadowCompared, Side
from streams.folds import latencies
from streams.log.record import Record

# Of one wave: 10 batches a second of 100 workers for a minute and a half; older ones are then added up.
MAX_TALLIES: Final = 100_000
MAX_ARCHIVE_BYTES: Final = 256 * 2**20
_REQUESTS, _ERRORS, _REFUSED, _COMPUTED, _LATENCY = 0, 1, 2, 3, 4
_SIZE: Final = _LATENCY + latencies.BUCKETS
_COMPUTED_TIERS: Final = tuple(TIERS.index(tier) for tier in ("model", "origin"))
_SPARSE: Final = np.dtype([("index", "<u2"), ("count", "<u4")])

Counts = npt.NDArray[np.int64]


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What one record adds: counts of both releases, packed as (index, count) pairs of what is not zero."""

    id: str
    topic: str
    partition: int
    offset: int
    stable: bytes = b""
    candidate: bytes = b""
    compared: int = 0
    disagreements: int = 0


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is compared with what, and by what, where (none named: everywhere), and since when (broker's clock)."""

    model: str
    sequence: int
    stable: str
    candidate: str
    regions: tuple[str, ...]
    since_ms: int
    compare: Compare


class _Archive(msgspec.Struct, frozen=True, kw_only=True):
    subject: Subject
    earlier: Tally
    tallies: tuple[Tally, ...]


class Comparison:
    """Mutable: one owner. `take` every record of ``requests`` and ``fleet``."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._tallies: dict[str, Tally] = {}
        self._earlier = Tally(id="", topic="", partition=0, offset=0)
        self._stable, self._candidate = np.zeros(_SIZE, np.int64), np.zeros(_SIZE, np.int64)
        self.compared = self.disagreements = 0

    def take(self, record: Record, envelope: Envelope) -> None:
        event = envelope.event
        if record.timestamp_ms <= self.subject.since_ms or envelope.id in self._tallies:
            return
        tally: Tally | None = None
        if isinstance(event, RequestBatch) and self._reaches(event.region):
            tally = self._of_batch(record, envelope.id, event)
        elif isinstance(event, ShadowCompared) and self._reaches(event.region):
            tally = self._of_shadow(record, envelope.id, event)
        if tally is not None:
            self._add(tally)

    @property
    def stable(self) -> Side:
        return _side(self.subject.stable, self._stable)

    @property
    def candidate(self) -> Side:
        return _side(self.subject.candidate, self._candidate)

    @property
    def computed(self) -> tuple[int, int]:
        """Answers whose latencies are compared: the stable release's, the candidate's."""
        return int(self._stable[_COMPUTED]), int(self._candidate[_COMPUTED])

    def archive(self) -> bytes:
        """Everything that was counted, in one order: the same records make the same bytes."""
        tallies = sorted(self._tallies.values(), key=lambda t: (t.topic, t.partition, t.offset))
        whole = _Archive(subject=self.subject, earlier=self._earlier, tallies=tuple(tallies))
        return zlib.compress(msgspec.msgpack.encode(whole), 6)

    @classmethod
    def of_archive(cls, data: bytes) -> Self:
        """`BadInput` for what is no archive."""
        unpack = zlib.decompressobj()
        try:
            whole = msgspec.msgpack.decode(unpack.decompress(data, MAX_ARCHIVE_BYTES), type=_Archive)
            comparison = cls(whole.subject)
            comparison._add_up(whole.earlier)
            for tally in whole.tallies:
                comparison._add(tally)
        except (zlib.error, msgspec.MsgspecError, ValueError, IndexError) as error:
            raise BadInput(f"no archive of compared rows: {error}") from None
        return comparison

    def _reaches(self, region: str) -> bool:
        return not self.subject.regions or region in self.subject.regions

    def _of_batch(self, record: Record, event_id: str, batch: RequestBatch) -> Tally | None:
        model = np.frombuffer(batch.model, "<u2")
        sides = [
            _counted(batch, np.isin(model, self._indexes(batch, digest)))
            for digest in (self.subject.stable, self.subject.candidate)
        ]
        if not any(side.any() for side in sides):
            return None
        return Tally(
            id=event_id,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            stable=_packed(sides[0]),
            candidate=_packed(sides[1]),
        )

    def _indexes(self, batch: RequestBatch, digest: str) -> list[int]:
        # Two releases of the same bytes cannot be told apart: their rows are the candidate's.
        if digest == self.subject.stable == self.subject.candidate:
            digest = ""
        return [i for i, m in enumerate(batch.models) if (m.name, m.digest) == (self.subject.model, digest)]

    def _of_shadow(self, record: Record, event_id: str, event: ShadowCompared) -> Tally | None:
        if (event.model, event.sequence) != (self.subject.model, self.subject.sequence):
            return None
        compared, disagreements = event.rows, event.disagreements
        if self.subject.compare is Compare.TOP1 and event.top1_rows:
            compared, disagreements = event.top1_rows, event.top1_rows - event.top1_agreements
        return Tally(
            id=event_id,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            compared=compared + event.failed,
            disagreements=disagreements + event.failed,
        )

    def _add(self, tally: Tally) -> None:
        self._add_up(tally)
        self._tallies[tally.id] = tally
        if len(self._tallies) > MAX_TALLIES:
            self._fold_earlier()

    def _add_up(self, tally: Tally) -> None:
        self._stable += _unpacked(tally.stable)
        self._candidate += _unpacked(tally.candidate)
        self.compared += tally.compared
        self.disagreements += tally.disagreements

    def _fold_earlier(self) -> None:
        """The older half of the tallies becomes one."""
        old = [self._tallies.pop(key) for key in list(self._tallies)[: MAX_TALLIES // 2]]
        self._earlier = _sum([self._earlier, *old])


def _side(digest: str, counts: Counts) -> Side:
    p50, p99 = latencies.quantiles_ms(counts[_LATENCY:], (0.5, 0.99))
    return Side(
        digest=digest,
        requests=int(counts[_REQUESTS]),
        errors=int(counts[_ERRORS]),
        refused=int(counts[_REFUSED]),
        p50_ms=p50,
        p99_ms=p99,
    )


def _counted(batch: RequestBatch, rows: npt.NDArray[np.bool_]) -> Counts:
    counts = np.zeros(_SIZE, np.int64)
    status = np.frombuffer(batch.status, "<u2")[rows]
    computed = np.isin(np.frombuffer(batch.tier, "u1")[rows], _COMPUTED_TIERS)
    counts[_REQUESTS] = len(status)
    failed = (status >= 500) | (status == 429)
    counts[_ERRORS] = np.count_nonzero(failed)
    counts[_REFUSED] = np.count_nonzero((status >= 400) & ~failed)
    counts[_COMPUTED] = np.count_nonzero(computed)
    counts[_LATENCY:] = latencies.histogram(np.frombuffer(batch.latency_us, "<u4")[rows][computed])
    return counts


def _packed(counts: Counts) -> bytes:
    index = np.flatnonzero(counts)
    pairs: npt.NDArray[Any] = np.empty(len(index), _SPARSE)
    pairs["index"], pairs["count"] = index, np.minimum(counts[index], 2**32 - 1)
    return pairs.tobytes()


def _unpacked(packed: bytes) -> Counts:
    counts = np.zeros(_SIZE, np.int64)
    pairs = np.frombuffer(packed, _SPARSE)
    counts[pairs["index"]] = pairs["count"]
    return counts


def _sum(tallies: Iterable[Tally]) -> Tally:
    stable, candidate, compared, disagreements = np.zeros(_SIZE, np.int64), np.zeros(_SIZE, np.int64), 0, 0
    for tally in tallies:
        stable += _unpacked(tally.stable)
        candidate += _unpacked(tally.candidate)
        compared += tally.compared
        disagreements += tally.disagreements
    return Tally(
        id="",
        topic="",
        partition=0,
        offset=0,
        stable=_packed(stable),
        candidate=_packed(candidate),
        compared=compared,
        disagreements=disagreements,
    )
