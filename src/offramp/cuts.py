"""Which caches are worth the cuts that they need.

Where a part ends on another runtime its results have to leave it: layouts are changed, eight-bit numbers widened, and
what could have been fused is not. So all stages in a row take longer than the full model as one part. That loss is
shared out over the cuts; a cache that saves less than its cut costs is better left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from offramp.cost import shares
from offramp.placement import CacheCosts, plan_path
from offramp.types import CostTable, Records


def worthwhile(records: Records, costs: CostTable, tolerance: float, miss_price: float = 0.0) -> list[str]:
    """The names of the caches that pay for their cuts on the tuning records; dropped one by one while that saves time.

    costs: of the model with all of them, each stage and the full model where they run now. miss_price: what a request
    that no cache answers counts on top of its time, in full runs of the backbone.
    """
    expected = functools.partial(_expected_cost, records, costs, tolerance, miss_price)
    kept = list(range(len(costs.caches)))
    cheapest = expected(kept)
    while kept:
        fewer = [_without(kept, k, records.reads_K) for k in kept]
        trials = [expected(trial) for trial in fewer]
        if min(trials) > cheapest:
            break
        cheapest, kept = min(trials), fewer[trials.index(min(trials))]
    return [costs.caches[k].name for k in kept]


def _without(kept: Sequence[int], dropped: int, reads_K: Sequence[int]) -> list[int]:
    """Without this cache and those that read its answer."""
    gone = {dropped}
    for k in kept:
        if reads_K[k] in gone:
            gone.add(k)
    return [k for k in kept if k not in gone]


def _expected_cost(
    records: Records, costs: CostTable, tolerance: float, miss_price: float, kept: Sequence[int]
) -> float:
    """Mean time of a request under the best plan with these caches, over the full model's, misses priced."""
    if not kept:
        return 1.0 + miss_price
    cut = _cut_share(costs)
    before_K, cache_K = (share[kept] * stages_share(costs) for share in shares(costs))
    points = [costs.cache_points[k] for k in kept]
    # Cuts that the caches left out would have needed are saved before each cache, and on the way to the end.
    saved_K = np.array([cut * len(_cuts(costs.cache_points, upto) - _cuts(points, upto)) for upto in points])
    whole = 1.0 + cut * len(_cuts(points, len(costs.stages)))
    before_K = np.maximum.accumulate((before_K - saved_K).clip(0))  # measured times are noisy
    relative = CacheCosts(before_K / whole, cache_K / whole)
    best = plan_path(_only(records, kept), relative, tolerance, miss_price=miss_price / whole)[-1]
    return whole * best.cost + miss_price * (1 - sum(best.hit_rates_K))


def _cuts(points: Iterable[int], upto: int) -> set[int]:
    """Where these caches cut the model, up to this point: not at its input."""
    return {point for point in points if 0 < point <= upto}


def stages_share(costs: CostTable, batch_sizes: Iterable[int] | None = None) -> float:
    """Time of all stages in a row over that of the full model as one part, the mean over these batch sizes; None: over
    all that were measured."""
    sizes = costs.backbone.time_ms if batch_sizes is None else batch_sizes
    return float(np.mean([costs.stages_ms(size) / costs.backbone.time_ms[size].median_ms for size in sizes]))


def _cut_share(costs: CostTable) -> float:
    """What one cut costs, in units of the full model's time."""
    cuts = len(costs.stages) - 1
    return max(stages_share(costs) - 1, 0.0) / cuts if cuts else 0.0


def _only(records: Records, kept: Sequence[int]) -> Records:
    """Of these caches alone; what each reads is among them."""
    reads_K = tuple(kept.index(records.reads_K[k]) if records.reads_K[k] >= 0 else -1 for k in kept)
    return dataclasses.replace(
        records,
        confidence_NK=records.confidence_NK[:, kept],
        answer_NK=records.answer_NK[:, kept],
        agreement_NK=records.agreement_NK[:, kept],
        reads_K=reads_K,
    )
