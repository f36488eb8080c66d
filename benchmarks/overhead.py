"""What routing costs: the whole call over its bare parts, the same stages and look-ups called in a row by hand.

ResNet-18 of ../shared/models with caches that never hit, at batch 1 and 32, in eager mode and on the fastest back ends.
The caches are of the shapes that fit() trains (untrained here: they never hit, so their weights do not matter): a
student of 5.6 % of the FLOPs at the input and pooled ones behind it. Whole call and parts are made in turn, each twice
in a row and timed the second time: in use it finds the memory caches full of its own data.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor

from offramp.caches import CacheShape, LearnedCache, reduction_for
from offramp.cost import measure, measure_caches, synchronizer
from offramp.model import CachedModel
from offramp.optimizing import TRIED, uncertified
from offramp.splitting import SplitModel, split
from offramp.streams import Batch
from offramp.tasks import Classification
from offramp.types import Certificate, Plan, PlannedCache

LEAST_TURNS = 30
NEVER = 2.0  # a threshold that no confidence reaches
SHAPES = {0: CacheShape("student", 16), 2: CacheShape("mlp", 64), 4: CacheShape("mlp", 64), 6: CacheShape("mlp", 64)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["float32", "int8"], help="lowest (default: float32 int8)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 32], help="rows of a batch (default: 1 32)")
    parser.add_argument("--backends", nargs="*", default=list(TRIED), help=f"(default: {' '.join(TRIED)})")
    parser.add_argument("--latency-budget", type=float, default=10, help="seconds per comparison (default 10)")
    parser.add_argument("--device", default="cpu", help="where all of it runs (default: cpu)")
    parser.add_argument("--threads", type=int, help="of torch and the back ends (default: torch's)")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the process's own time, for one thread on a busy machine"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    if not common.SHARED.exists():
        parser.exit(0, "skipped: the data and models in ../shared are not there\n")
    return parser.parse_args()


def cache_at(split_model: SplitModel, position: int, kind: type[LearnedCache] = LearnedCache) -> LearnedCache:
    point, shape = split_model.points[position], SHAPES[position]
    reduction = reduction_for(point.shape, is_input=position == 0)
    cache = kind(f"{point.name}/{shape.label}", point.name, shape, point.shape, 10, reduction=reduction)
    cache.eval()
    cache.fold()
    return cache


def cached_model(split_model: SplitModel, caches: Sequence[LearnedCache], threshold: float) -> CachedModel:
    costs = measure_caches(measure(split_model, batch_sizes=(1, 32), budget_s=3), split_model, caches, budget_s=2)
    plan = Plan(tuple(PlannedCache(cache.name, cache.point, threshold, "max_softmax", 0.0) for cache in caches))
    certificate = Certificate(0.01, 0.95, 0, 0, 0.0, "none: for timing only", 0, split_model.fingerprint, "", "")
    return CachedModel(split_model, caches, plan, certificate, costs, task=Classification(), summary={})


def bare_parts(cached: CachedModel) -> Callable[[Tensor], object]:
    """What the call runs, without anything between."""
    split_model = cached.split_model
    if not cached.plan.caches:
        return split_model.full
    look_ups: list[list[Any]] = [[c for c in cached.caches if c.point == p.name] for p in split_model.points]
    parts = list(zip(split_model.stages, look_ups, split_model._activations, strict=True))

    def run(x: Tensor) -> object:
        live: tuple[Tensor, ...] = (x,)
        for stage, caches, read in parts:
            for cache in caches:
                cache.look_up(live[read])
            live = stage(*live)
        return live

    return run


@torch.inference_mode()
def compared(cached: CachedModel, sample: Tensor, size: int, clock: Callable[[], float], budget_s: float) -> Any:
    """Milliseconds of both in each turn: (whole, parts)."""
    calls, times_ms, wait = (cached, bare_parts(cached)), [], synchronizer(sample.device)
    started, turn = time.perf_counter(), 0
    while turn < LEAST_TURNS or time.perf_counter() - started < budget_s:
        first = turn * size % (len(sample) - size)
        x, both = sample[first : first + size], [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            calls[which](x)
            wait()
            begun = clock()
            calls[which](x)
            wait()
            both[which] = (clock() - begun) * 1000
        times_ms.append(both)
        turn += 1
    return np.array(times_ms).T


def rows_of(cached: CachedModel, runs_on: str, sample: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for size in options.sizes:
        whole, parts = compared(cached, sample, size, CLOCKS[options.clock], options.latency_budget)
        rows.append(
            {
                "runs_on": runs_on,
                "caches": len(cached.plan.caches),
                "batch_size": size,
                "mean": whole.mean() / parts.mean(),
                "p50": np.median(whole) / np.median(parts),
                "whole_p50_ms": np.median(whole),
                "parts_p50_ms": np.median(parts),
                "turns": len(whole),
            }
        )
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| runs on | caches | batch | whole call over its parts: p50 | mean | parts ms | turns |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {row['runs_on']} | {row['caches']} | {row['batch_size']} | {row['p50']:.3f} | {row['mean']:.3f} "
        f"| {row['parts_p50_ms']:.2f} | {row['turns']} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    zoo = common.zoo()
    backbone = zoo.resnet18_cifar10().to(options.device)
    images = common.images("cifar10/test.parquet", lambda x: zoo.normalize(x, "cifar10"), side=32).rows(slice(0, 512))
    sample = images.transform(torch.from_numpy(images.images)).to(options.device)
    split_model = split(backbone, sample[:4])
    rows = []
    for positions in ((), (0, 4), (0, 2, 4, 6)):
        eager = cached_model(split_model, [cache_at(split_model, position) for position in positions], NEVER)
        rows += rows_of(eager, "eager", sample, options)
        for precision in options.precisions if options.backends else ():
            fast = uncertified(eager, Batch((sample[:256],)), backends=options.backends, precision=precision)
            rows += rows_of(fast, f"back ends, {precision}", sample, options)
    print(table(rows))
    result = common.document("overhead of routing, ResNet-18 / CIFAR-10", rows)
    common.finish(result | {"clock": options.clock}, options.out)


if __name__ == "__main__":
    main()
