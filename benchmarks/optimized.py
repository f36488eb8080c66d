"""A model on other back ends: which part runs where, what that does to the answers, and how fast it is.

    python benchmarks/optimized.py cifar10 --out benchmarks/results/optimized_cifar10.json

The cases are those of methods.py. Of the inputs that no cache is trained on, a quarter tunes and certifies the fit at
1 %; the model is then optimized in each precision on half of them, which calibrate, tune and certify it anew, and the
last quarter evaluates it. Four models are timed in one run, in turn, each in a process of its own: the full and the
cached model, in eager mode and on the back ends. Each precision is written as soon as it is measured. With --fitted the
model is kept, and a later run goes on with it; without precisions nothing else is done.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import apart
import common
import methods
import torch

import offramp
from offramp.evaluation import evaluate
from offramp.model import CachedModel
from offramp.optimizing import PRECISIONS, optimize
from offramp.streams import Batch, concatenated, read_stream

TOLERANCE, SIZES = 0.01, (1, 8, 32)
PARTS = 0, 0.25, 0.75, 1  # of the inputs to certify on: where those that certify the fit, optimize and evaluate end
QUICK_CERTIFY = 2000  # of these, enough are left to certify twice
SAMPLED = 20  # batches that models are timed on


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=methods.SETUPS, nargs="?", default="cifar10", help="(default: cifar10)")
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=list(PRECISIONS), help="(default: all)")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="rows of a batch (default: 1 8 32)")
    parser.add_argument("--device", default="cpu", help="where all of it runs (default: cpu)")
    parser.add_argument("--backends", nargs="+", help="(default: all that are here)")
    parser.add_argument("--time-budget", type=float, default=1000, help="seconds for the fit (default 1000)")
    parser.add_argument("--latency-budget", type=float, default=40, help="seconds per batch size (default 40)")
    parser.add_argument("--workdir", type=Path, help="go on from what an interrupted fit has left here")
    parser.add_argument("--fitted", type=Path, help="keep the fitted model in this folder, and take it from there")
    parser.add_argument("--quick", action="store_true", help="few inputs, little time: does it run at all?")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    if not common.SHARED.exists():
        parser.exit(0, "skipped: the data and models in ../shared are not there\n")
    options = parser.parse_args()
    if options.quick:
        options.time_budget, options.latency_budget = methods.QUICK["time_budget"], methods.QUICK["latency_budget"]
    return options


@dataclass(frozen=True)
class Parts:
    """The inputs of one case, each in one part only."""

    train: methods.Traffic
    certify: methods.Traffic
    again: methods.Traffic
    held_out: methods.Traffic

    @classmethod
    def of(cls, setup: methods.Setup) -> Parts:
        fresh: Any = setup.certify + setup.held_out  # type: ignore[operator] # both of one kind
        ends = [round(share * fresh.count) for share in PARTS]
        return cls(setup.train, *(fresh.rows(slice(a, b)) for a, b in itertools.pairwise(ends)))


def fitted(backbone: torch.nn.Module, parts: Parts, folder: Path, options: argparse.Namespace) -> CachedModel:
    if not folder.exists():
        cached = offramp.fit(
            backbone,
            parts.train,
            certify=parts.certify,
            tolerance=TOLERANCE,
            time_budget_s=options.time_budget,
            progress=False,
            workdir=options.workdir,
        )
        offramp.save(cached, folder)
    return offramp.load(folder, backbone)


def built(options: argparse.Namespace, folder: Path, *, whole: bool) -> tuple[Callable[..., Any], Batch]:
    """The model that was saved in this folder, or the full model as it runs there, and what it is timed on."""
    setup = methods.SETUPS[options.case](common.zoo())
    backbone = setup.backbone.to(options.device)
    held_out = itertools.islice(read_stream(Parts.of(setup).held_out, backbone), SAMPLED)
    model = offramp.load(folder, backbone)
    return (model.split_model.full if whole else model), concatenated(list(held_out)).to(model.split_model.device)


def timed(cached: CachedModel, optimized: CachedModel, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The full and the cached model in eager mode and on the back ends, as they come out of their artefacts."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = {"eager": Path(temporary, "eager"), "optimized": Path(temporary, "optimized")}
        for folder, model in zip(folders.values(), (cached, optimized), strict=True):
            offramp.save(model, folder)
        makes = {
            f"{kind}, {name}": functools.partial(built, options, folder, whole=kind == "full")
            for name, folder in folders.items()
            for kind in ("full", "cached")
        }
        return apart.timed(makes, options.sizes, options.latency_budget)


def through_caches(cached: CachedModel, traffic: methods.Traffic, sizes: Sequence[int]) -> methods.Traffic:
    """The same inputs in batches of the largest of these sizes at which the plan is not bypassed: what is certified is
    what it says there."""
    rebatched = copy.copy(traffic)
    rebatched.size = max((size for size in sizes if not cached.bypasses(size)), default=traffic.size)
    return rebatched


def row(cached: CachedModel, parts: Parts, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    optimized = optimize(cached, parts.again, backends=options.backends, precision=precision, progress=False)
    seconds = time.monotonic() - started
    evaluation = evaluate(optimized, through_caches(optimized, parts.held_out, options.sizes), batch_sizes=())
    return {
        "precision": precision,
        "seconds": seconds,
        **optimized.summary["optimized"],
        "plan": optimized.plan.to_json(),
        "certificate": asdict(optimized.certificate),
        "evaluation": evaluation.to_json(),
        "latency": timed(cached, optimized, options),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| lowest precision | disagree, measured | certified | FLOPs | batch | full eager ms | of it: cached eager "
        "| full | cached | cached over full: mean | p95 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        low, high = one["evaluation"]["interval"]
        differ = f"{100 * one['evaluation']['disagreement']:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"
        bound = f"{100 * one['certificate']['bound']:.2f} %" if one["plan"]["caches"] else "no caches"
        for size in sorted({entry["batch_size"] for entry in one["latency"]}):
            at = {entry["model"]: entry for entry in one["latency"] if entry["batch_size"] == size}
            eager_ms = at["full, eager"]["mean_ms"]
            shares = [
                at[name]["mean_ms"] / eager_ms for name in ("cached, eager", "full, optimized", "cached, optimized")
            ]
            both = at["cached, optimized"], at["full, optimized"]
            mean, p95 = (both[0][key] / both[1][key] for key in ("mean_ms", "p95_ms"))
            lines.append(
                f"| {one['precision']} | {differ} | {bound} | {one['evaluation']['flops_ratio']:.2f} | {size} "
                f"| {eager_ms:.1f} | {' | '.join(f'{share:.2f}' for share in shares)} | {mean:.2f} | {p95:.2f} |"
            )
    return "\n".join(lines)


def back_ends(rows: list[dict[str, Any]]) -> str:
    """What each back end makes of the full model."""
    lines = [
        "| lowest precision | full model on | batch 1 ms | batch 32 ms | largest difference | answers that differ |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['precision']} | {tried['backend']}, {tried['precision']} | {tried['one_ms']:.2f} "
        f"| {tried['many_ms']:.2f} | {tried['difference']:.1e} | {100 * tried['disagreement']:.1f} % |"
        for one in rows
        for tried in one["full_model"]
    ]
    return "\n".join(lines)


def tables(rows: list[dict[str, Any]]) -> str:
    older = "full_model" not in rows[0]
    return "\n\n".join([table(rows), *([] if older else [back_ends(rows)]), parts_table(rows)])


def parts_table(rows: list[dict[str, Any]]) -> str:
    """Which part runs where, and what was left out."""
    lines = [
        "| lowest precision | part | rows | back end | ms | eager ms | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        for part in one["parts"]:
            where = f"{part['backend']}, {part['precision']}"
            lines.append(
                f"| {one['precision']} | {part['part']} | {part['rows']} | {where} | {part['ms']:.2f} "
                f"| {part['eager_ms']:.2f} | {part['difference']:.1e} |"
            )
    left_out = [f"- {one['precision']}: {why}" for one in rows for why in one["left_out"]]
    empty = [f"- {one['precision']}: {one['plan']['reason']}" for one in rows if not one["plan"]["caches"]]
    lines += ["", "Left out:", "", *left_out] if left_out else []
    lines += ["", "Without caches:", "", *empty] if empty else []
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    setup = methods.SETUPS[options.case](common.zoo())
    setup = setup.quick(certify=QUICK_CERTIFY) if options.quick else setup
    backbone, parts = setup.backbone.to(options.device), Parts.of(setup)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.fitted or Path(temporary, "cached")
        cached = fitted(backbone, parts, folder, options)
        for precision in options.precisions:
            rows.append(row(cached, parts, precision, options))
            print(tables(rows))
            common.finish(common.document(f"{setup.title} on other back ends", rows), options.out)


if __name__ == "__main__":
    main()
