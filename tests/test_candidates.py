"""Candidates on a recording made by hand: building, pricing, sharing the time, storing, and what they said."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp import candidates as module
from offramp import distillation
from offramp.blending import fit_blend
from offramp.caches import Cache, CacheShape, KeyCache, LearnedCache, NearestCache, Reduction
from offramp.caches.nearest import StoreShape
from offramp.candidates import Candidates, Trained
from offramp.confidence import auroc
from offramp.distillation import Recipe, Stop, Training, TrainingLog
from offramp.errors import InputError, StorageError
from offramp.progress import Bar, bar
from offramp.recording import CERTIFY, TRAIN, TUNE, Recording
from offramp.splitting import SplitModel, SplitPoint
from offramp.streams import Batch
from offramp.tasks import Classification
from offramp.types import CostTable, PartCost, RoutingCost, Timing

CLASSES, ROWS = 4, 400
BACKBONE_FLOPS = 12e6  # so that the narrowest student is 3 % of it
RECIPE = Recipe(rows=96, batch_size=16)  # six steps


# --- a made-up backbone and its recording (test_search.py and test_summary.py use them too) ---------


def make_point(
    name: str, position: int, shape: tuple[int, ...], depth: float, dtype: Any = torch.float32
) -> SplitPoint:
    return SplitPoint(name, position, shape, dtype, (shape,), 4, depth)


POINTS = (
    make_point("input", 0, (1, 8, 8), 0.0),
    make_point("early", 1, (4, 4, 4), 0.3),
    make_point("late", 2, (6,), 0.8),
)


def make_recording(
    features: Sequence[NDArray[Any]], logits_NC: NDArray[np.float32], *, labels: bool = True
) -> Recording:
    """Of every five rows three train, one tunes and one certifies."""
    rows = len(logits_NC)
    keys = np.frombuffer(b"".join(i.to_bytes(16, "little") for i in range(rows)), "V16")
    return Recording(
        features=list(features),
        reductions=[Reduction() for _ in features],
        logits_NC=logits_NC,
        part_N=np.array([TRAIN, TRAIN, TRAIN, TUNE, CERTIFY], np.uint8)[np.arange(rows) % 5],
        copy_N=np.zeros(rows, np.uint8),
        label_N=np.arange(rows) % CLASSES if labels else None,
        keys_N=keys,
        dropped_duplicates=0,
        sample=Batch((torch.from_numpy(features[0][:4]),)),
    )


def image_recording(rows: int = ROWS, *, labels: bool = True) -> Recording:
    """Images whose answer is the brightest quarter; later activations hold the quarters and some noise."""
    random = np.random.default_rng(0)
    quarters = random.standard_normal((rows, 1, 2, 2))
    images = quarters.repeat(4, axis=2).repeat(4, axis=3) + 0.5 * random.standard_normal((rows, 1, 8, 8))
    means = images.reshape(rows, 2, 4, 2, 4).mean((2, 4)).reshape(rows, 4)
    early = means[:, :, None, None] + 0.3 * random.standard_normal((rows, 4, 4, 4))
    late = np.concatenate([means, random.standard_normal((rows, 2))], axis=1)
    features = [values.astype(np.float16) for values in (images, early, late)]
    return make_recording(features, (8 * means).astype(np.float32), labels=labels)


def make_costs(points: Sequence[SplitPoint], flops: float = BACKBONE_FLOPS) -> CostTable:
    """Each stage does its share of the FLOPs by the depth of its point; all calls take as long."""
    time_ms = {size: Timing(float(size), float(size), float(size)) for size in (1, 8, 32)}
    ends = [*(point.depth for point in points[1:]), 1.0]
    stages = tuple(
        PartCost(point.name, (end - point.depth) * flops, 10, 40, time_ms)
        for point, end in zip(points, ends, strict=True)
    )
    routing = (RoutingCost(0.0, 0.0, 0.0),) * len(points)
    return CostTable("cpu", 1, PartCost("backbone", flops, 100, 400, time_ms), stages, routing)


def make_candidates(
    recording: Recording,
    points: Sequence[SplitPoint] = POINTS,
    *,
    seed: int = 0,
    deadline: float | None = None,
    workdir: Path | None = None,
    fingerprint: str = "backbone",
) -> Candidates:
    split = SimpleNamespace(points=tuple(points), device=torch.device("cpu"), fingerprint=fingerprint)
    return candidates_of(
        cast(SplitModel, split), recording, make_costs(points), seed=seed, deadline=deadline, workdir=workdir
    )


def candidates_of(
    split: SplitModel,
    recording: Recording,
    costs: CostTable,
    *,
    seed: int = 0,
    deadline: float | None = None,
    workdir: Path | None = None,
) -> Candidates:
    """As `fit` makes them, without bars."""
    return Candidates(
        split,
        Classification(),
        recording,
        costs,
        seed=seed,
        deadline=deadline,
        stop=Stop(),
        workdir=workdir,
        show=False,
    )


def say(
    candidates: Candidates,
    position: int,
    logits_NC: Tensor,
    *,
    shape: CacheShape | None = None,
    reads: Trained | None = None,
    sure_N: Tensor | None = None,
) -> Trained:
    """A candidate that says this on every recorded row, as if it were trained; `sure_N`: its confidence on tune."""
    shape = shape or CacheShape("linear")
    cache = candidates.build(candidates.split.points[position], shape, None if reads is None else reads.cache)
    rows = np.arange(len(candidates.recording))
    trained = Trained(cache.eval(), position, rows, logits_NC, TrainingLog(1, 1.0, 0.0))
    tune = candidates.recording.index(TUNE)
    score_N = cache.confidence(trained.on(tune)) if sure_N is None else sure_N[tune]
    trained.confidence_N = score_N.double().numpy()
    candidates.trained.append(trained)
    return trained


class Clock:
    """In place of the `time` module: stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(module, "time", stopped)
    return stopped


