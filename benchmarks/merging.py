"""Threads that call one cached model at once: each call on its own, and the misses of concurrent calls merged.

ResNet-18 of ../shared/models with one cache behind its second block that answers half of the images, by chance: which
ones does not matter here, so nothing is trained. Every thread sends one image after the other. Both ways
are run in turn for each number of threads; "always" merges wherever rows wait, whatever the cost table says.

    python benchmarks/merging.py --out benchmarks/results/merging.json
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import overhead
import torch
from torch import Tensor

from offramp.caches import LearnedCache
from offramp.cost import synchronizer
from offramp.merging import Merging, saved_ms
from offramp.model import CachedModel
from offramp.splitting import split

POSITION, ROUNDS = 2, 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 16], help="that call (default: 1 4 16)")
    parser.add_argument("--calls", type=int, default=20, help="of each thread and round (default 20)")
    parser.add_argument("--waits", type=float, nargs="+", default=[2.0, 10.0], help="max_wait_ms (default: 2 10)")
    parser.add_argument("--device", default="cpu", help="where all of it runs (default: cpu)")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    if not common.SHARED.exists():
        parser.exit(0, "skipped: the data and models in ../shared are not there\n")
    return parser.parse_args()


class Half(LearnedCache):
    """Sure of every second image, by a number that is as good as random and the same for the same image."""

    def confidence(self, logits_BC: Tensor, read_BC: Tensor | None = None) -> Tensor:
        del read_BC
        return (logits_BC.sum(1) * 1e4).frac().abs()


def always(cached: CachedModel, wait_ms: float) -> Merging:
    merged = Merging(cached, max_wait_ms=wait_ms)
    merged._pays[POSITION] = set(range(1, merged.max_rows))
    return merged


def run(call: Callable[[Tensor], object], images: Tensor, threads: int, calls: int) -> tuple[float, list[float]]:
    """Seconds for all, and the milliseconds of each call."""
    wait = synchronizer(images.device)

    def ask(thread: int) -> list[float]:
        times_ms = []
        with torch.inference_mode():
            for number in range(calls):
                row = (thread * calls + number) % len(images)
                begun = time.perf_counter()
                call(images[row : row + 1])
                wait()
                times_ms.append((time.perf_counter() - begun) * 1000)
        return times_ms

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        times_ms = [ms for one in pool.map(ask, range(threads)) for ms in one]
    return time.perf_counter() - started, times_ms


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| threads that call | | images per s | p50 ms | p95 ms |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['threads']} | {row['way']} | {row['images_per_s']:.1f} | {row['p50_ms']:.1f} | {row['p95_ms']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    zoo = common.zoo()
    images = common.images("cifar10/test.parquet", lambda x: zoo.normalize(x, "cifar10"), side=32).rows(slice(0, 512))
    sample = images.transform(torch.from_numpy(images.images)).to(options.device)
    split_model = split(zoo.resnet18_cifar10().to(options.device), sample[:4])
    cached = overhead.cached_model(split_model, [overhead.cache_at(split_model, POSITION, Half)], threshold=0.5)
    ways: dict[str, Callable[[Tensor], Any]] = {"each on its own": cached}
    for wait_ms in options.waits:
        ways[f"merged, up to {wait_ms:g} ms"] = Merging(cached, max_wait_ms=wait_ms)
        ways[f"merged always, up to {wait_ms:g} ms"] = always(cached, wait_ms)
    print(f"one image from there on takes {saved_ms(cached.costs, POSITION, 1):.2f} ms more alone than among 32")
    rows = []
    for threads in options.threads:
        measured: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, call in ways.items():
                measured[name].append(run(call, sample, threads, options.calls))
        for name, rounds in measured.items():
            times_ms = [ms for _, one in rounds for ms in one]
            p50, p95 = np.percentile(times_ms, (50, 95))
            per_s = len(times_ms) / math.fsum(seconds for seconds, _ in rounds)
            rows.append({"threads": threads, "way": name, "images_per_s": per_s, "p50_ms": p50, "p95_ms": p95})
    print(table(rows))
    result = common.document("merging misses, ResNet-18 / CIFAR-10", rows)
    common.finish(result | {"saved_ms": saved_ms(cached.costs, POSITION, 1)}, options.out)


if __name__ == "__main__":
    main()
