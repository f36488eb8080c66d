"""What the published rules share, against loops over every row and every combination. Also the toys of their tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offramp import choosing, fitting
from offramp.cost import flop_shares
from offramp.methods import published
from offramp.methods.published import cheapest, loosest_threshold, loosest_thresholds
from offramp.placement import OFF, CacheCosts
from offramp.types import BoolArray, FloatArray, Records

# --- toys (the tests of the methods use them too) ---------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Flatten(), nn.Linear(128, 1024), nn.ReLU())
        self.narrow = nn.Linear(1024, 128)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.narrow(self.wide(x)).view_as(x)
        return x + 0.1 * y


class Toy(nn.Module):
    """Says which quarter of the image is the brightest: dear, but easy to see in the activations behind its blocks,
    two maps of 8 x 4 x 4 and a vector of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
        self.blocks = nn.Sequential(Block(), Block(), nn.Flatten(), Block(), Block())
        self.head = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.blocks(self.stem(x)))
        quarters: Tensor = 20 * nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        logits: Tensor = quarters + 1e-2 * y
        return logits


def toy() -> nn.Module:
    torch.manual_seed(0)
    return Toy().eval()


def images(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    quarters = torch.randn(count, 1, 2, 2, generator=random)
    return quarters.repeat_interleave(4, 2).repeat_interleave(4, 3) + 0.3 * torch.randn(
        count, 1, 8, 8, generator=random
    )


def labelled_batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The labels are the quarters themselves."""
    x = images(count, seed)
    return list(zip(x.split(100), nn.functional.adaptive_avg_pool2d(x, 2).flatten(1).argmax(1).split(100), strict=True))


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few copies, short measurements, and costs in FLOPs alone, which are the same in every run."""
    monkeypatch.setattr("offramp.recording.ASKED_ROWS", 0)
    monkeypatch.setattr(fitting, "STAGES_S", 0.2)
    monkeypatch.setattr(fitting, "CACHES_S", 0.2)
    monkeypatch.setattr(choosing, "LATENCY_S", 0.05)
    monkeypatch.setattr(choosing, "shares", lambda costs, weight_flops: flop_shares(costs))


def make_records(n: int, caches: int, seed: int) -> Records:
    """Later caches agree more often, sure ones too; some confidences are tied, some are NaN."""
    random = np.random.default_rng(seed)
    ease_N1 = random.standard_normal((n, 1))
    margin_NK = np.linspace(0.8, 2.5, caches) + ease_N1 + 0.7 * random.standard_normal((n, caches))
    confidence_NK = 1 / (1 + np.exp(-np.abs(margin_NK + 0.4 * random.standard_normal((n, caches)))))
    confidence_NK = confidence_NK.round(2).astype(np.float32)
    confidence_NK[random.random((n, caches)) < 0.03] = np.nan
    nothing_NK = np.zeros((n, caches), dtype=np.int64)
    return Records(confidence_NK, nothing_NK, margin_NK > 0, nothing_NK[:, 0], (-1,) * caches)


def make_costs(caches: int, seed: int, layers: int | None = None) -> CacheCosts:
    """Equally many caches at each of some layers, one each by default."""
    random = np.random.default_rng(seed)
    before_L = np.sort(random.random(layers or caches)) * 0.8
    return CacheCosts(np.repeat(before_L, caches // len(before_L)), random.uniform(0.01, 0.08, caches))


# --- slow oracles -----------------------------------------------------------------------------------


def slow_threshold(confidence_N: FloatArray, agreement_N: BoolArray, tolerance: float) -> float:
    """Every confidence in turn, and every row that it lets through."""
    good = [OFF]
    for threshold in confidence_N.tolist():
        hits = [bool(agrees) for value, agrees in zip(confidence_N, agreement_N, strict=True) if value >= threshold]
        if hits and hits.count(False) / len(hits) <= tolerance:
            good.append(threshold)
    return min(good)


def slow_outcome(records: Records, thresholds: Sequence[float], costs: CacheCosts) -> tuple[float, float]:
    """(mean cost, share of disagreements), request by request and cache by cache."""
    spent, wrong = 0.0, 0
    for n in range(len(records)):
        for k, threshold in enumerate(thresholds):
            if threshold == OFF:
                continue
            spent += float(costs.cache_K[k])
            if float(records.confidence_NK[n, k]) >= threshold:
                spent += float(costs.before_K[k])
                wrong += not records.agreement_NK[n, k]
                break
        else:
            spent += 1.0
    return spent / len(records), wrong / len(records)


def slow_cheapest(
    records: Records, costs: CacheCosts, options_K: Iterable[Sequence[float]], tolerance: float, layers: Sequence[Any]
) -> float:
    """Cost of the best of all combinations."""
    best = 1.0
    for plan in itertools.product(*([OFF, *options] for options in options_K)):
        used = [layer for layer, threshold in zip(layers, plan, strict=True) if threshold < OFF]
        if len(used) == len(set(used)):
            cost, wrong = slow_outcome(records, plan, costs)
            if wrong <= tolerance:
                best = min(best, cost)
    return best


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
