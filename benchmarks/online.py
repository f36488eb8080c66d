"""A model in service, end to end: real pictures come when the requests of a real trace came, only faster.

    python benchmarks/online.py cold --workdir work --out benchmarks/results/online_cold.json
    python benchmarks/online.py drift --workdir work --out benchmarks/results/online_drift.json
    python benchmarks/online.py faults --workdir work --out benchmarks/results/online_faults.json
    python benchmarks/online.py threads --workdir work --out benchmarks/results/online_threads.json
    python benchmarks/online.py cost --workdir work --out benchmarks/results/online_cost.json

ResNet-18 / CIFAR-10 of ../shared. cold: from the bare full model to certified caches, on live traffic alone. drift:
traffic that changes and changes back, our loop beside other rules. faults: one long run with everything that can break.
threads: many callers while plans are swapped. cost: latency and throughput with and without the loop. `--quick` takes
few inputs, little time and a wide tolerance: to see that all of it runs. Decoded pictures, the fitted model and what
the full model says to each stream are kept in --workdir.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import common
import torch
from replay import cold, cost, drift, drift_page, faults, threads
from replay.service import TRACES

PARTS: dict[str, ModuleType] = {"cold": cold, "drift": drift, "faults": faults, "threads": threads, "cost": cost}
TABLES = {
    "cold": cold.table,
    "drift": drift_page.table,
    "faults": faults.table,
    "threads": threads.table,
    "cost": cost.table,
}
PICTURES = {"cold": cold.picture, "drift": drift_page.picture}
TITLES = {
    "cold": "Cold start: from the bare model to certified caches on live traffic, ResNet-18 / CIFAR-10",
    "drift": "Traffic that changes and changes back, ResNet-18 / CIFAR-10",
    "faults": "Everything breaks, one thing after the other, ResNet-18 / CIFAR-10",
    "threads": "Many callers while plans are swapped, ResNet-18",
    "cost": "What the loop costs, ResNet-18 / CIFAR-10",
}


def drawn(document: dict[str, Any]) -> str:
    """The table of a document, as docs/results.md shows it."""
    return TABLES[document["part"]](document)


def picture(document: dict[str, Any]) -> str | None:
    """The SVG of a document, where it has one."""
    draw = PICTURES.get(document["part"])
    return None if draw is None else draw(document)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="few inputs, little time, a wide tolerance")
    parser.add_argument("--workdir", type=Path, default=Path("online-work"), help="files to keep (default online-work)")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    parser.add_argument("--picture", type=Path, help="also draw it to this SVG file (cold, drift)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for each process (default 1)")
    parser.add_argument("--tolerance", type=float, help="(default: cold 0.01, others 0.02)")
    parser.add_argument("--shadow", type=float, help="share of requests sampled (default: 0.05; drift and faults 0.1)")
    parser.add_argument("--reservoir-mb", type=int, default=512, help="MiB of recent inputs (default 512)")
    parser.add_argument("--trace", choices=TRACES, default="conv", help="whose arrival times (default conv)")
    parser.add_argument("--speed-up", type=float, default=5.0, help="how many times faster they come (default 5)")
    parser.add_argument("--requests", type=int, default=57_500, help="cold: at most (default: all pictures)")
    parser.add_argument("--population", choices=cold.ABOUT, default="all", help="cold: which pictures (default all)")
    parser.add_argument("--fit-budget", type=float, default=400.0, help="drift, cost: seconds of the fit before")
    parser.add_argument("--method", default="offramp", help="of the fit before (default offramp)")
    parser.add_argument("--refresh-budget", type=float, default=90.0, help="cold, drift: seconds of one refit")
    parser.add_argument(
        "--cpu-share", type=float, default=0.5, help="cold, drift: of all processors, for refits (default 0.5)"
    )
    parser.add_argument("--policy", type=json.loads, default={}, help="JSON: more arguments of offramp.Refresh")
    parser.add_argument("--kinds", nargs="+", choices=drift.KINDS, default=list(drift.KINDS), help="drift: of change")
    parser.add_argument("--lengths", type=int, nargs=3, default=(2000, 10_000, 3000), help="drift: calm, changed, back")
    parser.add_argument(
        "--parts", type=int, nargs=3, default=(15_000, 5000, 10_200), help="drift: pictures to fit, certify, be calm"
    )
    parser.add_argument("--no-refresh", dest="refreshes", action="store_const", const=[False], default=[True])
    parser.add_argument("--both", dest="refreshes", action="store_const", const=[True, False], help="drift: both ways")
    parser.add_argument("--run-length", type=float, default=10_000, help="drift: for the false alarms (default 10,000)")
    parser.add_argument("--calm-requests", type=int, default=1_000_000, help="drift: sampled, for the false alarms")
    parser.add_argument("--episode", type=int, default=600, help="faults: requests of each (default 600)")
    parser.add_argument("--flood", type=int, default=2000, help="faults: requests that no cache answers")
    parser.add_argument("--load", type=int, default=24_000, help="faults: different pictures (default 24,000)")
    parser.add_argument("--kill-after-s", type=float, default=3.0, help="faults: of load, before each kill -9")
    parser.add_argument("--patience", type=int, default=200, help="faults: looks until something must have happened")
    parser.add_argument("--callers", type=int, default=16, help="threads: that call")
    parser.add_argument("--swaps", type=int, default=1000, help="threads: of what answers")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(cost.SIZES), help="cost: rows of a batch")
    parser.add_argument("--rounds", type=int, default=30, help="cost: of all ways in turn (default 30)")
    parser.add_argument(
        "--calls", type=int, default=100, help="cost: one-row calls of each way and round (default 100)"
    )
    if not common.SHARED.exists():
        parser.exit(0, "skipped: the data and models in ../shared are not there\n")
    options = parser.parse_args()
    options.workdir = options.workdir.resolve()
    if options.tolerance is None:
        options.tolerance = 0.01 if options.part == "cold" else 0.02
    if options.shadow is None:
        options.shadow = 0.1 if options.part in ("drift", "faults") else 0.05
    return options


def main() -> None:
    options = arguments()
    part = PARTS[options.part]
    if options.quick:
        part.quick(options)
    torch.set_num_threads(options.threads)
    found = part.run(options)
    result = common.document(TITLES[options.part], found["rows"]) | found
    print(drawn(result))
    drawing = picture(result)
    if options.picture is not None and drawing is not None:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_text(drawing)
    common.finish(result, options.out)


if __name__ == "__main__":
    main()
