"""Plans under which few requests are slower than without caches, where that costs little.

A request that no cache answers pays for all look-ups. Where these are one in twenty or more, the 95th percentile of the
time is above the full model's, however low the mean. A search that charges for them finds plans with half as many and
hardly higher a mean: late caches answer some more, the first ones some fewer (docs/experiments.md). A limit on the
percentile itself would leave a path of plans with gaps.
"""

from __future__ import annotations

from typing import NamedTuple

from offramp.placement import CacheCosts, Candidate, cheapest_within, plan_path, request_costs
from offramp.types import Records

# Of a request that no cache answers, on top of its cost, in full runs of the backbone.
PRICES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
SLOW, FEW = 1.05, 0.05  # times the full model's cost, and the share of the requests that may cost more
GIVEN_UP = 0.05  # of the saving, for the sake of these requests, at most


class Priced(NamedTuple):
    """A path of plans, and at which price of a miss it was found."""

    path: tuple[Candidate, ...]
    miss_price: float


def steady_path(
    records: Records,
    costs: CacheCosts,
    max_disagreement: float,
    tolerance: float,
    *,
    alone: CacheCosts | None = None,
    full: float = 1.0,
) -> Priced:
    """The path of `placement.plan_path` at the lowest price of a miss at which few requests are slow; where none brings
    that about within what may be given up, at the one that leaves the fewest. A path is judged by its cheapest plan
    within the tolerance.

    alone: what requests cost that come one at a time, where that is known apart. full: what the model without caches
    costs then, in units of all stages in a row.
    """
    alone, slow = alone or costs, SLOW * full
    best = Priced(plan_path(records, costs, max_disagreement), 0.0)
    plan = cheapest_within(best.path, tolerance)
    most, fewest = 1 - (1 - GIVEN_UP) * (1 - plan.cost), _share_above(slow, records, plan, alone)
    for price in PRICES:
        if fewest <= FEW:
            break
        path = plan_path(records, costs, max_disagreement, miss_price=price)
        plan = cheapest_within(path, tolerance)
        if plan.cost > most:
            break
        share = _share_above(slow, records, plan, alone)
        if share < fewest:
            best, fewest = Priced(path, price), share
    return best


def _share_above(cost: float, records: Records, plan: Candidate, costs: CacheCosts) -> float:
    return int((request_costs(records, plan.thresholds_K, costs) > cost).sum()) / max(len(records), 1)
