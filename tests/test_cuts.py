"""Which caches are worth their cuts: by hand, where the answer is known."""

from __future__ import annotations

import dataclasses

import models
import numpy as np
import pytest

from offramp.cuts import worthwhile
from offramp.types import CostTable, PartCost, Records, Timing

TOLERANCE = 0.01


def records(*shares: float, reads_K: tuple[int, ...] | None = None, n: int = 400) -> Records:
    """Caches that are sure, and right, of this share of the rows each, the first ones, and know nothing of the rest."""
    sure_NK = np.column_stack([np.arange(n) < share * n for share in shares])
    return Records(
        np.where(sure_NK, 0.9, 0.1),
        np.zeros(sure_NK.shape, dtype=int),
        sure_NK,
        np.zeros(n, dtype=int),
        (-1,) * len(shares) if reads_K is None else reads_K,
    )


def table(stages_ms: list[float], full_ms: float, points: list[int], cache_ms: float = 0.01) -> CostTable:
    """A model of these stages; `points`: where its caches sit."""

    def timed(name: str, ms: float) -> PartCost:
        return dataclasses.replace(models.part(name, 1.0), time_ms={size: Timing(ms, ms, ms) for size in (1, 8)})

    plain = models.costs(len(stages_ms), compaction=True)
    return dataclasses.replace(
        plain,
        backbone=timed("backbone", full_ms),
        stages=tuple(timed(f"stage{k}", ms) for k, ms in enumerate(stages_ms)),
        caches=tuple(timed(f"cache{k}", cache_ms) for k in range(len(points))),
        cache_points=tuple(points),
    )


def test_where_cuts_cost_nothing_every_useful_cache_is_kept() -> None:
    costs = table([1.0, 1.0, 1.0], 3.0, [1, 2])
    assert worthwhile(records(0.4, 0.8), costs, TOLERANCE) == ["cache0", "cache1"]


def test_a_cache_that_adds_nothing_is_dropped_even_there() -> None:
    costs = table([1.0, 1.0, 1.0], 3.0, [1, 2])
    assert worthwhile(records(0.6, 0.6), costs, TOLERANCE) == ["cache0"]


def test_a_cache_that_saves_less_than_its_cut_costs_is_dropped() -> None:
    """Two cuts take a third of the model's time each. The second cache saves 0.1 x 2/3 of it."""
    costs = table([1.0, 2.0, 2.0], 3.0, [1, 2])
    assert worthwhile(records(0.7, 0.8), costs, TOLERANCE) == ["cache0"]


def test_none_is_left_where_no_saving_is_worth_a_cut() -> None:
    costs = table([1.0, 2.0, 2.0], 3.0, [1, 2])
    assert worthwhile(records(0.3, 0.35), costs, TOLERANCE) == []


def test_a_cache_at_the_input_needs_no_cut() -> None:
    costs = table([1.0, 4.0], 3.0, [0, 1])
    assert worthwhile(records(0.3, 0.35), costs, TOLERANCE) == ["cache0"]


@pytest.mark.parametrize("reads_K", [(-1, -1), (-1, 0)])
def test_what_reads_a_cache_goes_with_it(reads_K: tuple[int, int]) -> None:
    """The first knows little and costs much; without it the second can stay only if it does not read it."""
    costs = table([1.0, 1.0], 2.0, [0, 1])
    dear = dataclasses.replace(costs.caches[0], time_ms={size: Timing(1.5, 1.5, 1.5) for size in (1, 8)})
    costs = dataclasses.replace(costs, caches=(dear, costs.caches[1]))
    kept = worthwhile(records(0.01, 0.8, reads_K=reads_K), costs, TOLERANCE)
    assert kept == ([] if 0 in reads_K else ["cache1"])


def test_a_cache_that_saves_less_than_its_cut_stays_where_a_miss_costs_more_than_its_time() -> None:
    costs = table([1.0, 2.0, 2.0], 3.0, [1, 2])
    both = ["cache0", "cache1"]
    assert worthwhile(records(0.7, 0.8), costs, TOLERANCE, miss_price=0.1) == ["cache0"]
    assert worthwhile(records(0.7, 0.8), costs, TOLERANCE, miss_price=5.0) == both
    assert worthwhile(records(0.3, 0.35), costs, TOLERANCE, miss_price=5.0) == ["cache1"], "which answers all of them"
