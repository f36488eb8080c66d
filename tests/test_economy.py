"""Whether caches pay: a flood of misses is cut short, and calm traffic is left alone."""

from __future__ import annotations

import random

import pytest

from offramp.economy import MOST_TRIED, RESTS_ABOVE, TRIED, WINDOW, Economy, Trial

COSTS = (0.1, 0.5, 1.1)  # at two caches, and at the end


def requests_until_rest(economy: Economy, exits: list[int]) -> int | None:
    for number, at in enumerate(exits, 1):
        if economy.must_rest([at]):
            return number
    return None


def test_a_flood_that_never_hits_is_cut_short() -> None:
    until = requests_until_rest(Economy(COSTS, 0.4), [2] * 100_000)
    assert until is not None
    assert until < 5 * WINDOW
    overpaid = until * (COSTS[-1] - 1)
    assert overpaid < 0.5 * WINDOW, "the whole bill, in calls of the full model"


def test_look_ups_that_cost_next_to_nothing_are_let_be() -> None:
    assert requests_until_rest(Economy((0.01, RESTS_ABOVE - 0.001), 0.4), [1] * 20_000) is None


@pytest.mark.parametrize("expected", [0.4, 1.0])
def test_calm_traffic_never_makes_them_rest(expected: float) -> None:
    rng = random.Random(0)
    exits = rng.choices([0, 1, 2], [0.3, 0.3, 0.4], k=50_000)
    assert requests_until_rest(Economy(COSTS, expected), exits) is None


def test_batches_count_like_single_requests() -> None:
    one, many = Economy(COSTS, 0.4), Economy(COSTS, 0.4)
    exits = random.Random(1).choices([0, 1, 2], k=1000)
    for at in exits:
        one.must_rest([at])
    many.must_rest(exits)
    assert one.mean == pytest.approx(many.mean)


def test_each_rest_is_longer_than_the_last() -> None:
    economy = Economy(COSTS, 0.4)
    needed = [economy.rest().needed for _ in range(9)]
    assert needed[:3] == [TRIED, 2 * TRIED, 4 * TRIED]
    assert needed[-1] == MOST_TRIED


def test_a_trial_ends_only_where_caches_clearly_pay() -> None:
    trial = Trial(COSTS, 10)
    assert not any(trial.pays(2) for _ in range(50))
    assert [trial.pays(0) for _ in range(10)] == [False] * 9 + [True]
