"""How the nodes answer: the fold of ``mlcdn.requests`` into ten seconds of counts a node. PURE.

Laws: a row counts in the second in which the broker received it, so a node's clock changes nothing; a record at or
below a partition's position is dropped without a word; counts only add, so batches of a second commute; everything is
bounded. A second is one vector of counts held as bytes: adding a batch is one addition, and states compare and hash as
values.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from schemas import codec
from schemas.errors import EventRefused
from schemas.events import TIERS, RequestBatch
from streams.folds import latencies
from streams.folds.step import Step
from streams.log.record import Record

WINDOW_S: Final = 10
NODES_KEPT: Final = 8_192
HIT_TIERS: Final = ("memory", "redis", "disk")

# A vector of counts: requests, errors, rows lost, one per tier, then the latencies by bucket.
_REQUESTS, _ERRORS, _LOST, _TIER = 0, 1, 2, 3
_LATENCY: Final = _TIER + len(TIERS)
_SIZE: Final = _LATENCY + latencies.BUCKETS
_Counts = npt.NDArray[np.int64]


class Second(msgspec.Struct, frozen=True):
    """The counts of one second, `at` being Unix seconds of the broker."""

    at: int
    counts: bytes


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """`nodes` has at most `WINDOW_S` seconds each, oldest first; `positions` the last record folded, by partition."""

    positions: dict[int, int] = {}
    nodes: dict[str, tuple[Second, ...]] = {}


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """A node's last seconds. Shares are 0 to 1, `rate` is requests a second, latencies are within 12 %."""

    requests: int = 0
    errors: int = 0
    rows_lost: int = 0
    tiers: tuple[int, ...] = (0,) * len(TIERS)
    rate: float = 0.0
    error_rate: float = 0.0
    hit_rate: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0


def fold(state: Traffic, record: Record) -> Step[Traffic]:
    """One record of ``mlcdn.requests``."""
    if record.offset <= state.positions.get(record.partition, -1):
        return Step(state)
    positions = state.positions | {record.partition: record.offset}
    try:
        envelope = codec.decode(record.topic, record.key, record.value, record.headers)
    except EventRefused as refused:
        return Step(Traffic(positions=positions, nodes=state.nodes), refused=refused)
    if not isinstance(envelope.event, RequestBatch):
        return Step(Traffic(positions=positions, nodes=state.nodes), envelope=envelope)
    nodes = dict(state.nodes)
    # Taken out and put back, so that the first is the one that has been quiet for longest.
    seconds = nodes.pop(envelope.event.node, ())
    nodes[envelope.event.node] = _added(seconds, record.timestamp_ms // 1000, _counted(envelope.event))
    while len(nodes) > NODES_KEPT:
        del nodes[next(iter(nodes))]
    return Step(Traffic(positions=positions, nodes=nodes), envelope=envelope)


def window(state: Traffic, node: str, now_ms: int) -> Window:
    """The node's last `WINDOW_S` seconds at `now_ms`, by the broker's clock."""
    oldest = now_ms // 1000 - WINDOW_S
    seconds = [second for second in state.nodes.get(node, ()) if second.at > oldest]
    if not seconds:
        return Window()
    counts = np.sum([np.frombuffer(second.counts, np.int64) for second in seconds], axis=0)
    requests, errors = int(counts[_REQUESTS]), int(counts[_ERRORS])
    tiers = tuple(int(n) for n in counts[_TIER:_LATENCY])
    answered = requests - tiers[TIERS.index("none")]
    # A node heard of for two seconds is not a fifth as busy as it is.
    spanned = min(WINDOW_S, max(1.0, now_ms / 1000 - seconds[0].at))
    p50, p99 = latencies.quantiles_ms(counts[_LATENCY:], (0.5, 0.99))
    return Window(
        requests=requests,
        errors=errors,
        rows_lost=int(counts[_LOST]),
        tiers=tiers,
        rate=requests / spanned,
        error_rate=errors / requests if requests else 0.0,
        hit_rate=sum(tiers[TIERS.index(tier)] for tier in HIT_TIERS) / answered if answered > 0 else 0.0,
        p50_ms=p50,
        p99_ms=p99,
    )


def _counted(batch: RequestBatch) -> _Counts:
    counts = np.zeros(_SIZE, np.int64)
    counts[_REQUESTS] = batch.rows
    counts[_ERRORS] = np.count_nonzero(np.frombuffer(batch.status, "<u2") >= 500)
    counts[_LOST] = min(max(batch.dropped, 0), 2**40)
    counts[_TIER:_LATENCY] = np.bincount(np.frombuffer(batch.tier, "u1"), minlength=len(TIERS))
    counts[_LATENCY:] = latencies.histogram(np.frombuffer(batch.latency_us, "<u4"))
    return counts


def _added(seconds: tuple[Second, ...], at: int, counts: _Counts) -> tuple[Second, ...]:
    """The seconds with the batch in its own."""
    if seconds and at <= seconds[-1].at - WINDOW_S:
        # Broker time does not go back within a partition, unless its clock was set back: what was counted is of no
        # time.
        seconds = ()
    newest = max(at, seconds[-1].at) if seconds else at
    kept = {second.at: second for second in seconds if second.at > newest - WINDOW_S}
    same = kept.get(at)
    total = counts if same is None else counts + np.frombuffer(same.counts, np.int64)
    kept[at] = Second(at, total.tobytes())
    return tuple(kept[second] for second in sorted(kept))
