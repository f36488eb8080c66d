"""Placement against loops and brute force on records small enough to enumerate, and its behaviour on odd input."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from offramp.errors import InputError
from offramp.placement import (
    NEVER,
    OFF,
    CacheCosts,
    Thresholds,
    _descend,
    _Problem,
    _search,
    expected_cost,
    hit_rates,
    oracle_cost,
    outcomes,
    plan_path,
    smoothed_risk,
)
from offramp.types import BoolArray, Records

COSTS = CacheCosts(np.array([0.0, 0.3, 0.6]), np.array([0.05, 0.02, 0.02]))


def make_records(n: int, caches: int, seed: int, reads_K: tuple[int, ...] | None = None) -> Records:
    """Caches that get better with depth, whose confidence tells much about whether they agree."""
    rng = np.random.default_rng(seed)
    ease = rng.standard_normal((n, 1))
    margin = np.linspace(0.8, 2.5, caches) + ease + 0.7 * rng.standard_normal((n, caches))
    confidence = 1 / (1 + np.exp(-2 * np.abs(margin + 0.4 * rng.standard_normal((n, caches)))))
    nothing = np.zeros((n, caches), dtype=np.int64)
    reads = reads_K or (-1,) * caches
    return Records(confidence.astype(np.float32), nothing, margin > 0, nothing[:, 0], reads)


def walk(records: Records, thresholds: Sequence[float], costs: CacheCosts, n: int) -> tuple[int, bool, float]:
    """One request by the letter: (where it left, whether it disagrees, what it cost)."""
    spent = 0.0
    for k, threshold in enumerate(thresholds):
        source = records.reads_K[k]
        if threshold == OFF or (source >= 0 and thresholds[source] == OFF):
            continue
        spent += costs.cache_K[k]
        if records.confidence_NK[n, k] >= threshold:
            return k, not records.agreement_NK[n, k], spent + costs.before_K[k]
    return len(thresholds), False, spent + 1.0


@pytest.mark.parametrize("seed", range(20))
def test_outcomes_and_costs_equal_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = make_records(60, 3, seed, reads_K=[(-1, -1, -1), (-1, 0, -1), (-1, 0, 0)][seed % 3])
    records.confidence_NK[rng.random((60, 3)) < 0.1] = np.nan
    thresholds = [OFF if rng.random() < 0.3 else float(rng.uniform(0.5, 1)) for _ in range(3)]
    expected = [walk(records, thresholds, COSTS, n) for n in range(60)]
    left_at_N, disagrees_N = outcomes(records, thresholds)
    assert left_at_N.tolist() == [one[0] for one in expected]
    assert disagrees_N.tolist() == [one[1] for one in expected]
    assert expected_cost(records, thresholds, COSTS) == pytest.approx(np.mean([one[2] for one in expected]))
    shares = [np.mean([one[0] == k for one in expected]) for k in range(3)]
    assert hit_rates(records, thresholds).tolist() == pytest.approx(shares)


def test_oracle_leaves_at_the_first_agreement() -> None:
    agreement = np.array([[1, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=bool)
    expected = np.mean([0.05, 0.3 + 0.07, 0.6 + 0.09, 1.0 + 0.09])
    assert oracle_cost(agreement, COSTS) == pytest.approx(expected)
    assert oracle_cost(np.zeros((5, 0), dtype=bool), CacheCosts(np.zeros(0), np.zeros(0))) == 1.0


def with_recorded_risk(records: Records, costs: CacheCosts) -> _Problem:
    """The search problem on the recorded 0/1 disagreements: what brute force can be compared with."""
    confidence = records.confidence_NK.astype(np.float64).T
    order = np.argsort(-confidence, axis=1, kind="stable")
    return _Problem(confidence, order, (~records.agreement_NK.T).astype(np.float64), costs, records.reads_K)


def all_plans(records: Records) -> list[Thresholds]:
    columns = [[OFF, NEVER, *np.unique(column).tolist()] for column in records.confidence_NK.T]
    plans = itertools.product(*columns)
    return [
        plan for plan in plans if all(plan[j] < OFF or plan[k] == OFF for k, j in enumerate(records.reads_K) if j >= 0)
    ]


@pytest.mark.parametrize("reads", [(-1, -1, -1), (-1, 0, -1), (-1, -1, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_search_finds_what_brute_force_finds(seed: int, reads: tuple[int, ...]) -> None:
    records = make_records(12, 3, seed, reads)
    problem = with_recorded_risk(records, COSTS)
    ratings = np.array([problem.cost_and_risk(plan) for plan in all_plans(records)])
    found = np.array([problem.cost_and_risk(plan) for plan in set(_search(problem, 40))])
    weights = np.stack([np.ones(20), np.geomspace(30, 0.3, 20)])  # cost + price * disagreement, for 20 prices
    gaps = (found @ weights).min(axis=0) - (ratings @ weights).min(axis=0)
    assert min(gaps) > -1e-12
    assert np.mean(gaps) < 0.01
    assert np.mean(gaps < 1e-9) >= 0.75


@pytest.mark.parametrize("seed", range(3))
def test_a_search_with_priced_misses_finds_what_brute_force_finds(seed: int) -> None:
    records = make_records(12, 3, seed)
    problem = dataclasses.replace(with_recorded_risk(records, COSTS), end=2.5)
    missed = {plan: (outcomes(records, plan)[0] == 3).mean() for plan in all_plans(records)}
    ratings = {plan: problem.cost_and_risk(plan) for plan in missed}
    for plan, share in missed.items():
        assert ratings[plan][0] == pytest.approx(expected_cost(records, plan, COSTS) + 1.5 * share)
    found = np.array([problem.cost_and_risk(plan) for plan in set(_search(problem, 40))])
    weights = np.stack([np.ones(20), np.geomspace(30, 0.3, 20)])
    gaps = (found @ weights).min(axis=0) - (np.array(list(ratings.values())) @ weights).min(axis=0)
    assert min(gaps) > -1e-12
    assert np.mean(gaps) < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_no_single_change_improves_what_the_descent_settles_on(seed: int) -> None:
    records = make_records(40, 3, seed)
    problem = with_recorded_risk(records, COSTS)
    for price in (0.5, 3.0, 20.0):
        plan = _descend(problem, (OFF,) * 3, price)
        settled = problem.objective(plan, price)
        for k, column in enumerate(records.confidence_NK.T):
            for value in [OFF, *column.tolist()]:
                other = (*plan[:k], value, *plan[k + 1 :])
                assert problem.objective(other, price) >= settled - 1e-9


@pytest.mark.parametrize("reads", [(-1,) * 6, (-1, 0, -1, 0, 2, 4)])
def test_path_is_dense_ordered_and_begins_with_no_cache(reads: tuple[int, ...]) -> None:
    records = make_records(1500, 6, 1, reads)
    costs = CacheCosts(np.linspace(0, 0.9, 6), np.full(6, 0.01))
    path = plan_path(records, costs, 0.03)
    assert path[0].thresholds_K == (OFF,) * 6
    assert (path[0].disagreement, path[0].cost) == (0.0, 1.0)
    risks, prices = [one.disagreement for one in path], [one.cost for one in path]
    assert risks == sorted(risks)
    assert prices == sorted(prices, reverse=True)
    assert 60 <= len(path) <= 400
    assert 0.028 <= risks[-1] <= 0.03
    assert max(np.diff(risks)) < 0.002
    for one in path:
        assert one.cost == pytest.approx(expected_cost(records, one.thresholds_K, costs))
        assert one.hit_rates_K == pytest.approx(hit_rates(records, one.thresholds_K).tolist())
        for k, source in enumerate(reads):
            assert source < 0 or one.thresholds_K[k] == OFF or one.thresholds_K[source] < OFF


def test_priced_misses_become_fewer_and_plans_say_what_they_really_cost() -> None:
    records = make_records(1500, 6, 1)
    costs = CacheCosts(np.linspace(0, 0.9, 6), np.full(6, 0.03))
    plain, priced = (plan_path(records, costs, 0.03, miss_price=price) for price in (0.0, 2.0))
    missed = [1 - sum(path[-1].hit_rates_K) for path in (plain, priced)]
    assert missed[1] < missed[0]
    assert plain[-1].cost < priced[-1].cost < 1
    for one in priced:
        assert one.cost == pytest.approx(expected_cost(records, one.thresholds_K, costs))


def test_no_plan_that_saves_nothing_is_bought_by_the_price_of_misses() -> None:
    dear = CacheCosts(np.array([0.5]), np.array([0.6]))
    records = make_records(300, 1, 6)
    assert [one.thresholds_K for one in plan_path(records, dear, 0.5, miss_price=5.0)] == [(OFF,)]


def test_estimated_disagreement_holds_on_fresh_inputs() -> None:
    path = plan_path(make_records(2000, 5, 2), CacheCosts(np.linspace(0, 0.8, 5), np.full(5, 0.01)), 0.03)
    fresh = make_records(40000, 5, 3)
    for one in path[:: len(path) // 10]:
        _, disagrees = outcomes(fresh, one.thresholds_K)
        assert disagrees.mean() <= 0.001 + 1.6 * one.disagreement


def test_a_cache_that_only_helps_its_reader_is_switched_on_for_it() -> None:
    rng = np.random.default_rng(0)
    n = 400
    useless, good = rng.uniform(0.5, 0.6, n), rng.uniform(0.9, 1.0, n)
    agreement = np.column_stack([rng.random(n) < 0.3, np.ones(n, dtype=bool)])
    zeros = np.zeros((n, 2), dtype=np.int64)
    records = Records(np.column_stack([useless, good]).astype(np.float32), zeros, agreement, zeros[:, 0], (-1, 0))
    path = plan_path(records, CacheCosts(np.array([0.0, 0.2]), np.array([0.05, 0.05])), 0.02)
    assert any(one.thresholds_K[0] == NEVER and one.cost == pytest.approx(0.3) for one in path)
    assert all(one.thresholds_K[1] < 1 for one in path[1:])


def test_nan_confidence_never_hits() -> None:
    records = make_records(500, 3, 4)
    records.confidence_NK[:, 1] = np.nan
    records.confidence_NK[::7, 2] = np.nan
    path = plan_path(records, COSTS, 0.05)
    assert len(path) > 1
    assert all(one.thresholds_K[1] == OFF for one in path)
    for one in path:
        left_at_N, _ = outcomes(records, one.thresholds_K)
        assert not (left_at_N[::7] == 2).any()
    assert not (outcomes(records, (OFF, 0.0, OFF))[0] == 1).any()
    assert not (outcomes(records, (float("nan"),) * 3)[0] < 3).any()


def test_thresholds_lie_between_confidences_and_survive_single_precision() -> None:
    records = make_records(800, 3, 5)
    for one in plan_path(records, COSTS, 0.03):
        for column, threshold in zip(records.confidence_NK.T, one.thresholds_K, strict=True):
            assert threshold in (OFF, NEVER) or float(np.float32(threshold)) == threshold
            assert threshold in (OFF, NEVER) or (column >= threshold).any()


def test_tied_confidences_hit_together() -> None:
    confidence = np.array([[0.9], [0.9], [0.9], [0.5]], dtype=np.float32)
    nothing = np.zeros((4, 1), dtype=np.int64)
    agreement = np.array([[True], [True], [False], [True]])
    problem = with_recorded_risk(
        Records(confidence, nothing, agreement, nothing[:, 0], (-1,)), CacheCosts(np.zeros(1), np.array([0.01]))
    )
    assert _descend(problem, (OFF,), 100.0) == (OFF,)
    threshold = _descend(problem, (OFF,), 1.0)[0]
    assert threshold == 0.5


def test_nothing_is_enabled_that_does_not_pay() -> None:
    dear = CacheCosts(np.array([0.0, 0.3, 0.6]), np.array([1.1, 0.9, 0.9]))
    assert len(plan_path(make_records(300, 3, 6), dear, 0.5)) == 1
    everywhere_wrong = make_records(300, 3, 6)
    everywhere_wrong.agreement_NK[:] = False
    assert len(plan_path(everywhere_wrong, COSTS, 0.05)) == 1


def test_a_path_may_be_searched_by_another_risk() -> None:
    """With raw counts the estimates are what the tuning inputs show."""
    records = make_records(300, 3, 6)

    def raw(confidence_KN: NDArray[np.float64], agreement_KN: BoolArray) -> NDArray[np.float64]:
        assert confidence_KN.shape == agreement_KN.shape == (3, 300)
        return (~agreement_KN).astype(np.float64)

    path, smoothed = plan_path(records, COSTS, 0.05, risk=raw), plan_path(records, COSTS, 0.05)
    counted = [outcomes(records, one.thresholds_K)[1].mean() for one in path]
    assert [one.disagreement for one in path] == pytest.approx(counted)
    assert len(path) > 1
    assert [one.thresholds_K for one in path] != [one.thresholds_K for one in smoothed]


def test_no_records_and_no_caches_give_the_empty_plan() -> None:
    nothing = plan_path(make_records(0, 3, 0), COSTS, 0.03)
    assert [one.thresholds_K for one in nothing] == [(OFF,) * 3]
    no_cache = Records(np.zeros((5, 0)), np.zeros((5, 0), int), np.zeros((5, 0), bool), np.zeros(5, int), ())
    assert plan_path(no_cache, CacheCosts(np.zeros(0), np.zeros(0)), 0.03)[0].cost == 1.0
    assert outcomes(no_cache, ())[0].tolist() == [0] * 5


def test_one_disagreement_price_step_follows_the_other() -> None:
    """A looser limit only adds plans at the end: the beginning of the path stays as cheap."""
    records = make_records(1000, 4, 7)
    costs = CacheCosts(np.linspace(0, 0.8, 4), np.full(4, 0.01))
    short, long = plan_path(records, costs, 0.01), plan_path(records, costs, 0.03)
    assert short[-1].cost >= long[-1].cost
    assert short[-1].disagreement <= 0.01


def test_smoothed_risk_keeps_the_totals_and_never_says_never() -> None:
    records = make_records(3000, 4, 8)
    confidence, agreement = records.confidence_NK.T.astype(np.float64), records.agreement_NK.T
    risk = smoothed_risk(confidence, agreement)
    assert risk.sum(axis=1) == pytest.approx((~agreement).sum(axis=1), abs=1.0)
    for k in range(4):
        unsure, sure = np.split(np.argsort(confidence[k]), 2)
        assert risk[k, sure].mean() < risk[k, unsure].mean() / 2
    flawless = smoothed_risk(confidence, np.ones_like(agreement))
    assert (flawless > 0).all()
    assert flawless.mean() < 1 / 1000
    assert (smoothed_risk(np.full((2, 9), -np.inf), np.ones((2, 9), dtype=bool)) == 1).all()


def test_smoothed_risk_knows_that_what_earlier_caches_left_is_harder() -> None:
    records = make_records(20_000, 3, 9)
    risk = smoothed_risk(records.confidence_NK.T.astype(np.float64), records.agreement_NK.T)
    left = records.confidence_NK[:, 0] < 0.8
    assert risk[2, left].mean() == pytest.approx((~records.agreement_NK[left, 2]).mean(), rel=0.15)


@pytest.mark.parametrize(
    ("before", "cache", "words"),
    [
        ([0.0, 0.5], [0.1], "shapes"),
        ([0.5, 0.2], [0.1, 0.1], "order of the backbone"),
        ([0.0], [-0.1], "less than nothing"),
        ([np.nan], [0.1], "finite"),
    ],
)
def test_impossible_costs_are_refused(before: list[float], cache: list[float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CacheCosts(np.array(before), np.array(cache))


def test_mismatched_arguments_are_refused() -> None:
    records = make_records(10, 3, 0)
    with pytest.raises(InputError, match="thresholds for 3 caches"):
        outcomes(records, (0.5, 0.5))
    with pytest.raises(InputError, match="costs of 1 caches for records of 3"):
        plan_path(records, CacheCosts(np.zeros(1), np.zeros(1)), 0.03)
    with pytest.raises(InputError, match="before it"):
        plan_path(make_records(10, 3, 0, (-1, 2, -1)), COSTS, 0.03)
