"""Receipts: which nodes say that they serve a release, or obey an invalidation.

The nodes that are asked for are those with a fresh beat when the waiting begins; a node is live when every worker it beats
for says so. One that is away is named as missing, with the age of its last beat, and converges when it is back.

Law: who was there is judged by the broker's time alone: a caller whose clock is wrong must not wait for nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Final

import msgspec

from schemas.topics import FLEET
from streams.folds import fleet
from streams.folds.fleet import Fleet, Report, WorkerState
from streams.log.record import LogReader, Record

FRESH_MS: Final = 5_000
# Beats come once a second; what is older than this was said by nodes that are gone.
RECENT_MS: Final = 60_000


class NodeOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """`outcome`: live, rejected, failed or missing; `reason` where it is not live. `ms` by phase, and total since append."""

    region: str
    node: str
    outcome: str
    reason: str
    ms: dict[str, float]


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds from the broker's timestamp of the purge to the node's fence."""

    region: str
    node: str
    applied_ms: float


class FleetWatch:
    """The fleet as it reports, from a minute ago on. Make it before the append, so that it knows who was there."""

    def __init__(self, reader: LogReader) -> None:
        self.reader = reader
        self.state = Fleet()
        self._since_ms = 0
        self._positions: dict[tuple[str, int], int] = {}

    async def look(self) -> None:
        """Reads what the last minute brought, by this machine's clock."""
        await asyncio.to_thread(self._read_recent, time.time_ns() // 1_000_000 - RECENT_MS)

    async def look_around(self, broker_ms: int) -> None:
        """Looks again if the minute before the broker's `broker_ms` is not what was looked at."""
        if not self._positions or self._since_ms > broker_ms - RECENT_MS // 2:
            await asyncio.to_thread(self._read_recent, broker_ms - RECENT_MS)

    def _read_recent(self, since: int) -> None:
        self._since_ms = since
        self.state, self._positions = Fleet(), {}
        for partition in range(self.reader.partitions(FLEET.name)):
            start = self.reader.offset_at(FLEET.name, partition, since)
            for record in self.reader.read(FLEET.name, partition, start):
                self.state = fleet.fold(self.state, record).state
                start = record.offset + 1
            self._positions[(FLEET.name, partition)] = start

    def fresh(self, now_ms: int) -> dict[str, list[WorkerState]]:
        """Workers with a fresh beat, by node; not those of a life before the node's present one."""
        found: dict[str, list[WorkerState]] = {}
        for worker in self.state.workers.values():
            here = not worker.left and fleet.current(self.state, worker)
            if here and now_ms - worker.received_ms <= FRESH_MS:
                found.setdefault(worker.beat.node, []).append(worker)
        return found

    def stale(self, now_ms: int) -> dict[str, WorkerState]:
        """Nodes without a fresh beat that did not say good-bye, by node."""
        fresh = self.fresh(now_ms)
        return {w.beat.node: w for w in self.state.workers.values() if not w.left and w.beat.node not in fresh}

    async def until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Folds what comes until `done`; False when the time ran out first."""
        if done():
            return True
        records = self.reader.tail(self._positions)
        try:
            async with asyncio.timeout(timeout_s):
                await self._follow(records, done)
        except TimeoutError:
            return False
        finally:
            await records.aclose()
        return True

    async def _follow(self, records: AsyncGenerator[Record], done: Callable[[], bool]) -> None:
        async for record in records:
            self.state = fleet.fold(self.state, record).state
            self._positions[(record.topic, record.partition)] = record.offset + 1
            if done():
                return


async def wait_live(
    watch: FleetWatch,
    model: str,
    sequence: int,
    appended_ms: int,
    *,
    timeout_s: float,
    progress: Callable[[NodeOutcome], None] = lambda _: None,
) -> list[NodeOutcome]:
    """One outcome a node, in the order of region and node. Ends early once every node that was there has said its word."""
    await watch.look_around(appended_ms)
    asked = watch.fresh(appended_ms)
    away = watch.stale(appended_ms)
    told: dict[str, NodeOutcome] = {}

    def done() -> bool:
        for node, workers in asked.items():
            if node not in told:
                outcome = _outcome(watch.state, node, workers, model, sequence, appended_ms)
                if outcome is not None:
                    told[node] = outcome
                    progress(outcome)
        return len(told) == len(asked)

    await watch.until(done, timeout_s)
    for node, workers in asked.items():
        if node not in told:
            waiting = _last_report(watch.state, node, model, sequence)
            reason = waiting.reason if waiting else f"no report within {timeout_s:g} s"
            region = workers[0].beat.region
            told[node] = NodeOutcome(region=region, node=node, outcome="missing", reason=reason, ms={})
    for node, worker in away.items():
        age = (appended_ms - worker.received_ms) / 1000
        reason = f"last beat {age:.0f} s before the release"
        told[node] = NodeOutcome(region=worker.beat.region, node=node, outcome="missing", reason=reason, ms={})
    return sorted(told.values(), key=lambda o: (o.region, o.node))


async def wait_applied(
    watch: FleetWatch,
    position: int,
    appended_ms: int,
    *,
    timeout_s: float,
) -> tuple[list[Receipt], list[str]]:
    """Receipts of the nodes that were there, and the names of those that gave none in time or were away."""
    await watch.look_around(appended_ms)
    asked = watch.fresh(appended_ms)

    def applied(node: str) -> bool:
        known = watch.state.applied.get(node)
        return known is not None and known.position >= position

    await watch.until(lambda: all(map(applied, asked)), timeout_s)
    receipts = [
        Receipt(region=asked[node][0].beat.region, node=node, applied_ms=watch.state.applied[node].ms)
        for node in sorted(asked)
        if applied(node)
    ]
    missing = [node for node in asked if not applied(node)] + list(watch.stale(appended_ms))
    return receipts, sorted(missing)


def _outcome(
    state: Fleet,
    node: str,
    workers: list[WorkerState],
    model: str,
    sequence: int,
    appended_ms: int,
) -> NodeOutcome | None:
    """What the node came to; None while it may still come to something else."""
    region = workers[0].beat.region
    reports = [state.reports.get((node, w.beat.worker, model, sequence)) for w in workers]
    live = [r for r in reports if r is not None and r.outcome == "live"]
    if len(live) == len(workers):
        slowest = max(live, key=lambda r: r.received_ms)
        ms = dict(slowest.ms) | {"total": float(slowest.received_ms - appended_ms)}
        return NodeOutcome(region=region, node=node, outcome="live", reason="", ms=ms)
    bad = _last_report(state, node, model, sequence)
    if bad is not None and bad.outcome != "live" and not bad.retrying:
        total = {"total": float(bad.received_ms - appended_ms)}
        return NodeOutcome(region=region, node=node, outcome=bad.outcome, reason=bad.reason, ms=total)
    return None


def _last_report(state: Fleet, node: str, model: str, sequence: int) -> Report | None:
    found = [r for (n, _, m, s), r in state.reports.items() if (n, m, s) == (node, model, sequence)]
    return max((r for r in found if r.outcome != "live"), key=lambda r: r.received_ms, default=None)
