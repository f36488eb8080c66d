"""A cached model laid out in parts, each on a back end: a run of stages, one look-up of a cache, or the full model.

A part is what runs between two places where the plan decides. `lay_out` walks through the model and asks a builder for
each: `Race` builds it on every back end, compares it with the module that it stands for, times it beside it for one row
and for many, and takes the fastest; `Recipe` builds what a race has found before. The full model is a part like the
others, so caches are compared with the fastest full model and not with a slow one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from offramp.backends import Backend, Difference, backend_named, compare
from offramp.caches import Cache
from offramp.cost import race, synchronizer
from offramp.errors import BackendError
from offramp.model import CachedModel
from offramp.progress import Bar, bar
from offramp.splitting import SplitModel, in_a_row
from offramp.streams import Batch
from offramp.tasks import Classification

log = logging.getLogger("offramp")

ONE, MANY = 1, 32  # rows that a part is timed with
FULL = "full model"
EAGER, FLOAT32 = "eager", "float32"
SAMPLE_SLACK = 3.0  # inputs of the sample that may differ by chance
RACE_S = 0.5  # for one part and number of rows, or three turns of each where these take longer
COMPARED_ROWS = 4  # that are compared one by one
# Times the fastest: where the full model takes longer, for one row and for many, its parts are not built. Building
# takes most of the time of an optimization, and a runtime that is far behind on the whole has not won a stage of it.
FAR_BEHIND = 2.0
# Every runtime has threads of its own. After a call they stay awake for a while and slow down what another runtime does
# next, torch's for longest. A race between parts by themselves does not see it, so a part on other threads than those
# of the full model has to win by this.
SPINNING = frozenset({EAGER, "compile", "aotinductor"})
SPIN_MS, SWITCH_MS = 5.0, 0.5


@dataclass(frozen=True)
class Choice:
    """Where one part runs for so many rows, and what that brought.

    difference: the largest from the module's output, relative to the largest number in it.
    """

    part: str
    rows: int
    backend: str
    precision: str
    ms: float
    eager_ms: float
    difference: float

    @property
    def kind(self) -> tuple[str, str]:
        return self.backend, self.precision


@dataclass(frozen=True)
class Tried:
    """What one back end made of the full model: milliseconds for one row and for many, the difference as in `Choice`,
    and the share of the sample that it answers otherwise than the module."""

    backend: str
    precision: str
    one_ms: float
    many_ms: float
    difference: float
    disagreement: float

    @property
    def kind(self) -> tuple[str, str]:
        return self.backend, self.precision


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
class PlacedPart:
    """A part of the layout, where it runs, and the same in float32."""

    module: Fastest
    choices: tuple[Choice, ...]
    in_float32: PlacedPart | None = None


class Builder(Protocol):
    """Builds a part for inputs like these, which are a module's on the rows of the sample."""

    def part(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> PlacedPart: ...


@dataclass(frozen=True)
class Layout:
    """The model with these caches on its back ends. `parts` are in the order in which they were built."""

    split: SplitModel
    caches: tuple[Cache, ...]
    parts: Mapping[str, PlacedPart]

    @property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(choice for part in self.parts.values() for choice in part.choices)

    def without_caches(self, *, in_float32: bool = False) -> Layout:
        """The full model alone."""
        full = self.parts[FULL]
        full = full.in_float32 or full if in_float32 else full
        return Layout(self.split.merged(()).running_on([full.module], full.module), (), {FULL: full})


def exceeds(share: float, rows: int, tolerance: float) -> bool:
    """Whether this share of so many rows of a sample is more than the tolerance, and more than a few by chance."""
    return share > max(tolerance, SAMPLE_SLACK / rows)


def lay_out(cached: CachedModel, names: Sequence[str], builder: Builder, sample: Batch, *, show: bool) -> Layout:
    """The model with these of its caches, cut where they sit; `sample` flows through it as each part is built."""
    kept = [cast(Cache, cache) for cache in cached.caches if cache.name in names]
    split = cached.split_model.merged({cache.point for cache in kept})
    with bar("building parts", None, show=show) as running:
        build = _Walk(builder, running)
        live = split.flatten(sample)
        full = build.part(FULL, in_a_row(split.stages), live)
        stages, caches, said = [], list[Cache](), dict[str, Tensor]()
        ends = [*(point.name for point in split.points[1:]), "the end"]
        whole = len(split.stages) == 1
        for position, (point, stage, end) in enumerate(zip(split.points, split.stages, ends, strict=True)):
            for cache in (cache for cache in kept if cache.point == point.name):
                caches.append(build.cache(cache, split.activation(position, live), said))
            stages.append(full if whole else build.part(f"{point.name} to {end}", stage, live))
            live = stage(*live)
    return Layout(split.running_on(stages, full), tuple(caches), build.parts)


class _Walk:
    """What was built on the way through a model."""

    def __init__(self, builder: Builder, running: Bar) -> None:
        self.builder, self.running, self.parts = builder, running, dict[str, PlacedPart]()

    def part(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> Fastest:
        self.running.note(name)
        self.parts[name] = self.builder.part(name, module, inputs)
        self.running.advance()
        return self.parts[name].module

    def cache(self, cache: Cache, activation: Tensor, said: dict[str, Tensor]) -> Cache:
        read = () if cache.reads is None else (said[cache.reads],)
        said[cache.name] = cache.look_up(activation, *read)[0]
        inputs = OptimizedCache(cache, nn.Identity()).feature(activation), *read
        return OptimizedCache(cache, self.part(f"cache {cache.name}", _LookUp(cache).eval(), inputs))


# -- the race --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Built:
    """One part on one back end: for one row, and for more."""

    backend: str
    precision: str
    one: Callable[..., Any]
    many: Callable[..., Any]
    difference: float = 0.0
    disagreement: float = 0.0  # of the full model alone

    @property
    def kind(self) -> tuple[str, str]:
        return self.backend, self.precision


class Race:
    """Builds every part on every back end, and keeps the fastest, woken threads included. A part that was built is not
    built again, unless `leave_out` was called since.

    `left_out` says what was not taken, and why; `full_model`, how the full model did on each back end. A precision in
    which it differs from the backbone on more of the sample than `tolerance` is left out of all parts, and so is a back
    end on which it is far behind.
    """

    def __init__(
        self, backends: Sequence[Backend], precisions: Sequence[str], task: Classification, tolerance: float
    ) -> None:
        self.task, self.tolerance = task, tolerance
        self.left_out: list[str] = []
        self.full_model: list[Tried] = []
        self.kinds = [
            (backend, precision)
            for backend, precision in itertools.product(filter(self._is_here, backends), precisions)
            if precision in backend.precisions and (backend.name, precision) != (EAGER, FLOAT32)
        ]
        self._slow: dict[tuple[Backend, str], str] = {}  # kinds that were left out for it, and what was said
        self._parts: dict[str, PlacedPart] = {}

    def _is_here(self, backend: Backend) -> bool:
        if problem := backend.missing():
            self._leave_out(f"{backend.name} cannot be used here: {problem}")
        return problem is None

    def part(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> PlacedPart:
        if name not in self._parts:
            built = list(self._built(name, module, inputs))
            times = {rows: _timed(built, inputs, rows) for rows in (ONE, MANY)}
            exact = [other for other in built if other.precision == FLOAT32]
            won = functools.partial(_won, name, times=times, homes=self._homes(inputs))
            self._parts[name] = dataclasses.replace(won(built), in_float32=won(exact))
            if name == FULL:
                before = [tried for tried in self.full_model if tried.kind not in times[ONE]]
                self.full_model = before + [_tried(other, *times.values()) for other in built]
                self._leave_out_slow(times)
        return self._parts[name]

    def leave_out(self, reasons: Mapping[tuple[str, str], str]) -> None:
        """From now on without these back ends in these precisions; all parts are raced anew, and no other kind is far
        behind until then: it may have been behind these."""
        for why in self._slow.values():
            self.left_out.remove(why)
        kinds = [*self.kinds, *self._slow]
        self.kinds = [(backend, precision) for backend, precision in kinds if (backend.name, precision) not in reasons]
        self._slow.clear()
        self._parts.clear()
        for (backend, precision), why in reasons.items():
            self._leave_out(f"{backend} in {precision}: {why}")

    def _homes(self, inputs: Sequence[Tensor]) -> Mapping[int, str]:
        """On which back end the full model, which is raced first, runs so many rows; where threads cannot be in each
        other's way, nothing."""
        if FULL not in self._parts or inputs[0].device.type != "cpu" or torch.get_num_threads() == 1:
            return {}
        return {choice.rows: choice.backend for choice in self._parts[FULL].choices}

    def _leave_out_slow(self, times: Mapping[int, Mapping[tuple[str, str], float]]) -> None:
        """Without the kinds on which the full model takes far longer than on the fastest, for one row and for many."""
        for backend, precision in list(self.kinds):
            kind = backend.name, precision
            behind = min(ms.get(kind, 0.0) / min(ms.values()) for ms in times.values())
            if behind > FAR_BEHIND:
                self.kinds.remove((backend, precision))
                self._slow[backend, precision] = (
                    f"{backend.name} in {precision}: the full model takes at least {behind:.1f} times as long there as "
                    "on the fastest; not tried on its parts"
                )
                self._leave_out(self._slow[backend, precision])

    def _built(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[_Built]:
        """The module itself, and all that can be built of it and is close enough to it."""
        yield _Built(EAGER, FLOAT32, module, module)
        expected = _Expected(module, inputs)
        for backend, precision in list(self.kinds):
            try:
                built = _build(backend, precision, module, inputs)
                difference = expected.compare(built)
                if precision == FLOAT32 and not difference.within:
                    raise BackendError(
                        f"{backend.name} in float32 differs from eager by {difference.relative:.1e} of the largest "
                        "number"
                    )
            except BackendError as error:
                self._leave_out(f"{name}: {error}")
                continue
            built = dataclasses.replace(built, difference=difference.relative)
            if name == FULL:
                built = dataclasses.replace(built, disagreement=self._disagreement(built, expected))
                if exceeds(built.disagreement, len(inputs[0]), self.tolerance):
                    self.kinds.remove((backend, precision))
                    self._leave_out(
                        f"{backend.name} in {precision}: the full model answers {100 * built.disagreement:.1f} % of "
                        f"{len(inputs[0])} inputs differently there, more than the tolerance of "
                        f"{100 * self.tolerance:g} %"
                    )
                    continue
            yield built

    def _disagreement(self, built: _Built, expected: _Expected) -> float:
        """The share of the sample that the full model alone answers otherwise there."""
        answers = (self.task.answer(self.task.logits(one)) for one in (built.many(*expected.inputs), expected.output))
        return 1 - float(self.task.agree(*answers).double().mean())

    def _leave_out(self, why: str) -> None:
        if why not in self.left_out:  # parts can be built again
            self.left_out.append(why)
            log.info("left out: %s", why)


class _Expected:
    """What a module says of the sample: of all rows at once, and of the first ones one by one."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.inputs, self.output = inputs, module(*inputs)
        self.each = [tuple(tensor[row : row + 1] for tensor in inputs) for row in range(COMPARED_ROWS)]
        self.of_each = [module(*row) for row in self.each]

    def compare(self, built: _Built) -> Difference:
        difference = compare(built.many(*self.inputs), self.output)
        for row, expected in zip(self.each, self.of_each, strict=True):
            difference |= compare(built.one(*row), expected)
        return difference


def _build(backend: Backend, precision: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> _Built:
    """Raises BackendError where that cannot be built."""
    example = tuple(tensor[:4] for tensor in inputs)
    many = one = backend.build(module, example, precision=precision, calibration=[inputs])
    if backend.faster_static:
        one = backend.build(module, example, precision=precision, calibration=[inputs], static_rows=ONE)
    return _Built(backend.name, precision, one.run, many.run)  # each gets what another gave


def _timed(built: Sequence[_Built], inputs: tuple[Tensor, ...], rows: int) -> dict[tuple[str, str], float]:
    """The milliseconds of one call with so many rows, by back end and precision."""
    given = tuple(tensor[:rows].clone() for tensor in inputs)
    calls = [functools.partial(other.one if rows == ONE else other.many, *given) for other in built]
    times = race(calls, budget_s=RACE_S, synchronize=synchronizer(inputs[0].device))
    return {other.kind: time.median_ms for other, time in zip(built, times, strict=True)}


def _tried(built: _Built, one: Mapping[tuple[str, str], float], many: Mapping[tuple[str, str], float]) -> Tried:
    return Tried(*built.kind, one[built.kind], many[built.kind], built.difference, built.disagreement)


def _won(
    name: str, built: Sequence[_Built], times: Mapping[int, Mapping[tuple[str, str], float]], homes: Mapping[int, str]
) -> PlacedPart:
    """The fastest for one row and for many, threads that are woken beside those of the full model included."""
    fastest, choices = [], []
    for rows, ms in times.items():
        best = min(built, key=lambda other: ms[other.kind] + _woken_ms(other.backend, homes.get(rows, other.backend)))
        choices.append(Choice(name, rows, *best.kind, ms[best.kind], ms[EAGER, FLOAT32], best.difference))
        fastest.append(best)
    return PlacedPart(Fastest(fastest[0].one, fastest[1].many), tuple(choices))


def _woken_ms(backend: str, home: str) -> float:
    """What it costs to run a part here, where the full model is at home on the other."""
    if backend == home or {backend, home} <= SPINNING:  # these share torch's threads
        return 0.0
    return SPIN_MS if backend in SPINNING else SWITCH_MS


# -- once more -------------------------------------------------------------------------------------


class Recipe:
    """Builds each part where these choices say. Raises BackendError where that cannot be."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._choices = {(choice.part, choice.rows): choice for choice in choices}

    def part(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> PlacedPart:
        choices = tuple(self._choices[name, rows] for rows in (ONE, MANY))
        built = {kind: self._build(*kind, module, inputs) for kind in dict.fromkeys(choice.kind for choice in choices)}
        one, many = (built[choice.kind] for choice in choices)
        return PlacedPart(Fastest(one.one, many.many), choices)

    @staticmethod
    def _build(backend: str, precision: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> _Built:
        if (backend, precision) == (EAGER, FLOAT32):
            return _Built(EAGER, FLOAT32, module, module)
        return _build(backend_named(backend), precision, module, inputs)
