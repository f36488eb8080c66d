"""A cached model on other runtimes: every part on the back end that is fastest for it here, and certified again.

A part is what runs between two places where the plan decides: a run of stages, or one look-up of a cache. It is built
on each back end, compared with the module that it stands for, and timed beside it for one row and for many. The full
model is offered the same back ends, so that caches are compared with the fastest full model and not with a slow one.

Lower precision changes answers, and so does, at ties, another order of summation. So the thresholds are chosen anew on
what the parts say, and the result is certified against the backbone as the user gave it, for one row and for many:
these may run on different back ends.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.backends import Backend, backend_named, check
from offramp.caches import Cache
from offramp.calibration import certify, inputs_needed, upper_bound
from offramp.choosing import BATCH_SIZES, PATH_REACH, never_slower
from offramp.cost import measure, measure_caches, race, shares, synchronizer
from offramp.errors import BackendError, InputError, StreamError
from offramp.evaluation import compare_latency, say_all
from offramp.model import CachedModel
from offramp.placement import CacheCosts, Candidate, outcomes, plan_path
from offramp.progress import Bar, bar
from offramp.splitting import SplitModel, in_a_row
from offramp.streams import Batch, concatenated, read_stream
from offramp.tasks import Classification
from offramp.types import Certificate, CostTable, LatencyRatio, PartCost, Plan, Records

log = logging.getLogger("offramp")

PRECISIONS = ("float32", "bfloat16", "int8")
TRIED = ("eager", "compile", "onnxruntime", "openvino", "cudagraphs")  # AOTInductor's kernels are those of "compile"
ONE, MANY = 1, 32  # rows that a part is timed with
FULL = "full model"
SAMPLE_SLACK = 3.0  # inputs of the sample that may differ by chance
RACE_S = 0.5  # for one part and number of rows
CALIBRATION_ROWS = 256  # from the beginning of the stream, for "int8" and for timing; used for nothing else
TUNE_SHARE = 1 / 3  # of the other rows; the rest certifies
LATENCY_S, COSTS_S = 2.0, 5.0


@dataclass(frozen=True)
class Choice:
    """Where one part runs, and what that brought. difference: the largest from the module's output, relative to the
    largest number in it."""

    part: str
    rows: int
    backend: str
    precision: str
    ms: float
    eager_ms: float
    difference: float


def optimize(
    cached: CachedModel,
    stream: Iterable[object],
    *,
    backends: Sequence[str] | None = None,
    precision: str = "float32",
    seed: int = 0,
    progress: bool = True,
) -> CachedModel:
    """The same caches on the fastest back ends for this machine, tuned and certified again; `cached` stays as it is.

    stream: unlabelled inputs that the fit has not seen, as many as a fit takes for certification. backends: those to
    try, by name (`offramp.backends.BACKENDS`); by default all that are installed and run on the model's device.
    precision: the lowest allowed: "float32", "bfloat16" or "int8". Tolerance and confidence level: those of `cached`.

    A back end that is missing, fails or differs from eager in float32 is left out, and `summary["optimized"]` says so.
    The result runs on this hardware and with as many threads as torch has now; it cannot be saved.

    Raises InputError for arguments that do not fit, StreamError when the stream is too short.
    """
    chosen, precisions = _backends(backends, cached.split_model.device), _precisions(precision)
    if cached.split_model.optimized:
        raise InputError("this model is optimized already; pass the one that it was made from")
    tolerance, level = cached.certificate.tolerance, cached.certificate.confidence_level
    sample, rows = _dealt(cached, stream, seed, inputs_needed(tolerance, level))
    with torch.inference_mode(mode=False), torch.no_grad():
        parts = _Parts(cached, sample, chosen, precisions, show=progress)
        layout = parts.layout([planned.name for planned in cached.plan.caches])
        kept = _worthwhile(cached, layout, rows)
        if len(kept) < len(layout.caches):  # fewer caches cut the model into fewer, longer parts
            layout = parts.layout(kept)
        model, of_full_model = _certified(cached, layout, parts.full_float32, rows, progress=progress)
        latency: tuple[LatencyRatio, ...] = ()
        if model.plan.caches:
            latency = compare_latency(model, sample, BATCH_SIZES, LATENCY_S)
            plan = never_slower(model.plan, latency)
            model = _assembled(cached, layout, plan, model.certificate if plan.caches else of_full_model)
    model.summary["optimized"] = {
        "precision": precision,
        "parts": [asdict(choice) for choice in parts.choices_of(layout)],
        "left_out": parts.left_out,
        "latency": [
            {"batch_size": one.batch_size, "full_ms": one.full_mean_ms, "cached_ms": one.cached_mean_ms}
            for one in latency
        ],
    }
    return model


def uncertified(
    cached: CachedModel, sample: Batch, *, backends: Sequence[str] | None = None, precision: str = "float32"
) -> CachedModel:
    """All caches of `cached`, under its thresholds, on the fastest back ends: for timing, and for nothing else.

    sample: some hundred rows, which calibrate and time the parts. Lower precision changes answers, so the certificate's
    bound is 1. The other arguments and the errors are those of `optimize`.
    """
    tried, precisions = _backends(backends, cached.split_model.device), _precisions(precision)
    with torch.inference_mode(mode=False), torch.no_grad():
        parts = _Parts(cached, sample, tried, precisions, show=False)
        layout = parts.layout([planned.name for planned in cached.plan.caches])
        none = dataclasses.replace(cached.certificate, n=0, errors=0, bound=1.0, procedure="none: for timing only")
        model = _assembled(cached, layout, cached.plan, none)
    model.summary["optimized"] = {
        "precision": precision,
        "parts": [asdict(choice) for choice in parts.choices_of(layout)],
        "left_out": parts.left_out,
    }
    return model


def _backends(names: Sequence[str] | None, device: torch.device) -> list[Backend]:
    if names is not None:
        return [backend_named(name) for name in names]
    return [backend for backend in map(backend_named, TRIED) if backend.only_on in (None, device.type)]


def _precisions(lowest: str) -> tuple[str, ...]:
    if lowest not in PRECISIONS:
        raise InputError(f"unknown precision {lowest!r}; known: {', '.join(PRECISIONS)}")
    return PRECISIONS[: PRECISIONS.index(lowest) + 1]


# -- the inputs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Rows to tune and to certify on, distinct and in random order; the first `tune` of them tune."""

    batch: Batch
    tune: int
    fingerprint: str