@pytest.fixture(scope="module")
def recording() -> Recording:
    return image_recording()


def silent() -> Bar:
    with bar("", None, show=False) as nothing:
        return nothing


# --- building ---------------------------------------------------------------------------------------


def weights(cache: LearnedCache) -> list[Tensor]:
    return list(cache.state_dict().values())


def test_initial_weights_depend_on_the_seed_and_the_name_alone(recording: Recording) -> None:
    early, late = POINTS[1:]
    shape = CacheShape("mlp", 16)
    one = make_candidates(recording).build(early, shape)
    torch.rand(7)  # neither what was drawn before
    other = make_candidates(recording)
    other.build(late, shape)  # nor what was built before
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other.build(early, shape)), strict=True))
    seeded = make_candidates(recording, seed=1).build(early, shape)
    assert not torch.equal(one.head.weight, seeded.head.weight)
    namesake = other.build(make_point("another", 1, early.shape, early.depth), shape)
    assert not torch.equal(one.head.weight, namesake.head.weight)


def test_building_leaves_the_global_random_state_alone(recording: Recording) -> None:
    before = torch.random.get_rng_state()
    make_candidates(recording).build(POINTS[0], CacheShape("student", 8))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_cache_knows_where_it_is_and_what_it_reads(recording: Recording) -> None:
    candidates = make_candidates(recording)
    first = candidates.build(POINTS[0], CacheShape("student", 8))
    second = candidates.build(POINTS[1], CacheShape("conv", 8), first)
    assert (second.name, second.point, second.reads) == ("early/conv8x1", "early", "input/student8x1")
    assert second.head.in_features == 2 * 8, "what it reads comes in behind the head"
    assert [candidates.position(cache) for cache in (first, second)] == [0, 1]


def test_token_ids_get_a_vocabulary_as_large_as_the_training_rows_need() -> None:
    ids = np.zeros((10, 5), np.int32)
    ids[0, 2], ids[3, 1] = 41, 99  # row 3 is for tuning: its ids are not known when caches are built
    point = make_point("input", 0, (5,), 0.0, torch.int64)
    candidates = make_candidates(make_recording([ids], np.zeros((10, CLASSES), np.float32)), (point,))
    cache = candidates.build(point, CacheShape("transformer", 32))
    assert cache.vocabulary == 42
    assert cache.from_feature(torch.from_numpy(ids)).shape == (10, CLASSES)


# --- pricing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "position", "share"),
    [("student", 0, 0.035), ("student", 0, 0.10), ("student", 0, 0.9), ("conv", 1, 0.01), ("conv", 1, 0.015)],
)
def test_widest_is_the_widest_within_the_share(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, kind: Any, position: int, share: float
) -> None:
    monkeypatch.setattr(module, "MAX_WIDTH", 32)  # wide ones take long to build
    candidates, point = make_candidates(recording), POINTS[position]
    found = candidates.widest(point, kind, share)
    fitting = [
        width
        for width in range(module.MIN_WIDTH, module.MAX_WIDTH + 1, 8)
        if candidates.flops_of(candidates.build(point, CacheShape(kind, width))) <= share * BACKBONE_FLOPS
    ]
    assert found == CacheShape(kind, max(fitting))


def test_widest_is_none_when_the_narrowest_is_above_the_share(recording: Recording) -> None:
    candidates, narrowest = make_candidates(recording), CacheShape("student", module.MIN_WIDTH)
    price = candidates.flops_of(candidates.build(POINTS[0], narrowest)) / BACKBONE_FLOPS
    assert candidates.widest(POINTS[0], "student", 1.001 * price) == narrowest
    assert candidates.widest(POINTS[0], "student", 0.999 * price) is None


