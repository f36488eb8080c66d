"""The search on recordings made by hand: which caches it tries, and which it leaves out when time is short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from test_candidates import (
    BACKBONE_FLOPS,
    CLASSES,
    Clock,
    image_recording,
    make_candidates,
    make_point,
    make_recording,
    say,
)
from torch import Tensor

from offramp import candidates as candidates_module
from offramp import search as module
from offramp.caches import CacheShape, LearnedCache
from offramp.candidates import Candidates, Trained
from offramp.distillation import Recipe, TrainingLog
from offramp.progress import Bar
from offramp.search import LEAST, MAX_POINTS, Search, evenly, first
from offramp.splitting import SplitPoint

POINTS = (
    make_point("input", 0, (1, 8, 8), 0.0),
    make_point("block1", 1, (4, 4, 4), 0.15),
    make_point("block2", 2, (4, 4, 4), 0.35),
    make_point("block3", 3, (4, 4, 4), 0.6),
    make_point("block4", 4, (4, 4, 4), 0.85),
    make_point("head", 5, (6,), 0.95),
)
STUDENTS = ["input/student8x1", "input/student16x1"]
POOLED = [
    "block1/mlp64x1",
    "block2/mlp64x1",
    *(f"{point}/{label}" for point in ("block3", "block4", "head") for label in ("mlp32x1", "linear")),
]
# Seconds of a full training, by kind. Of the students the second is wider and takes twice as long.
NEEDS = {"student": 60.0, "mlp": 4.0, "linear": 4.0, "conv": 15.0}


def make_search(
    points: Sequence[SplitPoint] = POINTS, rows: int = 100, *, deadline: float | None = None, **options: Any
) -> Search:
    images, block, head = image_recording(rows).features
    features = [{1: head, 3: block}[len(point.shape)] if point.position else images for point in points]
    recording = make_recording(features, image_recording(rows).logits_NC)
    options = {"mixtures": False} | options  # about which there is no backbone to ask
    return Search(make_candidates(recording, points, deadline=deadline), tolerance=0.05, **options)


def need(cache: LearnedCache) -> float:
    return NEEDS[cache.shape.kind] * (2 if cache.name == STUDENTS[1] else 1)


class Rehearsal:
    """Trainings that only move the clock, by what they need or their limit; what they leave is an untrained cache.

    `limits` has them in their order: name -> limit in seconds.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.limits: dict[str, float | None] = {}
        self.reads: dict[str, str | None] = {}
        self.needs: dict[str, float] = {}
        rehearsal = self

        def train(
            self: Candidates, cache: LearnedCache, recipe: Recipe, limit_s: float | None, progress: Bar
        ) -> Trained:
            assert cache.name not in rehearsal.limits, "one cache was trained twice"
            rehearsal.limits[cache.name], rehearsal.reads[cache.name] = limit_s, cache.reads
            rehearsal.needs[cache.name] = need(cache)
            rehearsal.clock.now += need(cache) if limit_s is None else min(need(cache), limit_s)
            cache.eval()
            cache.fold()
            return self._judge(cache, TrainingLog(1, 1.0, 0.0))

        monkeypatch.setattr(Candidates, "_train", train)
        monkeypatch.setattr(Candidates, "seconds_for", lambda self, cache, recipe: need(cache))
        monkeypatch.setattr(candidates_module, "time", self.clock)

    def search(self, seconds: float | None, **options: Any) -> Search:
        """Run the search with this much time."""
        self.limits.clear()
        search = make_search(deadline=None if seconds is None else self.clock.now + seconds, **options)
        search.run()
        return search

    def of_kind(self, *kinds: str) -> list[str]:
        return [name for name in self.limits if name.split("/")[1].rstrip("x0123456789") in kinds]


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    return Rehearsal(monkeypatch)


# --- the rounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [None, 2000.0])
def test_with_ample_time_all_three_rounds_are_trained(rehearsal: Rehearsal, seconds: float | None) -> None:
    search = rehearsal.search(seconds)
    names = list(rehearsal.limits)
    assert names[: len(STUDENTS)] == STUDENTS
    assert names[len(STUDENTS) :][: len(POOLED)] == POOLED
    trunks = names[len(STUDENTS) + len(POOLED) :]
    assert [name.split("/")[0] for name in trunks] == ["block3", "block4"]
    assert trunks == rehearsal.of_kind("conv")
    assert [trained.cache.name for trained in search.candidates.trained] == names
    for name, limit in rehearsal.limits.items():
        assert limit is None if seconds is None else limit is not None and limit >= rehearsal.needs[name]


