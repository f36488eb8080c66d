"""What the tests of the methods share: toy backbones and their inputs, made-up records, rules as slow loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.placement import OFF, CacheCosts
from offramp.types import Records

TOLERANCE = 0.05

# --- backbones and inputs ---------------------------------------------------------------------------


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


class Wide(nn.Module):
    """Dear, but easy to imitate: its answer is the brightest of the image's cells x cells parts, over all channels."""

    def __init__(self, channels: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.stem = nn.Conv2d(channels, 24, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem(x))
        for block in self.blocks:
            y = torch.relu(block(y))
        return 20 * nn.functional.adaptive_avg_pool2d(x, self.cells).flatten(1) + 1e-3 * y.mean((1, 2, 3))[:, None]


def wide(channels: int, cells: int) -> nn.Module:
    torch.manual_seed(0)
    return Wide(channels, cells).eval()


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


def traffic(stream: Iterable[Any], certify: Iterable[Any]) -> dict[str, Any]:
    """Arguments of a fit."""
    return {"stream": list(stream), "certify": list(certify), "tolerance": TOLERANCE, "progress": False}


# --- records ----------------------------------------------------------------------------------------


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


def slow_threshold(confidence_N: Iterable[float], agreement_N: Iterable[bool], tolerance: float) -> float:
    """Every confidence that occurs, from the smallest, and every row that it lets through."""
    said = [(float(confidence), bool(agrees)) for confidence, agrees in zip(confidence_N, agreement_N, strict=True)]
    for threshold in sorted({confidence for confidence, _ in said if not math.isnan(confidence)}):
        hits = [agrees for confidence, agrees in said if confidence >= threshold]
        if hits.count(False) / len(hits) <= tolerance:
            return threshold
    return OFF


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
