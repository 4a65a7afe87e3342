"""Which edges answer a client, best first, and why. PURE.

    score = 0.5 / (1 + km / 1000)  +  0.3 (1 - load)  +  0.2 hit rate

Laws:
- A node that has left is out. A node that drains, or fails 5 % and more of 20 requests and more, is out. One that does
  not serve the model is out, unless nobody is known to: a release may be newer than the table.
- Two observers judge a node: its beats, and our own probe of it. Doubted by one it is ranked behind all others, by both
  it is out: each of them can be wrong alone.
- When fewer than half would be left, it is likelier that we are wrong than that they are all sick: panic, all are in,
  those in doubt behind. So the answer is never empty while a node has not left.
- No herd: of the candidates that are nearly as good as the best, two are drawn and the less busy one goes first.
- Whatever figures the table holds, there is an answer and no exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final
from urllib.parse import urlsplit

import msgspec

from router.geo import FARTHEST_KM, great_circle_km
from schemas.events import Health, RoutedNode

PANIC_SHARE: Final = 0.5


class ChoicePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """`margin`: how far below the best score a candidate still shares its load."""

    distance: float = 0.5
    load: float = 0.3
    hit_rate: float = 0.2
    margin: float = 0.05
    error_rate: float = 0.05
    error_requests: int = 20


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the client wants, and where it stands in degrees; `model` None is any."""

    model: str | None
    lat: float
    lon: float


class Probed(msgspec.Struct, frozen=True):
    """What our own request to a node's ``/health`` came to."""

    ok: bool
    detail: str
    ms: float


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """`score` is the sum of `terms`; `doubts` and `out` say what speaks against it (`out` only in a panic)."""

    node: RoutedNode
    score: float
    terms: dict[str, float]
    km: float
    doubts: tuple[str, ...]
    out: tuple[str, ...]


class LeftOut(msgspec.Struct, frozen=True):
    node: RoutedNode
    why: tuple[str, ...]


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """`edges` best first. `model_known`: some node is known to serve the model."""

    edges: tuple[Candidate, ...]
    out: tuple[LeftOut, ...]
    panic: bool
    model_known: bool


def rank(
    nodes: Iterable[RoutedNode],
    asked: Asked,
    probes: Mapping[str, Probed],
    policy: ChoicePolicy,
    below: Callable[[int], int],
) -> Ranking:
    """`below(n)` draws a whole number from 0 to n - 1. A node without a probe is not doubted for that."""
    gone: list[LeftOut] = []
    there: list[RoutedNode] = []
    for node in nodes:
        why = _why_gone(node)
        if why is None:
            there.append(node)
        else:
            gone.append(LeftOut(node, (why,)))
    serving = [node for node in there if _serves(node, asked.model)]
    if serving:
        gone += [LeftOut(node, (f"does not serve {asked.model}",)) for node in there if not _serves(node, asked.model)]
    candidates = [_candidate(node, asked, probes.get(node.node), policy) for node in serving or there]
    eligible = [candidate for candidate in candidates if not candidate.out]
    panic = len(eligible) < PANIC_SHARE * len(candidates)
    ranked = sorted(candidates if panic else eligible, key=_order)
    if not panic:
        gone += [LeftOut(candidate.node, candidate.out) for candidate in candidates if candidate.out]
    return Ranking(
        edges=tuple(_two_choices(ranked, policy.margin, below)),
        out=tuple(sorted(gone, key=lambda left: left.node.node)),
        panic=panic,
        model_known=bool(serving),
    )


def usable_url(url: str) -> bool:
    """A base URL that may stand in a Location header: http or https, a host, printable ASCII."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and url.isascii() and url.isprintable()
    except ValueError:
        return False


def _why_gone(node: RoutedNode) -> str | None:
    if node.health is Health.LEFT:
        return "has left"
    if not usable_url(node.url):
        return "its URL cannot be used"
    return None


def _serves(node: RoutedNode, model: str | None) -> bool:
    return model is None or any(served.name == model for served in node.models)


def _candidate(node: RoutedNode, asked: Asked, probed: Probed | None, policy: ChoicePolicy) -> Candidate:
    km = min(FARTHEST_KM, great_circle_km(asked.lat, asked.lon, node.location.lat, node.location.lon))
    terms = {
        "distance": policy.distance / (1 + km / 1000),
        "load": policy.load * (1 - _share(node.load, 1.0)),
        "hit_rate": policy.hit_rate * _share(node.hit_rate, 0.0),
    }
    doubts = []
    if node.health in (Health.SUSPECT, Health.DEAD):
        doubts.append(f"beats: {node.health}, phi {node.phi:.1f}")
    if probed is not None and not probed.ok:
        doubts.append(f"probe: {probed.detail}")
    out = []
    if node.health is Health.DRAINING:
        out.append("draining")
    if node.window_requests >= policy.error_requests and not node.error_rate < policy.error_rate:
        out.append(f"fails {node.error_rate:.1%} of {node.window_requests} requests")
    if len(doubts) == 2:
        out += doubts
    score = sum(terms.values())
    return Candidate(node=node, score=score, terms=terms, km=km, doubts=tuple(doubts), out=tuple(out))


def _share(value: float, otherwise: float) -> float:
    """Within 0 to 1; what is no number becomes what speaks against the node."""
    return min(1.0, max(0.0, value)) if value == value else otherwise


def _order(candidate: Candidate) -> tuple[bool, int, float, str]:
    """Behind: who is in only by panic; then who is doubted, and by how many; then the lower score."""
    return (bool(candidate.out), len(candidate.doubts), -candidate.score, candidate.node.node)


def _two_choices(ranked: list[Candidate], margin: float, below: Callable[[int], int]) -> list[Candidate]:
    """The ranking with the less busy of two drawn candidates in front.

    Drawn with replacement: of two candidates the busier one must keep a quarter of the load, since `in_flight` is as
    old as the table, and sending everything to the quieter one would swap their roles with every table.
    """
    if not ranked:
        return ranked
    best = ranked[0]
    close = [c for c in ranked if _order(c)[:2] == _order(best)[:2] and c.score >= best.score - margin]
    first, second = close[below(len(close))], close[below(len(close))]
    chosen = min(first, second, key=_busy)
    return [chosen, *(candidate for candidate in ranked if candidate is not chosen)]


def _busy(candidate: Candidate) -> float:
    latency = candidate.node.p50_ms
    busy = (candidate.node.in_flight + 1) * max(latency if latency == latency else 0.0, 0.1)
    return busy if busy == busy else float("inf")