@pytest.mark.parametrize("seconds", [None, 500.0])
def test_every_round_can_be_left_out(rehearsal: Rehearsal, seconds: float | None) -> None:
    rehearsal.search(seconds, student_shares=())
    assert rehearsal.of_kind("student") == []
    assert len(rehearsal.of_kind("mlp", "linear")) == len(POOLED) + 1, "one at the input as well"
    rehearsal.search(seconds, student_shares=module.STUDENT_SHARES[:1])
    assert rehearsal.of_kind("student") == STUDENTS[:1]
    rehearsal.search(seconds, pooled=False, trunks=False)
    assert list(rehearsal.limits) == STUDENTS
    rehearsal.search(seconds, trunks=False)
    assert rehearsal.of_kind("conv") == []
    rehearsal.search(seconds, reads=False)
    assert {rehearsal.reads[name] for name in rehearsal.limits if name not in STUDENTS} == {None}


def test_precision_is_that_of_every_recipe_and_the_temperature_that_of_students() -> None:
    search = make_search(student_temperature=3.0, bfloat16=False)
    for point, kind in ((0, "student"), (0, "mlp"), (1, "conv"), (1, "mlp"), (5, "linear")):
        recipe = search.recipe(search.candidates.build(POINTS[point], CacheShape(kind, 8)))  # type: ignore[arg-type]
        assert not recipe.bfloat16
        assert recipe.temperature == (3.0 if kind == "student" else Recipe.temperature)


def test_the_larger_student_reads_the_smaller_and_later_caches_read_the_reader(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, "_reader", lambda self: self.candidates.named(STUDENTS[1]))
    rehearsal.search(None)
    assert [rehearsal.reads.pop(name) for name in STUDENTS] == [None, STUDENTS[0]]
    assert len(rehearsal.reads) > len(POOLED)
    assert set(rehearsal.reads.values()) == {STUDENTS[1]}


def test_pooled_caches_behind_a_trunk_of_the_best_plan_read_it(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enabled(self: Search) -> list[Trained]:
        return [
            one for one in self.candidates.ordered() if one.cache.point == "input" or "block3/conv" in one.cache.name
        ]

    monkeypatch.setattr(Search, "_enabled", enabled)
    reads = {one.cache.name: one.cache.reads for one in rehearsal.search(None).candidates.trained}
    trunks = rehearsal.of_kind("conv")
    behind = [name for name in POOLED if name.startswith(("block4", "head"))]
    assert {reads.pop(name) for name in behind} == {trunks[0]}
    assert reads.pop(STUDENTS[0]) is None
    assert reads.pop(STUDENTS[1]) == STUDENTS[0]
    assert set(reads.values()) == {STUDENTS[1]}, "those before it, beside it, and the other trunk"
    reads = {one.cache.name: one.cache.reads for one in rehearsal.search(None, reads=False).candidates.trained}
    assert {reads[name] for name in behind} == {None}


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        ((0.52, 0.62, 0.76), ["block1", "block2"]),  # in the order of TRUNK_DEPTHS: 5/8, 3/4
        ((0.1, 0.3, 0.52, 0.62, 0.65, 0.76, 0.9), ["block3", "block5"]),
        ((0.1, 0.4, 0.9), ["block2"]),  # none before the middle
        ((0.2,), []),
        ((), []),
    ],
)
def test_trunks_are_next_to_their_depths(depths: Sequence[float], expected: Sequence[str]) -> None:
    """A vector, here next to each of these depths, has no room for a convolution."""
    order = sorted([*depths, 0.625, 0.75])
    points = [make_point("input", 0, (1, 8, 8), 0.0)]
    for position, depth in enumerate(order, start=1):
        is_map = depth in depths
        name = f"block{depths.index(depth)}" if is_map else f"vector{position}"
        points.append(make_point(name, position, (4, 4, 4) if is_map else (6,), depth))
    search = make_search(tuple(points))
    assert [cache.point for cache in search._trunks(None)] == expected
    assert list(make_search(tuple(points), trunks=False)._trunks(None)) == []


def test_a_sequence_of_vectors_gets_convolutions_over_its_positions() -> None:
    points = (
        make_point("input", 0, (6,), 0.0),
        make_point("tokens", 1, (5, 16), 0.2),
        make_point("late", 2, (5, 16), 0.8),
    )
    features = [np.zeros((20, *point.shape), np.float16) for point in points]
    search = Search(make_candidates(make_recording(features, np.zeros((20, 4), np.float32)), points), tolerance=0.05)
    over_positions = [cache.point for cache in search._pooled(None) if cache.shape == module.OVER_POSITIONS]
    assert over_positions == ["tokens", "late"]
    assert list(search._trunks(None)) == [], "these are its trunks"


