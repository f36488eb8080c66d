"""A cached model on other runtimes: every part on the back end that is fastest for it here, and certified again.

Lower precision changes answers, and so does, at ties, another order of summation. So the thresholds are chosen anew on
what the parts say, and the result is certified against the backbone as the user gave it, for one row and for many:
these may run on different back ends.

Every cut costs time on another runtime (`offramp.cuts`). A cache that is not worth its cut is dropped, and the stages
around it become one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.backends import backend_named
from offramp.caches import Cache
from offramp.calibration import certify, inputs_needed, upper_bound
from offramp.choosing import BATCH_SIZES, PATH_REACH, never_slower
from offramp.cost import measure, measure_caches, shares
from offramp.cuts import stages_share, worthwhile
from offramp.errors import InputError, StreamError
from offramp.evaluation import compare_latency, say_all
from offramp.model import CachedModel
from offramp.parts import FLOAT32, FULL, MANY, ONE, Layout, Race, lay_out
from offramp.placement import CacheCosts, Candidate, cheapest_within, outcomes
from offramp.progress import Bar, bar
from offramp.rebuilding import OptimizedModel, Origin, hardware, model_of
from offramp.splitting import SplitModel
from offramp.streams import Batch, concatenated, read_stream
from offramp.tail import Priced, steady_path
from offramp.tasks import Classification
from offramp.types import Certificate, CostTable, LatencyRatio, PartCost, Plan, Records

PRECISIONS = ("float32", "bfloat16", "int8")
TRIED = ("eager", "compile", "onnxruntime", "openvino", "cudagraphs")  # AOTInductor's kernels are those of "compile"
CALIBRATION_ROWS = 256  # for "int8" and for timing; used for nothing else
TUNE_SHARE = 1 / 3  # of the other rows; the rest certifies
MOST_ROWS, MOST_BYTES = 10_000, 2 << 30  # of the stream that are kept, whichever is less
LATENCY_S, COSTS_S = 2.0, 5.0
CERTIFIED_REACH = 1.5  # times the tolerance: estimated disagreements up to which plans are often certified


def optimize(
    cached: CachedModel,
    stream: Iterable[object],
    *,
    backends: Sequence[str] | None = None,
    precision: str = "float32",
    seed: int = 0,
    progress: bool = True,
) -> OptimizedModel:
    """The same caches on the fastest back ends for this machine, tuned and certified again; `cached` stays as it is.

    stream: unlabelled inputs that the fit has not seen, as many as a fit takes for certification; of more than 10,000,
    or 2 GiB, that many are drawn. backends: those to try, by name (`offramp.backends.BACKENDS`); by default all that
    are installed and run on the model's device. precision: the lowest allowed: "float32", "bfloat16" or "int8".
    Tolerance and confidence level are those of `cached`. A model that is optimized already is optimized anew, from what
    it was made of.

    A back end that is missing, fails, differs from eager in float32, or takes more than twice the fastest for the full
    model, is left out; so is a lower precision in which the full model would not be certified. `summary["optimized"]`
    says so, and how the full model did on each. The result runs on this hardware and with as many threads as torch has
    now. `save` keeps how it was made, and `load` makes it again.

    Raises InputError for arguments that do not fit, StreamError when the stream is too short.
    """
    base = cached.origin.base if isinstance(cached, OptimizedModel) else cached
    race = _race(base, backends, precision)
    rows = _dealt(base, stream, seed)
    with torch.inference_mode(mode=False), torch.no_grad():
        job = _Job(base, rows, progress)
        setting, full_certificate = job.certified(job.tuned(race))
        latency: tuple[LatencyRatio, ...] = ()
        if setting.plan.caches:
            latency = compare_latency(_assembled(base, setting, rows.sample), rows.sample, BATCH_SIZES, LATENCY_S)
            plan = never_slower(setting.plan, latency)
            if plan.caches:
                setting = dataclasses.replace(setting, plan=plan)
            else:
                setting = job.without_caches(setting.layout, plan, full_certificate)
        model = _assembled(base, setting, rows.sample)
    _summarize(model, precision, race, latency)
    return model


def uncertified(
    cached: CachedModel, sample: Batch, *, backends: Sequence[str] | None = None, precision: str = "float32"
) -> OptimizedModel:
    """All caches of `cached`, under its thresholds, on the fastest back ends: for timing, and for nothing else.

    sample: some hundred rows, which calibrate and time the parts. Lower precision changes answers, so the certificate's
    bound is 1. The other arguments and the errors are those of `optimize`.
    """
    race = _race(cached, backends, precision)
    with torch.inference_mode(mode=False), torch.no_grad():
        layout = lay_out(cached, [planned.name for planned in cached.plan.caches], race, sample, show=False)
        none = dataclasses.replace(cached.certificate, n=0, errors=0, bound=1.0, procedure="none: for timing only")
        model = _assembled(cached, _Setting(layout, _costs(cached, layout), cached.plan, none), sample)
    _summarize(model, precision, race, ())
    return model


def _race(cached: CachedModel, names: Sequence[str] | None, precision: str) -> Race:
    """Between the back ends of these names, or all that run on the model's device."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    device = cached.split_model.device.type
    backends = [backend_named(name) for name in (TRIED if names is None else names)]
    if names is None:
        backends = [backend for backend in backends if backend.only_on in (None, device)]
    allowed = PRECISIONS[: PRECISIONS.index(precision) + 1]
    return Race(backends, allowed, cached.task, cached.certificate.tolerance)


