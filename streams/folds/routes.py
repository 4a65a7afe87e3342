"""The routing table, derived from how the nodes are and how they answer. PURE.

Laws: derived, never folded: the same states and the same moment give the same table; a node is as healthy as its
healthiest worker, since they share one listening socket, and serves what every one of them serves; it gets worse at
once and better only after it was well for a while, so a flapping node stays out; one that has not been heard of since
the last table is kept, as dead, until it is forgotten: a table never loses a node because its writer started anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from schemas.events import Health, RoutedModel, RoutedNode, ServedModel
from streams.folds import fleet as fleets
from streams.folds import traffic as traffics
from streams.folds.fleet import Fleet, WorkerState
from streams.folds.traffic import Traffic

SERVING_STATES: Final = ("live", "forwarded")


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """`settle_ms`: how long a doubted node must be well to count as such again. Forgetting is by broker time."""

    phi_suspect: float = 3.0
    phi_dead: float = 8.0
    settle_ms: int = 3_000
    forget_left_ms: int = 300_000
    forget_dead_ms: int = 3_600_000


class Doubt(msgspec.Struct, frozen=True):
    """When the node was last seen unwell."""

    at_ms: int


def health_of_phi(phi: float, policy: Policy) -> Health:
    """alive < `phi_suspect` <= suspect < `phi_dead` <= dead."""
    thresholds = ((policy.phi_dead, Health.DEAD), (policy.phi_suspect, Health.SUSPECT))
    return next((health for threshold, health in thresholds if phi >= threshold), Health.ALIVE)


def derive(fleet: Fleet, traffic: Traffic, now_ms: int, policy: Policy) -> tuple[RoutedNode, ...]:
    """Every node that is not forgotten, by name."""
    by_node: dict[str, list[WorkerState]] = {}
    for worker in fleet.workers.values():
        if fleets.current(fleet, worker):
            by_node.setdefault(worker.beat.node, []).append(worker)
    derived = (_node(workers, traffic, now_ms, policy) for _, workers in sorted(by_node.items()))
    return tuple(node for node in derived if node is not None)


def _node(workers: list[WorkerState], traffic: Traffic, now_ms: int, policy: Policy) -> RoutedNode | None:
    there = [worker for worker in workers if not worker.left]
    last = max(there or workers, key=lambda worker: worker.received_ms)
    forget_ms = policy.forget_dead_ms if there else policy.forget_left_ms
    if now_ms - last.received_ms > forget_ms:
        return None
    phis = {worker.beat.worker: fleets.phi(worker, now_ms) for worker in there}
    phi = min(phis.values(), default=fleets.PHI_MAX)
    # A worker that died alone says nothing of the node's load or models any more.
    heard = [worker for worker in there if phis[worker.beat.worker] < policy.phi_dead] or [last]
    if not there:
        health = Health.LEFT
    elif (health := health_of_phi(phi, policy)) is not Health.DEAD and all(w.beat.draining for w in heard):
        health = Health.DRAINING
    seen = traffics.window(traffic, last.beat.node, now_ms)
    return RoutedNode(
        node=last.beat.node,
        region=last.beat.region,
        url=last.beat.url,
        location=last.beat.location,
        health=health,
        phi=round(phi, 3),
        load=_share(sum(w.beat.load for w in heard) / len(heard)),
        hit_rate=_share(seen.hit_rate),
        error_rate=_share(seen.error_rate),
        window_requests=seen.requests,
        rate=seen.rate,
        p50_ms=seen.p50_ms,
        p99_ms=seen.p99_ms,
        in_flight=min(sum(w.beat.in_flight for w in heard), 2**31 - 1),
        models=_served_by_all(heard),
    )


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def _served_by_all(workers: list[WorkerState]) -> tuple[RoutedModel, ...]:
    """By name; in the middle of a swap workers differ in digest, and the node still serves the model."""
    # A model that is on both of its seats is known by the stable one.
    served = [
        {m.name: m for m in sorted(worker.beat.models, key=lambda m: m.channel) if _serves(m)} for worker in workers
    ]
    names = sorted(set(served[0]).intersection(*served[1:]))
    models = [served[0][name] for name in names]
    return tuple(RoutedModel(name=m.name, version=m.version, digest=m.digest) for m in models)


def _serves(model: ServedModel) -> bool:
    """A model that loads, or failed to, is served from its older digest where it says one."""
    return model.state in SERVING_STATES or model.digest != ""


def kept_from(before: Iterable[RoutedNode], nodes: tuple[RoutedNode, ...]) -> tuple[RoutedNode, ...]:
    """`nodes`, and those of an earlier table that are not among them: dead, unless they had left."""
    known = {node.node for node in nodes}
    lost = [
        msgspec.structs.replace(
            node,
            health=Health.LEFT if node.health is Health.LEFT else Health.DEAD,
            phi=fleets.PHI_MAX,
            rate=0.0,
            window_requests=0,
            in_flight=0,
        )
        for node in before
        if node.node not in known
    ]
    return tuple(sorted((*nodes, *lost), key=lambda node: node.node))


def settled(
    nodes: tuple[RoutedNode, ...],
    doubts: Mapping[str, Doubt],
    now_ms: int,
    policy: Policy,
) -> tuple[tuple[RoutedNode, ...], dict[str, Doubt]]:
    """The nodes with hysteresis, and the doubts to hand in next time.

    A node that was suspect, dead, draining or gone stays suspect until it was alive for `settle_ms`.
    """
    after: dict[str, Doubt] = {}
    steady: list[RoutedNode] = []
    for node in nodes:
        doubt = doubts.get(node.node)
        if node.health is not Health.ALIVE:
            after[node.node] = Doubt(now_ms)
        elif doubt is not None and 0 <= now_ms - doubt.at_ms < policy.settle_ms:
            after[node.node] = doubt
            node = msgspec.structs.replace(node, health=Health.SUSPECT)
        steady.append(node)
    return tuple(steady), after


def changed_materially(before: tuple[RoutedNode, ...], after: tuple[RoutedNode, ...]) -> bool:
    """Whether a router would rank by `after` other than by `before`, small movements of figures aside."""
    return [_standing(node) for node in before] != [_standing(node) for node in after] or any(
        abs(old.load - new.load) > 0.15
        or abs(old.hit_rate - new.hit_rate) > 0.15
        or abs(old.error_rate - new.error_rate) > 0.02
        for old, new in zip(before, after, strict=True)
    )


def _standing(node: RoutedNode) -> tuple[object, ...]:
    return (node.node, node.region, node.url, node.location, node.health, node.models)