def _dealt(cached: CachedModel, stream: Iterable[object], seed: int, needed: int) -> tuple[Batch, _Rows]:
    """A sample for calibration and timing, and the rows of the rest. Which row goes where depends on the seed alone."""
    split = cached.split_model
    read = list(read_stream(stream, split.backbone))
    if not read:
        raise StreamError("the stream is empty: it yielded no inputs; expected some thousand unlabelled inputs")
    everything = concatenated(read)
    keys = everything.row_keys()
    first_of = {key: number for number, key in reversed(list(enumerate(keys)))}
    order = np.random.default_rng(seed).permutation(sorted(first_of.values()))
    tune = int(TUNE_SHARE * (len(order) - CALIBRATION_ROWS))
    certified = len(order) - CALIBRATION_ROWS - tune
    if certified < needed:
        raise StreamError(
            f"too few inputs to certify anything: {len(order)} different ones, of which {max(certified, 0)} are left "
            f"to certify on; at least {needed} are needed, better three times as many"
        )
    sample, rest = (everything.rows(torch.from_numpy(index)) for index in np.split(order, [CALIBRATION_ROWS]))
    digest = hashlib.sha256(b"".join(sorted(keys[number] for number in order[CALIBRATION_ROWS + tune :])))
    return sample.to(split.device), _Rows(rest, tune, digest.hexdigest())


# -- the parts -------------------------------------------------------------------------------------


