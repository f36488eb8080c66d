"""What each idea is worth: our own method with one of them switched off or changed at a time.

    python benchmarks/ablations.py cifar10 --workdir work --time-budget 650 --out benchmarks/results/ablations.json

With `--on`, only the ideas about choosing, on caches that are there already:

    python benchmarks/ablations.py --on tests/data/resnet18_cifar10_records.npz work/sst2/records/offramp.npz

The cases, and the folder of --workdir with its recording and records, are those of methods.py. Every idea about
learning has the same time to learn in; ideas about choosing are tried on the caches of "as it is". The recorded tune
and certify inputs are dealt anew in each draw: to tune on, to certify on, and to measure the cost and the disagreement
on; all ideas see the same draws, so that the difference to "as it is" has a standard error of its own. That error is of
the draws alone: "another seed" shows what training by chance differs by. Costs are FLOPs over the full model's; of
records, what is in the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import breaches
import common
import methods
import numpy as np
import torch
from opponents import per_cache
from opponents.rules import joined

from offramp.choosing import PATH_REACH, Learned
from offramp.fitting import learn
from offramp.methods.offramp import Offramp
from offramp.placement import (
    OFF,
    CacheCosts,
    Thresholds,
    expected_cost,
    oracle_cost,
    outcomes,
    request_costs,
)
from offramp.precision import has_fast_bfloat16
from offramp.recording import CERTIFY, TUNE
from offramp.search import STUDENT_SHARES
from offramp.types import BoolArray, FloatArray, Records

AS_IT_IS = "as it is"
LEVELS = 100  # of the thresholds per cache
LEAST_LEARNING = 0.1  # of the time, for a recording that took the rest


Choice = Callable[[Records, Records, CacheCosts, float], Thresholds]  # from tune, certify, costs and tolerance


@dataclass(frozen=True)
class Idea:
    """One thing that is different. `fields` are those of the method; with another `confidence` or `choose` the caches
    are those of "as it is"."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    seed: int = methods.SEED
    augmented: bool = True
    slow_recording: bool = False
    confidence: str | None = None
    choose: Choice = breaches.certified

    @property
    def about_choosing(self) -> bool:
        return self.confidence is not None or self.choose is not breaches.certified


def raw_counts(confidence_KN: FloatArray, agreement_KN: BoolArray) -> FloatArray:
    """(K, N) a risk of 1 where a cache disagreed and of 0 elsewhere."""
    del confidence_KN
    return (~agreement_KN).astype(np.float64)


