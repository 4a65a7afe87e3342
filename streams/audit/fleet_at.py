"""Who had last said what by a moment: the fold of ``mlcdn.fleet`` for a reader who asks once, at the end.

Nearly every record is a beat that the same worker's next beat makes moot, and to decode one takes ten times as long as to
see whose it is. So a beat is decoded when it is the first of its worker or of an incarnation, when its number does not
rise, and when it is the last; any other is known by its first five fields.

Laws: what comes out is what `streams.folds.fleet` comes to, without rhythms and reports, of any log; a beat that turns
out unreadable means that one taken on trust was wrong, so the log is read again and every beat decoded; workers and swaps are
bounded as in the fold, and the oldest goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

import msgspec

from schemas import codec
from schemas.codec import Envelope
from schemas.errors import EventRefused
from schemas.events import (
    AGENT,
    ArtifactRejected,
    InvalidationApplied,
    ModelSwapped,
    NodeBeat,
    NodeLeft,
    SwapFailed,
)
from streams.folds.fleet import NODES_KEPT, REPORTS_KEPT, WORKERS_KEPT, Fleet, WorkerState
from streams.log.record import Record

K = TypeVar("K")
V = TypeVar("V")

SWAPS_KEPT: Final = 1_024
_BEAT_FRAME: Final = b"\0" + codec.LATEST["NodeBeat"].id.to_bytes(4, "big")


class Swap(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's last word of taking a model over, `id` its CloudEvents id."""

    event: ModelSwapped
    id: str
    received_ms: int


class Beaten(msgspec.Struct, kw_only=True):
    """A worker by its last beat; `envelope` once that is decoded. `swaps` are those after that beat, by (model, channel)."""

    record: Record
    incarnation: int
    number: int
    envelope: Envelope | None
    left: bool = False
    swaps: dict[tuple[str, str], Swap] = {}

    @property
    def beat(self) -> NodeBeat:
        event = self._decoded().event
        assert isinstance(event, NodeBeat)
        return event

    @property
    def id(self) -> str:
        return self._decoded().id

    def _decoded(self) -> Envelope:
        if self.envelope is None:
            record = self.record
            self.envelope = codec.decode(record.topic, record.key, record.value, record.headers)
        return self.envelope


class FleetAt(msgspec.Struct, kw_only=True):
    """`workers` by (node, worker), the one heard of last at the end; `unheard` are swaps of workers before any beat."""

    incarnations: dict[str, int] = {}
    workers: dict[tuple[str, int], Beaten] = {}
    unheard: dict[tuple[str, int, str, str], Swap] = {}

    def folded(self) -> Fleet:
        """As the fold has it, without rhythms, reports and purges."""
        return Fleet(
            workers={
                f"{node}/{worker}": WorkerState(beat=w.beat, received_ms=w.record.timestamp_ms, left=w.left)
                for (node, worker), w in self.workers.items()
            },
            incarnations=self.incarnations,
        )


def fleet_at(records: Callable[[], Iterable[Record]]) -> FleetAt:
    """`records` reads the topic, in the one order; it is asked a second time only if a beat is unreadable."""
    try:
        return _fold(records(), on_trust=True)
    except EventRefused:
        return _fold(records(), on_trust=False)


def _fold(records: Iterable[Record], *, on_trust: bool) -> FleetAt:
    state = FleetAt()
    for record in records:
        if on_trust and record.value is not None and record.value.startswith(_BEAT_FRAME) and _rises(state, record):
            continue
        try:
            envelope = codec.decode(record.topic, record.key, record.value, record.headers)
        except EventRefused:
            continue
        _take(state, envelope, record)
    for worker in state.workers.values():
        worker._decoded()
    return state


def _rises(state: FleetAt, record: Record) -> bool:
    """Takes a beat by its first fields, if its worker is known and its number rises; or it is moot either way."""
    seen = first_fields(record)
    if seen is None:
        return False
    node, number_of_worker, incarnation, number = seen
    known = state.incarnations.get(node, -1)
    if incarnation != known:
        return incarnation < known
    at = (node, number_of_worker)
    worker = state.workers.get(at)
    if worker is None or worker.incarnation != incarnation:
        return False
    if number <= worker.number:
        worker._decoded()
        return False
    del state.workers[at]
    worker.record, worker.number, worker.envelope, worker.left = record, number, None, False
    if worker.swaps:
        worker.swaps = {}
    state.workers[at] = worker
    return True


def first_fields(record: Record) -> tuple[str, int, int, int] | None:
    """Node, worker, incarnation and number of what is framed as a beat; None where it does not begin as one."""
    value, key = record.value or b"", record.key or b""
    try:
        if len(key) > 63 or value[5] != len(key) << 1 or not value.startswith(key, 6):
            return None
        at = 6 + len(key)
        region = value[at]
        if region & 0x81:
            return None
        at += 1 + (region >> 1)
        if value[at] & 0x80 or value[at + 1] & 0x80:
            worker, at = _long(value, at)
            incarnation, at = _long(value, at)
        else:
            worker, incarnation = _UNZIGZAG[value[at]], _UNZIGZAG[value[at + 1]]
            at += 2
        number, at = _long(value, at)
        return key.decode("ascii"), worker, incarnation, number
    except (IndexError, UnicodeDecodeError):
        return None


_UNZIGZAG: Final = tuple(n >> 1 ^ -(n & 1) for n in range(128))


def _long(value: bytes, at: int) -> tuple[int, int]:
    """Avro's int and long: zigzag, seven bits a byte, the lowest first; and where the next field begins."""
    said = shift = 0
    while True:
        byte = value[at]
        at += 1
        said |= (byte & 0x7F) << shift
        if byte < 0x80:
            return said >> 1 ^ -(said & 1), at
        shift += 7
        if shift > 63:
            raise IndexError(at)


def _take(state: FleetAt, envelope: Envelope, record: Record) -> None:
    event = envelope.event
    if not isinstance(event, NodeBeat | ModelSwapped | SwapFailed | ArtifactRejected | InvalidationApplied | NodeLeft):
        return
    known = state.incarnations.get(event.node, -1)
    if event.incarnation < known:
        return
    if event.incarnation > known:
        _put(state.incarnations, event.node, event.incarnation, NODES_KEPT)
    at = (event.node, event.worker)
    before = state.workers.get(at)
    match event:
        case NodeBeat():
            same_life = before is not None and before.incarnation == event.incarnation
            if same_life and before is not None and before.number == event.beat and not before.left:
                return
            if before is None:
                state.unheard = {key: swap for key, swap in state.unheard.items() if key[:2] != at}
            now = Beaten(record=record, incarnation=event.incarnation, number=event.beat, envelope=envelope)
            _put(state.workers, at, now, WORKERS_KEPT)
        case NodeLeft():
            for (node, worker), heard in state.workers.items():
                if node == event.node and event.worker in (AGENT, worker):
                    heard.left = True
        case ModelSwapped():
            swap = Swap(event=event, id=envelope.id, received_ms=record.timestamp_ms)
            if before is not None:
                _put(before.swaps, (event.model, event.channel), swap, SWAPS_KEPT)
            else:
                _put(state.unheard, (*at, event.model, event.channel), swap, REPORTS_KEPT)


def _put(kept: dict[K, V], key: K, value: V, limit: int) -> None:
    kept.pop(key, None)
    kept[key] = value
    while len(kept) > limit:
        del kept[next(iter(kept))]
