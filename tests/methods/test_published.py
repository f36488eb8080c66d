"""What the published rules share, against loops over every row and every combination."""

from __future__ import annotations

import numpy as np
import pytest
from toys import make_costs, make_records, slow_cheapest, slow_outcome, slow_threshold

from offramp.methods import published
from offramp.methods.published import cheapest, loosest_threshold, loosest_thresholds
from offramp.placement import OFF, CacheCosts
from offramp.types import Records

# --- thresholds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_the_loosest_threshold_is_that_of_a_loop(seed: int) -> None:
    records = make_records(40, 3, seed)
    for tolerance in (0.001, 0.05, 0.1, 0.3):
        expected = [
            slow_threshold(records.confidence_NK[:, k], records.agreement_NK[:, k], tolerance) for k in range(3)
        ]
        assert loosest_thresholds(records, tolerance) == pytest.approx(expected, abs=0)


def test_thresholds_of_odd_columns() -> None:
    nan, yes, no = float("nan"), True, False
    columns = [
        ([0.9, 0.8, 0.7, 0.6], [yes, no, yes, yes], 0.25, 0.6),  # falls short in between, and recovers
        ([0.9, 0.8, 0.8, 0.8], [yes, yes, no, yes], 0.1, 0.9),  # the tied three come together
        ([0.9, 0.8], [no, yes], 0.1, OFF),
        ([nan, nan], [yes, yes], 0.1, OFF),
        ([nan, 0.3], [no, yes], 0.1, float(np.float32(0.3))),
        ([], [], 0.1, OFF),
        ([0.5] * 20, [yes] * 19 + [no], 0.05, 0.5),  # exactly the tolerance
    ]
    for confidence, agreement, tolerance, expected in columns:
        found = loosest_threshold(np.array(confidence, np.float32), np.array(agreement, bool), tolerance)
        assert found == pytest.approx(expected)


# --- combinations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_is_that_of_all_combinations(seed: int) -> None:
    records, costs = make_records(40, 4, seed), make_costs(4, seed)
    options_K = [[0.6, 0.8, 0.9]] * 3 + [[0.7, OFF]]  # OFF as a cache's threshold: it has no other
    for tolerance in (0.0, 0.05, 0.15):
        found = cheapest(records, costs, options_K, tolerance)
        cost, wrong = slow_outcome(records, found, costs)
        assert wrong <= tolerance
        expected = slow_cheapest(records, costs, options_K, tolerance, range(4))
        assert cost == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_greedy_choice_is_allowed_and_no_single_change_improves_it(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "MOST_EXACT", 1)
    records, costs = make_records(60, 6, seed), make_costs(6, seed, layers=3)
    options_K, layers = [[0.7, 0.9]] * 6, costs.before_K.tolist()
    found = cheapest(records, costs, options_K, 0.1, layer_K=layers)
    cost, wrong = slow_outcome(records, found, costs)
    assert cost < 1
    assert wrong <= 0.1
    assert all(sum(threshold < OFF for threshold in found[i : i + 2]) <= 1 for i in (0, 2, 4))
    for k in range(6):
        for option in (OFF, 0.7, 0.9):
            other = [*found[:k], option, *found[k + 1 :]]
            other[k ^ 1] = OFF if option < OFF else other[k ^ 1]  # the other one at this layer
            changed_cost, changed_wrong = slow_outcome(records, other, costs)
            assert changed_wrong > 0.1 or changed_cost >= cost - 1e-12


def test_a_greedy_choice_exchanges_the_caches_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answers most by itself, but the second answers just what the third leaves."""
    monkeypatch.setattr(published, "MOST_EXACT", 1)
    kinds = [([1, 1, 0], 20), ([1, 0, 1], 35), ([0, 0, 1], 20), ([0, 1, 0], 25)]
    confidence_NK = np.array([row for row, times in kinds for _ in range(times)], np.float32)
    nothing_NK = np.zeros((100, 3), np.int64)
    records = Records(confidence_NK, nothing_NK, nothing_NK == 0, nothing_NK[:, 0], (-1, -1, -1))
    costs = CacheCosts(np.array([0.1, 0.1, 0.15]), np.array([0.02, 0.02, 0.01]))
    found = cheapest(records, costs, [[0.5]] * 3, 0.1, layer_K=[0, 0, 1])
    assert found == (OFF, 0.5, 0.5)


def test_a_further_condition_holds() -> None:
    records, costs = make_records(60, 3, 0), make_costs(3, 0)
    free = cheapest(records, costs, [[0.8]] * 3, 0.3)
    one = cheapest(records, costs, [[0.8]] * 3, 0.3, fits=lambda plan: sum(value < OFF for value in plan) <= 1)
    assert sum(value < OFF for value in free) > 1
    assert sum(value < OFF for value in one) == 1


def test_without_caches_there_is_nothing_to_choose() -> None:
    records = Records(np.zeros((5, 0)), np.zeros((5, 0), int), np.zeros((5, 0), bool), np.zeros(5, int), ())
    assert cheapest(records, CacheCosts(np.zeros(0), np.zeros(0)), [], 0.1) == ()