def per_cache_path(tune: Records, certify: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
    """Every cache by itself, at ever higher levels of disagreement, and the fixed sequence over these."""
    levels = np.geomspace(tolerance / LEVELS, PATH_REACH * tolerance, LEVELS).tolist()
    path = [(OFF,) * len(tune.reads_K), *(per_cache.thresholds(tune, costs, level) for level in levels)]
    return breaches.last_certified(list(dict.fromkeys(path)), certify, tolerance)


def p95(records: Records, thresholds_K: Thresholds, costs: CacheCosts) -> float:
    """What all but one request in twenty cost at most."""
    return float(np.percentile(request_costs(records, thresholds_K, costs), 95))


IDEAS = (
    Idea(AS_IT_IS),
    Idea("another seed", seed=1),
    Idea("no student", {"student_shares": ()}),
    Idea("one student only", {"student_shares": STUDENT_SHARES[:1]}),
    Idea("no pooled caches", {"pooled": False}),
    Idea("no trunks", {"trunks": False}),
    Idea("caches read no student", {"reads": False}),
    Idea("training in float32", {"bfloat16": False}),
    Idea("train rows recorded in float32", slow_recording=True),
    Idea("no free augmentation", augmented=False),
    Idea("no mixtures", {"mixtures": False}),
    Idea("students' temperature 1", {"student_temperature": 1.0}),
    Idea("students' temperature 2", {"student_temperature": 2.0}),
    *(Idea(f"confidence: {name}", confidence=name) for name in ("max_softmax", "margin", "entropy", "selector")),
    Idea("raw counts for the search", choose=partial(breaches.certified, risk=raw_counts)),
    Idea("only the plans that prices find", choose=partial(breaches.certified, steps=1)),
    Idea("each cache's threshold by itself", choose=per_cache_path),
    Idea("misses at no price", choose=partial(breaches.certified, miss_price=0.0)),
)


# -- learning --------------------------------------------------------------------------------------


def learned(idea: Idea, bench: methods.Bench) -> Learned:
    recording, learning_s = bench.recording, bench.learning_s
    if not idea.augmented:
        recording = dataclasses.replace(recording, free_augmentations=())
    if idea.slow_recording:
        rows = recording.counts()["train"]
        learning_s = max(learning_s - rows * saved_by_bfloat16(bench), LEAST_LEARNING * learning_s)
    return learn(
        bench.setup.backbone,
        recording,
        method=Offramp(**idea.fields),
        tolerance=methods.LEARN_FOR,
        time_budget_s=learning_s,
        seed=idea.seed,
        progress=sys.stderr.isatty(),
        workdir=bench.folder / "fits" / "ablations" / idea.name.replace(" ", "_"),
    )


@torch.inference_mode()
def saved_by_bfloat16(bench: methods.Bench, batches: int = 4) -> float:
    """Seconds that the backbone's pass over one train row takes longer in float32; 0 where bfloat16 is not used."""
    if not has_fast_bfloat16(bench.split_model.device):
        return 0.0
    sample = bench.recording.sample

    def run(*, bfloat16: bool) -> float:
        started = time.monotonic()
        with torch.autocast(bench.split_model.device.type, torch.bfloat16, enabled=bfloat16):
            for _ in range(batches):
                bench.setup.backbone(*sample.args, **sample.kwargs)
        return (time.monotonic() - started) / (batches * len(sample))

    run(bfloat16=True)
    return max(run(bfloat16=False) - run(bfloat16=True), 0.0)


def said(one: Learned) -> tuple[Records, CacheCosts]:
    """What the caches said about the tune and certify rows, and what they cost in FLOPs."""
    tune, certify = (one.candidates.records(one.trained, part) for part in (TUNE, CERTIFY))
    return joined(tune, certify), one.candidates.estimated_costs(one.trained)


# -- measuring -------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What came out of an idea at one tolerance, draw by draw."""

    cost: list[float] = field(default_factory=list)
    oracle: list[float] = field(default_factory=list)
    disagreement: list[float] = field(default_factory=list)
    p95: list[float] = field(default_factory=list)


def measured(
    records: Records, costs: CacheCosts, idea: Idea, tolerance: float, options: argparse.Namespace
) -> Measured:
    out = Measured()
    for tune, certify, fresh in breaches.dealt(records, options.draws, options.seed):
        thresholds_K = idea.choose(tune, certify, costs, tolerance)
        out.cost.append(expected_cost(fresh, thresholds_K, costs))
        out.disagreement.append(float(outcomes(fresh, thresholds_K)[1].mean()))
        out.oracle.append(enabled_oracle(fresh, thresholds_K, costs))
        out.p95.append(p95(fresh, thresholds_K, costs))
    return out


def enabled_oracle(records: Records, thresholds_K: Thresholds, costs: CacheCosts) -> float:
    """Cost if each request left at the first enabled cache that agrees."""
    on_K = np.isfinite(thresholds_K)
    if not on_K.any():
        return 1.0
    return oracle_cost(records.agreement_NK[:, on_K], CacheCosts(costs.before_K[on_K], costs.cache_K[on_K]))


def row(on: str, idea: Idea, tolerance: float, one: Measured, base: Measured) -> dict[str, Any]:
    differences = np.array(one.cost) - np.array(base.cost)
    draws = len(differences)
    return {
        "on": on,
        "idea": idea.name,
        "tolerance": tolerance,
        "draws": draws,
        "cost_mean": float(np.mean(one.cost)),
        "difference_mean": float(differences.mean()),
        "difference_se": float(differences.std(ddof=1) / draws**0.5),
        "disagreement_mean": float(np.mean(one.disagreement)),
        "oracle_cost_mean": float(np.mean(one.oracle)),
        "cost_p95_mean": float(np.mean(one.p95)),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| on | idea | tolerance | cost | difference | its 95th percentile | disagreement | oracle | of its saving "
        "| learned in s |",
        "|" + "---|" * 10,
    ]
    for one in rows:
        saved, limit = 1 - one["cost_mean"], 1 - one["oracle_cost_mean"]
        slowest = f"{one['cost_p95_mean']:.2f}" if "cost_p95_mean" in one else "-"
        difference = f"{one['difference_mean']:+.3f} +- {one['difference_se']:.3f}"
        lines.append(
            f"| {one['on']} | {one['idea']} | {100 * one['tolerance']:g} % | {one['cost_mean']:.3f} | "
            f"{'' if one['idea'] == AS_IT_IS else difference} | {slowest} | {100 * one['disagreement_mean']:.2f} % | "
            f"{one['oracle_cost_mean']:.3f} | {100 * saved / limit if limit else 0:.0f} % | "
            f"{round(one['learn_s']) if 'learn_s' in one else '-'} |"
        )
    return "\n".join(lines)


# -- the run ---------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=methods.SETUPS, nargs="?", default="cifar10", help="(default: cifar10)")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.01, 0.02])
    parser.add_argument("--ideas", nargs="+", metavar="NAME", help="(default: all) beginnings of their names")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--time-budget", type=float, default=1000, help="seconds for one fit (default 1000)")
    parser.add_argument("--workdir", type=Path, help="keep recording and caches here, and go on from them")
    parser.add_argument("--on", type=Path, nargs="+", metavar="FILE", help="try the ideas about choosing on these")
    parser.add_argument("--quick", action="store_true", help="few inputs, little time: does it run at all?")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    options = parser.parse_args()
    if not options.on and not common.SHARED.exists():
        parser.exit(0, "skipped: the data and models in ../shared are not there\n")
    options.latency_budget = methods.QUICK["latency_budget"]
    if options.quick:
        options.time_budget, options.draws = methods.QUICK["time_budget"], 2
    return options


def chosen(names: Sequence[str] | None) -> list[Idea]:
    """These ideas, and first of all what they are compared with."""
    wanted = [idea for idea in IDEAS[1:] if not names or idea.name.startswith(tuple(names))]
    return [IDEAS[0], *wanted]


def rows_on(
    on: str, records: Records, costs: CacheCosts, idea: Idea, base: dict[float, Measured], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each tolerance; the first idea becomes what the others are compared with."""
    rows = []
    for tolerance in options.tolerances:
        result = measured(records, costs, idea, tolerance, options)
        base.setdefault(tolerance, result)
        rows.append(row(on, idea, tolerance, result, base[tolerance]))
    print(table(rows), file=sys.stderr, flush=True)
    return rows


def run(bench: methods.Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    as_it_is = learned(IDEAS[0], bench)
    rows: list[dict[str, Any]] = []
    base: dict[float, Measured] = {}
    for idea in chosen(options.ideas):
        one = as_it_is if idea is IDEAS[0] or idea.about_choosing else learned(idea, bench)
        if not one.trained:
            print(f"{idea.name}: no cache was trained", file=sys.stderr, flush=True)
            continue
        one.candidates.decide_by(idea.confidence)
        learn_s = sum(one.seconds.values())
        found = rows_on(bench.setup.title, *said(one), idea, base, options)
        rows += [row | {"learn_s": learn_s} for row in found]
    return rows


def run_on_records(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for file in options.on:
        base: dict[float, Measured] = {}
        for idea in chosen(options.ideas):
            if idea is IDEAS[0] or (idea.about_choosing and idea.confidence is None):  # the file has one confidence
                rows += rows_on(title(file), *breaches.load(file), idea, base, options)
    return rows


def title(file: Path) -> str:
    """What the records are of: methods.py keeps them in a folder of that name, in another called `records`."""
    return file.parents[1].name if file.parent.name == "records" else file.stem


def main() -> None:
    options = arguments()
    if options.on:
        rows = run_on_records(options)
        where = "caches that are there already"
    else:
        setup = methods.SETUPS[options.case](common.zoo())
        setup = setup.quick() if options.quick else setup
        with methods.workspace(options) as folder:
            rows = run(methods.Bench(setup, options, methods.Book(None, {}), folder), options)
        where = setup.title
    print(table(rows))
    common.finish(common.document(f"What each idea is worth, {where}", rows), options.out)


if __name__ == "__main__":
    main()
