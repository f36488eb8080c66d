"""fit(): from a backbone and unlabelled traffic to a certified cached model, in straight calls of the other rooms."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from offramp.calibration import Verdict, check_levels, inputs_needed
from offramp.calibration import certify as certify_path
from offramp.cost import measure, measure_caches, shares
from offramp.distillation import graceful_stop
from offramp.errors import InputError, StreamError
from offramp.evaluation import compare_latency
from offramp.model import CachedModel
from offramp.placement import CacheCosts, Candidate, outcomes, plan_path
from offramp.recording import CERTIFY, SHARES_CERTIFY_STREAM, SHARES_ONE_STREAM, TUNE, Recording, record
from offramp.search import Search, Trained
from offramp.splitting import SplitModel, split
from offramp.streams import Batch, as_batch
from offramp.summary import Findings, summarise
from offramp.tasks import Classification, task_named
from offramp.types import Certificate, CostTable, LatencyRatio, Plan, PlannedCache, Records

METHODS = ("offramp",)
PATH_REACH = 3.0  # the path of plans goes on to this multiple of the tolerance
WEIGHT_FLOPS = 0.5  # a plan's cost is half measured time and half FLOPs, which carry over to other machines
CLOSING_SHARE = 0.08  # of a time budget, kept back for costs and certification
BATCH_SIZES = (1, 8, 32)


def fit(
    backbone: nn.Module,
    stream: Iterable[object],
    *,
    certify: Iterable[object] | None = None,
    tolerance: float = 0.01,
    confidence_level: float = 0.95,
    task: str = "classification",
    method: str = "offramp",
    time_budget_s: float | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
    workdir: str | Path | None = None,
) -> CachedModel:
    """Learn caches for `backbone` from unlabelled inputs, and certify how often an answer may differ.

    stream: batches of inputs (tensors, tuples, dicts, a DataLoader), in part used to train, tune and certify; or the
    `recorded` of an interrupted call. certify: separate, fresher inputs to tune and certify on. With probability
    `confidence_level` at most a share `tolerance` of the answers differs from the backbone's on such traffic. When
    nothing pays or nothing passes, the plan has no caches and says why.

    time_budget_s shortens recording and training; without it a run is reproducible from `seed`. workdir keeps what was
    recorded and trained until the fit is complete: call again to resume. The first Ctrl-C while caches are trained ends
    the training and goes on with what was learned.

    Raises InputError, SplitError, StreamError or StorageError; the backbone is left as it was.
    """
    check_levels(tolerance, confidence_level)
    learned = learn(
        backbone,
        stream,
        certify=certify,
        tolerance=tolerance,
        confidence_level=confidence_level,
        task=task,
        method=method,
        time_budget_s=time_budget_s,
        device=device,
        seed=seed,
        progress=progress,
        workdir=workdir,
    )
    cached = choose(learned, tolerance=tolerance, confidence_level=confidence_level)
    if workdir is not None:
        for name in ("recording", "caches"):
            shutil.rmtree(Path(workdir) / name, ignore_errors=True)
    return cached


@dataclass
class Learned:
    """The neural half of a fit: trained candidates and their measured costs. `choose` makes a model of it."""

    search: Search
    trained: list[Trained]
    costs: CostTable
    seconds: dict[str, float]
    time_budget_s: float | None
    interrupted: bool


def learn(
    backbone: nn.Module,
    stream: Iterable[object],
    *,
    certify: Iterable[object] | None = None,
    tolerance: float = 0.01,
    confidence_level: float = 0.95,
    task: str = "classification",
    method: str = "offramp",
    time_budget_s: float | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
    workdir: str | Path | None = None,
) -> Learned:
    """Everything in `fit` before the choice: split, record, train, measure. Arguments and errors as there."""
    started = time.monotonic()
    chosen_task = task_named(task)
    _check_arguments(method, time_budget_s)
    if device is not None:
        _check_device(backbone, torch.device(device))
    folder = None if workdir is None else Path(workdir)
    clock = _Clock()
    example, stream = _example(backbone, stream)
    split_model = split(backbone, example.to(_device_of(backbone)))
    clock.lap("split")
    costs = measure(split_model, batch_sizes=BATCH_SIZES)
    clock.lap("measure")
    recording = _record(split_model, chosen_task, stream, certify, seed, folder, time_budget_s, show=progress)
    clock.lap("record")
    _check_enough(recording, tolerance, confidence_level, separate=certify is not None)
    with graceful_stop() as stop:
        search = Search(
            split_model,
            chosen_task,
            recording,
            costs,
            tolerance=tolerance,
            seed=seed,
            deadline=None if time_budget_s is None else started + time_budget_s * (1 - CLOSING_SHARE),
            stop=stop,
            workdir=folder,
            show=progress,
        )
        trained = search.run()
    clock.lap("train")
    costs = measure_caches(costs, split_model, [candidate.cache for candidate in trained])
    clock.lap("measure_caches")
    return Learned(search, trained, costs, clock.seconds, time_budget_s, stop.requested)


def choose(learned: Learned, *, tolerance: float, confidence_level: float) -> CachedModel:
    """From trained candidates to a certified model: path of plans on tune, fixed sequence on certify, a last timing.

    Call it again with another tolerance to have a second model from the same caches; each certificate holds by itself.
    """
    started = time.monotonic()
    check_levels(tolerance, confidence_level)
    search, trained, costs = learned.search, learned.trained, learned.costs
    recording = search.recording
    path, errors_M, verdict = _certified_path(search, trained, costs, tolerance, confidence_level)
    candidate = path[max(verdict.index, 0)]
    plan = _plan(candidate, trained, verdict, path)
    certificate = Certificate(
        tolerance=tolerance,
        confidence_level=confidence_level,
        n=verdict.n,
        errors=verdict.errors if plan.caches else 0,
        bound=verdict.bound if plan.caches else 0.0,
        procedure="fixed-sequence testing, exact binomial bound",
        candidates_tested=verdict.candidates_tested,
        backbone_fingerprint=search.split.fingerprint,
        data_fingerprint=recording.fingerprint(CERTIFY),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        advice=verdict.advice,
    )
    cached = _assemble(search, trained, plan, certificate, costs)
    latency: tuple[LatencyRatio, ...] = ()
    if plan.caches:
        with torch.inference_mode():
            latency = compare_latency(cached, recording.sample.to(search.split.device), BATCH_SIZES, budget_s=3.0)
        plan = _never_slower(plan, latency)
        certificate = certificate if plan.caches else dataclasses.replace(certificate, errors=0, bound=0.0)
        cached = _assemble(search, trained, plan, certificate, costs)
    chosen = candidate if plan.caches else path[0]
    findings = Findings(trained, path, errors_M, verdict, chosen, latency, learned.seconds, learned.time_budget_s)
    cached.summary.update(summarise(search, cached, costs, findings))
    cached.summary["fit"]["seconds"]["choose"] = time.monotonic() - started
    if learned.interrupted:
        cached.summary["advice"] += " Training was interrupted; a full run may save more."
    return cached


def _certified_path(
    search: Search, trained: list[Trained], costs: CostTable, tolerance: float, confidence_level: float
) -> tuple[tuple[Candidate, ...], list[int], Verdict]:
    n = len(search.recording.index(CERTIFY))
    if not trained:
        nothing = (Candidate((), 0.0, 1.0, ()),)
        return nothing, [0], certify_path([0], n, tolerance, confidence_level)
    cache_costs = CacheCosts(*shares(costs, weight_flops=WEIGHT_FLOPS))
    path = plan_path(search.records(trained, TUNE), cache_costs, PATH_REACH * tolerance)
    errors_M = count_errors(search.records(trained, CERTIFY), path)
    return path, errors_M, certify_path(errors_M, n, tolerance, confidence_level)


def count_errors(records: Records, path: Iterable[Candidate]) -> list[int]:
    """Disagreements of each plan of the path on these records."""
    return [int(outcomes(records, candidate.thresholds_K)[1].sum()) for candidate in path]


def _plan(candidate: Candidate, trained: list[Trained], verdict: Verdict, path: tuple[Candidate, ...]) -> Plan:
    if verdict.index < 0:
        return Plan(reason=f"nothing could be certified. {verdict.advice}")
    enabled = [k for k, threshold in enumerate(candidate.thresholds_K) if np.isfinite(threshold)]
    if not enabled:
        what = (
            "no cache saves more than it costs" if len(path) == 1 else f"no plan with caches passed. {verdict.advice}"
        )
        return Plan(reason=what)
    planned = tuple(
        PlannedCache(
            trained[k].cache.name,
            trained[k].cache.point,
            float(candidate.thresholds_K[k]),
            trained[k].cache.confidence_name,
            float(candidate.hit_rates_K[k]),
        )
        for k in enabled
    )
    return Plan(planned, candidate.disagreement, candidate.cost)


def _assemble(
    search: Search, trained: list[Trained], plan: Plan, certificate: Certificate, costs: CostTable
) -> CachedModel:
    names = [planned.name for planned in plan.caches]
    kept = [k for k, candidate in enumerate(trained) if candidate.cache.name in names]
    costs = dataclasses.replace(
        costs,
        caches=tuple(costs.caches[k] for k in kept),
        cache_points=tuple(costs.cache_points[k] for k in kept),
    )
    caches = [trained[k].cache for k in kept]
    return CachedModel(search.split, caches, plan, certificate, costs, task=search.task, summary={})


def _never_slower(plan: Plan, latency: tuple[LatencyRatio, ...]) -> Plan:
    """The plan, switched off at the batch sizes where it was measured not to be faster; without caches if at all."""
    slower = tuple(ratio.batch_size for ratio in latency if ratio.mean >= 1)
    if len(slower) < len(latency):
        return dataclasses.replace(plan, bypass_batch_sizes=slower)
    measured = ", ".join(f"{ratio.mean:.2f} at batch {ratio.batch_size}" for ratio in latency)
    return Plan(reason=f"the best certified plan was not faster than the full model: time ratio {measured}")


# -- arguments -------------------------------------------------------------------------------------


def _check_arguments(method: str, time_budget_s: float | None) -> None:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if time_budget_s is not None and not time_budget_s > 0:
        raise InputError(f"time_budget_s must be a positive number of seconds or None; received {time_budget_s}")


def _check_device(backbone: nn.Module, device: torch.device) -> None:
    actual = _device_of(backbone)
    if actual.type != device.type:
        raise InputError(
            f"device={str(device)!r} but the backbone is on {actual}; move it first, "
            f"`backbone.to({str(device)!r})`: fit() does not touch the model"
        )


def _device_of(backbone: nn.Module) -> torch.device:
    parameter = next(itertools.chain(backbone.parameters(), backbone.buffers()), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _example(backbone: nn.Module, stream: Iterable[object]) -> tuple[Batch, Iterable[object]]:
    """A few rows to trace the backbone with, and the stream, still whole."""
    if isinstance(stream, Recording):
        return stream.sample.rows(slice(0, 4)), stream
    if isinstance(stream, (torch.Tensor, dict, str)) or not isinstance(stream, Iterable):
        raise InputError(
            f"a stream must yield batches; received a {type(stream).__name__}. Pass a DataLoader or a list of batches; "
            "for one tensor of all inputs use `tensor.split(128)`."
        )
    iterator = iter(stream)
    try:
        first = next(iterator, None)
    except Exception as error:
        raise StreamError(f"the stream broke at batch 0: {type(error).__name__}: {error}") from error
    if first is None:
        raise StreamError(
            "the stream is empty: it yielded no batches; expected unlabelled inputs, some hundreds at least"
        )
    once_only = iterator is stream
    return as_batch(first, backbone).rows(slice(0, 4)), itertools.chain([first], iterator) if once_only else stream


def _record(
    split_model: SplitModel,
    task: Classification,
    stream: Iterable[object],
    certify: Iterable[object] | None,
    seed: int,
    workdir: Path | None,
    time_budget_s: float | None,
    *,
    show: bool,
) -> Recording:
    if isinstance(stream, Recording):
        return cast(Recording, stream)
    limit_s = None if time_budget_s is None else time_budget_s * 0.45
    return record(split_model, task, stream, certify, seed=seed, workdir=workdir, time_limit_s=limit_s, show=show)


def _check_enough(recording: Recording, tolerance: float, confidence_level: float, *, separate: bool) -> None:
    counts = recording.counts()
    needed = inputs_needed(tolerance, confidence_level)
    share = (SHARES_CERTIFY_STREAM if separate else SHARES_ONE_STREAM)[CERTIFY]
    if counts["certify"] < needed or not counts["tune"] or not counts["train"]:
        error = StreamError(
            f"too few inputs to certify anything: {counts['certify']} fell to certification, and a tolerance of "
            f"{tolerance:g} at confidence level {confidence_level:g} takes at least {needed}. The "
            f"{'certification ' if separate else ''}stream needs about {int(np.ceil(1.1 * needed / share)):,} inputs, "
            "better three times as many; or loosen the tolerance."
        )
        error.recorded = recording
        raise error


class _Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.last = now - self.last, now
