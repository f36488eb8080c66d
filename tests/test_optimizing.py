"""Models on other back ends: the right parts, the same answers, an honest certificate. The back ends are made up here;
real ones have tests of their own, and one slow test at the end."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import models
import pytest
import torch
from torch import Tensor, nn

from offramp import artifact, cuts, optimizing, parts
from offramp.artifact import load, save
from offramp.backends import BACKENDS, Backend
from offramp.backends.base import Job
from offramp.caches import Cache, Reduction
from offramp.cost import flop_shares
from offramp.errors import ArtifactError, InputError, StreamError
from offramp.model import CachedModel
from offramp.optimizing import optimize, uncertified
from offramp.parts import Fastest, Layout
from offramp.placement import Candidate
from offramp.rebuilding import OptimizedModel
from offramp.splitting import split
from offramp.streams import Batch
from offramp.types import Certificate, CostTable, Plan, PlannedCache, Records, Timing

TOLERANCE, ROWS = 0.05, 700
CERTIFICATE = Certificate(TOLERANCE, 0.95, 1000, 0, 0.003, "by hand", 1, "", "", "2026-01-01")


class Knows(Cache):
    """A cache that says what the backbone would."""

    kind: ClassVar[str] = "knows"

    def __init__(self, name: str, point: str, rest: nn.Module) -> None:
        super().__init__(name, point, Reduction())
        self.rest = rest

    def from_feature(self, feature: Tensor, read_BC: Tensor | None = None) -> Tensor:
        logits: Tensor = self.rest(feature.float())
        return logits


def make() -> CachedModel:
    torch.manual_seed(0)
    backbone = models.mlp().eval()
    split_model = split(backbone, torch.randn(4, 6), points=["1", "3"])
    caches = [Knows("early", "1", backbone[2:]), Knows("late", "3", backbone[4:])]
    cached = models.cached_model(split_model)
    cached.plan = dataclasses.replace(
        cached.plan, caches=tuple(PlannedCache(cache.name, cache.point, 0.9, "max_softmax", 0.5) for cache in caches)
    )
    table = dataclasses.replace(
        cached.costs,
        caches=tuple(dataclasses.replace(models.part(cache.name, 0.1), flops=1.0) for cache in caches),
        cache_points=(1, 2),
    )
    return CachedModel(split_model, caches, cached.plan, CERTIFICATE, table, task=cached.task, summary={"a": 1})


def stream(rows: int = ROWS, seed: int = 3) -> list[Tensor]:
    return list(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)).split(100))


class Rows:
    """The module, with what it says in some rows turned round: the sign of everything."""

    stored_bytes = 0

    def __init__(self, job: Job, wrong: Callable[[Tensor], Tensor]) -> None:
        self.job, self.wrong = job, wrong

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        output = self.job.module(*inputs)
        outputs = (output,) if isinstance(output, Tensor) else output
        wrong = self.wrong(inputs[0])
        return [torch.where(wrong.view(-1, *(1,) * (one.ndim - 1)), -one, one) for one in outputs]


class Fake(Backend):
    """Wrong in the rows that `wrong` names, in these precisions; called faster than all others."""

    name = "fake"
    precisions = ("float32", "int8")

    def __init__(self, **wrong: Callable[[Tensor], Tensor]) -> None:
        self.wrong, self.calls = wrong, list[tuple[str, int | None, int]]()

    def missing(self) -> str | None:
        return None

    def program(self, job: Job) -> Any:
        rows = sum(len(given[0]) for given in job.calibration)
        self.calls.append((job.precision, job.static_rows, rows))
        which = job.precision if job.static_rows is None else f"{job.precision}_static"
        return Rows(job, self.wrong.get(which, self.wrong.get(job.precision, nowhere)))


def nowhere(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.bool)


def somewhere(share: float) -> Callable[[Tensor], Tensor]:
    """As good as random, and the same for the same row."""
    return lambda x: (x.flatten(1).double().sum(1) * 1e4).frac().abs() < share


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The last to be built is the fastest, and time counts as FLOPs do."""
    backend = Fake()

    def race(calls: Sequence[Any], **_: Any) -> list[Timing]:
        for call in calls:
            call()
        return [Timing(1 / (1 + k), 0.0, 1.0) for k in range(len(calls))]

    monkeypatch.setitem(BACKENDS, "fake", backend)
    monkeypatch.setattr(parts, "race", race)
    monkeypatch.setattr(optimizing, "shares", lambda costs, *_: flop_shares(costs))
    monkeypatch.setattr(optimizing, "stages_share", lambda costs, _: 1.0)
    monkeypatch.setattr(cuts, "shares", flop_shares)
    monkeypatch.setattr(cuts, "stages_share", lambda costs: 1.0)
    monkeypatch.setattr(optimizing, "never_slower", lambda plan, latency: plan)
    monkeypatch.setattr(optimizing, "COSTS_S", 0.05)
    monkeypatch.setattr(optimizing, "LATENCY_S", 0.01)
    return backend


