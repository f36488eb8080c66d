"""Every method and every opponent on one backbone: one recording, the same held-out inputs, one machine, one run.

    python benchmarks/methods.py cifar10 --workdir work --out benchmarks/results/methods_cifar10.json

The case is one of cifar10 (ResNet-18), resnet56_cifar10 (with ResNet-20 beside it), mobilenet_v2 and resnet56 (both
Tiny-ImageNet), and sst2 (a transformer, fine-tuned by `python examples/finetune_sst2.py
../shared/data/text/sst2_train.parquet --out sst2-minilm`). Every method of offramp is fitted once and chosen at every
tolerance by our certificate and by its own published rule; opponents (benchmarks/opponents, extra `bench`) are built
from the same train rows. What fails becomes a row with its error and stops nothing else. With --workdir the recording,
trained caches and finished rows are kept, and a later run with the same options goes on. `--quick` takes few inputs and
little time: to see that all of it runs.

Published rules of methods see the tune rows only, as in `fit(method=...)`; the rules among the opponents see tune and
certify rows. Their caches are those of offramp's own method.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import comparison
import numpy as np
import tiny_imagenet
import torch
from comparison import OURS
from opponents import OPPONENTS, RULES, Case, Opponent, Rule, smaller
from opponents.base import BATCH_SIZES, compared, measured
from opponents.rules import Given
from torch import nn

from offramp.choosing import WEIGHT_FLOPS, Learned, choose
from offramp.cost import measure, shares
from offramp.evaluation import compare_latency, shares_and_flops
from offramp.fitting import RECORDING_SHARE, learn
from offramp.methods import METHODS
from offramp.methods.base import RULES as METHOD_RULES
from offramp.methods.base import Rule as MethodRule
from offramp.model import CachedModel
from offramp.placement import CacheCosts
from offramp.recording import CERTIFY, TUNE, Recording, record
from offramp.splitting import SplitModel, split
from offramp.streams import as_batch, read_stream
from offramp.tasks import task_named
from offramp.types import LatencyRatio, Records

SEED = 0
OUR_ENDS = (0.001, 0.002, 0.1)  # further tolerances for ours, so that its curve reaches as far as the others' rows
LEARN_FOR = 0.01  # the tolerance that caches are learned for
LEAST_LEARNING = 0.5  # of the time budget: what a slow recording leaves to a fit
COSTS_S = 1.0  # opponents need FLOPs only
SST2_FOLDER = common.ROOT / "sst2-minilm"
SST2_TOKENS = 32  # 5 % of the sentences are longer
QUICK = {"train": 400, "certify": 900, "held_out": 200, "time_budget": 30.0, "latency_budget": 0.3}


Traffic = common.Images | common.Tokens


@dataclass(frozen=True)
class Setup:
    """A backbone and its inputs: to train on, to tune and certify on, and to evaluate on."""

    title: str
    backbone: nn.Module
    train: Traffic
    certify: Traffic
    held_out: Traffic
    smaller: tuple[str, nn.Module] | None = None

    def quick(self, **more: int) -> Setup:
        """A few rows of each part; `more`: as many of these parts instead."""
        rows = {name: int((QUICK | more)[name]) for name in ("train", "certify", "held_out")}
        return dataclasses.replace(self, **{name: getattr(self, name).rows(slice(0, n)) for name, n in rows.items()})


# -- the cases -------------------------------------------------------------------------------------


def cifar10(zoo: Any) -> Setup:
    return _cifar10("ResNet-18 / CIFAR-10", zoo.resnet18_cifar10(), lambda x: zoo.normalize(x, "cifar10"))


def resnet56_cifar10(zoo: Any) -> Setup:
    setup = _cifar10("ResNet-56 / CIFAR-10", zoo.resnet56_cifar10(), lambda x: zoo.normalize(x, "imagenet"))
    return dataclasses.replace(setup, smaller=("ResNet-20", zoo.resnet20_cifar10()))


def _cifar10(title: str, backbone: nn.Module, transform: Callable[[Any], Any]) -> Setup:
    """The parts of cifar10.py."""
    test = common.images("cifar10/test.parquet", transform, side=32, seed=0)
    train = common.images("cifar10/train.parquet", transform, side=32)
    return Setup(title, backbone, train, test.rows(slice(0, 5000)), test.rows(slice(5000, None)))


def tiny(name: str, zoo: Any) -> Setup:
    """The parts of tiny_imagenet.py."""
    title, build, side, transform = tiny_imagenet.cases(zoo)[name]
    pictures = common.images("tiny_imagenet/train_100pc.parquet", transform, side=side, seed=0)
    pictures.labels = np.zeros(0, dtype=np.int64)
    train, certify, held_out = (pictures.rows(slice(a, b)) for a, b in ((0, 12000), (12000, 17000), (17000, 20000)))
    return Setup(title, build(), train, certify, held_out)


def sst2(zoo: Any) -> Setup:
    """Training sentences for the caches are those that the backbone was trained on; all others are new to both."""
    del zoo
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not SST2_FOLDER.is_dir():
        sys.exit(f"there is no {SST2_FOLDER.name}: fine-tune it first, as the beginning of this file says")
    tokenizer = AutoTokenizer.from_pretrained(SST2_FOLDER, local_files_only=True)
    backbone = AutoModelForSequenceClassification.from_pretrained(SST2_FOLDER, local_files_only=True).eval()
    known, other = common.labelled_text("text/sst2_train.parquet"), common.labelled_text("text/sst2_dev.parquet")
    train = common.sentences(known, tokenizer, length=SST2_TOKENS, seed=0)
    new = {text: label for text, label in other.items() if text not in known}
    fresh = common.sentences(new, tokenizer, length=SST2_TOKENS, seed=0)
    certify, held_out = fresh.rows(slice(0, 4000)), fresh.rows(slice(4000, None))
    return Setup("MiniLM-L6 / SST-2", backbone, train.rows(slice(0, 20000)), certify, held_out)


SETUPS: dict[str, Callable[[Any], Setup]] = {
    "cifar10": cifar10,
    "resnet56_cifar10": resnet56_cifar10,
    "mobilenet_v2": functools.partial(tiny, "mobilenet_v2"),
    "resnet56": functools.partial(tiny, "resnet56"),
    "sst2": sst2,
}


# -- the rows --------------------------------------------------------------------------------------


class Book:
    """Rows by name, rule and tolerance; with a file they outlive the run. A row with an error is tried again."""

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        self.file, self.rows = file, list[dict[str, Any]]()
        if file is None:
            return
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        if lines and lines[0] != settings:
            sys.exit(f"{file} was begun with {lines[0]}, not {settings}: take another --workdir, or delete it")
        if not lines:
            file.write_text(json.dumps(settings) + "\n")
        for row in lines[1:]:
            self._keep(row)

    def done(self, name: str, rule: str | None, tolerance: float | None) -> bool:
        found = self.find(name, rule, tolerance)
        return found is not None and "error" not in found

    def find(self, name: str, rule: str | None, tolerance: float | None) -> dict[str, Any] | None:
        wanted = (name, rule, tolerance)
        return next((row for row in self.rows if (row["name"], row["rule"], row["tolerance"]) == wanted), None)

    def attempt(
        self, name: str, rule: str | None, tolerance: float | None, guarantee: str, make: Callable[[], dict[str, Any]]
    ) -> None:
        """The row that `make` gives, or one with its error; none where it is there already."""
        if self.done(name, rule, tolerance):
            return
        row: dict[str, Any] = {"name": name, "rule": rule, "tolerance": tolerance, "guarantee": guarantee}
        try:
            row |= make()
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"
        print(comparison.line(row), file=sys.stderr, flush=True)
        self._keep(row)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _keep(self, row: dict[str, Any]) -> None:
        old = self.find(row["name"], row["rule"], row["tolerance"])
        if old is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(old)] = row


# -- methods of offramp ----------------------------------------------------------------------------


class Bench:
    """One backbone, recorded once."""

    def __init__(self, setup: Setup, options: argparse.Namespace, book: Book, folder: Path) -> None:
        self.setup, self.options, self.book, self.folder = setup, options, book, folder
        example = as_batch(next(iter(setup.train)), setup.backbone).rows(slice(0, 4))
        self.split_model: SplitModel = split(setup.backbone, example)
        self.recording, self.record_s = self._record()
        self.learning_s = max(options.time_budget - self.record_s, LEAST_LEARNING * options.time_budget)
        self.case = self._case()
        self._ours: Learned | None = None
        self._idle_latency: tuple[LatencyRatio, ...] | None = None

    def _record(self) -> tuple[Recording, float]:
        """The pass, and the seconds that it took, those of interrupted runs included."""
        clock = self.folder / "record_s.json"
        before_s = float(json.loads(clock.read_text())) if clock.exists() else None
        started = time.monotonic()
        recording = record(
            self.split_model,
            task_named("classification"),
            self.setup.train,
            self.setup.certify,
            seed=SEED,
            workdir=self.folder,
            # What is complete stays as it is: with other train rows the caches in the folder would be of no use.
            time_limit_s=RECORDING_SHARE * self.options.time_budget if before_s is None else 0.0,
            show=sys.stderr.isatty(),
        )
        seconds = time.monotonic() - started if before_s is None else before_s
        clock.write_text(json.dumps(seconds))
        print(f"recorded {recording.counts()} in {seconds:.0f} s", file=sys.stderr, flush=True)
        return recording, seconds

    def learned(self, name: str, tolerance: float = LEARN_FOR) -> Learned:
        """Caches of this method. The recording counts in the time of every one of them."""
        kept_as = name if tolerance == LEARN_FOR else f"{name}-{tolerance:g}"
        learned = learn(
            self.setup.backbone,
            self.recording,
            method=name,
            tolerance=tolerance,
            time_budget_s=self.learning_s,
            seed=SEED,
            progress=sys.stderr.isatty(),
            workdir=self.folder / "fits" / kept_as,
        )
        learned.seconds = self._seconds(kept_as, learned.seconds | {"record": self.record_s})
        keep_records(learned, self.folder / "records" / f"{kept_as}.npz")
        return learned

    def _seconds(self, kept_as: str, seconds: dict[str, float]) -> dict[str, float]:
        """Those of the run that trained these caches: a later one that only loads them would seem to be fast."""
        clock = self.folder / "fits" / f"{kept_as}.seconds.json"
        if clock.exists():
            return {part: float(value) for part, value in json.loads(clock.read_text()).items()}
        clock.write_text(json.dumps(seconds))
        return seconds

    @property
    def ours(self) -> Learned:
        """The caches of our own method: what rules are tried on. Those of an earlier run are found in the folder."""
        if self._ours is None:
            self._ours = self.learned(OURS)
        return self._ours

    def run_method(self, name: str) -> None:
        tolerances = sorted({*self.options.tolerances, *(OUR_ENDS if name == OURS else ())})
        # What is learned depends on the tolerance of Freeze alone, whose thresholds per class are part of its caches.
        groups = {one: [one] for one in tolerances} if name == "freeze" else {LEARN_FOR: tolerances}
        for learn_for, group in groups.items():
            fitted = once(functools.partial(self.learned, name, learn_for) if name != OURS else lambda: self.ours)
            for rule, tolerance in itertools.product(METHOD_RULES, group):
                make = functools.partial(self._method_row, fitted, rule, tolerance)
                self.book.attempt(name, rule, tolerance, promise(name, rule), make)

    def _method_row(self, fitted: Callable[[], Learned], rule: MethodRule, tolerance: float) -> dict[str, Any]:
        return self.row(fitted(), tolerance, rule)

    def row(self, learned: Learned, tolerance: float, rule: MethodRule | None) -> dict[str, Any]:
        """Choose, evaluate on the held-out images, and say it in the words of `opponents.base.measured`."""
        started = time.monotonic()
        cached = choose(learned, tolerance=tolerance, confidence_level=common.LEVEL, rule=rule)
        chosen_s = time.monotonic() - started
        answer_N, left_N, bypassed = self._served(cached)
        certificate, (hit_rates, flops_ratio) = cached.certificate, shares_and_flops(cached, left_N, bypassed)
        return compared(answer_N, self.case) | {
            "latency": [asdict(ratio) for ratio in self._latency(cached)],
            "flops_ratio": flops_ratio,
            "bytes": cached.costs.backbone.parameter_bytes + cache_bytes(cached),
            "build_s": sum(learned.seconds.values()) + chosen_s,
            "details": {
                "certified": {"errors": certificate.errors, "n": certificate.n, "bound": certificate.bound},
                "hit_rates": hit_rates,
                "plan": cached.plan.to_json(),
                "cache_bytes": cache_bytes(cached),
            },
        }

    @torch.inference_mode()
    def _served(self, cached: CachedModel) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
        """(N,) answers to the held-out inputs, at which of its exits each of them left, and how many bypassed them."""
        said, bypassed = [], 0
        for batch in read_stream(self.setup.held_out, self.setup.backbone):
            said.append(cached.predict(*batch.args, **batch.kwargs))
            bypassed += len(batch) if cached.bypasses(len(batch)) else 0
        answers, exits = (torch.cat([getattr(one, name) for one in said]) for name in ("answer_B", "left_at_B"))
        return answers.numpy(), exits.numpy(), bypassed

    def _latency(self, cached: CachedModel) -> tuple[LatencyRatio, ...]:
        """Beside the full model. All plans without caches are the same model, so that it is timed once."""
        if cached.plan.caches:
            return self._timed(cached)
        if self._idle_latency is None:
            self._idle_latency = self._timed(cached)
        return self._idle_latency

    def _timed(self, cached: CachedModel) -> tuple[LatencyRatio, ...]:
        return compare_latency(cached, self.case.sample, BATCH_SIZES, self.options.latency_budget)

    # -- opponents ---------------------------------------------------------------------------------

    def run_rule(self, rule: Rule) -> None:
        for tolerance in self.options.tolerances:
            make = functools.partial(self._rule_row, rule, tolerance)
            self.book.attempt(rule.name, "on our caches", tolerance, rule.guarantee, make)

    def _rule_row(self, rule: Rule, tolerance: float) -> dict[str, Any]:
        learned = self.ours
        if not learned.trained:
            raise RuntimeError("no cache of ours was trained")
        tune, certify = (learned.candidates.records(learned.trained, part) for part in (TUNE, CERTIFY))
        costs = CacheCosts(*shares(learned.costs, weight_flops=WEIGHT_FLOPS))
        thresholds_K = rule.thresholds(tune, certify, costs, tolerance)
        given = Given(rule="published", thresholds_K=thresholds_K)
        return self.row(dataclasses.replace(learned, method=given), tolerance, None)

    def _run_opponent(self, opponent: Opponent) -> None:
        for tolerance in self.options.tolerances if opponent.per_tolerance else [None]:

            def make(tolerance: float | None = tolerance) -> dict[str, Any]:
                return measured(opponent.build(self.case, tolerance), self.case)

            self.book.attempt(opponent.name, None, tolerance, opponent.guarantee, make)

    def run_opponents(self, opponents: Iterable[Opponent]) -> None:
        ours = {tolerance: self.book.find(OURS, "certificate", tolerance) for tolerance in self.options.tolerances}
        self.case.our_flops |= {key: row["flops_ratio"] for key, row in ours.items() if row and "error" not in row}
        for opponent in opponents:
            self._run_opponent(opponent)

    def _case(self) -> Case:
        return Case(
            split_model=self.split_model,
            task=task_named("classification"),
            recording=self.recording,
            costs=measure(self.split_model, batch_sizes=(1,), budget_s=COSTS_S),
            train=self.setup.train,
            held_out=self.setup.held_out,
            folder=self.folder / "opponents",
            time_budget_s=self.learning_s,
            latency_budget_s=self.options.latency_budget,
            confidence_level=common.LEVEL,
            seed=SEED,
            smaller=self.setup.smaller,
        )


def once(make: Callable[[], Learned]) -> Callable[[], Learned]:
    """The same result, or the same error, each time: what failed after long is not tried again for every row."""
    made: list[Learned | Exception] = []

    def result() -> Learned:
        if not made:
            try:
                made.append(make())
            except Exception as error:
                made.append(error)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    return result


def cache_bytes(cached: CachedModel) -> int:
    return sum(cache.parameter_bytes for cache in cached.costs.caches)


def promise(name: str, rule: str) -> str:
    if rule == "certificate":
        return (
            f"With {100 * common.LEVEL:g} % confidence at most a share `tolerance` of the answers differs; without "
            "caches where that cannot be shown."
        )
    return f"What {name}'s own rule says of the tuning inputs; no bound for others."


def keep_records(learned: Learned, file: Path) -> None:
    """What the caches said about tune and certify rows, and what they are, for breaches.py and replication.py."""
    if not learned.trained:
        return
    parts = [learned.candidates.records(learned.trained, part) for part in (TUNE, CERTIFY)]
    before_K, cache_K = shares(learned.costs, weight_flops=WEIGHT_FLOPS)

    def stacked(value: Callable[[Records], Any]) -> np.ndarray[Any, Any]:
        return np.concatenate([value(part) for part in parts])

    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        file,
        confidence=stacked(lambda part: part.confidence_NK).astype(np.float32),
        agreement=stacked(lambda part: part.agreement_NK),
        answer=stacked(lambda part: part.answer_NK),
        backbone_answer=stacked(lambda part: part.backbone_answer_N),
        reads=np.array(parts[0].reads_K),
        before=before_K,
        cache=cache_K,
        name=np.array([one.cache.name for one in learned.trained]),
        depth=np.array([learned.candidates.split.points[one.position].depth for one in learned.trained]),
        bytes=np.array([cache.parameter_bytes for cache in learned.costs.caches]),
    )


# -- the run ---------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=SETUPS, nargs="?", default="cifar10", help="(default: cifar10)")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.005, 0.01, 0.02, 0.05])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="(default: all)")
    names = [*(one.name for one in OPPONENTS), *(one.name for one in RULES)]
    parser.add_argument("--opponents", nargs="*", choices=names, default=names, metavar="NAME", help=f"of {names}")
    parser.add_argument("--time-budget", type=float, default=1000, help="seconds for one fit (default 1000)")
    parser.add_argument("--latency-budget", type=float, default=10, help="seconds per latency comparison (default 10)")
    parser.add_argument("--workdir", type=Path, help="keep recording, caches and rows here, and go on from them")
    parser.add_argument("--quick", action="store_true", help="few inputs, little time: does it run at all?")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    if not common.SHARED.exists():
        parser.exit(0, "skipped: the data and models in ../shared are not there\n")
    options = parser.parse_args()
    if options.quick:
        options.time_budget, options.latency_budget = QUICK["time_budget"], QUICK["latency_budget"]
    return options


def run(setup: Setup, options: argparse.Namespace, book: Book, folder: Path) -> None:
    bench = Bench(setup, options, book, folder)
    for name in sorted(options.methods, key=lambda name: name != OURS):  # ours first: the student has its cost to match
        bench.run_method(name)
        gc.collect()
    for rule in RULES:
        if rule.name in options.opponents:
            bench.run_rule(rule)
    absent = {opponent.name for opponent in smaller.OPPONENTS} if setup.smaller is None else set()
    bench.run_opponents(one for one in OPPONENTS if one.name in options.opponents and one.name not in absent)


@contextmanager
def workspace(options: argparse.Namespace) -> Iterator[Path]:
    """The folder of this case; a temporary one without --workdir."""
    if options.workdir is not None:
        folder = options.workdir / (options.case + ("-quick" if options.quick else ""))
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def main() -> None:
    options = arguments()
    setup = SETUPS[options.case](common.zoo())
    setup = setup.quick() if options.quick else setup
    settings = {name: vars(options)[name] for name in ("case", "quick", "time_budget", "latency_budget")}
    with workspace(options) as folder:
        book = Book(None if options.workdir is None else folder / "rows.jsonl", settings)
        run(setup, options, book, folder)
    print(comparison.tables(book.rows))
    common.finish(common.document(f"{setup.title}: methods and opponents", book.rows), options.out)


if __name__ == "__main__":
    main()
