"""Choosing: edges ranked for a client, with every term of every score. PURE.

    score = 0.5 / (1 + km / 1000)  +  0.3 × (1 − load)  +  0.2 × hit rate

A node is doubted by its beats (suspect, dead) or by the probe; one doubt ranks it behind all others, two independent ones
take it out: a single observer that lost its network must not empty the table. Draining, failing (5xx) and not serving the
model take it out too. When fewer than half of the nodes that could serve would be left, that is taken for an error of
the observers: all of them are ranked (panic). Never empty while one node has not said good-bye, never an exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from router.geo import Place, distance_km
from schemas.events import Health, RoutedNode

ERROR_RATE: Final = 0.05
ERROR_REQUESTS: Final = 20
PANIC_SHARE: Final = 0.5


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """`margin`: candidates within this score of the best share the load."""

    distance: float = 0.5
    load: float = 0.3
    hit_rate: float = 0.2
    margin: float = 0.05


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One edge in the ranking. `terms` add up to `score`; the other figures are what they were made of."""

    node: str
    region: str
    url: str
    score: float
    terms: dict[str, float]
    km: float
    health: str
    probe: str
    doubted: bool


class Out(msgspec.Struct, frozen=True, kw_only=True):
    node: str
    region: str
    why: str


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """`edges` best first; `out` are those left out, each with its reason; `panic`: nearly all were, so none is."""

    edges: tuple[Candidate, ...]
    out: tuple[Out, ...]
    panic: bool


def choose(
    nodes: Sequence[RoutedNode],
    probes: Mapping[str, bool],
    client: Place,
    model: str | None,
    weights: Weights,
    draw: Callable[[], float],
) -> Choice:
    """`probes` says which nodes answered their last probe (absent: not probed yet); `draw` gives a number in [0, 1)."""
    able = [n for n in nodes if n.health is not Health.LEFT and (model is None or _serves(n, model))]
    unable = tuple(
        Out(node=n.node, region=n.region, why="left" if n.health is Health.LEFT else f"does not serve {model}")
        for n in nodes
        if n not in able
    )
    reasons = {n.node: _unfit(n, probes.get(n.node)) for n in able}
    fit = [n for n in able if not reasons[n.node]]
    panic = bool(able) and len(fit) < PANIC_SHARE * len(able)
    chosen = able if panic else fit
    ranked = sorted(
        (_candidate(n, probes.get(n.node), client, weights) for n in chosen),
        # In a panic the observers are doubted, but a node that fits is still a better guess than one that does not.
        key=lambda c: (panic and bool(reasons[c.node]), c.doubted, -c.score, c.node),
    )
    out = tuple(Out(node=n.node, region=n.region, why=reasons[n.node]) for n in able if n not in chosen)
    return Choice(edges=tuple(_shared(ranked, nodes, weights.margin, draw)), out=out + unable, panic=panic)


def _serves(node: RoutedNode, model: str) -> bool:
    return any(m.name == model for m in node.models)


def _unfit(node: RoutedNode, probed: bool | None) -> str:
    """Why a node should get no request; empty when it may."""
    if node.health is Health.DRAINING:
        return "draining"
    if node.health is Health.DEAD and probed is not True:
        return "no beat, and no answer to the probe" if probed is False else "no beat, not probed"
    if node.health is Health.SUSPECT and probed is False:
        return "late beat, and no answer to the probe"
    if node.window_requests >= ERROR_REQUESTS and node.error_rate >= ERROR_RATE:
        return f"{node.error_rate:.0%} of its answers are errors"
    return ""


def _candidate(node: RoutedNode, probed: bool | None, client: Place, weights: Weights) -> Candidate:
    km = distance_km(client, Place(node.location.lat, node.location.lon))
    terms = {
        "distance": weights.distance / (1 + km / 1000),
        "load": weights.load * (1 - _share(node.load)),
        "hit_rate": weights.hit_rate * _share(node.hit_rate),
    }
    return Candidate(
        node=node.node,
        region=node.region,
        url=node.url,
        score=sum(terms.values()),
        terms=terms,
        km=km,
        health=node.health,
        probe={True: "answered", False: "failed", None: "none yet"}[probed],
        doubted=probed is False or node.health in (Health.SUSPECT, Health.DEAD),
    )


def _share(value: float) -> float:
    return 0.0 if math.isnan(value) else min(1.0, max(0.0, value))


def _shared(
    ranked: list[Candidate], nodes: Sequence[RoutedNode], margin: float, draw: Callable[[], float]
) -> list[Candidate]:
    """The power of two choices among the nearly best, by in-flight × latency: always taking the best makes a herd."""
    if len(ranked) < 2:
        return ranked
    best = ranked[0]
    near = [c for c in ranked if c.doubted == best.doubted and c.score >= best.score - margin]
    if len(near) < 2:
        return ranked
    work = {n.node: (1 + n.in_flight) * max(n.p50_ms, 0.1) for n in nodes}
    first = near[int(draw() * len(near))]
    second = near[int(draw() * len(near))]
    winner = min(first, second, key=lambda c: work[c.node])
    return [winner, *(c for c in ranked if c is not winner)]
