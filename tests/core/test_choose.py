"""Which edge answers: the ranking, its promises, and where clients stand."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.choose import Asked, ChoicePolicy, Probed, Ranking, rank, usable_url
from router.geo import FARTHEST_KM, Place, great_circle_km, parse_locations
from schemas.errors import BadInput, SettingsInvalid
from schemas.events import Health, Location, RoutedModel, RoutedNode

PLACES = {"tokyo": (35.68, 139.69), "london": (51.51, -0.13), "virginia": (38.95, -77.45)}
LONDON = Asked(model=None, lat=51.5, lon=-0.1)
UP, DOWN = Probed(True, "200", 1.0), Probed(False, "ConnectError", 1.0)
DEFAULT = Place(lat=1.0, lon=2.0, source="default")


def node(name: str = "london-1", **other: Any) -> RoutedNode:
    region = name.rpartition("-")[0]
    lat, lon = PLACES[region]
    return RoutedNode(
        **{
            "node": name,
            "region": region,
            "url": f"http://{name}:80",
            "location": Location(lat=lat, lon=lon),
            "health": Health.ALIVE,
            "phi": 0.1,
            "load": 0.0,
            "hit_rate": 0.0,
            "error_rate": 0.0,
            "window_requests": 0,
            "rate": 0.0,
            "p50_ms": 1.0,
            "p99_ms": 2.0,
            "in_flight": 0,
            "models": (RoutedModel(name="digits", version="1", digest="ab" * 32),),
        }
        | other
    )


def broken(whole: RoutedNode, **figures: float) -> RoutedNode:
    """A node with figures that no event could carry."""
    for field, value in figures.items():
        msgspec.structs.force_setattr(whole, field, value)
    return whole


def ranked(*nodes: RoutedNode, asked: Asked = LONDON, seed: int = 0, **probes: Probed) -> Ranking:
    outcomes = {name.replace("_", "-"): probed for name, probed in probes.items()}
    return rank(nodes, asked, outcomes, ChoicePolicy(), random.Random(seed).randrange)


def named(ranking: Ranking) -> list[str]:
    return [candidate.node.node for candidate in ranking.edges]


def why(ranking: Ranking) -> dict[str, str]:
    return {left.node.node: "; ".join(left.why) for left in ranking.out}


def test_the_score_is_the_sum_of_its_terms() -> None:
    (edge,) = ranked(node("virginia-1", load=0.5, hit_rate=0.25)).edges
    assert edge.km == pytest.approx(5_920, rel=0.01)
    assert edge.terms == pytest.approx({"distance": 0.5 / (1 + edge.km / 1000), "load": 0.15, "hit_rate": 0.05})
    assert edge.score == pytest.approx(sum(edge.terms.values()))


def test_near_is_first_and_load_and_hits_outweigh_a_short_way() -> None:
    near, far = node("london-1"), node("virginia-1")
    assert named(ranked(far, near)) == ["london-1", "virginia-1"]
    busy = node("london-1", load=1.0)
    assert named(ranked(busy, node("virginia-1", hit_rate=1.0))) == ["virginia-1", "london-1"]


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"health": Health.LEFT}, "has left"),
        ({"health": Health.DRAINING}, "draining"),
        ({"error_rate": 0.05, "window_requests": 20}, "fails 5.0% of 20 requests"),
        ({"models": ()}, "does not serve digits"),
        ({"url": "javascript:alert(1)"}, "its URL cannot be used"),
        ({"url": "http://a\r\nset-cookie: b"}, "its URL cannot be used"),
    ],
)
def test_who_is_out_and_why(figures: dict[str, Any], reason: str) -> None:
    ranking = ranked(node("london-1", **figures), node("tokyo-1"), asked=Asked(model="digits", lat=51.5, lon=0))
    assert named(ranking) == ["tokyo-1"]
    assert why(ranking) == {"london-1": reason}
    assert not ranking.panic


def test_few_requests_say_nothing_about_errors() -> None:
    assert named(ranked(node("london-1", error_rate=1.0, window_requests=19), node("tokyo-1"))) == [
        "london-1",
        "tokyo-1",
    ]


@pytest.mark.parametrize("health", [Health.SUSPECT, Health.DEAD])
def test_one_observers_doubt_ranks_last_and_two_put_out(health: Health) -> None:
    others = (node("tokyo-1", load=1.0), node("virginia-1"))
    last = ["virginia-1", "tokyo-1", "london-1"]
    assert named(ranked(node("london-1", health=health), *others, london_1=UP)) == last
    assert named(ranked(node("london-1"), *others, london_1=DOWN)) == last
    both = ranked(node("london-1", health=health, phi=9.0), *others, london_1=DOWN)
    assert named(both) == ["virginia-1", "tokyo-1"]
    assert why(both) == {"london-1": f"beats: {health}, phi 9.0; probe: ConnectError"}


def test_with_less_than_half_eligible_all_are_in_the_doubted_behind() -> None:
    dead = [node(f"london-{i}", health=Health.DEAD) for i in (1, 2)]
    ranking = ranked(*dead, node("tokyo-1"), node("virginia-1", health=Health.LEFT), london_1=DOWN, london_2=DOWN)
    assert ranking.panic
    assert named(ranking) == ["tokyo-1", "london-1", "london-2"]
    assert why(ranking) == {"virginia-1": "has left"}


def test_a_model_that_no_table_knows_yet_is_asked_of_everybody() -> None:
    ranking = ranked(node("london-1"), node("tokyo-1"), asked=Asked(model="brand-new", lat=51.5, lon=0))
    assert named(ranking) == ["london-1", "tokyo-1"]
    assert not ranking.model_known


def test_no_herd_the_busier_of_two_keeps_a_quarter() -> None:
    nodes = (node("london-1", in_flight=0), node("london-2", in_flight=50))
    first = Counter(named(ranked(*nodes, seed=seed))[0] for seed in range(2_000))
    assert first["london-2"] == pytest.approx(500, abs=100)


def test_only_those_near_the_best_share_its_load() -> None:
    nodes = (node("london-1", in_flight=9_000), node("virginia-1"))
    assert {named(ranked(*nodes, seed=seed))[0] for seed in range(200)} == {"london-1"}


def test_one_of_many_quiet_nodes_is_not_chosen_always() -> None:
    nodes = [node(f"london-{i}", in_flight=i) for i in range(10)]
    first = Counter(named(ranked(*nodes, seed=seed))[0] for seed in range(2_000))
    assert len(first) == 10
    assert max(first.values()) < 600


figures = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf, 1e308]))


@st.composite
def nodes(draw: st.DrawFn) -> RoutedNode:
    made = node(
        f"{draw(st.sampled_from(sorted(PLACES)))}-{draw(st.integers(1, 9))}",
        health=draw(st.sampled_from(list(Health))),
        models=draw(st.sampled_from([(), node().models])),
        url=draw(st.sampled_from(["http://a:1", "https://b", "ftp://c", "http://", "", "http://[", "http://d/\n"])),
    )
    fields = ("load", "hit_rate", "error_rate", "phi", "p50_ms", "rate", "window_requests", "in_flight")
    return broken(made, **{field: draw(figures) for field in fields})


@given(
    st.lists(nodes(), max_size=8, unique_by=lambda n: n.node),
    st.sampled_from([None, "digits", "unknown"]),
    figures,
    figures,
    st.dictionaries(st.sampled_from(["london-1", "tokyo-1"]), st.sampled_from([UP, DOWN])),
    st.integers(0, 9),
)
def test_there_is_always_an_answer_and_never_an_exception(
    all_nodes: list[RoutedNode],
    model: str | None,
    lat: float,
    lon: float,
    probes: dict[str, Probed],
    seed: int,
) -> None:
    ranking = rank(
        all_nodes, Asked(model=model, lat=lat, lon=lon), probes, ChoicePolicy(), random.Random(seed).randrange
    )
    there = [n for n in all_nodes if n.health is not Health.LEFT and usable_url(n.url)]
    assert bool(ranking.edges) == bool(there)
    assert sorted([*named(ranking), *why(ranking)]) == sorted(n.node for n in all_nodes)
    assert all(math.isfinite(edge.score) and edge.score == sum(edge.terms.values()) for edge in ranking.edges)
    well = [not edge.out and not edge.doubts for edge in ranking.edges]
    assert well == sorted(well, reverse=True)


@given(figures, figures, figures, figures)
def test_a_distance_is_a_number_whatever_is_asked(lat1: float, lon1: float, lat2: float, lon2: float) -> None:
    assert 0 <= great_circle_km(lat1, lon1, lat2, lon2) <= FARTHEST_KM


def test_known_distances() -> None:
    assert great_circle_km(*PLACES["london"], *PLACES["tokyo"]) == pytest.approx(9_560, rel=0.01)
    assert great_circle_km(0, 179.5, 0, -179.5) == pytest.approx(111.2, rel=0.01)
    assert great_circle_km(90, 0, -90, 77) == pytest.approx(FARTHEST_KM)


LOCATIONS = """
10.0.0.0/8, 51.5, -0.1      # the office
10.1.0.0/16, 35.7, 139.7
2001:db8::/32, 38.9, -77.4
"""


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("10.2.3.4", "network 10.0.0.0/8"),
        ("10.1.3.4", "network 10.1.0.0/16"),
        ("::ffff:10.1.3.4", "network 10.1.0.0/16"),
        ("2001:db8::1", "network 2001:db8::/32"),
        ("192.168.1.1", "default"),
        ("8.8.8.8", "default"),
        ("::1", "default"),
        ("fe80::1%eth0", "default"),
    ],
)
def test_where_an_address_stands(address: str, source: str) -> None:
    assert parse_locations(LOCATIONS, DEFAULT).of(address).source == source


@given(st.text(max_size=40))
def test_an_address_is_placed_or_refused(address: str) -> None:
    try:
        assert parse_locations(LOCATIONS, DEFAULT).of(address).lat in (1.0, 51.5, 35.7, 38.9)
    except BadInput as error:
        assert "no IP address" in str(error)


@pytest.mark.parametrize(
    "line", ["10.0.0.0/8", "10.0.0.1/8, 1, 2", "10.0.0.0/8, 91, 0", "10.0.0.0/8, nan, 0", "x, 1, 2"]
)
def test_a_bad_location_file_names_the_line(line: str) -> None:
    with pytest.raises(SettingsInvalid, match="line 2"):
        parse_locations(f"# ours\n{line}\n", DEFAULT)
