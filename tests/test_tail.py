"""Plans with few slow requests: taken where they cost little, on records whose best plans are known."""

from __future__ import annotations

import numpy as np
import pytest

from offramp import tail
from offramp.placement import CacheCosts, plan_path, request_costs
from offramp.tail import FEW, SLOW, steady_path
from offramp.types import Records

COSTS = CacheCosts(np.array([0.0, 0.8]), np.array([0.06, 0.02]))
# The second cache is met behind 90 % of the backbone, where a look-up costs a little more than its hits save.
LATE = CacheCosts(np.array([0.0, 0.9]), np.array([0.06, 0.08]))
N, TOLERANCE = 2000, 0.02


def records(first: float, late: float, n: int = N) -> Records:
    """Two caches whose confidence says when they are wrong, never up to these shares of the requests."""
    rank_N = (np.random.default_rng(0).permutation(n) + 0.5) / max(n, 1)
    agreement = np.column_stack([rank_N < first, rank_N < late])
    confidence = np.column_stack([1 - rank_N, 1 - rank_N]).astype(np.float32)
    nothing = np.zeros((n, 2), dtype=np.int64)
    return Records(confidence, nothing, agreement, nothing[:, 0], (-1, -1))


def slow(of: Records, costs: CacheCosts) -> float:
    path, _ = steady_path(of, costs, 3 * TOLERANCE, TOLERANCE)
    plan = [one for one in path if one.disagreement <= TOLERANCE][-1]
    return float((request_costs(of, plan.thresholds_K, costs) > SLOW).mean())


def test_where_few_requests_are_slow_misses_have_no_price() -> None:
    good = records(0.97, 0.99)
    path, miss_price = steady_path(good, COSTS, 3 * TOLERANCE, TOLERANCE)
    assert miss_price == 0
    assert path == plan_path(good, COSTS, 3 * TOLERANCE)


def test_where_look_ups_cost_next_to_nothing_no_request_is_slow() -> None:
    cheap = CacheCosts(COSTS.before_K, np.array([0.01, 0.01]))
    assert steady_path(records(0.6, 0.7), cheap, 3 * TOLERANCE, TOLERANCE).miss_price == 0


def test_a_late_cache_that_hardly_saves_is_used_where_it_makes_slow_requests_few() -> None:
    of = records(0.8, 0.98)
    plain = plan_path(of, LATE, TOLERANCE)[-1]
    assert (request_costs(of, plain.thresholds_K, LATE) > SLOW).mean() > FEW
    path, miss_price = steady_path(of, LATE, 3 * TOLERANCE, TOLERANCE)
    assert miss_price in tail.PRICES
    assert slow(of, LATE) < FEW
    kept = 1 - [one.cost for one in path if one.disagreement <= TOLERANCE][-1]
    assert kept >= (1 - tail.GIVEN_UP) * (1 - plain.cost)


def test_where_no_price_makes_them_few_it_is_the_one_that_leaves_the_fewest() -> None:
    of = records(0.8, 0.9)
    plain = plan_path(of, COSTS, TOLERANCE)[-1]
    path, _ = steady_path(of, COSTS, 3 * TOLERANCE, TOLERANCE)
    assert FEW < slow(of, COSTS) < 0.8 * (request_costs(of, plain.thresholds_K, COSTS) > SLOW).mean()
    kept = 1 - [one.cost for one in path if one.disagreement <= TOLERANCE][-1]
    assert kept >= (1 - tail.GIVEN_UP) * (1 - plain.cost)


def test_where_no_price_leaves_fewer_misses_have_none() -> None:
    assert steady_path(records(0.5, 0.6), LATE, 3 * TOLERANCE, TOLERANCE).miss_price == 0


def test_late_hits_are_slow_too_where_cuts_make_them_so() -> None:
    """A late hit costs 1.04 of all stages in a row; uncut, the full model takes 0.95 of these."""
    of = records(0.8, 0.98)
    path, miss_price = steady_path(of, LATE, 3 * TOLERANCE, TOLERANCE, full=0.95)
    assert miss_price == 0, "they would only take the place of misses"
    assert path == plan_path(of, LATE, 3 * TOLERANCE)


def test_slow_is_what_a_request_by_itself_is_where_that_is_known() -> None:
    of, quick = records(0.8, 0.98), CacheCosts(LATE.before_K, np.array([0.01, 0.01]))
    assert steady_path(of, LATE, 3 * TOLERANCE, TOLERANCE).miss_price > 0
    assert steady_path(of, LATE, 3 * TOLERANCE, TOLERANCE, alone=quick).miss_price == 0


def test_where_it_would_cost_too_much_misses_have_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "GIVEN_UP", 0.0)
    assert steady_path(records(0.8, 0.98), LATE, 3 * TOLERANCE, TOLERANCE).miss_price == 0


def test_where_nothing_was_recorded_the_path_has_no_caches() -> None:
    assert len(steady_path(records(0.8, 0.98, n=0), COSTS, 3 * TOLERANCE, TOLERANCE).path) == 1