def test_the_search_ends_with_what_there_is_when_the_user_stops_it(
    rehearsal: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Candidates._train

    def stopping(self: Candidates, *arguments: Any) -> Trained:
        self.stop.requested = True
        return trained(self, *arguments)

    monkeypatch.setattr(Candidates, "_train", stopping)
    search = rehearsal.search(None)
    assert [trained.cache.name for trained in search.candidates.trained] == STUDENTS[:1]


# --- short of time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [60.0, 70.0, 80.0])
def test_under_a_short_deadline_fewer_caches_are_trained_each_for_long_enough(
    rehearsal: Rehearsal, seconds: float
) -> None:
    rehearsal.search(seconds)
    assert rehearsal.of_kind("student") == STUDENTS[:1], "of the students the first survives"
    pooled = rehearsal.of_kind("mlp", "linear")
    assert 2 <= len(pooled) < len(POOLED)
    assert [pooled[0], pooled[-1]] == [POOLED[0], POOLED[-1]], "from the first point to the last"
    assert len(rehearsal.of_kind("conv")) == 1
    for name, limit in rehearsal.limits.items():
        assert limit is not None
        assert limit >= LEAST * rehearsal.needs[name] * (1 - 1e-9), name
    assert rehearsal.clock.now <= 1000 + seconds + 1e-6, "and the deadline is kept"


@pytest.mark.parametrize(("seconds", "count"), [(240.0, 1), (250.0, 2)])
def test_a_second_student_waits_for_a_budget_that_trains_both_in_full(
    rehearsal: Rehearsal, seconds: float, count: int
) -> None:
    """They need 180 seconds, and for the rounds behind them 36 and 30 are kept back."""
    rehearsal.search(seconds)
    assert rehearsal.of_kind("student") == STUDENTS[:count]
    for name in STUDENTS[:count]:
        limit = rehearsal.limits[name]
        assert limit is not None
        assert limit >= rehearsal.needs[name]


def test_a_student_that_would_be_starved_leaves_its_time_to_pooled_caches(rehearsal: Rehearsal) -> None:
    """It needs 60 seconds, and of 16 it would have 11, of 8 less than a tenth of 60."""
    rehearsal.search(16.0)
    assert rehearsal.of_kind("student") == STUDENTS[:1]
    before = sum(limit for name, limit in rehearsal.limits.items() if "student" not in name and limit)
    rehearsal.search(8.0)
    assert rehearsal.of_kind("student") == []
    pooled = [rehearsal.limits[name] or 0.0 for name in rehearsal.of_kind("mlp", "linear")]
    assert sum(pooled) > before
    rehearsal.search(8.0, pooled=False)
    assert rehearsal.of_kind("student") == STUDENTS[:1], "where nothing else can be had it is tried all the same"


def test_of_three_caches_at_the_input_the_first_two_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Candidates, "seconds_for", lambda self, cache, recipe: 100.0)
    search = make_search()
    students = [search.candidates.build(POINTS[0], CacheShape("student", width)) for width in (8, 16, 24)]
    assert search._affordable(students, 201.0, first) == students[:2]
    assert search._affordable(students, 301.0, first) == students


def test_time_that_later_caches_cannot_use_goes_to_the_students(rehearsal: Rehearsal) -> None:
    rehearsal.search(1000.0)
    pooled = NEEDS["mlp"] * (len(POOLED) + 1)  # one more at the input, if no student came of it
    limit = rehearsal.limits[STUDENTS[0]]
    assert limit == pytest.approx((1000 - 2 * NEEDS["conv"] - pooled) / 3)  # the second student needs twice as much


def test_more_time_never_means_fewer_caches(rehearsal: Rehearsal) -> None:
    counts = []
    for seconds in (16, 28, 60, 2000):
        rehearsal.search(seconds)
        counts.append([len(rehearsal.of_kind(*kinds)) for kinds in (("student",), ("mlp", "linear"))])
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == [len(STUDENTS), len(POOLED)]


def test_time_that_early_rounds_do_not_need_goes_to_the_trunks(rehearsal: Rehearsal) -> None:
    seconds = 2000.0
    rehearsal.search(seconds)
    earlier = sum(rehearsal.needs[name] for name in (*STUDENTS, *POOLED))
    trunks = rehearsal.of_kind("conv")
    by_need = (seconds - earlier) / len(trunks)  # they need equally much
    assert rehearsal.limits[trunks[0]] == pytest.approx(by_need)


