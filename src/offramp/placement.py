"""Which caches to enable and at which confidence each answers: one joint search over recorded inputs.

Everything here works on `Records` alone. A request meets the enabled caches in their order and leaves at the first one
whose confidence reaches its threshold; a request that meets none of them gets the backbone's answer. A threshold of
infinity means that the cache is off. Costs are in units of the backbone's cost.

The search minimises cost + price * disagreement for a series of prices, by coordinate descent that is exact in each
coordinate (all possible thresholds of one cache, and "off", with the others fixed). A price per disagreement instead
of a limit on it makes every step a sum over requests; the price falls along the path from "no cache" to "everything".

Shape suffixes: N recorded inputs, K candidate caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.errors import InputError
from offramp.types import BoolArray, FloatArray, IntArray, Records

OFF = float("inf")
DEAREST, CHEAPEST = 1e4, 0.3  # prices of a disagreement, in full runs of the backbone
NEVER = 2.0  # above every confidence: such a cache is looked up only because another one reads its answer

Thresholds = tuple[float, ...]
Array = NDArray[np.float64]
Risk = Callable[[Array, BoolArray], Array]


@dataclass(frozen=True)
class CacheCosts:
    """What answering at each cache costs, in units of the backbone's cost.

    before_K: share of the backbone that has run when cache k is met, never falling with k.
    cache_K: one look-up of cache k (its own run, its confidence, the comparison), paid by every request that meets it.
    """

    before_K: FloatArray
    cache_K: FloatArray

    def __post_init__(self) -> None:
        before, cache = (np.asarray(values, dtype=np.float64) for values in (self.before_K, self.cache_K))
        if before.ndim != 1 or before.shape != cache.shape:
            raise InputError(f"costs have shapes {before.shape} and {cache.shape}; expected two equally long lists")
        if not (np.isfinite(before).all() and np.isfinite(cache).all() and (cache >= 0).all()):
            raise InputError("costs must be finite, and look-ups must not cost less than nothing")
        if (np.diff(before) < 0).any():
            raise InputError(
                f"before_K falls somewhere in {before.tolist()}; caches must be in the order of the backbone"
            )
        object.__setattr__(self, "before_K", before)
        object.__setattr__(self, "cache_K", cache)


@dataclass(frozen=True)
class Candidate:
    """One possible plan. disagreement and cost are estimates from the tuning inputs; hit rates are shares of all."""

    thresholds_K: Thresholds
    disagreement: float
    cost: float
    hit_rates_K: Thresholds


def outcomes(records: Records, thresholds_K: Sequence[float]) -> tuple[IntArray, BoolArray]:
    """(left_at_N, disagrees_N): where each request leaves (K: the backbone) and whether its answer then differs.

    A request hits when its confidence is at least the threshold; NaN never does. A cache whose source (`reads_K`)
    is off counts as off.
    """
    hits_NK = _usable_confidence(records) >= _effective(records.reads_K, thresholds_K)
    left_at_N = _first(hits_NK)
    agrees_NK1 = np.column_stack([records.agreement_NK, np.ones(len(records), dtype=bool)])
    return left_at_N, ~agrees_NK1[np.arange(len(records)), left_at_N]


def hit_rates(records: Records, thresholds_K: Sequence[float]) -> Array:
    """(K,) share of all requests that leave at each cache."""
    left_at_N, _ = outcomes(records, thresholds_K)
    counts = np.bincount(left_at_N, minlength=len(records.reads_K) + 1)[:-1]
    return np.asarray(counts / max(len(records), 1), dtype=np.float64)


def request_costs(records: Records, thresholds_K: Sequence[float], costs: CacheCosts) -> Array:
    """(N,) cost of each request: the backbone up to where it leaves, and every enabled cache that it met."""
    left_at_N, _ = outcomes(records, thresholds_K)
    enabled_K = np.isfinite(_effective(records.reads_K, thresholds_K))
    return _leaving_costs(enabled_K, costs)[left_at_N]


def expected_cost(records: Records, thresholds_K: Sequence[float], costs: CacheCosts) -> float:
    """Mean cost of a request."""
    return float(request_costs(records, thresholds_K, costs).mean())


def oracle_cost(agreement_NK: ArrayLike, costs: CacheCosts) -> float:
    """Mean cost if every request left at the first of these caches that agrees, paying each look-up until there.

    The limit of what thresholds can reach with these caches, all enabled; `costs` describes the same caches.
    """
    agreement = np.asarray(agreement_NK, dtype=bool)
    everything = np.ones(agreement.shape[1], dtype=bool)
    return float(_leaving_costs(everything, costs)[_first(agreement)].mean())


def _first(hits_NK: BoolArray) -> IntArray:
    """(N,) the first cache of each row that is true, K where none is."""
    return np.asarray(np.column_stack([hits_NK, np.ones(len(hits_NK), dtype=bool)]).argmax(axis=1))


def _usable_confidence(records: Records) -> Array:
    """(N, K) confidence with NaN as minus infinity, in double precision so that every comparison is exact."""
    confidence = np.asarray(records.confidence_NK, dtype=np.float64)
    return np.where(np.isnan(confidence), -np.inf, confidence)


def _effective(reads_K: Sequence[int], thresholds_K: Sequence[float]) -> Array:
    """Thresholds with every cache off whose source is off."""
    thresholds = np.array(thresholds_K, dtype=np.float64)
    if thresholds.shape != (len(reads_K),):
        raise InputError(f"{thresholds.size} thresholds for {len(reads_K)} caches; expected one for each")
    for k, source in enumerate(reads_K):
        if source >= 0 and not np.isfinite(thresholds[source]):
            thresholds[k] = OFF
    return np.where(np.isnan(thresholds), OFF, thresholds)


def _leaving_costs(enabled_K: BoolArray, costs: CacheCosts) -> Array:
    """(K + 1,) cost of a request that leaves at each cache, and of one that runs to the end."""
    lookups_K = np.cumsum(np.where(enabled_K, costs.cache_K, 0.0))
    everything = lookups_K[-1] if len(lookups_K) else 0.0
    return np.append(costs.before_K + lookups_K, 1.0 + everything)


# --- the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """Tuning records prepared for the descent, one row per cache.

    order_KN: the requests by falling confidence. risk_KN: how likely each cache is to disagree on each request. end:
    what running to the end counts.
    """

    confidence_KN: Array
    order_KN: NDArray[np.intp]
    risk_KN: Array
    costs: CacheCosts
    reads_K: tuple[int, ...]
    end: float = 1.0

    def hits(self, k: int, thresholds: Sequence[float]) -> BoolArray:
        return np.asarray(self.confidence_KN[k] >= thresholds[k])

    def readers(self, k: int) -> set[int]:
        """The caches that read cache k, directly or through others."""
        found = {k}
        for reader in range(k + 1, len(self.reads_K)):
            if self.reads_K[reader] in found:
                found.add(reader)
        return found - {k}

    def objective(self, thresholds: Sequence[float], price: float) -> float:
        """Mean cost + price * mean risk of a plan."""
        return float(self.value_after(-1, thresholds, price).mean())

    def cost_and_risk(self, thresholds: Sequence[float]) -> tuple[float, float]:
        """Mean cost and mean expected disagreement of a plan."""
        cost = self.objective(thresholds, 0.0)
        return cost, max(self.objective(thresholds, 1.0) - cost, 0.0)

    def value_after(self, k: int, thresholds: Sequence[float], price: float) -> Array:
        """(N,) cost + price * risk still ahead of a request that passed cache k without leaving."""
        value = np.full(self.confidence_KN.shape[1], self.end)
        for later in range(len(self.reads_K) - 1, k, -1):
            value = self.value_at(later, thresholds, price, value)
        return value

    def value_at(self, k: int, thresholds: Sequence[float], price: float, value_N: Array) -> Array:
        """(N,) the same one cache earlier, given `value_N` behind cache k."""
        if thresholds[k] == OFF:
            return value_N
        leaving = self.costs.before_K[k] + price * self.risk_KN[k]
        return np.asarray(np.where(self.hits(k, thresholds), leaving, value_N) + self.costs.cache_K[k])


def plan_path(
    records: Records,
    costs: CacheCosts,
    max_disagreement: float,
    *,
    prices: int = 40,
    steps: int = 200,
    risk: Risk | None = None,
    miss_price: float = 0.0,
) -> tuple[Candidate, ...]:
    """Plans from "no cache" to the cheapest found whose estimated disagreement is at most `max_disagreement`.

    Estimated disagreement rises and estimated cost, misses priced, falls strictly along the path; its first plan is "no
    cache".
    records: the tuning inputs. prices: length of the series of prices of a disagreement. steps: into how many equal
    steps of estimated disagreement the path is filled up by plans between those that the prices found. risk: how likely
    each cache is to disagree, from confidences and agreement of shape (K, N); None: `smoothed_risk`. miss_price: what a
    request that no cache answers counts in the search on top of its cost (`offramp.tail`).
    """
    problem = _prepare(records, costs, risk or smoothed_risk, miss_price)
    off = (OFF,) * len(problem.reads_K)
    if not len(records) or not off:
        return (Candidate(off, 0.0, 1.0, (0.0,) * len(off)),)
    found = _efficient(problem, {off, *_search(problem, prices)})
    within = [plan for plan in found if problem.cost_and_risk(plan)[1] <= max_disagreement]
    between = _fill(problem, found[: len(within) + 1], max_disagreement / steps)
    unpriced = dataclasses.replace(problem, end=1.0)
    candidates = (_candidate(unpriced, plan) for plan in _efficient(problem, {*within, *between}))
    # Priced misses make plans look good that save nothing; the path keeps those that do.
    return tuple(one for one in candidates if one.disagreement <= max_disagreement and one.cost <= 1)


def cheapest_within(path: Sequence[Candidate], tolerance: float) -> Candidate:
    """The last plan of a path whose estimated disagreement is within the tolerance."""
    return [plan for plan in path if plan.disagreement <= tolerance][-1]


def _prepare(records: Records, costs: CacheCosts, risk: Risk, miss_price: float) -> _Problem:
    if len(costs.cache_K) != len(records.reads_K):
        raise InputError(f"costs of {len(costs.cache_K)} caches for records of {len(records.reads_K)} caches")
    for k, source in enumerate(records.reads_K):
        if source >= k:
            raise InputError(f"cache {k} reads cache {source}; a cache can only read one that comes before it")
    confidence = np.minimum(_usable_confidence(records), 1.0).T.copy()
    return _Problem(
        confidence_KN=confidence,
        order_KN=np.argsort(-confidence, axis=1, kind="stable"),
        risk_KN=risk(confidence, np.asarray(records.agreement_NK.T, dtype=bool)),
        costs=costs,
        reads_K=tuple(records.reads_K),
        end=1.0 + miss_price,
    )


def smoothed_risk(confidence_KN: Array, agreement_KN: BoolArray) -> Array:
    """(K, N) probability that each cache disagrees given the confidences of all caches, not whether it did.

    A logistic regression per cache on the standardised log-odds of every cache's confidence, with a hinge at the
    median of its own, a weak ridge, and half a pseudo-disagreement so that "none seen" does not become "never".
    A search on the recorded 0/1 disagreements settles between the accidents of a small sample; one on the
    probability given a cache's own confidence alone misses that requests which earlier caches left are harder.
    Minus infinity as confidence (never a hit) has risk 1.
    """
    odds_KN = np.array([_standard_log_odds(row) for row in confidence_KN])
    risk_KN = np.ones_like(odds_KN)
    for k, odds in enumerate(odds_KN):
        usable = confidence_KN[k] > -np.inf
        if usable.any():
            hinge = np.maximum(odds - np.median(odds[usable]), 0)
            design = np.column_stack([np.ones_like(odds), *odds_KN, hinge])[usable]
            risk_KN[k, usable] = _logistic_fit(design, (~agreement_KN[k, usable]).astype(np.float64))
    return risk_KN


def _standard_log_odds(confidence_N: Array) -> Array:
    """(N,) log-odds with mean 0 and standard deviation 1; 0 where there is no confidence."""
    usable = confidence_N > -np.inf
    clipped = np.clip(confidence_N, 1e-7, 1 - 1e-7)
    odds = np.log(clipped / (1 - clipped))
    if not usable.any():
        return np.zeros_like(odds)
    centred = odds - odds[usable].mean()
    return np.where(usable, centred / (odds[usable].std() + 1e-9), 0.0)


def _logistic_fit(design_NF: Array, target_N: Array, ridge: float = 0.5, rounds: int = 30) -> Array:
    """(N,) fitted probabilities of a ridge logistic regression (Newton); column 0 is the constant, not shrunk."""
    origin = np.eye(1, design_NF.shape[1])
    design = np.vstack([design_NF, origin])  # one pseudo-request, half of it a disagreement, at the origin
    target = np.append(target_N, 0.5)
    penalty = ridge * np.eye(design.shape[1])
    penalty[0, 0] = 1e-6
    weights = np.zeros(design.shape[1])
    for _ in range(rounds):
        mean = _sigmoid(design @ weights)
        curvature = (design * (mean * (1 - mean) + 1e-9)[:, None]).T @ design + penalty
        step = np.linalg.solve(curvature, design.T @ (mean - target) + penalty @ weights)
        weights -= np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-6:
            break
    return _sigmoid(design_NF @ weights)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -30, 30))))


def _search(problem: _Problem, prices: int) -> Iterator[Thresholds]:
    """Every plan that some price settles on, from dear disagreements to cheap ones.

    Each price starts from the best plan of the one before, every fifth also from all caches off and from all on.
    """
    caches = len(problem.reads_K)
    off, on = (OFF,) * caches, (NEVER,) * caches
    current: Thresholds = off
    for turn, price in enumerate(np.geomspace(DEAREST, CHEAPEST, prices).tolist()):
        starts = {current, off, on} if turn % 5 == 0 else {current}
        found = {_descend(problem, start, price) for start in starts}
        yield from found
        current = min(found, key=lambda plan: problem.objective(plan, price))


def _descend(problem: _Problem, start: Thresholds, price: float, max_sweeps: int = 30) -> Thresholds:
    """Improve one cache at a time, last to first, until none improves."""
    thresholds = list(start)
    for _ in range(max_sweeps):
        before = tuple(thresholds)
        _sweep(problem, thresholds, price)
        if tuple(thresholds) == before:
            break
    return tuple(thresholds)


def _sweep(problem: _Problem, thresholds: list[float], price: float) -> None:
    """One pass over the caches, last to first; changes `thresholds` in place."""
    reaching = _reaching(problem, thresholds)
    value = np.full(problem.confidence_KN.shape[1], problem.end)
    for k in range(len(thresholds) - 1, -1, -1):
        source = problem.reads_K[k]
        if source < 0 or thresholds[source] != OFF:
            value = _improve(problem, thresholds, k, price, reaching[k], value)
        value = problem.value_at(k, thresholds, price, value)


def _reaching(problem: _Problem, thresholds: Sequence[float]) -> list[BoolArray]:
    """For each cache, which requests no earlier one answers."""
    waiting = np.ones(problem.confidence_KN.shape[1], dtype=bool)
    reaching = []
    for k in range(len(thresholds)):
        reaching.append(waiting)
        if thresholds[k] != OFF:
            waiting = waiting & ~problem.hits(k, thresholds)
    return reaching


def _improve(
    problem: _Problem, thresholds: list[float], k: int, price: float, reaching_N: BoolArray, value_N: Array
) -> Array:
    """The best threshold of cache k, or off, with the others fixed. Returns the value of passing it by."""
    order = problem.order_KN[k]
    order = order[reaching_N[order]]
    confidence = problem.confidence_KN[k][order]
    gain = value_N[order] - problem.costs.before_K[k] - price * problem.risk_KN[k][order]
    saved, threshold = _best_threshold(confidence, gain)
    saved -= float(problem.costs.cache_K[k]) * len(order)
    readers = [reader for reader in problem.readers(k) if thresholds[reader] != OFF]
    alone = value_N
    if readers:
        without = [OFF if reader in readers else value for reader, value in enumerate(thresholds)]
        alone = problem.value_after(k, without, price)
        saved += float((alone - value_N)[order].sum())
    if saved > 1e-9:
        thresholds[k] = threshold
        return value_N
    thresholds[k] = OFF
    for reader in readers:
        thresholds[reader] = OFF
    return alone


def _best_threshold(confidence: Array, gain: Array) -> tuple[float, float]:
    """The largest sum of gains over a prefix of requests by falling confidence, and the threshold that cuts it off."""
    if not len(gain):
        return 0.0, NEVER
    total = np.cumsum(gain)
    cut_here = np.append(confidence[:-1] > confidence[1:], confidence[-1] > -np.inf)
    total[~cut_here] = -np.inf
    last = int(np.argmax(total))
    if total[last] <= 0:
        return 0.0, NEVER
    below = float(confidence[last + 1]) if last + 1 < len(confidence) else -np.inf
    return float(total[last]), _between(below, float(confidence[last]))


def _between(below: float, above: float) -> float:
    """Half way between two confidences, in single precision as caches give them; above `below`, at most `above`."""
    if below == -np.inf:
        return above
    middle = float(np.float32((below + above) / 2))
    return middle if below < middle <= above else above


def _fill(problem: _Problem, path: Sequence[Thresholds], spacing: float, most: int = 400) -> Iterator[Thresholds]:
    """Plans between neighbours on the path, about `spacing` apart in risk, so that certification can stop in between.

    The number of requests above each threshold moves in a straight line from one plan to the next; a cache that is
    off in one of them starts from no request. A second line loosens only the caches that are on in the first plan:
    where the next one has other caches, half of each costs look-ups for little.
    """
    ranked_KN = np.sort(problem.confidence_KN, axis=1)[:, ::-1]
    risks = [problem.cost_and_risk(plan)[1] for plan in path]
    for plan, following, risk, next_risk in zip(path, path[1:], risks, risks[1:], strict=False):
        parts = min(int(np.ceil((next_risk - risk) / spacing)), most)
        start_K, end_K = _ranks(ranked_KN, plan), _ranks(ranked_KN, following)
        on_K = np.isfinite(plan)
        loosened_K = np.where(on_K, np.maximum(start_K, end_K), 0)
        kept_K = on_K & np.isfinite(following)
        for share in np.arange(1, parts) / max(parts, 1):
            yield _at_ranks(problem, ranked_KN, np.rint(start_K + (end_K - start_K) * share), kept_K)
            yield _at_ranks(problem, ranked_KN, np.rint(start_K + (loosened_K - start_K) * share), on_K)


def _ranks(ranked_KN: Array, thresholds: Sequence[float]) -> Array:
    """(K,) how many requests have a confidence of at least the threshold."""
    return np.asarray((ranked_KN >= np.array(thresholds)[:, None]).sum(axis=1), dtype=np.float64)


def _at_ranks(problem: _Problem, ranked_KN: Array, count_K: Array, kept_K: BoolArray) -> Thresholds:
    """The plan with count_K requests above each threshold. A cache without any stays on where `kept_K` or read."""
    thresholds = [NEVER if kept else OFF for kept in kept_K]
    for k, (row, count) in enumerate(zip(ranked_KN, count_K.astype(int), strict=True)):
        if count:
            thresholds[k] = _between(float(row[count]) if count < len(row) else -np.inf, float(row[count - 1]))
    for k in range(len(thresholds) - 1, -1, -1):
        if thresholds[k] != OFF and problem.reads_K[k] >= 0:
            source = problem.reads_K[k]
            thresholds[source] = min(thresholds[source], NEVER)
    return tuple(thresholds)


def _efficient(problem: _Problem, plans: Iterable[Thresholds]) -> list[Thresholds]:
    """No cache at all, then the plans that no other one beats in both cost and risk, by rising risk."""
    path: list[Thresholds] = [(OFF,) * len(problem.reads_K)]
    cheapest = problem.end
    rated = [(*problem.cost_and_risk(plan), plan) for plan in plans]
    for cost, _, plan in sorted(rated, key=lambda entry: (entry[1], entry[0])):
        if cost < cheapest - 1e-9:
            path.append(plan)
            cheapest = cost
    return path


def _candidate(problem: _Problem, thresholds: Thresholds) -> Candidate:
    cost, risk = problem.cost_and_risk(thresholds)
    reaching = _reaching(problem, thresholds)
    rates = [float((waiting & problem.hits(k, thresholds)).mean()) for k, waiting in enumerate(reaching)]
    return Candidate(thresholds_K=thresholds, disagreement=risk, cost=cost, hit_rates_K=tuple(rates))
