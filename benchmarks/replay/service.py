"""The model in service: ResNet-18 / CIFAR-10 with its pictures, and the loop that calls it when a trace says so."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import offramp
from offramp.cost import flop_shares
from offramp.evaluation import costs_at_exits
from offramp.ladder import Rung
from offramp.model import CachedModel
from offramp.online_model import OnlineModel
from offramp.placement import CacheCosts
from replay.ledger import Ledger, Served
from replay.traffic import Pictures

CERTIFIED = "certified"
TRACES = {name: common.SHARED / "data" / "traces" / f"AzureLLMInferenceTrace_{name}.csv" for name in ("code", "conv")}
TELL_EVERY_S = 20.0


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Case:
    """A full model and its pictures, in one random order: those that it was trained on (train.parquet) and others."""

    backbone: nn.Module
    pictures: Pictures
    inputs: Callable[[NDArray[np.uint8]], Tensor]

    def stream(self, rows: slice) -> common.Images:
        """Pictures for `offramp.fit`."""
        part = self.pictures.rows(rows)
        nothing = np.zeros(0, dtype=np.int64)
        return common.Images(part.image_P, nothing, lambda x: self.inputs(x.numpy()))


def case(options: argparse.Namespace) -> Case:
    zoo = importable_zoo()

    def inputs(images: NDArray[np.uint8]) -> Tensor:
        normalized: Tensor = zoo.normalize(torch.from_numpy(np.ascontiguousarray(images)), "cifar10")
        return normalized

    order = np.random.default_rng(options.seed)
    parts = [cifar("test", options.workdir, known=False)]
    if options.population == "all":
        parts.append(cifar("train", options.workdir, known=True))
    joined = Pictures(*(np.concatenate(columns) for columns in zip(*(_columns(part) for part in parts), strict=True)))
    return Case(zoo.resnet18_cifar10(), joined.rows(order.permutation(len(joined))), inputs)


def importable_zoo() -> Any:
    """The module of ../shared/models under its own name: a process that learns in the background has to find it."""
    folder = str(common.SHARED / "models")
    if folder not in sys.path:
        sys.path.append(folder)
    import zoo

    return zoo


def _columns(pictures: Pictures) -> tuple[NDArray[Any], ...]:
    return pictures.image_P, pictures.label_P, pictures.known_P


def cifar(part: str, workdir: Path, *, known: bool) -> Pictures:
    """Decoded once."""
    return _decoded(f"cifar10/{part}.parquet", workdir, known=known)


def tiny_imagenet(workdir: Path) -> Pictures:
    """Thumbnails of 200 other classes, shrunk to the size of the others. Labels are their own."""
    return _decoded("tiny_imagenet/train_100pc.parquet", workdir, known=False)


def _decoded(parquet: str, workdir: Path, *, known: bool) -> Pictures:
    file = workdir / f"{parquet.replace('/', '-')}.npz"
    if not file.exists():
        read = common.images(parquet, lambda x: x, side=32)
        workdir.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"unfinished-{file.name}")
        np.savez(unfinished, images=read.images, labels=read.labels)
        unfinished.replace(file)
    with np.load(file) as kept:
        images, labels = kept["images"], kept["labels"]
    return Pictures(images, labels, np.full(len(labels), known))


def fitted(bench: Case, options: argparse.Namespace) -> CachedModel:
    """A model that was fitted before it went into service; once per set of options."""
    folder = fitted_folder(options)
    if not folder.exists():
        train, certify = options.parts[0], options.parts[0] + options.parts[1]
        tell(f"fitting for about {options.fit_budget:.0f} s")
        cached = offramp.fit(
            bench.backbone,
            bench.stream(slice(0, train)),
            certify=bench.stream(slice(train, certify)),
            tolerance=options.tolerance,
            method=options.method,
            time_budget_s=options.fit_budget,
            seed=options.seed,
            progress=False,
        )
        offramp.save(cached, folder)
    cached = offramp.load(folder, bench.backbone)
    if not cached.plan.caches:
        raise SystemExit(f"the fit has no caches, so that nothing can be shown: {cached.plan.reason}")
    return cached


def fitted_folder(options: argparse.Namespace) -> Path:
    fit = (options.tolerance, options.method, options.fit_budget, *options.parts[:2])
    settings = (options.population, options.seed, *fit)
    folder: Path = options.workdir / f"fitted-{hashlib.blake2b(repr(settings).encode(), digest_size=6).hexdigest()}"
    return folder


def others(bench: Case, options: argparse.Namespace) -> Pictures:
    """The pictures that the fit has not seen."""
    return bench.pictures.rows(slice(options.parts[0] + options.parts[1], None))


# -- serving ---------------------------------------------------------------------------------------


class Plans:
    """Numbers the plans in the order in which they answer, and knows what a request costs under each rung."""

    def __init__(self) -> None:
        self.known: list[Any] = []
        self._last: tuple[Rung, Served, NDArray[np.float64]] | None = None

    def served(self, rung: Rung) -> tuple[Served, NDArray[np.float64]]:
        if self._last is None or self._last[0] is not rung:
            certificate = rung.model.certificate
            said = Served(
                self._number(rung.model),
                rung.name,
                len(rung.model.plan.caches),
                certificate.tolerance,
                certificate.bound,
                certificate.n,
            )
            self._last = rung, said, cost_at_exits(rung)
        return self._last[1], self._last[2]

    def _number(self, model: CachedModel) -> int:
        found = [number for number, certificate in enumerate(self.known) if certificate == model.certificate]
        if not found:
            self.known.append(model.certificate)
        return found[0] if found else len(self.known) - 1


def cost_at_exits(rung: Rung) -> NDArray[np.float64]:
    """FLOPs of a request that leaves at each exit, in units of the full model's. Look-ups behind the last cache that
    still answers are not made, and none where the plan was measured not to pay for one row."""
    if rung.model.bypasses(1):
        return np.ones(len(rung.model.plan.caches) + 1)
    before_K, cache_K = flop_shares(rung.model.costs)
    live = 1 + max((k for k, least in enumerate(rung.answers_from) if np.isfinite(least)), default=-1)
    return costs_at_exits(CacheCosts(before_K, np.where(np.arange(len(cache_K)) < live, cache_K, 0.0)))


def replay(
    model: OnlineModel,
    images: NDArray[np.uint8],
    inputs: Callable[[NDArray[np.uint8]], Tensor],
    at_s: NDArray[np.float64],
    *,
    marks: Mapping[int, Callable[[], None]] | None = None,
) -> Ledger:
    """One caller: every request when it is due, or as soon as those before it are answered. marks: what to do before a
    request."""
    ledger, plans = Ledger(), Plans()
    started = told = time.perf_counter()
    for number, due_s in enumerate(at_s.tolist()):
        if marks is not None and number in marks:
            marks[number]()
        x = inputs(images[number : number + 1])
        now_s = time.perf_counter() - started
        if now_s < due_s:
            time.sleep(due_s - now_s)
        rung, begun = model.rung, time.perf_counter()
        said = model.predict(x)
        took_s = time.perf_counter() - begun
        served, cost_E = plans.served(rung)
        # A swap while the call began: it may have been answered before or after it, so it counts as a full run.
        cost = float(cost_E[int(said.left_at_B)]) if model.rung is rung else 1.0
        ledger.add(served, int(said.answer_B), cost, begun - started - due_s, took_s)
        if time.perf_counter() - told > TELL_EVERY_S:
            told = time.perf_counter()
            late_s = told - started - due_s
            tell(f"request {number + 1} of {len(at_s)}: plan {served.plan}, {served.rung}, {late_s:.0f} s late")
    return ledger


@contextlib.contextmanager
def one_thread_each() -> Any:
    """torch keeps to one core while it serves, so that learning in the background has the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refresh_policy(options: argparse.Namespace, **others: Any) -> Any:
    """The least that `offramp.Refresh` has to be told for a run that ends."""
    return offramp.Refresh(time_budget_s=options.refresh_budget, cpu_share=options.cpu_share, **others)