def _summarize(model: OptimizedModel, precision: str, race: Race, latency: Sequence[LatencyRatio]) -> None:
    model.summary["optimized"] = {
        "precision": precision,
        "hardware": model.origin.hardware,
        "parts": [asdict(choice) for choice in model.origin.choices],
        "full_model": [asdict(tried) for tried in race.full_model],
        "left_out": race.left_out,
        "latency": [
            {"batch_size": one.batch_size, "full_ms": one.full_mean_ms, "cached_ms": one.cached_mean_ms}
            for one in latency
        ],
    }


# -- the inputs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Distinct rows of the stream in random order, each in one part only."""

    sample: Batch
    tune: Batch
    certify: Batch

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(sorted(self.certify.row_keys()))).hexdigest()


def _dealt(cached: CachedModel, stream: Iterable[object], seed: int) -> _Rows:
    """Which row goes where depends on the row and the seed alone."""
    split, certificate = cached.split_model, cached.certificate
    drawn = _drawn(stream, split, seed)
    tune = int(TUNE_SHARE * (len(drawn) - CALIBRATION_ROWS))
    left = len(drawn) - CALIBRATION_ROWS - tune
    needed = inputs_needed(certificate.tolerance, certificate.confidence_level)
    if left < needed:
        raise StreamError(
            f"too few inputs to certify anything: {len(drawn)} different ones, of which {max(left, 0)} are left to "
            f"certify on; at least {needed} are needed, better three times as many"
        )
    ends = [0, CALIBRATION_ROWS, CALIBRATION_ROWS + tune, len(drawn)]
    sample, tuning, certifying = (drawn.rows(slice(a, b)) for a, b in itertools.pairwise(ends))
    return _Rows(sample.to(split.device), tuning, certifying)


