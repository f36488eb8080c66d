"""What the loop costs: the same calls to the full model, to the cached one, and to the cached one in service.

All are timed in turn in one run. Latency is that of the calls; throughput counts the time until the last shadow is
judged as well, so it has all the work in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

import offramp
from offramp.model import CachedModel
from offramp.online_model import OnlineModel
from replay.service import case, fitted, others, tell

SIZES, SHADOWS = (1, 32), (0.01, 0.05)
ROWS = 512
LEAST_CALLS = 5
BARE, FULL = "cached", "full model"


def run(options: argparse.Namespace) -> dict[str, Any]:
    bench = case(options)
    cached = fitted(bench, options)
    x = bench.inputs(others(bench, options).image_P[:ROWS])
    rows = [row for size in options.sizes for row in compared(cached, x, size, options)]
    return {
        "part": "cost",
        "note": f"torch on {options.threads} thread.",
        "rows": rows,
        "plan": cached.plan.to_json(),
    }


def compared(cached: CachedModel, x: Tensor, size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per way of calling, at this batch size."""
    with ExitStack() as stack:
        ways: dict[str, Callable[[Tensor], Any]] = {FULL: cached.split_model.full, BARE: cached}
        for shadow in SHADOWS:
            model = offramp.online(cached, shadow=shadow, seed=options.seed)
            ways[f"in service, {100 * shadow:g} % sampled"] = stack.enter_context(model)
        times_ms: dict[str, list[float]] = {name: [] for name in ways}
        seconds = dict.fromkeys(ways, 0.0)
        for turn in range(-1, options.rounds):  # one round of warm-up
            for name, call in list(ways.items())[:: 1 if turn % 2 else -1]:
                took_ms, took_s = _round(call, x, size, max(LEAST_CALLS, options.calls // size))
                if turn >= 0:
                    times_ms[name] += took_ms
                    seconds[name] += took_s
            tell(f"batch size {size}: round {turn + 1} of {options.rounds}")
        reports = {name: call.report() for name, call in ways.items() if isinstance(call, OnlineModel)}
    return [_row(name, size, times_ms, seconds, reports.get(name)) for name in ways]


@torch.inference_mode()
def _round(call: Callable[[Tensor], Any], x: Tensor, size: int, calls: int) -> tuple[list[float], float]:
    """The milliseconds of each call, and the seconds until all that they brought about is done."""
    times_ms = []
    started = time.perf_counter()
    for number in range(calls):
        first = number * size % (len(x) - size + 1)
        begun = time.perf_counter()
        call(x[first : first + size])
        times_ms.append((time.perf_counter() - begun) * 1000)
    if isinstance(call, OnlineModel):
        call.settle()
    return times_ms, time.perf_counter() - started


def _row(
    name: str,
    size: int,
    times_ms: dict[str, list[float]],
    seconds: dict[str, float],
    report: dict[str, Any] | None,
) -> dict[str, Any]:
    mine, bare = np.array(times_ms[name]), np.array(times_ms[BARE])
    said = {"way": name, "batch_size": size, "calls": len(mine), "rows_per_s": size * len(mine) / seconds[name]}
    for key, of in (("mean", np.mean), ("p50", np.median), ("p95", lambda ms: np.percentile(ms, 95))):
        said |= {f"{key}_ms": float(of(mine)), f"{key}_ratio": float(of(mine) / of(bare))}
    said["throughput_ratio"] = seconds[BARE] / seconds[name]
    if report is not None:
        said |= {key: report[key] for key in ("requests", "sampled", "shadowed", "dropped", "rung")}
    return said


def table(document: dict[str, Any]) -> str:
    lines = [
        "| batch | way | p50 ms | p95 ms | mean ms | images per s | over the cached model alone: p50 | p95 | mean "
        "| throughput | shadowed | dropped |",
        "|---" * 12 + "|",
    ]
    for row in document["rows"]:
        watched = f"{row['shadowed']:,} | {row['dropped']:,}" if "shadowed" in row else "- | -"
        lines.append(
            f"| {row['batch_size']} | {row['way']} | {row['p50_ms']:.2f} | {row['p95_ms']:.2f} | {row['mean_ms']:.2f} "
            f"| {row['rows_per_s']:.1f} | {row['p50_ratio']:.3f} | {row['p95_ratio']:.3f} | {row['mean_ratio']:.3f} "
            f"| {row['throughput_ratio']:.3f} | {watched} |"
        )
    return "\n".join(lines)


def quick(options: argparse.Namespace) -> None:
    options.method = "freeze"  # nothing to train
    options.parts, options.rounds, options.calls = (1500, 1500, 1600), 3, 20
    options.tolerance, options.fit_budget = 0.05, 150.0