def test_however_short_the_time_one_cache_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Candidates, "seconds_for", lambda self, cache, recipe: 100.0)
    search = make_search()
    students, pooled = list(search._students()), list(search._pooled(None))
    assert search._affordable(students, 0.1, first) == students[:1]
    assert search._affordable(pooled, 0.1, evenly) == [pooled[len(pooled) // 2]]
    assert search._affordable([], 0.1, evenly) == []


@pytest.mark.parametrize("limit_s", [None, 14.9, 15.1, 29.0, 31.0, 1e6])
def test_affordable_are_as_many_as_get_their_least(monkeypatch: pytest.MonkeyPatch, limit_s: float | None) -> None:
    """Of caches that need 100 seconds each the limit holds as many as `LEAST` of that goes into it."""
    monkeypatch.setattr(Candidates, "seconds_for", lambda self, cache, recipe: 100.0)
    search = make_search()
    pooled = list(search._pooled(None))
    count = len(pooled) if limit_s is None else min(len(pooled), max(1, int(limit_s / (LEAST * 100))))
    assert search._affordable(pooled, limit_s, evenly) == evenly(pooled, count)


@pytest.mark.parametrize(
    ("kind", "passes", "most"),
    [("student", 60, 3_000_000), ("transformer", 40, 1_500_000), ("conv", 40, 400_000), ("mlp", 30, 600_000)],
)
def test_trainings_grow_with_the_inputs_up_to_a_limit(kind: str, passes: int, most: int) -> None:
    search = make_search()
    for n in (2_000, 1_000_000):
        search.candidates.train_rows = np.arange(n)
        assert search._recipe(kind, 0 if kind == "student" else 1).rows == min(passes * n, most)


def test_trunks_take_little_of_what_a_hit_saves() -> None:
    search = make_search()
    assert [cache.point for cache in search._trunks(None)] == ["block3", "block4"]
    widths = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search.candidates, "widest", lambda point, kind, share: widths.append((point.name, share)))
        assert list(search._trunks(None)) == []
    assert dict(widths) == pytest.approx({"block3": 0.015, "block4": 0.04 * 0.15})


def test_of_trunks_the_better_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal = Rehearsal(monkeypatch)
    rehearsal.search(16.0)
    assert [name.split("/")[0] for name in rehearsal.of_kind("conv")] == ["block3"]


# --- students ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((6,), torch.float32), ((1, 4, 4), torch.float32), ((5, 16), torch.float32), ((3, 16), torch.int64)],
)
def test_an_input_that_is_neither_image_nor_token_ids_gets_no_student(shape: tuple[int, ...], dtype: Any) -> None:
    point = make_point("input", 0, shape, 0.0, dtype)
    features = np.zeros((20, *shape), np.float16 if dtype.is_floating_point else np.int32)
    recording = make_recording([features], np.zeros((20, CLASSES), np.float32))
    assert list(Search(make_candidates(recording, (point,)), tolerance=0.05)._students()) == []


def test_without_a_student_the_input_gets_pooled_caches_that_read_nothing(rehearsal: Rehearsal) -> None:
    points = (make_point("input", 0, (6,), 0.0), make_point("head", 1, (6,), 0.8))
    head = image_recording(100).features[2]
    recording = make_recording([head, head], image_recording(100).logits_NC)
    Search(make_candidates(recording, points), tolerance=0.05).run()
    assert list(rehearsal.reads.items()) == [("input/mlp64x1", None), ("head/mlp32x1", None), ("head/linear", None)]


def token_search() -> Search:
    points = (make_point("input", 0, (12,), 0.0, torch.int64), make_point("head", 1, (6,), 0.8))
    ids = np.random.default_rng(0).integers(0, 50, (100, 12)).astype(np.int32)
    recording = make_recording([ids, image_recording(100).features[2]], image_recording(100).logits_NC)
    return Search(make_candidates(recording, points), tolerance=0.05)


def test_token_ids_are_looked_through_once_for_the_vocabulary() -> None:
    search, looks = token_search(), 0
    ids = search.candidates.recording.features[0]

    class Watched:
        shape, dtype = ids.shape, ids.dtype

        def __len__(self) -> int:
            return len(ids)

        def __getitem__(self, rows: Any) -> Any:
            nonlocal looks
            looks += isinstance(rows, np.ndarray)
            return ids[rows]

    search.candidates.recording.features[0] = cast(Any, Watched())
    first, second = search._students()
    assert (first.vocabulary, second.vocabulary) == (int(ids[search.candidates.train_rows].max()) + 1,) * 2
    assert looks == 1


