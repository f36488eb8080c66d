"""What the published recipes share: where their caches go, a threshold per cache, and the cheapest combination.

All of it looks at the tuning inputs as they are, raw counts and no allowance for chance, as the papers do. Costs are
ours: half measured time, half FLOPs, in units of the backbone's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from offramp.candidates import Candidates
from offramp.placement import OFF, CacheCosts, Thresholds, expected_cost, outcomes
from offramp.search import evenly
from offramp.splitting import SplitPoint
from offramp.types import BoolArray, FloatArray, Records

MOST_EXACT = 5000  # combinations that are all tried: two or three choices of 16 thresholds, or a dozen caches on or off


def hidden_points(candidates: Candidates, most: int) -> list[SplitPoint]:
    """At most `most` of the split points behind the input, evenly spread: the papers read hidden layers only."""
    points = [point for point in candidates.split.points[1:] if point.dtype.is_floating_point]
    return evenly(points, most)


def loosest_threshold(confidence_N: FloatArray, agreement_N: BoolArray, tolerance: float) -> float:
    """The smallest of these confidences at which the share of disagreements among the hits is at most `tolerance`;
    infinity where there is none. NaN is never a hit."""
    usable_N = ~np.isnan(confidence_N)
    order = np.argsort(-confidence_N[usable_N], kind="stable")
    sorted_N = np.asarray(confidence_N[usable_N][order], dtype=np.float64)
    share_N = np.cumsum(~agreement_N[usable_N][order]) / np.arange(1, len(order) + 1)
    ends = np.append(sorted_N[1:] < sorted_N[:-1], [True])[: len(order)]  # equal confidences hit together
    allowed = np.flatnonzero(ends & (share_N <= tolerance))
    return float(sorted_N[allowed[-1]]) if len(allowed) else OFF


def loosest_thresholds(records: Records, tolerance: float) -> list[float]:
    """(K,) the same for each cache, as if it were the only one."""
    columns = zip(records.confidence_NK.T, records.agreement_NK.T, strict=True)
    return [loosest_threshold(confidence_N, agreement_N, tolerance) for confidence_N, agreement_N in columns]


def cheapest(
    records: Records,
    costs: CacheCosts,
    choices_K: Sequence[Sequence[float]],
    tolerance: float,
    *,
    layer_K: Sequence[float] | None = None,
    fits: Callable[[Thresholds], bool] | None = None,
) -> Thresholds:
    """The cheapest combination of one of its thresholds, or "off", for each cache, of those whose disagreement on these
    records is at most `tolerance`.

    layer_K: of caches with an equal value only one may be on; None: any. fits: a further condition, which holds for
    "all off" and still holds when caches are switched off. Up to MOST_EXACT combinations are all tried; of more the
    search is greedy: from "all off", again and again the one change of one cache that lowers the cost most (switching
    it on, off or to another threshold, the others of its layer off), until none does.
    """

    def allowed(thresholds_K: Thresholds) -> bool:
        if layer_K is not None:
            used = [layer for layer, threshold in zip(layer_K, thresholds_K, strict=True) if threshold < OFF]
            if len(set(used)) < len(used):
                return False
        if fits is not None and not fits(thresholds_K):
            return False
        return bool(outcomes(records, thresholds_K)[1].mean() <= tolerance)

    def cost(thresholds_K: Thresholds) -> float:
        return expected_cost(records, thresholds_K, costs)

    options_K = [(OFF, *(choice for choice in choices if choice < OFF)) for choices in choices_K]
    if math.prod(map(len, options_K)) <= MOST_EXACT:
        return min(filter(allowed, itertools.product(*options_K)), key=cost)
    best: Thresholds = (OFF,) * len(options_K)
    while True:
        changed = min(filter(allowed, _changes(best, options_K, layer_K)), key=cost, default=best)
        if cost(changed) >= cost(best):
            return best
        best = changed


def _changes(
    thresholds_K: Thresholds, options_K: Sequence[Sequence[float]], layer_K: Sequence[float] | None
) -> Iterator[Thresholds]:
    """Every combination that differs in one cache, and in what that takes of the others of its layer."""
    for k, options in enumerate(options_K):
        others = list(thresholds_K)
        if layer_K is not None:
            others = [OFF if layer == layer_K[k] else old for layer, old in zip(layer_K, others, strict=True)]
        for option in options:
            if option != thresholds_K[k]:
                yield (*others[:k], option, *others[k + 1 :])
