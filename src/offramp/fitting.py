"""fit(): from a backbone and unlabelled traffic to a certified cached model, in straight calls of the other rooms."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from offramp.behaviour import check_mode
from offramp.calibration import Verdict, check_levels, inputs_needed
from offramp.calibration import certify as certify_path
from offramp.candidates import Candidates, Trained
from offramp.cost import measure, measure_caches, shares
from offramp.distillation import graceful_stop
from offramp.errors import InputError, StorageError, StreamError
from offramp.evaluation import compare_latency
from offramp.model import CachedModel
from offramp.placement import CacheCosts, Candidate, outcomes, plan_path
from offramp.recording import (
    CERTIFY,
    SHARES_CERTIFY_STREAM,
    SHARES_ONE_STREAM,
    TUNE,
    Recording,
    RecordingInterrupted,
    record,
)
from offramp.search import Search
from offramp.splitting import split
from offramp.streams import Batch, check_stream, read_stream
from offramp.summary import Findings, summarise
from offramp.tasks import task_named
from offramp.types import Certificate, CostTable, LatencyRatio, Plan, PlannedCache, Records

METHODS = ("offramp",)
PATH_REACH = 3.0  # the path of plans goes on to this multiple of the tolerance
WEIGHT_FLOPS = 0.5  # a plan's cost is half measured time and half FLOPs, which carry over to other machines
CLOSING_SHARE = 0.08  # of a time budget, kept back for costs and certification
BATCH_SIZES = (1, 8, 32)
RECORDING_SHARE = 0.45  # of a time budget, the most that recording takes
# Seconds for measuring stages, caches and, per batch size, the finished model; and their most as a share of a budget.
STAGES_S, CACHES_S, LATENCY_S = 20.0, 10.0, 3.0
STAGES_SHARE, CACHES_SHARE, LATENCY_SHARE = 0.10, 0.05, 0.01


def fit(
    backbone: nn.Module,
    stream: Iterable[object] | Recording,
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

    Raises InputError, SplitError, StreamError or StorageError; the last two, and the KeyboardInterrupt of a Ctrl-C that
    stops the fit, have as `recorded` what was recorded until then. The backbone is left as it was.
    """
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

    candidates: Candidates
    trained: list[Trained]
    costs: CostTable
    seconds: dict[str, float]
    time_budget_s: float | None
    interrupted: bool


def learn(
    backbone: nn.Module,
    stream: Iterable[object] | Recording,
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
    check_levels(tolerance, confidence_level)
    _check_arguments(method, time_budget_s, seed)
    _check_backbone(backbone, device)
    for given in (stream, certify):
        if given is not None and not isinstance(given, Recording):
            check_stream(given)
    folder = None if workdir is None else Path(workdir)
    clock = _Clock()
    example, stream = _example(backbone, stream)
    split_model = split(backbone, example.to(_device_of(backbone)))
    clock.lap("split")
    costs = measure(split_model, batch_sizes=BATCH_SIZES, budget_s=_within(STAGES_S, time_budget_s, STAGES_SHARE))
    _check_countable(costs)
    clock.lap("measure")
    recording = record(
        split_model,
        chosen_task,
        stream,
        certify,
        seed=seed,
        workdir=folder,
        time_limit_s=None if time_budget_s is None else time_budget_s * RECORDING_SHARE,
        show=progress,
    )
    clock.lap("record")
    _check_enough(recording, tolerance, confidence_level)
    with _keeping(recording), graceful_stop() as stop:
        candidates = Candidates(
            split_model,
            chosen_task,
            recording,
            costs,
            seed=seed,
            deadline=None if time_budget_s is None else started + time_budget_s * (1 - CLOSING_SHARE),
            stop=stop,
            workdir=folder,
            show=progress,
        )
        Search(candidates, tolerance=tolerance).run()
    trained = candidates.ordered()
    clock.lap("train")
    with _keeping(recording):
        budget_s = _within(CACHES_S, time_budget_s, CACHES_SHARE)
        costs = measure_caches(costs, split_model, [candidate.cache for candidate in trained], budget_s=budget_s)
    clock.lap("measure_caches")
    return Learned(candidates, trained, costs, clock.seconds, time_budget_s, stop.requested)


def choose(learned: Learned, *, tolerance: float, confidence_level: float) -> CachedModel:
    """From trained candidates to a certified model: path of plans on tune, fixed sequence on certify, a last timing.

    Call it again with another tolerance to have a second model from the same caches; each certificate holds by itself.
    """
    check_levels(tolerance, confidence_level)
    with _keeping(learned.candidates.recording):
        return _choose(learned, tolerance, confidence_level)


def _choose(learned: Learned, tolerance: float, confidence_level: float) -> CachedModel:
    started = time.monotonic()
    candidates, trained, costs = learned.candidates, learned.trained, learned.costs
    recording = candidates.recording
    path, errors_M, verdict = _certified_path(candidates, trained, costs, tolerance, confidence_level)
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
        backbone_fingerprint=candidates.split.fingerprint,
        data_fingerprint=recording.fingerprint(CERTIFY),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        advice=verdict.advice,
    )
    cached = _assemble(candidates, trained, plan, certificate, costs)
    latency: tuple[LatencyRatio, ...] = ()
    if plan.caches:
        with torch.inference_mode():
            sample = recording.sample.to(candidates.split.device)
            budget_s = _within(LATENCY_S, learned.time_budget_s, LATENCY_SHARE)
            latency = compare_latency(cached, sample, BATCH_SIZES, budget_s=budget_s)
        plan = _never_slower(plan, latency)
        certificate = certificate if plan.caches else dataclasses.replace(certificate, errors=0, bound=0.0)
        cached = _assemble(candidates, trained, plan, certificate, costs)
    chosen = candidate if plan.caches else path[0]
    findings = Findings(trained, path, errors_M, verdict, chosen, latency, learned.seconds, learned.time_budget_s)
    cached.summary.update(summarise(candidates, cached, costs, findings))
    cached.summary["fit"]["seconds"]["choose"] = time.monotonic() - started
    if learned.interrupted:
        cached.summary["advice"] += " Training was interrupted; a full run may save more."
    return cached


