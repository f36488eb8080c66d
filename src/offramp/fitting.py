"""fit(): from a backbone and unlabelled traffic to a certified cached model, in straight calls of the other rooms."""

from __future__ import annotations

import itertools
import operator
import shutil
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from offramp.behaviour import check_mode
from offramp.calibration import check_levels, inputs_needed
from offramp.candidates import Candidates
from offramp.choosing import BATCH_SIZES, Learned, choose, within
from offramp.cost import measure, measure_caches
from offramp.distillation import graceful_stop
from offramp.errors import InputError, StreamError
from offramp.methods import Method, method_named
from offramp.model import CachedModel
from offramp.recording import CERTIFY, SHARES_CERTIFY_STREAM, SHARES_ONE_STREAM, Recording, keeping, record
from offramp.splitting import split
from offramp.streams import Batch, check_stream, read_stream
from offramp.tasks import task_named
from offramp.types import Certificate, CostTable, Plan

WORK = ".offramp-fit"  # our folder in the user's workdir; nothing beside it is touched
CLOSING_SHARE = 0.08  # of a time budget, kept back for costs and certification
RECORDING_SHARE = 0.45  # of a time budget, the most that recording takes
STAGES_S, STAGES_SHARE = 20.0, 0.10  # for measuring stages, and at most of a budget
CACHES_S, CACHES_SHARE = 10.0, 0.05  # for measuring caches
UNCACHED_S = 2.0  # for measuring stages, where nothing is learned yet


def fit(
    backbone: nn.Module,
    stream: Iterable[object] | Recording,
    *,
    certify: Iterable[object] | None = None,
    tolerance: float = 0.01,
    confidence_level: float = 0.95,
    task: str = "classification",
    method: str | Method = "offramp",
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
    nothing pays or nothing passes, the plan has no caches and says why. A stream of token ids may have a method
    `to_text(ids)`, with which the report then shows its samples.

    method: whose recipe the caches are learned by, a name or an `offramp.methods.Method` with its hyper-parameters.
    task: what an answer is; "classification" so far. device: where the backbone is, as a check; it is not moved.
    progress: bars on stderr.

    time_budget_s shortens recording and training; without it a run is reproducible from `seed`. What is recorded goes
    to files without a name in the system's temporary folder, or to `workdir`, which keeps it and what was trained until
    the fit is complete: call again to resume. The first Ctrl-C while caches are trained ends the training and goes on
    with what was learned.

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
        shutil.rmtree(Path(workdir) / WORK, ignore_errors=True)
    return cached


def learn(
    backbone: nn.Module,
    stream: Iterable[object] | Recording,
    *,
    certify: Iterable[object] | None = None,
    tolerance: float = 0.01,
    confidence_level: float = 0.95,
    task: str = "classification",
    method: str | Method = "offramp",
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
    chosen_method = method_named(method)
    _check_arguments(time_budget_s, seed)
    _check_backbone(backbone, device)
    if not isinstance(stream, Recording):
        check_stream(stream)
    if certify is not None:
        check_stream(certify)
    folder = None if workdir is None else Path(workdir) / WORK
    clock = _Clock()
    to_text = getattr(stream, "to_text", None)
    example, stream = _example(backbone, stream)
    _check_labels(chosen_method, "stream", example, stream)
    if chosen_method.needs_labels and certify is not None:
        fresh, certify = _peek(backbone, certify)
        _check_labels(chosen_method, "certification stream", fresh, certify)
    split_model = split(backbone, example.to(_device_of(backbone)))
    clock.lap("split")
    costs = measure(split_model, batch_sizes=BATCH_SIZES, budget_s=within(STAGES_S, time_budget_s, STAGES_SHARE))
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
    with keeping(recording), graceful_stop() as stop:
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
        chosen_method.learn(candidates, tolerance)
    trained = candidates.ordered()
    clock.lap("train")
    with keeping(recording):
        budget_s = within(CACHES_S, time_budget_s, CACHES_SHARE)
        costs = measure_caches(costs, split_model, [candidate.cache for candidate in trained], budget_s=budget_s)
    clock.lap("measure_caches")
    return Learned(chosen_method, candidates, trained, costs, clock.seconds, time_budget_s, stop.requested, to_text)


def uncached(
    backbone: nn.Module,
    example: object,
    *,
    tolerance: float = 0.01,
    confidence_level: float = 0.95,
    task: str = "classification",
) -> CachedModel:
    """The backbone as it is, split and measured but without caches: where a model begins that learns from its traffic.

        model = offramp.online(offramp.uncached(backbone, x), refresh=offramp.Refresh())

    example: one batch of inputs, in any form that a stream may yield. The other arguments are those of `fit`; they hold
    for what will be learned. Raises InputError or SplitError; the backbone is left as it was.
    """
    chosen_task = task_named(task)
    check_levels(tolerance, confidence_level)
    _check_backbone(backbone, None)
    batch, _ = _peek(backbone, [example])
    split_model = split(backbone, batch.to(_device_of(backbone)))
    costs = measure(split_model, batch_sizes=BATCH_SIZES, budget_s=UNCACHED_S)
    _check_countable(costs)
    certificate = Certificate(
        tolerance=tolerance,
        confidence_level=confidence_level,
        n=0,
        errors=0,
        bound=0.0,
        procedure="none needed: without caches nothing can differ",
        candidates_tested=0,
        backbone_fingerprint=split_model.fingerprint,
        data_fingerprint="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    plan = Plan(reason="nothing has been learned yet")
    return CachedModel(split_model, (), plan, certificate, costs, task=chosen_task, summary={})


# -- arguments -------------------------------------------------------------------------------------


def _check_arguments(time_budget_s: float | None, seed: int) -> None:
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


def _check_labels(method: Method, which: str, example: Batch, stream: Iterable[object] | Recording) -> None:
    labelled = stream.label_N is not None if isinstance(stream, Recording) else example.labels_B is not None
    if method.needs_labels and not labelled:
        raise InputError(
            f"method {method.name!r} trains on labels, and the {which} has none: let it yield (inputs, labels), or "
            "take another method; offramp's own needs no labels"
        )


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
    """A few rows to trace the backbone with, and the stream, still whole."""
    if isinstance(stream, Recording):
        return stream.sample.rows(slice(0, 4)), stream
    return _peek(backbone, stream)


def _peek(backbone: nn.Module, stream: Iterable[object]) -> tuple[Batch, Iterable[object]]:
    """The first few rows of a stream, and the stream, still whole and read once only."""
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


class _Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.last = now - self.last, now