def test_pricing_leaves_the_cache_in_its_mode(recording: Recording) -> None:
    candidates = make_candidates(recording)
    cache = candidates.build(POINTS[1], CacheShape("conv", 8))
    for training in (True, False):
        cache.train(training)
        running = copy.deepcopy(cache.state_dict())
        candidates.flops_of(cache)
        assert cache.training is training
        assert all(torch.equal(value, running[name]) for name, value in cache.state_dict().items())


def test_estimated_costs_are_the_stages_before_and_the_look_up(recording: Recording) -> None:
    """A linear probe multiplies its features by its classes and does little else."""
    candidates, nothing = make_candidates(recording), torch.zeros(ROWS, CLASSES)
    told = [say(candidates, position, nothing) for position in (1, 2)]
    costs = candidates.estimated_costs(told)
    assert costs.before_K.tolist() == pytest.approx([0.3, 0.8])
    by_hand = [2 * features * CLASSES / BACKBONE_FLOPS for features in (2 * 4, 6)]
    assert costs.cache_K.tolist() == pytest.approx(by_hand)


# --- time -------------------------------------------------------------------------------------------


def test_seconds_for_leaves_the_cache_and_the_random_state_alone(recording: Recording) -> None:
    candidates = make_candidates(recording)
    first = candidates.build(POINTS[0], CacheShape("student", 8))
    for cache in (first, candidates.build(POINTS[1], CacheShape("mlp", 8), first)):
        before, state = copy.deepcopy(cache.state_dict()), torch.random.get_rng_state()
        assert candidates.seconds_for(cache, RECIPE) > 0
        assert all(torch.equal(value, before[name]) for name, value in cache.state_dict().items())
        assert cache.training
        assert not cache.folded
        assert torch.equal(state, torch.random.get_rng_state())
    assert candidates.trained == []