def _certified_path(
    candidates: Candidates, trained: list[Trained], costs: CostTable, tolerance: float, confidence_level: float
) -> tuple[tuple[Candidate, ...], list[int], Verdict]:
    n = len(candidates.recording.index(CERTIFY))
    if not trained:
        nothing = (Candidate((), 0.0, 1.0, ()),)
        return nothing, [0], certify_path([0], n, tolerance, confidence_level)
    cache_costs = CacheCosts(*shares(costs, weight_flops=WEIGHT_FLOPS))
    path = plan_path(candidates.records(trained, TUNE), cache_costs, PATH_REACH * tolerance)
    errors_M = count_errors(candidates.records(trained, CERTIFY), path)
    return path, errors_M, certify_path(errors_M, n, tolerance, confidence_level)


def count_errors(records: Records, path: Iterable[Candidate]) -> list[int]:
    """Disagreements of each plan of the path on these records."""
    return [int(outcomes(records, candidate.thresholds_K)[1].sum()) for candidate in path]


def _plan(candidate: Candidate, trained: list[Trained], verdict: Verdict, path: tuple[Candidate, ...]) -> Plan:
    if not trained:
        return Plan(reason="no cache was trained: training ended before the first one, or none fits this backbone")
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
    candidates: Candidates, trained: list[Trained], plan: Plan, certificate: Certificate, costs: CostTable
) -> CachedModel:
    names = [planned.name for planned in plan.caches]
    kept = [k for k, candidate in enumerate(trained) if candidate.cache.name in names]
    costs = dataclasses.replace(
        costs,
        caches=tuple(costs.caches[k] for k in kept),
        cache_points=tuple(costs.cache_points[k] for k in kept),
    )
    caches = [trained[k].cache for k in kept]
    return CachedModel(candidates.split, caches, plan, certificate, costs, task=candidates.task, summary={})


def _never_slower(plan: Plan, latency: tuple[LatencyRatio, ...]) -> Plan:
    """The plan, switched off at the batch sizes where it was measured not to be faster; without caches if at all."""
    slower = tuple(ratio.batch_size for ratio in latency if ratio.mean >= 1)
    if len(slower) < len(latency):
        return dataclasses.replace(plan, bypass_batch_sizes=slower)
    measured = ", ".join(f"{ratio.mean:.2f} at batch {ratio.batch_size}" for ratio in latency)
    return Plan(reason=f"the best certified plan was not faster than the full model: time ratio {measured}")


# -- arguments -------------------------------------------------------------------------------------


def _check_arguments(method: str, time_budget_s: float | None, seed: int) -> None:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    if time_budget_s is not None and not time_budget_s > 0:
        raise InputError(f"time_budget_s must be a positive number of seconds or None; received {time_budget_s}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be a whole number from 0; received {seed!r}")


