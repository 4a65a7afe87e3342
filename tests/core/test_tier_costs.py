"""Which tiers are asked, by what a look-up and a row take; and how a look-up's cost is learnt."""

from __future__ import annotations

import pytest

from edge_node.caching.tier_choice import FIRST_LOOKUPS, PRIOR_S, LookupCost, TierChoice
from schemas.events import TierUse

COSTS = {"redis": 0.0003, "disk": 0.0001}


def test_a_tier_is_asked_where_a_row_takes_longer() -> None:
    assert TierChoice(TierUse.AUTO).decide(COSTS, 0.05) == ("redis", "disk")
    assert TierChoice(TierUse.AUTO).decide(COSTS, 0.0002) == ("disk",)
    assert TierChoice(TierUse.AUTO).decide(COSTS, 20e-6) == ()
    # What the origin runs, and a session that must be loaded first.
    assert TierChoice(TierUse.AUTO).decide(COSTS, None) == ("redis", "disk")


@pytest.mark.parametrize("row_s", [None, 1e-6, 1.0])
def test_a_release_that_says_so_is_not_judged(row_s: float | None) -> None:
    assert TierChoice(TierUse.ALWAYS).decide(COSTS, row_s) == ("redis", "disk")
    never = TierChoice(TierUse.NEVER)
    assert never.decide(COSTS, row_s) == () and never.reasons["redis"] == "the release says never"


def test_near_the_border_a_choice_stays_what_it_was() -> None:
    choice = TierChoice(TierUse.AUTO)
    seen = [bool(choice.decide({"redis": ms / 1e3}, 0.001)) for ms in (1.1, 0.9, 1.1, 1.4, 1.6, 1.4, 1.1, 0.9)]
    assert seen == [False, True, True, True, False, False, False, True]
    assert choice.reasons == {"redis": "a look-up takes 0.9 ms, a row of the model 1 ms"}


def test_a_cost_forgets_its_first_connection_and_follows_what_lasts() -> None:
    cost = LookupCost()
    assert cost.seconds == PRIOR_S
    for ms in (9.0, 0.4, 0.3, *(0.5 for _ in range(FIRST_LOOKUPS - 4))):
        cost.observe(ms / 1e3, 1)
        assert cost.seconds == PRIOR_S, "nothing is known yet"
    cost.observe(0.0005, 1)
    assert cost.seconds == pytest.approx(0.0003)
    # Once slow by chance, ten times slow, and quick again.
    cost.observe(0.05, 1)
    assert cost.seconds < 0.0004
    for _ in range(60):
        cost.observe(0.003, 1)
    assert cost.seconds > 0.002
    # A tier that is not asked has a probe a second.
    for _ in range(4):
        cost.observe(0.0003, 1)
    assert cost.seconds < 0.0005


def test_a_busy_host_does_not_make_a_tier_dear() -> None:
    cost = LookupCost()
    for number in range(400):
        cost.observe((0.0002, 0.005, 0.004)[number % 3], 1)
    assert cost.seconds < 0.0005


def test_many_keys_at_once_count_as_one_look_up() -> None:
    cost = LookupCost()
    for _ in range(10):
        cost.observe(0.0003 + 63 * 8e-6, 64)
    assert cost.seconds == pytest.approx(0.0003)