def _drawn(stream: Iterable[object], split: SplitModel, seed: int) -> Batch:
    """Distinct rows of the stream, no more than can be kept: those with the smallest marks, a fair draw."""
    held, marks, count, most = list[Batch](), list[NDArray[np.uint64]](), 0, MOST_ROWS
    for batch in read_stream(stream, split.backbone):
        most = max(1, min(MOST_ROWS, MOST_BYTES // sum(tensor[0].nbytes for tensor in batch.tensors)))
        held.append(batch.to("cpu"))
        marks.append(_marks(batch, seed))
        count += len(batch)
        if count > 2 * most:
            held, marks = _smallest(held, marks, most)
            count = len(held[0])
    if not held:
        raise StreamError("the stream is empty: it yielded no inputs; expected some thousand unlabelled inputs")
    return _smallest(held, marks, most)[0][0]


def _marks(batch: Batch, seed: int) -> NDArray[np.uint64]:
    """A random number for each row, the same for equal rows."""
    keyed = (hashlib.blake2b(key, digest_size=8, key=str(seed).encode()).digest() for key in batch.row_keys())
    return np.frombuffer(b"".join(keyed), dtype=np.uint64)


def _smallest(
    held: Sequence[Batch], marks: Sequence[NDArray[np.uint64]], most: int
) -> tuple[list[Batch], list[NDArray[np.uint64]]]:
    distinct, first = np.unique(np.concatenate(marks), return_index=True)
    return [concatenated(held).rows(torch.from_numpy(first[:most]))], [distinct[:most]]


# -- what the parts say ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Said:
    """What the caches say when all stages run, and whether the two ways to the end agree with the backbone."""

    records: Records
    stages_agree_N: NDArray[np.bool_]
    full_agrees_N: NDArray[np.bool_]

    def errors(self, plan: Candidate) -> int:
        """How many rows this plan answers otherwise than the backbone."""
        left_at_N, disagrees_N = outcomes(self.records, plan.thresholds_K)
        to_the_end_N = left_at_N == len(plan.thresholds_K)
        return int(np.where(to_the_end_N, ~self.stages_agree_N, disagrees_N).sum())

    @property
    def full_errors(self) -> int:
        return int((~self.full_agrees_N).sum())


def _observe(task: Classification, layout: Layout, rows: Batch, expected_N: Tensor, size: int, running: Bar) -> _Said:
    """Run everything on all rows, `size` at a time. expected_N: the backbone's answers to them."""
    parts = []
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        batch = rows.rows(chunk).to(layout.split.device)
        parts.append(_observe_batch(task, layout.split, layout.caches, batch, expected_N[chunk]))
        running.advance(len(batch))
    confidence, answer, agreement, backbone, stages, full = (
        torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)
    )
    names = [cache.name for cache in layout.caches]
    reads_K = tuple(-1 if cache.reads is None else names.index(cache.reads) for cache in layout.caches)
    return _Said(Records(confidence, answer, agreement, backbone, reads_K), stages, full)


def _observe_batch(
    task: Classification, split: SplitModel, caches: Sequence[Cache], batch: Batch, expected_B: Tensor
) -> tuple[Tensor, ...]:
    said = say_all(split, caches, task, batch)
    full_B = task.answer(task.logits(split.full_leaves(batch)))
    agree = functools.partial(task.agree, other_B=expected_B)
    agrees_BK = task.agree(said.answer_BK, expected_B[:, None])
    return said.confidence_BK, said.answer_BK, agrees_BK, expected_B, agree(said.end_B), agree(full_B)


# -- which caches, which thresholds, which certificate ---------------------------------------------


@dataclass(frozen=True)
class _Tuned:
    """A layout, what it costs, and plans for it in the order of testing; the first has no caches."""

    layout: Layout
    costs: CostTable
    path: tuple[Candidate, ...]


@dataclass(frozen=True)
class _Setting:
    """All that was decided about a model."""

    layout: Layout
    costs: CostTable
    plan: Plan
    certificate: Certificate


@dataclass(frozen=True)
class _Job:
    """One call of `optimize`, on these rows."""

    base: CachedModel
    rows: _Rows
    show: bool

    @functools.cached_property
    def tune_answers(self) -> Tensor:
        return self._answers(self.rows.tune)

    @functools.cached_property
    def certify_answers(self) -> Tensor:
        return self._answers(self.rows.certify)

    def _answers(self, rows: Batch) -> Tensor:
        """(N,) those of the backbone as the user gave it; asked once, MANY rows at a time: nothing here is slower."""
        split, task = self.base.split_model, self.base.task
        chunks = (rows.rows(slice(start, start + MANY)).to(split.device) for start in range(0, len(rows), MANY))
        return torch.cat([task.answer(task.logits(split.backbone_leaves(chunk))) for chunk in chunks])

    def tuned(self, race: Race) -> _Tuned:
        """The caches that are worth their cuts, on their fastest back ends, and the path of plans."""
        while lost := self._uncertifiable(race):
            race.leave_out(lost)
        names = [planned.name for planned in self.base.plan.caches]
        while True:
            layout, costs, records = self._observed(names, race)
            if records is None:
                return _Tuned(layout, costs, (Candidate((), 0.0, 1.0, ()),))
            path, miss_price = self._path(records, costs)
            worth = worthwhile(records, costs, self.base.certificate.tolerance, miss_price)
            used = _used(layout, path, self.base.certificate.tolerance)
            kept = [name for name in worth if name in used or not used]  # none: where no estimate is within reach
            if len(kept) == len(names):
                return _Tuned(layout, costs, path)
            names = kept  # with fewer cuts, others may no longer pay

    def _path(self, records: Records, costs: CostTable) -> Priced:
        tolerance = self.base.certificate.tolerance
        return steady_path(
            records,
            CacheCosts(*shares(costs)),
            PATH_REACH * tolerance,
            tolerance,
            alone=CacheCosts(*shares(costs, [ONE])),
            full=1 / stages_share(costs, [ONE]),
        )

    def _observed(self, names: Sequence[str], race: Race) -> tuple[Layout, CostTable, Records | None]:
        """What these caches say of the tune rows, one at a time; None where there are no caches."""
        layout = lay_out(self.base, names, race, self.rows.sample, show=self.show)
        costs = _costs(self.base, layout)
        if not layout.caches:
            return layout, costs, None
        with bar("tuning", len(self.rows.tune), show=self.show) as running:
            said = _observe(self.base.task, layout, self.rows.tune, self.tune_answers, ONE, running)
            return layout, costs, said.records

    def _uncertifiable(self, race: Race) -> dict[tuple[str, str], str]:
        """The back ends and lower precisions in which the full model differs on so many tune rows that it would not be
        certified, for one row or for many, and why. With these, the model could have no caches either."""
        layout = lay_out(self.base, (), race, self.rows.sample, show=self.show)
        choices, lost = layout.parts[FULL].choices, dict[tuple[str, str], str]()
        if all(choice.precision == FLOAT32 for choice in choices):
            return lost
        certificate, n, certifying = self.base.certificate, len(self.rows.tune), len(self.rows.certify)
        tolerance = certificate.tolerance
        said = self._said("tuning", layout, self.rows.tune, self.tune_answers)
        for choice, side in zip(choices, said, strict=True):
            rate = side.full_errors / n
            passes = rate < tolerance and inputs_needed(tolerance, certificate.confidence_level, rate) <= certifying
            if choice.precision != FLOAT32 and not passes:
                lost[choice.kind] = (
                    f"the full model answers {side.full_errors} of {n} tuning inputs differently there, too many to "
                    f"certify {100 * tolerance:g} % on {certifying}"
                )
        return lost

    def certified(self, tuned: _Tuned) -> tuple[_Setting, Certificate]:
        """The cheapest plan that passes, or the full model in float32 where nothing does; and the full model's own
        certificate.

        One sequence of hypotheses: the full model for one row, for many; then each plan for one row, for many. All up
        to the first that fails hold together, so it does not matter which of the programs answers a request.
        """
        base, layout, n = self.base, tuned.layout, len(self.rows.certify)
        said = self._said("certifying", layout, self.rows.certify, self.certify_answers)
        errors = [side.full_errors for side in said]
        errors += [side.errors(plan) for plan in tuned.path[1:] for side in said]
        tolerance, level = base.certificate.tolerance, base.certificate.confidence_level
        verdict = certify(errors, n, tolerance, level)
        recounted = dataclasses.replace(
            base.certificate,
            n=n,
            errors=0,
            bound=0.0,
            procedure="fixed-sequence testing of one row and of many, exact binomial bound",
            candidates_tested=verdict.candidates_tested,
            data_fingerprint=self.rows.fingerprint,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            advice=verdict.advice,
        )
        last = (verdict.index + 1) // len(said) - 1
        if last < 0:
            why = (
                "the full model itself could not be certified in lower precision, so it runs in float32, without caches"
            )
            plan = Plan(reason=f"{why}. {verdict.advice}")
            return self.without_caches(layout, plan, recounted, in_float32=True), recounted

        def certificate(tested: int) -> Certificate:
            worst = max(errors[len(said) * tested : len(said) * (tested + 1)])
            return dataclasses.replace(recounted, errors=worst, bound=upper_bound(worst, n, level))

        plan = _plan(base, layout, tuned.path[last], verdict.advice)
        if not plan.caches:
            return self.without_caches(layout, plan, certificate(0)), certificate(0)
        return _Setting(layout, tuned.costs, plan, certificate(last)), certificate(0)

    def _said(self, doing: str, layout: Layout, rows: Batch, answers_N: Tensor) -> list[_Said]:
        """By the programs for one row, and by those for many. answers_N: the backbone's."""
        with bar(doing, 2 * len(rows), show=self.show) as running:
            return [_observe(self.base.task, layout, rows, answers_N, size, running) for size in (ONE, MANY)]

    def without_caches(
        self, layout: Layout, plan: Plan, certificate: Certificate, *, in_float32: bool = False
    ) -> _Setting:
        """The full model alone, where the plan has turned out to be empty."""
        layout = layout.without_caches(in_float32=in_float32)
        return _Setting(layout, _costs(self.base, layout), plan, certificate)


def _used(layout: Layout, path: Sequence[Candidate], tolerance: float) -> list[str]:
    """The caches that answer in the cheapest plan within the tolerance and in that beyond it which may be certified as
    well: estimates on tune run high. In the final plan, a cache that is not used would still cost its cut."""
    plans = [cheapest_within(path, reach * tolerance).thresholds_K for reach in (1.0, CERTIFIED_REACH)]
    on_K = np.isfinite(np.array(plans)).all(axis=0).tolist()
    return [cache.name for cache, on in zip(layout.caches, on_K, strict=True) if on]


def _plan(cached: CachedModel, layout: Layout, candidate: Candidate, advice: str) -> Plan:
    named = {planned.name: planned for planned in cached.plan.caches}
    planned = tuple(
        dataclasses.replace(named[cache.name], threshold=float(threshold), hit_rate=float(hit_rate))
        for cache, threshold, hit_rate in zip(layout.caches, candidate.thresholds_K, candidate.hit_rates_K, strict=True)
        if np.isfinite(threshold)
    )
    if planned:
        return Plan(planned, candidate.disagreement, candidate.cost)
    return Plan(reason=cached.plan.reason or f"no cache saves more than it costs here. {advice}".strip())


# -- costs -----------------------------------------------------------------------------------------


def _costs(cached: CachedModel, layout: Layout) -> CostTable:
    """Times measured now; FLOPs and sizes, which other runtimes do not tell, from the table of the model as it was."""
    before, split, names = cached.costs, layout.split, [point.name for point in cached.split_model.points]
    starts = [*(names.index(point.name) for point in split.points), len(names)]
    timed = measure(split, batch_sizes=BATCH_SIZES, budget_s=COSTS_S)
    timed = measure_caches(timed, split, layout.caches, budget_s=COSTS_S)
    stages = [
        _with_sizes(now, before.stages[a:b])
        for now, (a, b) in zip(timed.stages, itertools.pairwise(starts), strict=True)
    ]
    named = {part.name: part for part in before.caches}
    looked_up = [_with_sizes(now, [named[now.name]]) for now in timed.caches]
    full = _with_sizes(timed.backbone, [before.backbone])
    return dataclasses.replace(timed, backbone=full, stages=tuple(stages), caches=tuple(looked_up))


def _with_sizes(now: PartCost, then: Sequence[PartCost]) -> PartCost:
    flops = sum(part.flops for part in then)
    parameters, size = sum(part.parameters for part in then), sum(part.parameter_bytes for part in then)
    return dataclasses.replace(now, flops=flops, parameters=parameters, parameter_bytes=size)


# -- the model -------------------------------------------------------------------------------------


def _assembled(base: CachedModel, setting: _Setting, sample: Batch) -> OptimizedModel:
    layout, plan = setting.layout, setting.plan
    origin = Origin(base, sample, layout.choices, tuple(cache.name for cache in layout.caches), hardware())
    costs = setting.costs.of([planned.name for planned in plan.caches])
    return model_of(origin, layout, plan, setting.certificate, costs)
