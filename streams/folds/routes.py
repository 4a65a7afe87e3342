"""The routing table: derived from the fleet and its traffic, never stored as truth. PURE.

A node is as healthy as its worst live worker; it serves a model only if every one of them does. Thresholds are data:

    phi < suspect  alive · phi < dead  suspect · else dead · draining and left by the node's own word
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from schemas.events import Health, RoutedModel, RoutedNode
from streams.folds.fleet import Fleet, WorkerState, phi
from streams.folds.traffic import Traffic

FORGOTTEN_MS: Final = 600_000


class HealthPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """`suspect` and `dead` are values of phi."""

    suspect: float = 3.0
    dead: float = 8.0


def derive(fleet: Fleet, traffic: Traffic, now_ms: int, policy: HealthPolicy) -> tuple[RoutedNode, ...]:
    """Every node heard of within ten minutes, dead ones too, in the order of their names."""
    by_node: dict[str, list[WorkerState]] = {}
    for worker in fleet.workers.values():
        by_node.setdefault(worker.beat.node, []).append(worker)
    found = (_node(node, _of_last_life(workers, fleet), traffic, now_ms, policy) for node, workers in by_node.items())
    return tuple(sorted((n for n in found if n is not None), key=lambda n: n.node))


def _of_last_life(workers: list[WorkerState], fleet: Fleet) -> list[WorkerState]:
    """A worker of an earlier incarnation is nobody any more: a node may have come back with fewer."""
    last = fleet.incarnations.get(workers[0].beat.node, 0)
    return [w for w in workers if w.beat.incarnation == last] or workers


def _node(
    node: str,
    workers: list[WorkerState],
    traffic: Traffic,
    now_ms: int,
    policy: HealthPolicy,
) -> RoutedNode | None:
    newest = max(workers, key=lambda w: w.received_ms)
    if now_ms - newest.received_ms > FORGOTTEN_MS:
        return None
    here = [w for w in workers if not w.left] or workers
    suspicions = [phi(w, now_ms) for w in here]
    window = traffic.window(node, now_ms)
    beat = newest.beat
    return RoutedNode(
        node=node,
        region=beat.region,
        url=beat.url,
        location=beat.location,
        health=_health(here, min(suspicions), policy),
        phi=min(suspicions),
        load=max(w.beat.load for w in here),
        hit_rate=window.hit_rate,
        error_rate=window.error_rate,
        window_requests=window.requests,
        rate=window.requests / 10,
        p50_ms=window.p50_ms,
        p99_ms=window.p99_ms,
        in_flight=sum(w.beat.in_flight for w in here),
        models=tuple(_models(here)),
    )


def _health(workers: list[WorkerState], suspicion: float, policy: HealthPolicy) -> Health:
    """By the least suspected worker: workers share a port, so one that lives answers for the node."""
    if all(w.left for w in workers):
        return Health.LEFT
    if suspicion >= policy.dead:
        return Health.DEAD
    if suspicion >= policy.suspect:
        return Health.SUSPECT
    if any(w.beat.draining for w in workers):
        return Health.DRAINING
    return Health.ALIVE


def _models(workers: list[WorkerState]) -> Iterable[RoutedModel]:
    """Models that every worker can answer for, as its first worker serves them."""
    able = [{m.name for m in w.beat.models if m.state == "forwarded" or m.digest} for w in workers]
    everywhere = set.intersection(*able)
    for model in workers[0].beat.models:
        if model.name in everywhere:
            yield RoutedModel(name=model.name, version=model.version, digest=model.digest)


def differs(before: tuple[RoutedNode, ...], now: tuple[RoutedNode, ...]) -> bool:
    """Whether a router would choose otherwise: who is there, how healthy, where, serving what. Figures are not looked at."""

    def facts(nodes: tuple[RoutedNode, ...]) -> list[tuple[object, ...]]:
        return [(n.node, n.region, n.url, n.health, n.models) for n in nodes]

    return facts(before) != facts(now)
