"""A cached model whose caches do what the inputs say, in service: for tests of what watches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import models
import torch
from models import FixedCache, part
from torch import Tensor

from offramp.model import CachedModel
from offramp.online_model import OnlineModel, online
from offramp.splitting import SplitModel, split
from offramp.tasks import Classification
from offramp.types import Certificate, Plan, PlannedCache

SURE_A, WRONG_A, SURE_B, WRONG_B, NUMBER = range(5)  # what the columns of an input say; the sixth is free
TOLERANCE = 0.02
THRESHOLDS = (0.5, 0.5)


class Scripted(FixedCache):
    """Answers as the backbone does, or differently where a column of the input says so; as sure as another says."""

    def __init__(self, split_model: SplitModel, name: str, sure: int, wrong: int) -> None:
        def says(x: Tensor) -> Tensor:
            logits: Tensor = split_model.backbone(x)
            return torch.where(x[:, wrong, None] > 0, logits.roll(1, dims=1), logits)

        super().__init__(split_model.points[0], 3, says, lambda x: x[:, sure], name)

    def look_up(self, activation: Tensor, read_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.say(activation), self.sure(activation)  # keeps nothing: many threads ask at once


def scripted(*, cache_ms: float = 0.1, bypass: tuple[int, ...] = ()) -> CachedModel:
    """Two caches in front of a small model, certified for 2 %."""
    torch.manual_seed(0)
    split_model = split(models.mlp().eval(), torch.randn(4, 6))
    caches = [Scripted(split_model, "A", SURE_A, WRONG_A), Scripted(split_model, "B", SURE_B, WRONG_B)]
    table = models.costs(len(split_model.stages), compaction=True)
    table = replace(table, caches=tuple(part(cache.name, cache_ms) for cache in caches), cache_points=(0, 0))
    planned = tuple(
        PlannedCache(cache.name, "input", threshold, "max_softmax", 0.4)
        for cache, threshold in zip(caches, THRESHOLDS, strict=True)
    )
    certificate = Certificate(TOLERANCE, 0.95, 1000, 10, 0.018, "by hand", 1, "", "", "2026-01-01")
    plan = Plan(planned, bypass_batch_sizes=bypass)
    return CachedModel(split_model, caches, plan, certificate, table, task=Classification(), summary={})


def traffic(rows: int, seed: int, *, wrong_a: float = 0.0, wrong_b: float = 0.0) -> Tensor:
    """A answers half of the requests, B a quarter; of what each says a share is wrong."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, 6, generator=generator)
    x[:, WRONG_A] = (x[:, WRONG_A] < wrong_a).float()
    x[:, WRONG_B] = (x[:, WRONG_B] < wrong_b).float()
    x[:, NUMBER] = torch.arange(rows)
    return x


def differing(model: CachedModel, x: Tensor) -> set[int]:
    """Which rows are not answered as the backbone answers them."""
    with torch.no_grad():
        full_B = model.split_model.backbone(x).argmax(1)
    return set((model.predict(x).answer_B != full_B).nonzero().flatten().tolist())


def serve(model: OnlineModel, x: Tensor, size: int = 50) -> None:
    for rows in x.split(size):
        model(rows)
        model.settle()


@contextmanager
def watching(cached: CachedModel | None = None, **more: Any) -> Iterator[OnlineModel]:
    settings = {"shadow": 1.0, "run_length": 1000, "seed": 0} | more
    with online(scripted() if cached is None else cached, **settings) as model:
        yield model