def run(cached: CachedModel, **options: Any) -> OptimizedModel:
    return optimize(cached, stream(), **{"backends": ["fake"], "progress": False, **options})


def test_every_part_runs_on_the_fastest_back_end_and_answers_as_before(fake: Fake) -> None:
    cached = make()
    before = copy.deepcopy(cached.plan), cached.split_model.stages
    optimized = run(cached)
    parts = optimized.summary["optimized"]["parts"]
    assert {(part["part"], part["rows"]) for part in parts} == {
        (name, rows) for name in ("full model", "input to 1", "cache early", "1 to the end") for rows in (1, 32)
    }, "the later cache is not worth a cut"
    assert {part["backend"] for part in parts} == {"fake"}
    assert optimized.summary["a"] == 1
    assert [cache.name for cache in optimized.plan.caches] == ["early"], "it knows all that the later one does"
    x = torch.cat(stream(200, seed=9))
    for rows in (slice(0, 1), slice(0, 200)):
        torch.testing.assert_close(optimized(x[rows]), models.plain(cached, x[rows]), rtol=1e-2, atol=1e-2)
        assert optimized.predict(x[rows]).left_at_B.float().mean() < 1, "caches answer"
    assert (cached.plan, cached.split_model.stages) == before, "the model that it was made of is as it was"


@pytest.mark.parametrize(
    ("threads", "full_on", "slower_ms", "part_on"),
    [(2, "fake", 0.4, "fake"), (2, "fake", 9.0, "eager"), (1, "fake", 0.4, "eager"), (2, "eager", 0.4, "eager")],
)
def test_a_part_wakes_the_threads_of_torch_only_where_that_pays(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, threads: int, full_on: str, slower_ms: float, part_on: str
) -> None:
    """Eager is faster for the parts by themselves here."""
    assert _where(monkeypatch, threads, full_on, "eager", slower_ms) == {"full": full_on, "parts": part_on}


@pytest.mark.parametrize("full_on", ["fake", "eager"])
@pytest.mark.parametrize(("slower_ms", "moves"), [(0.4, False), (0.6, True)])
def test_other_threads_have_to_win_by_less_where_they_are_not_those_of_torch(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, full_on: str, slower_ms: float, *, moves: bool
) -> None:
    monkeypatch.setitem(BACKENDS, "other", Other())
    found = _where(monkeypatch, 2, full_on, "other", slower_ms, backends=["fake", "other"])
    assert found == {"full": full_on, "parts": "other" if moves else full_on}


class Other(Fake):
    name = "other"