class Fastest(nn.Module):
    """A part for one row and for more, each on the back end that was fastest for it."""

    def __init__(self, one: Callable[..., Any], many: Callable[..., Any]) -> None:
        super().__init__()
        self._calls = one, many  # in a tuple: not submodules, a module among them stays its owner's
        self.training = False

    def forward(self, *inputs: Tensor) -> Any:
        one, many = self._calls
        return (one if len(inputs[0]) == 1 else many)(*inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fastest:
        return self  # programs of other runtimes cannot be copied, and hold no state


class _LookUp(nn.Module):
    """A cache from its reduced activation on, as one module that says logits and confidence.

    The reduction stays in torch: it rounds to half precision, which not every runtime does.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache, self.training = cache, False

    def forward(self, feature: Tensor, *read: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC = self.cache.from_feature(feature, *read)
        return logits_BC, self.cache.confidence(logits_BC, *read)


class OptimizedCache(Cache):
    """A cache whose look-up runs elsewhere. What it is, it is by the cache that it was made of."""

    def __init__(self, cache: Cache, look_up: nn.Module) -> None:
        super().__init__(cache.name, cache.point, cache.reduction, cache.reads)
        self.original, self._look_up = cache, (look_up,)
        self.use_confidence(cache.confidence_name, cache.selector)
        self.training = False

    def feature(self, activation: Tensor) -> Tensor:
        reduced = self.reduction(activation)
        return reduced.float() if reduced.is_floating_point() else reduced

    def look_up(self, activation: Tensor, read_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        read = () if read_BC is None else (read_BC,)
        said: tuple[Tensor, Tensor] = self._look_up[0](self.feature(activation), *read)
        return said

    def from_feature(self, feature: Tensor, read_BC: Tensor | None = None) -> Tensor:
        return self.original.from_feature(feature, read_BC)

    def confidence(self, logits_BC: Tensor, read_BC: Tensor | None = None) -> Tensor:
        return self.original.confidence(logits_BC, read_BC)

    def describe(self) -> dict[str, Any]:
        return self.original.describe()


@dataclass(frozen=True)
class _Built:
    """One part on one back end: for one row, and for more."""

    backend: str
    precision: str
    one: Callable[..., Any]
    many: Callable[..., Any]
    difference: float


@dataclass(frozen=True)
class _Layout:
    """The model with these caches on its back ends, what that costs, and the parts that it runs on."""

    split: SplitModel
    caches: tuple[Cache, ...]
    costs: CostTable
    parts: tuple[str, ...]


class _Parts:
    """Builds every part on every back end, and keeps the fastest. A part that was built is not built again."""

    def __init__(
        self,
        cached: CachedModel,
        sample: Batch,
        backends: Sequence[Backend],
        precisions: Sequence[str],
        *,
        show: bool,
    ) -> None:
        self.cached, self.sample, self.show = cached, sample, show
        self.wait = synchronizer(cached.split_model.device)
        self.kinds = [
            (backend, precision)
            for backend, precision in itertools.product(backends, precisions)
            if precision in backend.precisions and (backend.name, precision) != ("eager", "float32")
        ]
        self.choices: dict[str, list[Choice]] = {}
        self.left_out: list[str] = []
        self._fastest: dict[str, tuple[Fastest, Fastest]] = {}

    @property
    def full_float32(self) -> nn.Module:
        return self._fastest[FULL][1]

    def choices_of(self, layout: _Layout) -> list[Choice]:
        return [choice for part in layout.parts for choice in self.choices[part]]

    def layout(self, names: Sequence[str]) -> _Layout:
        """The model with these of the caches."""
        kept = [cast(Cache, cache) for cache in self.cached.caches if cache.name in names]
        split = self.cached.split_model.merged({cache.point for cache in kept})
        with bar("building parts", len(split.stages) + len(kept) + 1, show=self.show) as running:
            live = split.flatten(self.sample)
            full = self._part(FULL, in_a_row(split.stages), live, running)
            stages, caches, parts, said = [], list[Cache](), [FULL], dict[str, Tensor]()
            ends = [*(point.name for point in split.points[1:]), "the end"]
            for position, (point, stage, end) in enumerate(zip(split.points, split.stages, ends, strict=True)):
                for cache in (cache for cache in kept if cache.point == point.name):
                    caches.append(self._cache(cache, split.activation(position, live), said, running))
                    parts.append(f"cache {cache.name}")
                parts.append(f"{point.name} to {end}")
                stages.append(self._part(parts[-1], stage, live, running))
                live = stage(*live)
        split = split.running_on(stages, full)
        return _Layout(split, tuple(caches), _costs(self.cached, split, caches), tuple(parts))

    def _cache(self, cache: Cache, activation: Tensor, said: dict[str, Tensor], running: Bar) -> Cache:
        read = () if cache.reads is None else (said[cache.reads],)
        said[cache.name] = cache.look_up(activation, *read)[0]
        inputs = OptimizedCache(cache, nn.Identity()).feature(activation), *read
        return OptimizedCache(cache, self._part(f"cache {cache.name}", _LookUp(cache).eval(), inputs, running))

    def _part(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], running: Bar) -> Fastest:
        """What is fastest for these inputs of the sample."""
        running.note(name)
        if name not in self._fastest:
            self._fastest[name] = self._build(name, module, inputs)
        running.advance()
        return self._fastest[name][0]

    def _build(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Fastest, Fastest]:
        """The fastest of all, and the fastest in float32."""
        built, best, exact = list(self._built(name, module, inputs)), [], []
        self.choices[name] = []
        for rows in (ONE, MANY):
            ranked = self._ranked(built, inputs, rows)
            self._note(name, rows, ranked)
            best.append(ranked[0][0])
            exact.append(next(other for other, _ in ranked if other.precision == "float32"))
        return Fastest(best[0].one, best[1].many), Fastest(exact[0].one, exact[1].many)

    def _built(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[_Built]:
        """The module itself, and all that can be built of it and is close enough to it."""
        yield _Built("eager", "float32", module, module, 0.0)
        for backend, precision in list(self.kinds):
            try:
                built = self._on(backend, precision, module, inputs)
            except BackendError as error:
                self._leave_out(f"{name}: {error}")
                continue
            if name == FULL and (why := self._too_different(built, module, inputs)):
                self.kinds.remove((backend, precision))
                self._leave_out(why)
                continue
            yield built

    def _too_different(self, built: _Built, module: nn.Module, inputs: tuple[Tensor, ...]) -> str | None:
        """Why nothing should run there, if the full model alone already exceeds the tolerance on the sample."""
        task, tolerance = self.cached.task, self.cached.certificate.tolerance
        expected_B = task.answer(task.logits(module(*inputs)))
        agree_B = task.agree(task.answer(task.logits(built.many(*inputs))), expected_B)
        differs = 1 - float(agree_B.double().mean())
        if differs <= max(tolerance, SAMPLE_SLACK / len(agree_B)):
            return None
        return (
            f"{built.backend} in {built.precision}: the full model answers {100 * differs:.1f} % of {len(agree_B)} "
            f"inputs differently there, more than the tolerance of {100 * tolerance:g} %"
        )

    def _on(self, backend: Backend, precision: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> _Built:
        """Raises BackendError where that cannot be built or, in float32, differs from the module."""
        example = tuple(tensor[:4] for tensor in inputs)
        many = one = backend.build(module, example, precision=precision, calibration=[inputs])
        if backend.faster_static:
            one = backend.build(module, example, precision=precision, calibration=[inputs], static_rows=ONE)
        each = [tuple(tensor[row : row + 1] for tensor in inputs) for row in range(4)]
        difference = check(many, module, [inputs]) | check(one, module, each)
        if precision == "float32" and not difference.within:
            raise BackendError(
                f"{backend.name} in float32 differs from eager by {difference.relative:.1e} of the largest number"
            )
        return _Built(backend.name, precision, one.run, many.run, difference.relative)  # each gets what another gave

    def _note(self, name: str, rows: int, ranked: list[tuple[_Built, float]]) -> None:
        fastest, ms = ranked[0]
        eager_ms = next(ms for other, ms in ranked if (other.backend, other.precision) == ("eager", "float32"))
        choice = Choice(name, rows, fastest.backend, fastest.precision, ms, eager_ms, fastest.difference)
        self.choices[name].append(choice)

    def _ranked(self, built: Sequence[_Built], inputs: tuple[Tensor, ...], rows: int) -> list[tuple[_Built, float]]:
        """The fastest first, with the milliseconds of one call."""
        given = tuple(tensor[:rows].clone() for tensor in inputs)
        calls = [functools.partial(other.one if rows == ONE else other.many, *given) for other in built]
        times = race(calls, budget_s=RACE_S, synchronize=self.wait)
        pairs = [(other, timing.median_ms) for other, timing in zip(built, times, strict=True)]
        return sorted(pairs, key=lambda pair: pair[1])

    def _leave_out(self, why: str) -> None:
        self.left_out.append(why)
        log.info("left out: %s", why)


# -- what the parts say ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Said:
    """What the caches say when all stages run, and whether the two ways to the end agree with the backbone."""

    records: Records
    stages_agree_N: NDArray[np.bool_]
    full_agrees_N: NDArray[np.bool_]

    def errors(self, plan: Candidate, *, from_row: int) -> int:
        """How many of the rows from `from_row` on this plan answers otherwise than the backbone."""
        records = self.records.rows(np.arange(from_row, len(self.records)))
        left_at_N, disagrees_N = outcomes(records, plan.thresholds_K)
        to_the_end_N = left_at_N == len(plan.thresholds_K)
        return int(np.where(to_the_end_N, ~self.stages_agree_N[from_row:], disagrees_N).sum())

    def full_errors(self, *, from_row: int) -> int:
        return int((~self.full_agrees_N[from_row:]).sum())


def _observe(task: Classification, layout: _Layout, rows: Batch, size: int, running: Bar) -> _Said:
    """Run everything on all rows, `size` at a time."""
    parts = []
    for start in range(0, len(rows), size):
        batch = rows.rows(slice(start, start + size)).to(layout.split.device)
        parts.append(_observe_batch(task, layout.split, layout.caches, batch))
        running.advance(len(batch))
    confidence, answer, agreement, backbone, stages, full = (
        torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)
    )
    names = [cache.name for cache in layout.caches]
    reads_K = tuple(-1 if cache.reads is None else names.index(cache.reads) for cache in layout.caches)
    return _Said(Records(confidence, answer, agreement, backbone, reads_K), stages, full)


def _observe_batch(
    task: Classification, split: SplitModel, caches: Sequence[Cache], batch: Batch
) -> tuple[Tensor, ...]:
    expected_B = task.answer(task.logits(split.backbone_leaves(batch)))
    said = say_all(split, caches, task, batch)
    full_B = task.answer(task.logits(split.full_leaves(batch)))
    agree = functools.partial(task.agree, other_B=expected_B)
    agrees_BK = task.agree(said.answer_BK, expected_B[:, None])
    return said.confidence_BK, said.answer_BK, agrees_BK, expected_B, agree(said.end_B), agree(full_B)


# -- costs, certificate, model ---------------------------------------------------------------------


def _costs(cached: CachedModel, split: SplitModel, caches: Sequence[Cache]) -> CostTable:
    """Times measured now; FLOPs and sizes, which other runtimes do not tell, from the table of the model as it was."""
    before, names = cached.costs, [point.name for point in cached.split_model.points]
    starts = [*(names.index(point.name) for point in split.points), len(names)]
    timed = measure(split, batch_sizes=BATCH_SIZES, budget_s=COSTS_S)
    timed = measure_caches(timed, split, caches, budget_s=COSTS_S)
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


def _worthwhile(cached: CachedModel, layout: _Layout, rows: _Rows) -> list[str]:
    """The caches that the best plan has, judged on tune."""
    if not layout.caches:
        return []
    tune = rows.batch.rows(slice(0, rows.tune))
    with bar("tuning", len(tune), show=False) as running:
        said = _observe(cached.task, layout, tune, ONE, running)
    tolerance = cached.certificate.tolerance
    path = plan_path(said.records, CacheCosts(*shares(layout.costs)), tolerance)
    best = min((plan for plan in path if plan.disagreement <= tolerance), key=lambda plan: plan.cost)
    return [
        cache.name for cache, threshold in zip(layout.caches, best.thresholds_K, strict=True) if np.isfinite(threshold)
    ]


def _certified(
    cached: CachedModel, layout: _Layout, full_float32: nn.Module, rows: _Rows, *, progress: bool
) -> tuple[CachedModel, Certificate]:
    """The cheapest plan that passes, or the full model in float32 where nothing does; and the full model's certificate.

    One sequence of hypotheses: the full model for one row, for many; then each plan for one row, for many. All up to
    the first that fails hold together, so it does not matter which of the programs answers a request.
    """
    tolerance, level = cached.certificate.tolerance, cached.certificate.confidence_level
    with bar("certifying", 2 * len(rows.batch), show=progress) as running:
        said = [_observe(cached.task, layout, rows.batch, size, running) for size in (ONE, MANY)]
    path: tuple[Candidate, ...] = (Candidate((), 0.0, 1.0, ()),)
    if layout.caches:
        tune = said[0].records.rows(np.arange(rows.tune))
        path = plan_path(tune, CacheCosts(*shares(layout.costs)), PATH_REACH * tolerance)
    errors = [side.full_errors(from_row=rows.tune) for side in said]
    errors += [side.errors(plan, from_row=rows.tune) for plan in path[1:] for side in said]
    n = len(rows.batch) - rows.tune
    verdict = certify(errors, n, tolerance, level)
    last = (verdict.index + 1) // len(said) - 1
    recounted = dataclasses.replace(
        cached.certificate,
        n=n,
        errors=0,
        bound=0.0,
        procedure="fixed-sequence testing of one row and of many, exact binomial bound",
        candidates_tested=verdict.candidates_tested,
        data_fingerprint=rows.fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        advice=verdict.advice,
    )
    if last < 0:
        layout = dataclasses.replace(layout, split=layout.split.running_on(layout.split.stages, full_float32))
        why = "the full model itself could not be certified in lower precision, so it runs in float32, without caches"
        return _assembled(cached, layout, Plan(reason=f"{why}. {verdict.advice}"), recounted), recounted

    def certificate(tested: int) -> Certificate:
        worst = max(errors[len(said) * tested : len(said) * (tested + 1)])
        return dataclasses.replace(recounted, errors=worst, bound=upper_bound(worst, n, level))

    plan = _plan(cached, layout, path[last], verdict.advice)
    return _assembled(cached, layout, plan, certificate(last)), certificate(0)


def _plan(cached: CachedModel, layout: _Layout, candidate: Candidate, advice: str) -> Plan:
    named = {planned.name: planned for planned in cached.plan.caches}
    planned = tuple(
        dataclasses.replace(named[cache.name], threshold=float(threshold), hit_rate=float(hit_rate))
        for cache, threshold, hit_rate in zip(layout.caches, candidate.thresholds_K, candidate.hit_rates_K, strict=True)
        if np.isfinite(threshold)
    )
    if planned:
        return Plan(planned, candidate.disagreement, candidate.cost)
    return Plan(reason=cached.plan.reason or f"no cache saves more than it costs here. {advice}".strip())


def _assembled(cached: CachedModel, layout: _Layout, plan: Plan, certificate: Certificate) -> CachedModel:
    names = {planned.name for planned in plan.caches}
    kept = [k for k, cache in enumerate(layout.caches) if cache.name in names]
    costs = dataclasses.replace(
        layout.costs,
        caches=tuple(layout.costs.caches[k] for k in kept),
        cache_points=tuple(layout.costs.cache_points[k] for k in kept),
    )
    caches = [layout.caches[k] for k in kept]
    return CachedModel(layout.split, caches, plan, certificate, costs, task=cached.task, summary=dict(cached.summary))