def test_token_ids_get_transformer_students() -> None:
    search = token_search()
    first, second = search._students()
    assert (first.shape.kind, second.shape.kind) == ("transformer", "transformer")
    assert (first.reads, second.reads) == (None, first.name)
    assert first.shape.width < second.shape.width
    assert first.vocabulary > 0
    for cache, share in zip((first, second), module.STUDENT_SHARES, strict=True):
        assert 0 < search.candidates.flops_of(cache) <= share * BACKBONE_FLOPS


@pytest.mark.parametrize(("before", "students"), [(0.02, 0), (module.STUDENT_SHARES[-1], 0), (0.2, 2)])
def test_token_ids_whose_vectors_come_almost_free_get_no_student(before: float, students: int) -> None:
    points = (make_point("input", 0, (12,), 0.0, torch.int64), make_point("vectors", 1, (12, 6), before))
    ids = np.random.default_rng(0).integers(0, 50, (100, 12)).astype(np.int32)
    recording = make_recording([ids, np.zeros((100, 12, 6), np.float16)], image_recording(100).logits_NC)
    assert len(list(Search(make_candidates(recording, points), tolerance=0.05)._students())) == students


def test_token_ids_get_no_pooled_caches() -> None:
    assert [cache.point for cache in token_search()._pooled(None)] == ["head", "head"]


def test_a_second_student_is_wider_or_there_is_none() -> None:
    assert [cache.name for cache in make_search(student_shares=(0.04, 0.05))._students()] == STUDENTS[:1]
    (only,) = make_search(student_shares=(0.01, 0.04))._students()
    assert (only.name, only.reads) == (STUDENTS[0], None), "where the first is too dear the second reads nothing"


# --- which student later caches read ----------------------------------------------------------------


def right_where(search: Search, right_N: Tensor) -> Tensor:
    """Logits that agree with the backbone exactly on these rows."""
    full_N = torch.from_numpy(search.candidates.recording.logits_NC).argmax(1)
    said_N = torch.where(right_N, full_N, (full_N + 1) % CLASSES)
    return torch.nn.functional.one_hot(said_N, CLASSES).float()


@pytest.mark.parametrize(
    ("first_right", "second_right", "reader"),
    [
        (lambda i: i % 2 == 0, lambda i: i >= 0, 1),  # the second answers what the first leaves
        (lambda i: i >= 0, lambda i: i >= 0, 0),  # nothing is left for the second
        (lambda i: i < 0, lambda i: i < 0, 0),  # neither is worth its look-up
    ],
    ids=["both", "first", "neither"],
)
def test_the_reader_is_the_last_student_of_the_best_plan(first_right: Any, second_right: Any, reader: int) -> None:
    search = make_search(rows=400)
    number_N = torch.arange(400) // 5  # so that every part has both kinds
    sure_N = torch.linspace(0, 0.04, 400)
    first_N, second_N = first_right(number_N), second_right(number_N)
    first = say(
        search.candidates,
        0,
        right_where(search, first_N),
        shape=CacheShape("student", 8),
        sure_N=0.1 + 0.8 * first_N + sure_N,
    )
    second = say(
        search.candidates,
        0,
        right_where(search, second_N),
        shape=CacheShape("student", 16),
        reads=first,
        sure_N=0.1 + 0.8 * second_N + sure_N,
    )
    assert search._reader() is (first, second)[reader]


def test_without_students_there_is_no_reader() -> None:
    assert make_search()._reader() is None


# --- even choices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 13))
def test_a_choice_is_even_from_the_first_to_the_last(count: int) -> None:
    for size in range(1, 31):
        chosen = evenly(range(size), count)
        assert len(chosen) == min(size, count)
        assert chosen == sorted(set(chosen))
        if 1 < count < size:
            assert (chosen[0], chosen[-1]) == (0, size - 1)
            gaps = np.diff(chosen)
            assert gaps.max() - gaps.min() <= 1
        if count == 1:
            assert chosen == [size // 2]
    assert evenly([], count) == []


def test_a_deep_backbone_gets_pooled_caches_at_some_points_only() -> None:
    points = [make_point(f"p{k}", k, (6,), k / 100) for k in range(40)]
    features = [np.zeros((20, 6), np.float16)] * 40
    recording = make_recording(features, np.zeros((20, CLASSES), np.float32))
    pooled = list(Search(make_candidates(recording, points), tolerance=0.05)._pooled(None))
    assert len(pooled) == MAX_POINTS
    assert [pooled[0].point, pooled[-1].point] == ["p0", "p39"]
