"""What the wrapper costs when it saves nothing: no cache enabled, and caches that never hit, at batch 1 and 32.

ResNet-18 of ../shared/models. The caches are two of the shapes that fit() trains (untrained here: they never hit, so
their weights do not matter), a student of 3.5 % of the FLOPs at the input and a pooled one in the middle. The bare
stages are timed too, which tells the caches' own time from that of routing.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json
"""

from __future__ import annotations

import common
import torch

from offramp.caches import CacheShape, LearnedCache, reduction_for
from offramp.cost import measure, measure_caches
from offramp.evaluation import compare_latency
from offramp.model import CachedModel
from offramp.splitting import SplitModel, split
from offramp.streams import Batch
from offramp.tasks import Classification
from offramp.types import Certificate, Plan, PlannedCache

SIZES = (1, 32)


def cache_at(split_model: SplitModel, position: int, shape: CacheShape) -> LearnedCache:
    point = split_model.points[position]
    reduction = reduction_for(point.shape, is_input=position == 0)
    cache = LearnedCache(f"{point.name}/{shape.label}", point.name, shape, point.shape, 10, reduction=reduction)
    cache.eval()
    cache.fold()
    return cache


def cached_model(split_model: SplitModel, caches: list[LearnedCache]) -> CachedModel:
    """Thresholds above 1: every cache is looked up and none ever hits."""
    costs = measure_caches(measure(split_model, batch_sizes=SIZES, budget_s=6), split_model, caches, budget_s=3)
    plan = Plan(tuple(PlannedCache(cache.name, cache.point, 2.0, "max_softmax", 0.0) for cache in caches))
    certificate = Certificate(0.01, 0.95, 0, 0, 0.0, "none: never answers", 0, split_model.fingerprint, "", "")
    return CachedModel(split_model, caches, plan, certificate, costs, task=Classification(), summary={})


def main() -> None:
    options = common.arguments(__doc__)
    zoo = common.zoo()
    backbone = zoo.resnet18_cifar10()
    images = common.images("cifar10/test.parquet", lambda x: zoo.normalize(x, "cifar10"), side=32).rows(slice(0, 512))
    sample = Batch((images.transform(torch.from_numpy(images.images)),))
    split_model = split(backbone, sample.rows(slice(0, 4)))
    middle = len(split_model.points) // 2
    two = [cache_at(split_model, 0, CacheShape("student", 16)), cache_at(split_model, middle, CacheShape("mlp", 64))]
    rows = []
    print("| enabled | batch | time over full model: mean | p50 | p95 | full model ms | of it caches |")
    print("|---|---|---|---|---|---|---|")
    for name, caches in (("no cache", []), ("two caches, no hits", two)):
        cached = cached_model(split_model, caches)
        with torch.inference_mode():
            measured = compare_latency(cached, sample, SIZES, options.latency_budget)
        for ratio in measured:
            own_ms = sum(part.time_ms[ratio.batch_size].median_ms for part in cached.costs.caches)
            share = own_ms / ratio.full_mean_ms
            rows.append({"enabled": name, "caches_share": share, **vars(ratio)})
            print(
                f"| {name} | {ratio.batch_size} | {ratio.mean:.3f} | {ratio.p50:.3f} | {ratio.p95:.3f} | "
                f"{ratio.full_mean_ms:.2f} | {share:.3f} |"
            )
    common.finish(common.document("overhead, ResNet-18 / CIFAR-10", rows), options.out)


if __name__ == "__main__":
    main()