def _where(
    monkeypatch: pytest.MonkeyPatch, threads: int, full_on: str, parts_on: str, slower_ms: float, **options: Any
) -> dict[str, str]:
    """Where the full model and the parts run, for one row as for many, if these are fastest by themselves."""
    timed_parts: list[str] = []

    def timed(built: Sequence[Any], inputs: tuple[Tensor, ...], rows: int) -> dict[tuple[str, str], float]:
        winner = full_on if len(timed_parts) < 2 else parts_on
        timed_parts.append(winner)
        return {other.kind: 1.0 if other.backend == winner else 1.0 + slower_ms for other in built}

    monkeypatch.setattr(parts, "_timed", timed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    told = run(make(), **options).summary["optimized"]["parts"]
    where = {("full" if one["part"] == "full model" else "parts", one["backend"]) for one in told}
    assert {one["rows"] for one in told} == {1, 32}
    assert len(where) == 2, "for one row as for many"
    return dict(where)


def test_a_cut_that_the_likely_plans_do_not_use_is_not_made(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here both caches are said to be worth their cuts, and the later one knows nothing that the earlier does not."""
    monkeypatch.setattr(optimizing, "worthwhile", lambda _, costs, *__: [one.name for one in costs.caches])
    optimized = run(make())
    assert [cache.name for cache in optimized.plan.caches] == ["early"]
    told = {one["part"] for one in optimized.summary["optimized"]["parts"]}
    assert told == {"full model", "input to 1", "cache early", "1 to the end"}


@pytest.mark.parametrize(
    ("beyond", "used"),
    [((0.9, 0.8), ["early", "late"]), ((0.9, float("inf")), ["early"]), ((float("inf"), float("inf")), [])],
)
def test_a_cache_is_used_where_plans_around_the_tolerance_agree(beyond: tuple[float, float], used: list[str]) -> None:
    off, on = Candidate((float("inf"),) * 2, 0.0, 1.0, (0.0, 0.0)), Candidate((0.9, 0.9), 0.04, 0.5, (0.5, 0.2))
    path = off, on, Candidate(beyond, 0.07, 0.4, (0.6, 0.2)), Candidate((0.1, 0.1), 0.09, 0.3, (0.7, 0.2))
    layout = Layout(make().split_model, tuple(make().caches), {})  # type: ignore[arg-type]
    assert optimizing._used(layout, path, TOLERANCE) == used


def test_caches_are_dropped_until_all_that_are_left_are_worth_their_cuts(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the last of those that are left never is."""
    asked: list[list[str]] = []

    def all_but_the_last(records: Records, costs: CostTable, *_: Any) -> list[str]:
        asked.append([cache.name for cache in costs.caches])
        return asked[-1][:-1]

    monkeypatch.setattr(optimizing, "worthwhile", all_but_the_last)
    optimized = run(make())
    assert asked == [["early", "late"], ["early"]]
    assert not optimized.plan.caches
    assert {one["part"] for one in optimized.summary["optimized"]["parts"]} == {"full model"}


def test_how_the_full_model_did_on_each_back_end_is_told(fake: Fake) -> None:
    fake.wrong["int8"] = lambda x: somewhere(0.02)(x) & (x.shape[1] == 6)
    eager, exact, low = run(make(), precision="int8").summary["optimized"]["full_model"]
    assert [(one["backend"], one["precision"]) for one in (eager, exact, low)] == [
        ("eager", "float32"),
        ("fake", "float32"),
        ("fake", "int8"),
    ]
    assert [one["one_ms"] for one in (eager, exact, low)] == pytest.approx([1, 1 / 2, 1 / 3])
    assert eager["difference"] == exact["difference"] == exact["disagreement"] == 0
    assert 0 < low["disagreement"] <= TOLERANCE
    assert low["difference"] > 0


def test_the_certificate_counts_distinct_rows_that_calibrate_and_tune_nothing(fake: Fake) -> None:
    certificate = run(make()).certificate
    rest = ROWS - optimizing.CALIBRATION_ROWS
    assert certificate.n == rest - int(rest * optimizing.TUNE_SHARE)
    assert (certificate.tolerance, certificate.confidence_level) == (TOLERANCE, 0.95)
    assert certificate.bound <= TOLERANCE
    assert certificate.data_fingerprint != CERTIFICATE.data_fingerprint
    twice = optimize(make(), [*stream(), *stream()], backends=["fake"], progress=False).certificate
    assert (twice.n, twice.data_fingerprint) == (certificate.n, certificate.data_fingerprint)


def test_a_back_end_that_fails_is_left_out_with_a_line(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(job: Job) -> Any:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(fake, "program", fails)
    optimized = run(make())
    assert len(optimized.summary["optimized"]["left_out"]) == 7
    assert "no kernel for this" in optimized.summary["optimized"]["left_out"][0]
    assert {part["backend"] for part in optimized.summary["optimized"]["parts"]} == {"eager"}
    assert optimized.plan.caches


def test_a_back_end_that_differs_in_float32_is_left_out_with_a_line(fake: Fake) -> None:
    fake.wrong["float32"] = somewhere(0.1)
    optimized = run(make())
    assert "differs from eager by" in optimized.summary["optimized"]["left_out"][0]
    assert {part["backend"] for part in optimized.summary["optimized"]["parts"]} == {"eager"}


def test_lower_precision_is_used_only_where_it_is_allowed(fake: Fake) -> None:
    assert {precision for precision, _, _ in _calls(fake, "float32")} == {"float32"}
    assert {precision for precision, _, _ in _calls(fake, "int8")} == {"float32", "int8"}
    assert {rows for _, _, rows in fake.calls} == {optimizing.CALIBRATION_ROWS}


def _calls(fake: Fake, precision: str) -> list[tuple[str, int | None, int]]:
    run(make(), precision=precision)
    return fake.calls


def test_what_the_full_model_loses_in_lower_precision_counts_as_disagreement(fake: Fake) -> None:
    fake.wrong["int8"] = lambda x: somewhere(0.02)(x) & (x.shape[1] == 6)  # parts on the input: stage 0, full model
    optimized = run(make(), precision="int8")
    certificate = optimized.certificate
    assert 0 < certificate.errors < TOLERANCE * certificate.n
    x = torch.cat(stream(3000, seed=11))
    differs = (optimized.predict(x).answer_B != models.plain(make(), x).argmax(1)).double().mean()
    assert 0 < differs <= TOLERANCE


def test_without_caches_the_certificate_is_that_of_the_full_model(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.wrong["int8"] = lambda x: somewhere(0.02)(x) & (x.shape[1] == 6)
    monkeypatch.setattr(optimizing, "never_slower", lambda plan, latency: Plan(reason="not faster"))
    optimized = run(make(), precision="int8")
    certificate = optimized.certificate
    assert optimized.plan.caches == ()
    assert 0 < certificate.errors < TOLERANCE * certificate.n
    x = torch.cat(stream(3000, seed=11))
    assert not torch.equal(optimized(x).argmax(1), models.plain(make(), x).argmax(1)), "it is in lower precision"


def test_a_precision_in_which_the_full_model_loses_too_much_is_left_out_of_every_part(fake: Fake) -> None:
    fake.wrong["int8"] = lambda x: somewhere(0.3)(x) & (x.shape[1] == 6)
    optimized = run(make(), precision="int8")
    (why,) = optimized.summary["optimized"]["left_out"]
    assert why.startswith("fake in int8: the full model answers ")
    assert {part["precision"] for part in optimized.summary["optimized"]["parts"]} == {"float32"}
    assert [precision for precision, *_ in fake.calls].count("int8") == 1, "nothing else is built in it"
    assert optimized.plan.caches


def test_a_back_end_on_which_the_full_model_is_far_behind_is_not_tried_on_its_parts(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    times_ms = 1.0, 2.0, 0.9  # eager, and the two of `fake`: float32 takes more than twice as long as int8
    monkeypatch.setattr(parts, "race", lambda calls, **_: [Timing(ms, 0.0, 1.0) for ms in times_ms[-len(calls) :]])
    optimized = run(make(), precision="int8")
    (why,) = optimized.summary["optimized"]["left_out"]
    assert why.startswith("fake in float32: the full model takes at least 2.2 times as long there")
    assert [precision for precision, *_ in fake.calls].count("float32") == 1, "nothing else is built in it"
    assert {part["precision"] for part in optimized.summary["optimized"]["parts"]} == {"int8"}


def wrong_for_one_row(fake: Fake) -> None:
    """In INT8; the sample is asked many at a time and does not show it."""
    fake.faster_static = True  # type: ignore[misc]
    fake.wrong = {"int8": nowhere, "int8_static": lambda x: somewhere(0.3)(x) & (x.shape[1] == 6)}


def test_a_precision_in_which_the_full_model_would_not_be_certified_is_left_out_and_the_caches_stay(fake: Fake) -> None:
    wrong_for_one_row(fake)
    optimized = run(make(), precision="int8")
    told = optimized.summary["optimized"]
    (why,) = told["left_out"]
    assert why.startswith("fake in int8: the full model answers ")
    assert "tuning inputs differently there, too many to certify 5 % on" in why
    assert [one["precision"] for one in told["full_model"]] == ["int8", "float32", "float32"], "it is still told"
    assert {part["precision"] for part in told["parts"]} == {"float32"}
    assert optimized.plan.caches


def test_it_is_left_out_for_so_many_rows_alone(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 is wrong for one row, where one back end is the fastest; another one is for many."""
    wrong_for_one_row(fake)
    monkeypatch.setitem(BACKENDS, "other", Other())

    def timed(built: Sequence[Any], inputs: tuple[Tensor, ...], rows: int) -> dict[tuple[str, str], float]:
        fast = {"int8": 1.0, "float32": 1.5}
        return {one.kind: fast[one.precision] + 0.3 * ((one.backend == "fake") != (rows == 1)) for one in built}

    monkeypatch.setattr(parts, "_timed", timed)
    told = run(make(), precision="int8", backends=["fake", "other"]).summary["optimized"]
    (why,) = told["left_out"]
    assert why.startswith("fake in int8")
    assert {part["backend"] for part in told["parts"] if part["precision"] == "int8"} == {"other"}


def test_kinds_that_were_far_behind_a_precision_that_is_left_out_are_tried(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_for_one_row(fake)
    ms = {("eager", "float32"): 10.0, ("fake", "float32"): 5.0, ("fake", "int8"): 1.0}
    monkeypatch.setattr(parts, "_timed", lambda built, *_: {other.kind: ms[other.kind] for other in built})
    told = run(make(), precision="int8").summary["optimized"]
    (why,) = told["left_out"]
    assert "too many to certify" in why
    assert {(part["backend"], part["precision"]) for part in told["parts"]} == {("fake", "float32")}


def test_a_full_model_that_cannot_be_certified_runs_in_float32(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the tune rows are not asked about it."""
    monkeypatch.setattr(optimizing._Job, "_uncertifiable", lambda *_: {})
    wrong_for_one_row(fake)
    cached = make()
    optimized = run(cached, precision="int8")
    assert optimized.plan.caches == ()
    assert "float32" in optimized.plan.reason
    x = torch.cat(stream(300, seed=9))
    torch.testing.assert_close(optimized(x), models.plain(cached, x))
    torch.testing.assert_close(optimized(x[:1]), models.plain(cached, x[:1]))


def test_caches_that_lose_too_much_are_off_and_the_full_model_is_still_fast(fake: Fake) -> None:
    def wrong(x: Tensor) -> Tensor:
        return torch.full((len(x),), x.shape[1] == 32)  # everything but stage 0 and the full model

    fake.wrong["int8"] = wrong
    optimized = run(make(), precision="int8")
    assert optimized.plan.caches == ()
    assert optimized.certificate.errors == 0
    assert optimized.bypasses(1)


def test_an_optimized_model_can_be_copied_and_optimized_anew(fake: Fake) -> None:
    optimized = run(make())
    x = torch.randn(5, 6)
    assert torch.equal(copy.deepcopy(optimized)(x), optimized(x))
    assert run(optimized).certificate.data_fingerprint == optimized.certificate.data_fingerprint


def test_of_a_long_stream_a_fair_draw_is_kept(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows are kept depends on them alone: not on their order, their batches, or how often they come."""
    monkeypatch.setattr(optimizing, "MOST_ROWS", 40)
    split_model = make().split_model
    batches = stream(4000)
    drawn = optimizing._drawn(batches, split_model, seed=0).args[0]
    again = optimizing._drawn([*reversed(batches), *torch.cat(batches).split(7)], split_model, seed=0).args[0]
    assert torch.equal(drawn, again)
    assert len(drawn) == len({tuple(row) for row in drawn.tolist()}) == 40
    place = {tuple(row): number for number, row in enumerate(torch.cat(batches).tolist())}
    places = [place[tuple(row)] for row in drawn.tolist()]
    assert min(places) < 800, "from the beginning"
    assert max(places) > 3200, "and from the end"
    assert not torch.equal(drawn, optimizing._drawn(batches, split_model, seed=1).args[0])


def test_the_draw_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizing, "MOST_BYTES", 6 * 4 * 25)  # of 25 rows of six numbers
    assert len(optimizing._drawn(stream(500), make().split_model, seed=0)) == 25


# -- saved and loaded ------------------------------------------------------------------------------


@pytest.fixture
def saved(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[OptimizedModel, Path]:
    cached = make()
    made = {cache.name: cache for cache in cached.caches}
    monkeypatch.setattr(artifact, "build_cache", lambda description: copy.deepcopy(made[description["name"]]))
    optimized = run(cached, precision="int8")
    save(optimized, tmp_path / "model")
    return optimized, tmp_path / "model"


def test_a_loaded_model_runs_on_the_same_back_ends_and_answers_as_before(
    fake: Fake, saved: tuple[OptimizedModel, Path]
) -> None:
    optimized, folder = saved
    fake.calls.clear()
    loaded = load(folder, optimized.split_model.backbone)
    assert isinstance(loaded, OptimizedModel)
    assert loaded.report() == optimized.report()
    assert {precision for precision, *_ in fake.calls} == {choice.precision for choice in optimized.origin.choices}
    x = torch.cat(stream(300, seed=9))
    for rows in (slice(0, 1), slice(0, 300)):
        assert torch.equal(loaded(x[rows]), optimized(x[rows]))
        assert torch.equal(loaded.predict(x[rows]).left_at_B, optimized.predict(x[rows]).left_at_B)


def test_where_a_part_cannot_be_built_the_model_is_loaded_as_it_was_fitted(
    fake: Fake, saved: tuple[OptimizedModel, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optimized, folder = saved
    monkeypatch.setattr(fake, "missing", lambda: "fakelib not installed; run: pip install fakelib")
    loaded = load(folder, optimized.split_model.backbone)
    assert not isinstance(loaded, OptimizedModel)
    assert loaded.report() == optimized.origin.base.report()
    assert "runs as it was before it was optimized: fake cannot be used here: fakelib not installed" in caplog.text


def test_a_model_that_answers_otherwise_here_is_loaded_as_it_was_fitted(
    fake: Fake, saved: tuple[OptimizedModel, Path], caplog: pytest.LogCaptureFixture
) -> None:
    optimized, folder = saved
    fake.wrong["int8"] = fake.wrong["float32"] = somewhere(0.3)
    loaded = load(folder, optimized.split_model.backbone)
    assert not isinstance(loaded, OptimizedModel)
    assert "inputs otherwise than when it was saved, more than the tolerance of 5 %" in caplog.text


def test_other_hardware_is_said(
    fake: Fake,
    saved: tuple[OptimizedModel, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimized, folder = saved
    monkeypatch.setattr(artifact, "hardware", lambda: optimized.origin.hardware | {"threads": "96"})
    assert isinstance(load(folder, optimized.split_model.backbone), OptimizedModel)
    before = optimized.origin.hardware["threads"]
    assert f"was optimized elsewhere (threads {before} -> 96)" in caplog.text
    assert "optimize() it again" in caplog.text


def test_a_changed_choice_is_not_loaded(saved: tuple[OptimizedModel, Path]) -> None:
    optimized, folder = saved
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"backend": "fake"', '"backend": "eager"', 1))
    with pytest.raises(ArtifactError, match="was changed after it was saved"):
        load(folder, optimized.split_model.backbone)


# -- arguments -------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit(fake: Fake) -> None:
    with pytest.raises(InputError, match="unknown backend 'tensorrt'; known: eager, "):
        run(make(), backends=["tensorrt"])
    with pytest.raises(InputError, match="unknown precision 'fp8'; known: float32, bfloat16, int8"):
        run(make(), precision="fp8")
    with pytest.raises(StreamError, match="empty"):
        optimize(make(), [], backends=["fake"])
    with pytest.raises(StreamError, match="at least 59 are needed"):
        optimize(make(), stream(300), backends=["fake"])
    assert fake.calls == [], "found before anything is built"


def test_a_missing_back_end_is_left_out(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "missing", lambda: "fakelib not installed; run: pip install fakelib")
    (why,) = run(make()).summary["optimized"]["left_out"]
    assert why == "fake cannot be used here: fakelib not installed; run: pip install fakelib"


def test_a_model_without_caches_gets_the_fastest_full_model(fake: Fake) -> None:
    cached = models.cached_model(make().split_model)
    cached.certificate = CERTIFICATE
    optimized = run(cached)
    assert [part["part"] for part in optimized.summary["optimized"]["parts"]] == ["full model", "full model"]
    x = torch.randn(7, 6)
    torch.testing.assert_close(optimized(x), models.plain(cached, x))


def test_one_row_and_more_take_their_own_programs() -> None:
    said = Fastest(lambda x: "one", lambda x: "many")
    assert [said(torch.zeros(rows, 2)) for rows in (1, 2, 32)] == ["one", "many", "many"]


def test_all_caches_move_for_timing_and_certify_nothing(fake: Fake) -> None:
    cached = make()
    sample = Batch((torch.cat(stream(100)),))
    moved = uncertified(cached, sample, backends=["fake"], precision="int8")
    assert moved.plan == cached.plan
    assert (moved.certificate.n, moved.certificate.bound) == (0, 1.0)
    assert {part["backend"] for part in moved.summary["optimized"]["parts"]} == {"fake"}
    x = torch.randn(5, 6)
    torch.testing.assert_close(moved(x), cached(x))
    torch.testing.assert_close(moved(x[:1]), cached(x[:1]))


def test_merged_stages_give_the_same_answers() -> None:
    split_model = make().split_model
    x = torch.randn(5, 6)
    for names in ([], ["1"], ["3"], ["1", "3"]):
        merged = split_model.merged(names)
        assert [point.name for point in merged.points] == ["input", *names]
        assert [point.position for point in merged.points] == list(range(len(names) + 1))
        assert torch.equal(merged.run(Batch((x,))), split_model.run(Batch((x,))))
        live = merged.flatten(Batch((x,)))
        for position, stage in enumerate(merged.stages):
            assert merged.activation(position, live).shape[1:] == merged.points[position].shape
            live = stage(*live)
    assert [point.position for point in split_model.points] == [0, 1, 2]


@pytest.mark.slow
def test_real_back_ends_in_float32_answer_as_the_backbone() -> None:
    cached = make()
    optimized = optimize(cached, stream(), progress=False)
    x = torch.cat(stream(500, seed=9))
    assert (optimized.predict(x).answer_B == models.plain(cached, x).argmax(1)).double().mean() >= 1 - TOLERANCE
    for part in optimized.summary["optimized"]["parts"]:
        assert part["difference"] < 1e-4
        assert part["ms"] <= part["eager_ms"]