def _check_backbone(backbone: object, device: str | torch.device | None) -> None:
    """What can be said before the stream is touched: a generator must not lose a batch to a forgotten eval()."""
    if not isinstance(backbone, (nn.Module, ExportedProgram)):
        raise InputError(f"the backbone is a {type(backbone).__name__}; expected a torch.nn.Module")
    if isinstance(backbone, nn.Module):
        check_mode(backbone)
    if device is not None:
        _check_device(backbone, torch.device(device))


def _check_countable(costs: CostTable) -> None:
    if not costs.backbone.flops or not sum(stage.flops for stage in costs.stages):
        raise InputError(
            "the backbone does only element-wise work (no matrix product, convolution or attention in it): there is "
            "nothing to save, and caches for it cannot be priced. Serve it as it is."
        )


def _check_device(backbone: nn.Module | ExportedProgram, device: torch.device) -> None:
    actual = _device_of(backbone)
    if actual.type != device.type:
        raise InputError(
            f"device={str(device)!r} but the backbone is on {actual}; move it first, "
            f"`backbone.to({str(device)!r})`: fit() does not touch the model"
        )


def _device_of(backbone: nn.Module | ExportedProgram) -> torch.device:
    parameter = next(itertools.chain(backbone.parameters(), backbone.buffers()), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _example(backbone: nn.Module, stream: Iterable[object] | Recording) -> tuple[Batch, Iterable[object] | Recording]:
    """A few rows to trace the backbone with, and the stream, still whole and read once only."""
    if isinstance(stream, Recording):
        return stream.sample.rows(slice(0, 4)), stream
    peeked = _Peeked(stream)
    first = next(read_stream(peeked.ahead(), backbone if isinstance(backbone, nn.Module) else None), None)
    if first is None:
        raise StreamError(
            "the stream is empty: it yielded no inputs; expected unlabelled inputs, some hundreds at least"
        )
    return first.rows(slice(0, 4)), peeked


class _Peeked:
    """A stream of which the first batches were looked at. One iterator serves both: whether the stream can be read
    again from its start, only its owner knows."""

    def __init__(self, stream: Iterable[object]) -> None:
        self._stream, self._seen = stream, list[object]()
        self._iterator: Iterator[object] | None = None

    def ahead(self) -> Iterator[object]:
        """Batches from the start, kept for `__iter__`."""
        self._iterator = iter(self._stream)
        for batch in self._iterator:
            self._seen.append(batch)
            yield batch

    def __iter__(self) -> Iterator[object]:
        assert self._iterator is not None
        return itertools.chain(self._seen, self._iterator)

    def __length_hint__(self) -> int:
        try:
            return operator.length_hint(self._stream)
        except TypeError:
            return 0


def _check_enough(recording: Recording, tolerance: float, confidence_level: float) -> None:
    counts = recording.counts()
    needed = inputs_needed(tolerance, confidence_level)
    share = (SHARES_CERTIFY_STREAM if recording.separate else SHARES_ONE_STREAM)[CERTIFY]
    if counts["certify"] < needed or not counts["tune"] or not counts["train"]:
        error = StreamError(
            f"too few inputs to certify anything: of those recorded, {counts['train']} fell to training, "
            f"{counts['tune']} to tuning and {counts['certify']} to certification, and a tolerance of {tolerance:g} at "
            f"confidence level {confidence_level:g} takes at least {needed} for certification alone. The "
            f"{'certification ' if recording.separate else ''}stream needs about {round(1.1 * needed / share):,} "
            "different inputs, better three times as many; or loosen the tolerance."
        )
        error.recorded = recording
        raise error


# -- small things ----------------------------------------------------------------------------------


def _within(seconds: float, time_budget_s: float | None, share: float) -> float:
    """That many seconds, but no more than this share of a budget."""
    return seconds if time_budget_s is None else min(seconds, share * time_budget_s)


@contextmanager
def _keeping(recording: Recording) -> Iterator[None]:
    """Within: what was recorded leaves with a Ctrl-C and with a full disk."""
    try:
        yield
    except RecordingInterrupted:
        raise
    except KeyboardInterrupt:
        message = "interrupted after recording; fit() accepts `error.recorded` in place of the stream."
        raise RecordingInterrupted(message, recording) from None
    except StorageError as error:
        error.recorded = recording
        raise


class _Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.last = now - self.last, now