def test_seconds_for_is_estimated_once_for_each_recipe(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    estimated = []

    def estimate(self: Training) -> float:
        estimated.append((self.cache.name, self.recipe.rows))
        return 0.25 * self.recipe.steps

    monkeypatch.setattr(Training, "estimated_seconds", estimate)
    candidates = make_candidates(recording)
    cache = candidates.build(POINTS[2], CacheShape("mlp", 8))
    for _ in range(2):
        assert candidates.seconds_for(cache, Recipe(rows=100, batch_size=10)) == pytest.approx(2.5)
        assert candidates.seconds_for(cache, Recipe(rows=4000, batch_size=10)) == pytest.approx(100)
    assert estimated == [(cache.name, 100), (cache.name, 4000)]


def test_a_deadline_in_the_past_leaves_one_second(recording: Recording, clock: Clock) -> None:
    assert make_candidates(recording).time_left is None
    candidates = make_candidates(recording, deadline=clock.now + 40)
    assert candidates.time_left == 40
    clock.now += 60
    assert candidates.time_left == 1


def rehearse(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, needs: dict[str, float], takes: Callable[[str, float], float]
) -> list[tuple[str, float | None]]:
    """Trainings of which only the clock notices anything; returns their names and limits as they come."""
    begun: list[tuple[str, float | None]] = []

    def train(self: Candidates, cache: LearnedCache, recipe: Recipe, limit_s: float | None, progress: Bar) -> None:
        begun.append((cache.name, limit_s))
        clock.now += takes(cache.name, 0.0 if limit_s is None else limit_s)

    monkeypatch.setattr(Candidates, "train", train)
    monkeypatch.setattr(Candidates, "seconds_for", lambda self, cache, recipe: needs[cache.name])
    return begun


def three(candidates: Candidates) -> list[LearnedCache]:
    return [candidates.build(POINTS[2], CacheShape("mlp", width)) for width in (8, 16, 24)]


NEEDS = {"late/mlp8x1": 20.0, "late/mlp16x1": 60.0, "late/mlp24x1": 120.0}


def test_under_a_limit_each_gets_time_as_large_as_its_need(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    begun = rehearse(monkeypatch, clock, NEEDS, lambda name, limit: limit)
    candidates = make_candidates(recording)
    candidates.train_round("pooled", three(candidates), lambda cache: RECIPE, 50.0)
    assert [name for name, _ in begun] == list(NEEDS)
    assert [limit for _, limit in begun] == pytest.approx([5.0, 15.0, 30.0])


def test_time_that_a_training_did_not_need_goes_to_those_after_it(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    begun = rehearse(monkeypatch, clock, NEEDS, lambda name, limit: 2.0 if "mlp8" in name else limit)
    candidates = make_candidates(recording)
    candidates.train_round("pooled", three(candidates), lambda cache: RECIPE, 50.0)
    assert [limit for _, limit in begun] == pytest.approx([5.0, 16.0, 32.0])


def test_no_training_begins_when_the_time_is_used_up(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    begun = rehearse(monkeypatch, clock, NEEDS, lambda name, limit: 49.8)  # the first one overruns
    candidates = make_candidates(recording)
    candidates.train_round("pooled", three(candidates), lambda cache: RECIPE, 50.0)
    assert [name for name, _ in begun] == ["late/mlp8x1"]


def test_without_a_limit_nothing_is_timed(recording: Recording, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    begun = rehearse(monkeypatch, clock, {}, lambda name, limit: 1e6)  # no needs: asking for one is an error
    candidates = make_candidates(recording)
    candidates.train_round("pooled", three(candidates), lambda cache: RECIPE, None)
    assert begun == [(name, None) for name in NEEDS]
    candidates.train_round("trunks", [], lambda cache: RECIPE, 50.0)
    assert len(begun) == 3


@pytest.mark.parametrize("limit_s", [None, 1000.0])
def test_a_round_stops_when_the_user_asks(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, clock: Clock, limit_s: float | None
) -> None:
    candidates = make_candidates(recording)

    def asked(name: str, limit: float) -> float:
        candidates.stop.requested = "mlp16" in name
        return 0.0

    begun = rehearse(monkeypatch, clock, NEEDS, asked)
    candidates.train_round("pooled", three(candidates), lambda cache: RECIPE, limit_s)
    assert [name for name, _ in begun] == ["late/mlp8x1", "late/mlp16x1"]


# --- training and judging ---------------------------------------------------------------------------


def train_two(candidates: Candidates) -> list[Trained]:
    """A cache after a student that it reads."""
    student = candidates.build(POINTS[0], CacheShape("student", 8))
    reader = candidates.build(POINTS[1], CacheShape("conv", 8), student)
    for name, cache in (("students", student), ("trunks", reader)):
        candidates.train_round(name, [cache], lambda _: RECIPE, None)
    return candidates.ordered()


def test_a_trained_cache_is_judged_on_the_rows_that_matter(recording: Recording) -> None:
    """The held-out ones."""
    student, reader = train_two(make_candidates(recording))
    held_out = np.flatnonzero(recording.part_N != TRAIN)
    assert np.array_equal(student.rows, held_out)
    assert np.array_equal(reader.rows, held_out)
    assert student.log.steps == reader.log.steps == RECIPE.steps
    with torch.no_grad():
        rows = recording.index(CERTIFY)
        images, early = (torch.from_numpy(recording.features[k][rows]).float() for k in (0, 1))
        said = student.cache.from_feature(images)
        torch.testing.assert_close(student.on(rows), said, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reader.on(rows), reader.cache.from_feature(early, said), rtol=1e-4, atol=1e-4)


def test_a_cache_and_what_it_reads_are_weighed_on_tune_rows_and_no_others(recording: Recording) -> None:
    """The certificate must not rest on rows that had a part in it."""
    candidates = make_candidates(recording)
    student, reader = train_two(candidates)
    assert isinstance(reader.cache, LearnedCache)
    tune = recording.index(TUNE)
    with torch.no_grad():
        own_NC = reader.cache.from_condensed(torch.from_numpy(recording.features[1][tune]).float())
    expected = fit_blend(own_NC, student.on(tune), candidates.answer_N[tune])
    assert reader.cache.blend == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert reader.cache.blend != (1, 0)
    other = copy.copy(recording)
    other.features = [feature.copy() for feature in recording.features]
    other.logits_NC = recording.logits_NC.copy()
    certify = recording.index(CERTIFY)
    for array in (*other.features, other.logits_NC):
        array[certify] = -array[certify]
    same = train_two(make_candidates(other))[1].cache
    assert isinstance(same, LearnedCache)
    assert same.blend == reader.cache.blend


def test_a_candidate_that_rereads_is_as_if_it_had_been_built_so(recording: Recording) -> None:
    found = []
    for at_once in (True, False):
        candidates = make_candidates(recording)
        student, reader = train_two(candidates)
        source = reader if at_once else student
        late = candidates.build(POINTS[2], CacheShape("linear"), source.cache)
        candidates.train_round("pooled", [late], lambda _: RECIPE, None)
        trained = candidates.named(late.name)
        before = trained.on(recording.index(TUNE))
        if not at_once:
            candidates.reread(trained, reader.cache)
            assert not torch.equal(trained.on(recording.index(TUNE)), before)
        found.append((trained.cache.reads, trained.cache.describe(), trained.logits_NC, trained.auroc))
    (reads, description, logits_NC, auroc), again = found
    assert again[:2] == (reads, description)
    torch.testing.assert_close(again[2], logits_NC)
    assert again[3] == pytest.approx(auroc)


def test_a_blend_is_made_of_what_is_read_now(recording: Recording, tmp_path: Path) -> None:
    """Not stored with what was trained, so that a later run may have it read another student."""
    candidates = make_candidates(recording, workdir=tmp_path)
    blends = []
    for width in (8, 16):
        student = candidates.build(POINTS[0], CacheShape("student", width))
        candidates.train(student, RECIPE, None, silent())
        reader = candidates.build(POINTS[1], CacheShape("conv", 8), student)
        candidates.train(reader, RECIPE, None, silent())
        cache = candidates.trained[-1].cache
        assert isinstance(cache, LearnedCache)
        blends.append(cache.blend)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3, "the reader was trained once"
    assert blends[0] != blends[1]


def test_a_cache_that_comes_with_a_blend_keeps_it(recording: Recording) -> None:
    """As those that serve do in a refit: other answers would be those of another cache."""
    candidates = make_candidates(recording)
    student = candidates.build(POINTS[0], CacheShape("student", 8))
    candidates.add(student, TrainingLog(0, 0.5, 0.0))
    reader = candidates.build(POINTS[1], CacheShape("conv", 8), student)
    reader.blend = (0.25, 0.75)
    candidates.add(reader, TrainingLog(0, 0.5, 0.0))
    assert reader.blend == (0.25, 0.75)


def test_candidates_are_listed_as_a_request_meets_them(recording: Recording) -> None:
    candidates = make_candidates(recording)
    late = candidates.build(POINTS[2], CacheShape("linear"))
    candidates.train_round("pooled", [late], lambda _: RECIPE, None)
    train_two(candidates)
    names = ["input/student8x1", "early/conv8x1", "late/linear"]
    assert [trained.cache.name for trained in candidates.trained] == [names[2], *names[:2]]
    assert [trained.cache.name for trained in candidates.ordered()] == names
    assert candidates.named("early/conv8x1") is candidates.trained[2]


def test_the_confidence_chosen_ranks_the_disagreements_about_best(recording: Recording) -> None:
    candidates = make_candidates(recording)
    tune = recording.index(TUNE)
    for trained in train_two(candidates):
        agreement = trained.on(tune).argmax(1).numpy() == recording.logits_NC[tune].argmax(1)
        assert set(trained.auroc) == {"max_softmax", "margin", "entropy", "selector"}
        assert trained.auroc[trained.cache.confidence_name] >= max(trained.auroc.values()) - module.CLEARLY
        assert auroc(trained.confidence_N, agreement) == pytest.approx(trained.auroc[trained.cache.confidence_name])
        assert (trained.cache.selector is not None) is (trained.cache.confidence_name == "selector")


@pytest.mark.parametrize(
    ("others", "expected"),
    [({"margin": 0.909}, "max_softmax"), ({"margin": 0.911, "selector": 0.93}, "selector"), ({}, "max_softmax")],
)
def test_the_first_confidence_decides_unless_another_is_clearly_better(others: dict[str, float], expected: str) -> None:
    assert module._clearly_best({"max_softmax": 0.9} | others) == expected
    unknown = {"max_softmax": math.nan} | others
    assert module._clearly_best(unknown) == (max(others, key=lambda name: others[name]) if others else "max_softmax")


def test_the_confidence_may_be_chosen_again(recording: Recording) -> None:
    candidates, fixed = make_candidates(recording), make_candidates(recording)
    first = [(trained.cache.confidence_name, trained.confidence_N) for trained in train_two(candidates)]
    fixed.confidence = "entropy"
    train_two(fixed)
    candidates.decide_by("entropy")
    for part in (TUNE, CERTIFY):
        told, expected = (one.records(one.ordered(), part) for one in (candidates, fixed))
        assert np.array_equal(told.confidence_NK, expected.confidence_NK)
    candidates.decide_by(None)
    for trained, (name, confidence_N) in zip(candidates.trained, first, strict=True):
        assert trained.cache.confidence_name == name
        assert np.array_equal(trained.confidence_N, confidence_N)


def test_a_method_may_fix_the_confidence_of_all_caches(recording: Recording) -> None:
    for name in ("margin", "selector"):
        candidates = make_candidates(recording)
        candidates.confidence = name
        assert [trained.cache.confidence_name for trained in train_two(candidates)] == [name] * 2
        assert all((trained.cache.selector is not None) is (name == "selector") for trained in candidates.trained)
        tune = candidates.recording.index(TUNE)
        for trained in candidates.trained if name == "margin" else ():
            assert trained.confidence_N == pytest.approx(trained.cache.confidence(trained.on(tune)).double().numpy())


def test_logits_are_looked_at_a_few_rows_at_a_time(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_candidates(recording)
    expected.records(train_two(expected), CERTIFY)
    monkeypatch.setattr(module, "CHUNK_ROWS", 7)
    monkeypatch.setattr(distillation, "LOOK_UP_ROWS", 7)
    rows: list[int] = []
    at = Trained.on

    def watched(trained: Trained, index: NDArray[np.intp]) -> Tensor:
        rows.append(len(index))
        return at(trained, index)

    monkeypatch.setattr(Trained, "on", watched)
    candidates = make_candidates(recording)
    trained = train_two(candidates)
    for part in (TUNE, CERTIFY):
        ours, whole = candidates.records(trained, part), expected.records(expected.trained, part)
        assert np.array_equal(ours.answer_NK, whole.answer_NK)
        assert np.array_equal(ours.backbone_answer_N, whole.backbone_answer_N)
        assert ours.confidence_NK == pytest.approx(whole.confidence_NK, abs=1e-6)
    assert sum(rows) > len(recording)
    assert max(rows) <= 7


def test_what_caches_say_is_on_disk_and_a_full_one_says_so(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    candidates = make_candidates(recording, workdir=tmp_path)
    monkeypatch.setattr(distillation, "write_all", full)
    with pytest.raises(StorageError, match=f"could not write what a cache says to {tmp_path}: No space left"):
        train_two(candidates)


def test_searches_look_at_a_limited_number_of_tune_rows_and_the_certificate_at_all(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_TUNE", 20)
    candidates = make_candidates(recording)
    trained = train_two(candidates)
    tune, certify = recording.index(TUNE), recording.index(CERTIFY)
    looked_at = candidates.tune_rows
    assert len(looked_at) == 20
    assert set(looked_at) <= set(tune)
    assert (looked_at[0], looked_at[-1]) == (tune[0], tune[-1])
    assert max(np.diff(looked_at)) <= 2 * max(np.diff(tune)) * len(tune) / 20
    assert len(candidates.records(trained, TUNE)) == 20
    assert len(candidates.records(trained, CERTIFY)) == len(certify)


def test_a_cache_that_learned_by_other_means_is_judged_as_the_others_are(recording: Recording) -> None:
    candidates = make_candidates(recording)
    cache = candidates.build(POINTS[2], CacheShape("linear"))
    candidates.add(cache, TrainingLog(0, 0.5, 0.0))
    (added,) = candidates.trained
    assert added.cache is cache
    assert not cache.training
    rows = recording.index(CERTIFY)
    with torch.no_grad():
        said = cache.from_feature(torch.from_numpy(recording.features[2][rows]).float())
    torch.testing.assert_close(added.on(rows), said)
    assert added.auroc.keys() >= {"max_softmax", "selector"}


def filled(kind: type[Cache], candidates: Candidates) -> Cache:
    """A cache of a kind that is filled instead of trained, at the input."""
    recording, rows = candidates.recording, candidates.train_rows
    answer_N = recording.logits_NC[rows].argmax(1)
    if kind is KeyCache:
        table = KeyCache("input/table", "input", (1, 8, 8), CLASSES, grid=2, levels=2)
        table.fill(recording.features[0], rows, answer_N, 1 << 20)
        return table
    store = NearestCache("input/store", "input", StoreShape(), CLASSES, reduction=Reduction())
    store.fit(recording.features[0], rows, torch.from_numpy(answer_N), torch.Generator().manual_seed(0))
    return store


@pytest.mark.parametrize(
    ("kind", "fixed", "decides"),
    [
        (KeyCache, None, "agreement"),
        (KeyCache, "selector", "agreement"),
        (KeyCache, "margin", "agreement"),
        (NearestCache, "selector", "selector"),
        (NearestCache, "margin", "margin"),
    ],
)
def test_a_cache_without_the_score_that_a_method_fixed_decides_by_its_own(
    recording: Recording, kind: type[Cache], fixed: str | None, decides: str
) -> None:
    candidates = make_candidates(recording)
    candidates.confidence = fixed
    cache = filled(kind, candidates)
    candidates.add(cache, TrainingLog(0, 0.5, 0.0))
    assert cache.confidence_name == decides
    assert (cache.selector is not None) is (decides == "selector")
    assert candidates.trained[0].auroc.keys() == {*cache.confidences(), *(["selector"] if kind.suits_selector else [])}


def test_a_cache_that_took_no_step_is_no_candidate(recording: Recording, tmp_path: Path) -> None:
    candidates = make_candidates(recording, workdir=tmp_path)
    candidates.stop.requested = True
    candidates.train(candidates.build(POINTS[2], CacheShape("linear")), RECIPE, None, silent())
    assert candidates.trained == []
    assert not list(tmp_path.rglob("*.safetensors"))


# --- resuming ---------------------------------------------------------------------------------------


def test_a_stored_cache_comes_back_with_the_same_logits_and_log(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train_two(make_candidates(recording, workdir=tmp_path))
    monkeypatch.setattr(module, "Training", lambda *_, **__: pytest.fail("trained or timed again"))
    again = make_candidates(recording, workdir=tmp_path)
    fresh = again.build(POINTS[0], CacheShape("student", 8))
    assert again.seconds_for(fresh, RECIPE) == 0.0
    after = train_two(again)
    for old, new in zip(before, after, strict=True):
        assert new.log == old.log
        assert torch.equal(new.logits_NC, old.logits_NC)
        assert np.array_equal(new.rows, old.rows)
        assert new.cache.confidence_name == old.cache.confidence_name
        assert new.auroc == pytest.approx(old.auroc)
        assert new.confidence_N == pytest.approx(old.confidence_N, abs=1e-5)
        assert not new.cache.training
        assert new.cache.folded
        assert not any(parameter.requires_grad for parameter in new.cache.parameters())


def test_a_stored_cache_serves_only_the_fit_that_it_was_trained_in(recording: Recording, tmp_path: Path) -> None:
    shape = CacheShape("linear")
    candidates = make_candidates(recording, workdir=tmp_path)
    candidates.train(candidates.build(POINTS[2], shape), RECIPE, None, silent())
    moved = copy.copy(recording)
    moved.part_N = np.roll(recording.part_N, 1)
    for same, other in (
        (True, make_candidates(recording, workdir=tmp_path)),
        (False, make_candidates(recording, workdir=tmp_path, seed=1)),
        (False, make_candidates(recording, workdir=tmp_path, fingerprint="another")),
        (False, make_candidates(moved, workdir=tmp_path)),
    ):
        assert (other.seconds_for(other.build(POINTS[2], shape), RECIPE) == 0.0) is same
    assert candidates.seconds_for(candidates.build(POINTS[2], shape), Recipe(rows=160, batch_size=16)) > 0.0
    reading = candidates.build(POINTS[2], shape, candidates.build(POINTS[0], CacheShape("student", 8)))
    assert candidates.seconds_for(reading, RECIPE) == 0.0, "what it reads is no part of its training"


def test_the_train_rows_are_digested_once(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested, inner = [], Recording.fingerprint

    def counting(self: Recording, part: int) -> str:
        digested.append(part)
        return inner(self, part)

    monkeypatch.setattr(Recording, "fingerprint", counting)
    train_two(make_candidates(recording, workdir=tmp_path))
    assert digested == [TRAIN]


def test_a_half_trained_cache_is_used_but_not_stored(recording: Recording, tmp_path: Path) -> None:
    candidates = make_candidates(recording, workdir=tmp_path)

    class Impatient:
        def advance(self, units: float = 1) -> None:
            candidates.stop.requested = True

        def note(self, text: str) -> None: ...

    candidates.train(candidates.build(POINTS[2], CacheShape("linear")), RECIPE, None, Impatient())
    assert [trained.log.steps for trained in candidates.trained] == [1]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_cache_that_cannot_be_stored_says_where_and_what_to_do(recording: Recording, tmp_path: Path) -> None:
    (tmp_path / "caches").write_text("in the way")
    candidates = make_candidates(recording, workdir=tmp_path)
    with pytest.raises(StorageError, match=r"could not keep what was learned in .*caches.*workdir="):
        candidates.train(candidates.build(POINTS[2], CacheShape("linear")), RECIPE, None, silent())


# --- what they said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [TUNE, CERTIFY])
def test_records_are_what_a_slow_loop_finds(part: int) -> None:
    recording = image_recording(40)
    candidates = make_candidates(recording)
    random = torch.Generator().manual_seed(1)
    logits = [torch.randn(40, CLASSES, generator=random) for _ in range(4)]
    student = say(candidates, 0, logits[0], shape=CacheShape("student", 8))
    alone = say(candidates, 1, logits[1], shape=CacheShape("mlp", 8))
    reader = say(candidates, 1, logits[2], shape=CacheShape("conv", 8), reads=student)
    last = say(candidates, 2, logits[3], reads=student)
    told = [student, alone, reader, last]
    records = candidates.records(told, part)
    assert records.reads_K == (-1, -1, 0, 0)
    assert len(records) == 8
    for i, row in enumerate(recording.index(part)):
        full = int(recording.logits_NC[row].argmax())
        assert records.backbone_answer_N[i] == full
        assert records.label_N is not None
        assert records.label_N[i] == row % CLASSES
        for k, trained in enumerate(told):
            answer = int(trained.logits_NC[row].argmax())
            assert records.answer_NK[i, k] == answer
            assert records.agreement_NK[i, k] == (answer == full)
            expected = trained.logits_NC[row].softmax(-1).amax()  # the first confidence, until another is chosen
            assert records.confidence_NK[i, k] == pytest.approx(float(expected))


def test_records_of_an_unlabelled_recording_have_no_labels() -> None:
    candidates = make_candidates(image_recording(40, labels=False))
    told = say(candidates, 0, torch.zeros(40, CLASSES))
    assert candidates.records([told], TUNE).label_N is None


def told_by_the_other(flipped: int | None = None) -> tuple[Candidates, Trained, Trained]:
    """A cache that agrees exactly where it says what the cache it reads says: only a learned selector can tell.

    At the row `flipped` it is the other way round.
    """
    random = torch.Generator().manual_seed(2)
    read_NC, own_NC = (torch.randn(ROWS, CLASSES, generator=random) for _ in range(2))
    own_N = own_NC.argmax(1)
    agrees_N = read_NC.argmax(1) == own_N
    if flipped is not None:
        agrees_N[flipped] = ~agrees_N[flipped]
    full_N = torch.where(agrees_N, own_N, (own_N + 1) % CLASSES)
    logits_NC = torch.nn.functional.one_hot(full_N, CLASSES).float().numpy()
    recording = make_recording(image_recording().features, logits_NC)
    candidates = make_candidates(recording)
    read = say(candidates, 0, read_NC)
    own = say(candidates, 2, own_NC, reads=read)
    candidates._choose_confidence(own)
    return candidates, read, own


def test_on_tune_a_row_is_scored_by_a_selector_that_has_not_seen_it() -> None:
    """So whether a row agrees leaves its own score as it is, and changes those of other rows."""
    candidates, read, own = told_by_the_other()
    tune = candidates.recording.index(TUNE)
    assert own.cache.confidence_name == "selector"
    confidence_N = candidates.records([read, own], TUNE).confidence_NK[:, 1]
    for i in (0, 17, 79):
        changed, read, own = told_by_the_other(flipped=int(tune[i]))
        records = changed.records([read, own], TUNE)
        assert own.cache.confidence_name == "selector"
        assert records.confidence_NK[i, 1] == confidence_N[i]
        others = np.delete(records.confidence_NK[:, 1] != confidence_N, i)
        assert 0.6 < others.mean() < 0.9, "four folds of five have seen it"


def test_on_certify_a_row_is_scored_by_the_selector_that_will_serve() -> None:
    candidates, read, own = told_by_the_other()
    for part, equal in ((CERTIFY, True), (TUNE, False)):
        rows = candidates.recording.index(part)
        served = own.cache.confidence(own.on(rows), read.on(rows)).double().numpy()
        recorded = candidates.records([read, own], part).confidence_NK[:, 1]
        assert np.array_equal(recorded, served) is equal
        assert auroc(recorded, candidates.records([read, own], part).agreement_NK[:, 1]) > 0.99


# --- what resuming must not trust ----------------------------------------------------------------------


def cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """A recording, and in `tmp_path` a cache whose training a time limit cut short."""
    recording, ticks = image_recording(), itertools.count()
    candidates = make_candidates(recording, workdir=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(distillation, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
        candidates.train(candidates.build(POINTS[2], CacheShape("linear")), RECIPE, 3.0, silent())
    assert candidates.trained[0].log.steps < RECIPE.steps
    return recording


def test_a_training_that_was_cut_short_is_done_again_without_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = make_candidates(cut_short(tmp_path, monkeypatch), workdir=tmp_path)
    again.train_round("pooled", [again.build(POINTS[2], CacheShape("linear"))], lambda _: RECIPE, None)
    assert again.trained[0].log.steps == RECIPE.steps


def test_a_training_that_was_cut_short_will_do_under_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = make_candidates(cut_short(tmp_path, monkeypatch), workdir=tmp_path, deadline=float("inf"))
    again.train(again.build(POINTS[2], CacheShape("linear")), RECIPE, 4.0, silent())
    assert again.trained[0].log.steps < RECIPE.steps


def test_a_damaged_stored_cache_is_trained_again(tmp_path: Path) -> None:
    recording = image_recording()
    for _ in range(2):
        candidates = make_candidates(recording, workdir=tmp_path)
        candidates.train(candidates.build(POINTS[2], CacheShape("linear")), RECIPE, None, silent())
        assert candidates.trained[0].log.steps == RECIPE.steps
        for file in tmp_path.rglob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:40])


def test_building_leaves_the_seeds_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    make_candidates(image_recording()).build(POINTS[2], CacheShape("linear"))
    assert not seeded


def test_only_a_cache_that_a_request_has_met_can_be_read() -> None:
    candidates = make_candidates(image_recording(40))
    early = candidates.build(POINTS[1], CacheShape("mlp", 8))
    assert candidates.build(POINTS[2], CacheShape("linear"), early).reads == early.name
    with pytest.raises(InputError, match=f"was to read {early.name}, which comes only after it"):
        candidates.build(POINTS[0], CacheShape("student", 8), early)
