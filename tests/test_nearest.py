"""Nearest-neighbour caches against slow oracles: answers, choice of entries, class thresholds, to disk and back."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.artifact import load, save
from offramp.caches import Reduction, build_cache
from offramp.caches import nearest as module
from offramp.caches.nearest import FAR, NEVER, SHARPNESS, SMALL, ClassThresholds, NearestCache, StoreShape, kmeans
from offramp.cost import count_flops
from offramp.errors import InputError
from offramp.model import CachedModel
from offramp.splitting import split
from offramp.tasks import Classification
from offramp.types import Certificate, CostTable, PartCost, Plan, PlannedCache, RoutingCost, Timing

CLASSES, ROWS = 4, 90
ACTIVATIONS: dict[str, tuple[int, ...]] = {"map": (3, 4, 4), "sequence": (5, 6), "vector": (8,)}
SHAPES = [
    StoreShape(store=store, feature=feature, score=score, width=6, centroids=3)  # type: ignore[arg-type]
    for store, feature, score in itertools.product(
        ("points", "centroids"), ("raw", "pooled", "projected"), ("vote", "distance")
    )
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recorded(activation: str, rows: int = ROWS, seed: int = 0) -> tuple[NDArray[np.float16], Tensor]:
    """Activations around one centre per answer, far from the origin; answers of very unequal frequency."""
    random = np.random.default_rng(seed)
    answer_N = np.minimum(random.geometric(0.5, rows) - 1, CLASSES - 1)
    centres = np.random.default_rng(7).standard_normal((CLASSES, *ACTIVATIONS[activation]))
    features = 20 + centres[answer_N] + 0.7 * random.standard_normal((rows, *ACTIVATIONS[activation]))
    return features.astype(np.float16), torch.from_numpy(answer_N)


def make(shape: StoreShape, activation: str = "vector", *, classes: int = CLASSES) -> NearestCache:
    features, answer_N = recorded(activation)
    cache = NearestCache("p/nearest", "p", shape, classes, reduction=Reduction())
    cache.fit(features, np.arange(ROWS), answer_N, generator())
    cache.eval()
    return cache


def queries(activation: str, rows: int = 20) -> Tensor:
    return torch.from_numpy(recorded(activation, rows, seed=1)[0])


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)


# --- oracles ----------------------------------------------------------------------------------------


def numbers(activation_B: NDArray[Any], feature: str) -> NDArray[np.float64]:
    """(B, W) what distances are taken between."""
    out = []
    for row in activation_B.astype(np.float64):
        if feature == "raw" or row.ndim == 1:
            out.append(row.ravel())
        else:
            positions = row if row.ndim == 2 else row.reshape(len(row), -1).T
            out.append(np.concatenate([positions.mean(0), positions.max(0)]))
    return np.array(out)


def slow_scale(entries: NDArray[Any], answers: NDArray[Any]) -> float:
    nearest = []
    for entry, answer in zip(entries, answers, strict=True):
        nearest.append(min(math.dist(entry, m) for m, a in zip(entries, answers, strict=True) if a != answer))
    return sorted(nearest)[(len(nearest) - 1) // 2]


def slow_scores(
    query: NDArray[Any], entries: NDArray[Any], answers: NDArray[Any], scale: float, shape: StoreShape
) -> list[float]:
    distances = sorted((math.dist(query, entry), int(answer)) for entry, answer in zip(entries, answers, strict=True))
    if shape.score == "distance":
        nearest = [min((d for d, a in distances if a == answer), default=FAR * scale) for answer in range(CLASSES)]
        return [-SHARPNESS * d / scale for d in nearest]
    votes = [0.0] * CLASSES
    for d, a in distances[: shape.neighbours]:
        votes[a] += 1 / (1 + (d / scale) ** 2) / min(shape.neighbours, len(distances))
    return [math.log(v + SMALL) for v in votes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("feature", ["raw", "pooled"])
@pytest.mark.parametrize("score", ["vote", "distance"])
@torch.no_grad()
def test_points_answer_as_a_loop_over_all_training_inputs_does(activation: str, feature: Any, score: Any) -> None:
    for neighbours in (1, 5, 200):
        shape = StoreShape(feature=feature, score=score, neighbours=neighbours)
        features, answer_N = recorded(activation)
        entries = numbers(features, feature)
        scale = slow_scale(entries, answer_N.numpy())
        expected = [
            slow_scores(query, entries, answer_N.numpy(), scale, shape)
            for query in numbers(queries(activation).numpy(), feature)
        ]
        scores = make(shape, activation)(queries(activation))
        close(scores.double(), torch.tensor(expected, dtype=torch.float64))
        assert scores.argmax(1).tolist() == [row.index(max(row)) for row in expected]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.store == "centroids"], ids=lambda s: s.label)
@torch.no_grad()
def test_centroids_answer_as_a_loop_over_the_centroids_does(shape: StoreShape) -> None:
    cache = make(shape, "map")
    entries, answers = cache.entries_MW.double().numpy(), cache.answer_M.numpy()
    assert np.bincount(answers).tolist() == [3] * CLASSES
    scale = slow_scale(entries, answers)
    points = numbers(queries("map").numpy(), "pooled" if shape.feature == "pooled" else "raw")
    points = points - cache.centre_F.double().numpy()
    if shape.feature == "projected":
        points = points @ cache.directions_FW.double().numpy()
    expected = [slow_scores(point, entries, answers, scale, shape) for point in points]
    scores = cache(queries("map"))
    close(scores.double(), torch.tensor(expected, dtype=torch.float64))
    assert scores.argmax(1).tolist() == [row.index(max(row)) for row in expected]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
@torch.no_grad()
def test_every_store_learns_and_rows_do_not_depend_on_each_other(
    shape: StoreShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    for activation in ACTIVATIONS:
        cache, x = make(shape, activation), queries(activation)
        scores = cache(x)
        assert (scores.argmax(1) == recorded(activation, 20, seed=1)[1]).double().mean() >= 0.5
        assert bool(scores.isfinite().all())
        close(cache(x[[4, 0]]), scores[[4, 0]])
        for name in cache.confidences():
            cache.use_confidence(name)
            confidence = cache.confidence(scores)
            assert confidence.shape == (20,)
            assert bool(((confidence >= 0) & (confidence <= 1)).all())
        with monkeypatch.context() as patched:
            patched.setattr(module, "CHUNK", 3 * cache.kept)
            close(cache(x), scores)
            assert cache(x[:0]).shape == (0, CLASSES)


# --- confidences ------------------------------------------------------------------------------------


@torch.no_grad()
def test_vote_is_high_where_many_neighbours_agree_and_are_close() -> None:
    cache = NearestCache("c", "p", StoreShape(neighbours=2), 2, reduction=Reduction())
    features = np.array([[0.0], [0.0], [4.0], [4.0]], np.float16)
    cache.fit(features, np.arange(4), torch.tensor([0, 0, 1, 1]), generator())
    assert cache.confidence_name in ("max_softmax", "vote")
    cache.use_confidence("vote")
    scores = cache(torch.tensor([[0.0], [-4.0], [-400.0]]))
    assert cache.confidence(scores).tolist() == pytest.approx([1, 0.5, 1 / (1 + 100**2)], rel=1e-3)
    assert scores.argmax(1).tolist() == [0, 0, 0], "far away votes are light, but still votes"


@torch.no_grad()
def test_distance_is_how_much_nearer_the_answer_is_than_any_other() -> None:
    cache = NearestCache("c", "p", StoreShape(score="distance"), 3, reduction=Reduction())
    features = np.array([[0.0], [4.0], [9.0]], np.float16)
    cache.fit(features, np.arange(3), torch.tensor([2, 0, 0]), generator())
    cache.use_confidence("distance")
    scores = cache(torch.tensor([[0.0], [1.0], [2.0], [6.0]]))
    assert cache.confidence(scores).tolist() == pytest.approx([1, 2 / 3, 0, 2 / 3], abs=1e-3)
    assert scores.argmax(1)[[0, 1, 3]].tolist() == [2, 2, 0]
    assert bool(scores.isfinite().all()), "class 1 is not in the store"


def test_distance_between_two_answers_at_no_distance_is_no_confidence() -> None:
    assert module.distance(torch.tensor([[0.0, 0.0, -3.0]])).tolist() == [0.0]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
@torch.no_grad()
def test_nan_stays_nan_in_the_answer_and_spoils_no_store(shape: StoreShape) -> None:
    features, answer_N = recorded("map")
    features[3, 0, 0, 0] = np.nan
    cache = NearestCache("c", "p", shape, CLASSES, reduction=Reduction())
    cache.fit(features, np.arange(ROWS), answer_N, generator())
    cache.use_class_thresholds(shape.score, torch.zeros(CLASSES))
    x = queries("map")
    x[1, 0, 0, 0] = torch.nan
    for name in cache.confidences():
        cache.use_confidence(name)
        assert cache.confidence(cache(x)).isnan().nonzero().flatten().tolist() == [1], name


# --- one threshold per class ------------------------------------------------------------------------


def test_class_thresholds_decide_exactly_as_the_thresholds_themselves() -> None:
    random = generator()
    threshold_C = torch.cat([torch.rand(200, generator=random), torch.tensor([0.0, 1e-30, 1.0, NEVER, math.inf])])
    thresholds = ClassThresholds("vote", threshold_C)
    below, above = torch.tensor(0.0), torch.tensor(1.0)
    capped_C = threshold_C.clamp(max=1)
    for score_C in (
        capped_C,
        torch.nextafter(capped_C, below),
        torch.nextafter(capped_C, above),
        *torch.rand(50, len(threshold_C), generator=random),
    ):
        rescaled_C = thresholds(score_C, torch.arange(len(threshold_C)))
        assert torch.equal(rescaled_C >= module.CLASS_LEVEL, score_C >= threshold_C)
        assert bool(((rescaled_C >= 0) & (rescaled_C <= 1)).all())


def test_class_thresholds_keep_the_order_within_a_class() -> None:
    score_B = torch.rand(500, generator=generator()).sort().values
    for threshold in (0.0, 0.3, 0.999, 1.0, math.inf):
        rescaled_B = ClassThresholds("vote", torch.tensor([threshold]))(score_B, torch.zeros(500, dtype=torch.int64))
        assert bool((rescaled_B.diff() >= 0).all())


def test_class_thresholds_of_another_score_or_number_are_refused() -> None:
    cache = make(StoreShape(score="vote"))
    for score in ("distance", "max_softmax"):
        with pytest.raises(InputError, match=f"for the score 'vote' of this cache; received '{score}'"):
            cache.use_class_thresholds(score, torch.zeros(CLASSES))
    with pytest.raises(InputError, match=r"shape \(3,\); expected one per class, 4"):
        cache.use_class_thresholds("vote", torch.zeros(3))


# --- the store --------------------------------------------------------------------------------------


def held(cache: NearestCache) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in cache.buffers())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
def test_a_store_stays_within_its_bytes_and_says_what_was_cut(
    shape: StoreShape, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "offramp")
    whole = make(shape, "map")
    assert (whole.kept, whole.seen) == (ROWS if shape.store == "points" else 3 * CLASSES, ROWS)
    assert not caplog.records
    for share in (0.9, 0.7):
        caplog.clear()
        limit = int(share * held(whole))
        cut = make(dataclasses.replace(shape, max_bytes=limit), "map")
        assert held(cut) <= limit
        assert cut.kept < whole.kept or cut.entries_MW.shape[1] < whole.entries_MW.shape[1]
        if cut.kept < whole.kept:
            assert caplog.messages == [
                f"cache p/nearest: the store is cut from {whole.kept} to {cut.kept} entries to stay within "
                f"max_bytes={limit}"
            ]


def test_the_limit_in_points_is_no_cut(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "offramp")
    cache = make(StoreShape(points=10))
    assert (cache.kept, cache.seen) == (10, ROWS)
    assert not caplog.records


def test_points_are_balanced_over_the_answers_as_far_as_there_are_any() -> None:
    """Oracle: give one more to the answer that has fewest, as long as it has rows left."""
    _, answer_N = recorded("vector")
    available = answer_N.bincount(minlength=CLASSES).tolist()
    for points in (1, 2, 7, 20, 60, 89, ROWS, 1000):
        kept = make(StoreShape(points=points)).answer_M.bincount(minlength=CLASSES).tolist()
        assert sum(kept) == min(points, ROWS)
        cut = [k for k, a in zip(kept, available, strict=True) if k < a]
        assert max(cut, default=0) - min(cut, default=0) <= 1
        assert all(k <= max(cut, default=ROWS) for k, a in zip(kept, available, strict=True) if cut)


def test_entries_are_training_inputs_with_their_answers_each_once() -> None:
    features, answer_N = recorded("vector")
    cache = make(StoreShape(feature="raw", points=30))
    entries = cache.entries_MW + cache.centre_F
    matches = torch.cdist(entries, torch.from_numpy(features).float()).min(1)
    assert float(matches.values.max()) < 0.05
    assert len(set(matches.indices.tolist())) == 30
    assert torch.equal(answer_N[matches.indices], cache.answer_M)


def test_only_the_given_rows_are_used() -> None:
    features, answer_N = recorded("vector")
    rows = np.flatnonzero(answer_N.numpy() == 1)
    features[np.flatnonzero(answer_N.numpy() != 1)] = np.nan
    cache = NearestCache("c", "p", StoreShape(), CLASSES, reduction=Reduction())
    cache.fit(features, rows, answer_N[rows], generator())
    assert cache.seen == cache.kept == len(rows)
    assert cache.answer_M.unique().tolist() == [1]
    assert float(cache.scale) == 1.0, "no other answer to measure a distance to"
    assert torch.equal(cache(torch.from_numpy(features[rows])).argmax(1), torch.ones(len(rows), dtype=torch.int64))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
def test_a_store_depends_on_its_generator_alone_and_leaves_the_global_one(shape: StoreShape) -> None:
    shape = StoreShape(store=shape.store, feature=shape.feature, score=shape.score, points=20, centroids=2, width=3)
    before = torch.random.get_rng_state()
    first = make(shape, "map")
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    for name, value in make(shape, "map").state_dict().items():
        assert torch.equal(value, first.state_dict()[name])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
def test_a_single_training_input_is_enough(shape: StoreShape) -> None:
    features, answer_N = recorded("map")
    cache = NearestCache("c", "p", shape, CLASSES, reduction=Reduction())
    cache.fit(features, np.array([5]), answer_N[[5]], generator())
    assert cache(queries("map")).argmax(1).tolist() == [int(answer_N[5])] * 20


def test_reading_in_small_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in SHAPES:
        whole = make(shape, "map")
        with monkeypatch.context() as patched:
            patched.setattr(module, "READ_ROWS", 7)
            close(make(shape, "map").entries_MW, whole.entries_MW)


def test_refilling_drops_what_was_there() -> None:
    features, answer_N = recorded("vector")
    cache = make(StoreShape())
    cache.fit(features, np.arange(10), answer_N[:10], generator())
    assert (cache.kept, cache.seen, len(cache.norm_M)) == (10, 10, 10)


def test_what_no_store_can_be_filled_from() -> None:
    features, answer_N = recorded("vector")
    cache = NearestCache("c", "p", StoreShape(feature="pooled", max_bytes=50), CLASSES, reduction=Reduction())
    with pytest.raises(InputError, match="cache c has an empty store; fill it"):
        cache(queries("vector"))
    with pytest.raises(InputError, match="max_bytes=50 leaves no room for an entry of 44 bytes beside 36 bytes"):
        cache.fit(features, np.arange(ROWS), answer_N, generator())
    with pytest.raises(InputError, match="distances between int32 features mean nothing"):
        cache.fit(features.astype(np.int32), np.arange(ROWS), answer_N, generator())
    with pytest.raises(InputError, match=r"0 rows with answers of shape \(0,\)"):
        cache.fit(features, np.arange(0), answer_N[:0], generator())
    with pytest.raises(InputError, match=r"90 rows with answers of shape \(89,\)"):
        cache.fit(features, np.arange(ROWS), answer_N[1:], generator())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("store", "rows", "store is 'rows'; expected one of points, centroids"),
        ("feature", "flat", "feature is 'flat'; expected one of raw, pooled, projected"),
        ("score", "both", "score is 'both'; expected one of vote, distance"),
        ("neighbours", 0, "neighbours is 0; expected a whole number from 1"),
        ("max_bytes", -1, "max_bytes is -1; expected"),
    ],
)
def test_a_shape_that_no_store_has_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        StoreShape(**{field: value})  # type: ignore[arg-type]


# --- k-means ----------------------------------------------------------------------------------------


def scatter(points: Tensor, centroids: Tensor) -> float:
    """Sum of squared distances to the nearest centroid."""
    return sum(min(math.dist(p, c) ** 2 for c in centroids.tolist()) for p in points.tolist())


def test_kmeans_lowers_the_scatter_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    points, found = torch.randn(60, 3, generator=generator(1)), []
    for rounds in (0, 1, 2, 4, 20):
        monkeypatch.setattr(module, "ROUNDS", rounds)
        found.append(scatter(points, kmeans(points, 5, generator())))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.9 * found[0]


def test_kmeans_settles_on_the_means_of_its_clusters() -> None:
    points = torch.randn(60, 3, generator=generator(1))
    centroids = kmeans(points, 5, generator())
    nearest = torch.cdist(points, centroids).argmin(1)
    for k in range(5):
        close(centroids[k], points[nearest == k].mean(0))


def test_kmeans_with_as_many_centroids_as_points_keeps_them() -> None:
    points = torch.randn(6, 2, generator=generator(2))
    assert scatter(points, kmeans(points, 6, generator())) == pytest.approx(0, abs=1e-9)


def test_kmeans_of_equal_points_has_no_nan() -> None:
    assert kmeans(torch.ones(8, 2), 3, generator()).tolist() == [[1.0, 1.0]] * 3


def test_centroids_scatter_less_within_each_class_than_as_many_stored_points() -> None:
    features, answer_N = recorded("vector")
    centroids = make(StoreShape(store="centroids", feature="raw", centroids=3))
    points = make(StoreShape(feature="raw", points=3 * CLASSES))
    base = torch.from_numpy(features).float() - centroids.centre_F
    for answer in range(CLASSES):
        members = base[answer_N == answer]
        within = [scatter(members, cache.entries_MW[cache.answer_M == answer]) for cache in (centroids, points)]
        assert within[0] < within[1]


# --- projections ------------------------------------------------------------------------------------


def test_a_full_projection_keeps_all_distances() -> None:
    projected = make(StoreShape(feature="projected", width=100))
    raw = make(StoreShape(feature="raw"))
    assert projected.entries_MW.shape == (ROWS, 8)
    first, second = (torch.cdist(cache.entries_MW, cache.entries_MW) for cache in (raw, projected))
    close(first, second)


def test_a_projection_keeps_the_directions_of_largest_variance() -> None:
    cache = make(StoreShape(feature="projected", width=3), "map")
    base = torch.from_numpy(recorded("map")[0]).float().flatten(1)
    values, vectors = torch.linalg.eigh((base - base.mean(0)).T @ (base - base.mean(0)))
    leading = vectors[:, -3:]
    assert float(values[-1]) > 0
    close((cache.directions_FW.T @ leading).svd().S, torch.ones(3))


def test_whitening_gives_every_direction_unit_variance() -> None:
    cache = make(StoreShape(feature="projected", width=4, whiten=True), "map")
    close(cache.entries_MW.var(0), torch.ones(4))


def test_a_projection_takes_at_most_half_of_the_bytes() -> None:
    features = np.random.default_rng(0).standard_normal((50, 1000)).astype(np.float16)
    cache = NearestCache("c", "p", StoreShape(feature="projected", max_bytes=40_000), 2, reduction=Reduction())
    cache.fit(features, np.arange(50), torch.arange(50) % 2, generator())
    assert cache.directions_FW.shape == (1000, 5)
    assert held(cache) <= 40_000


# --- price and disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["vote", "distance"])
@torch.no_grad()
def test_the_search_is_counted_in_flops(score: Any) -> None:
    x = queries("map", 20)
    raw = make(StoreShape(feature="raw", score=score), "map")
    assert count_flops(lambda: raw(x)) == 2 * 20 * ROWS * 48
    projected = make(StoreShape(feature="projected", score=score, width=6), "map")
    assert count_flops(lambda: projected(x)) == 2 * 20 * (48 * 6 + ROWS * 6)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.label)
@torch.no_grad()
def test_described_and_built_again_it_is_the_same(shape: StoreShape) -> None:
    for by_class in (False, True):
        cache, x = make(shape, "map"), queries("map")
        cache.use_confidence(shape.score)
        if by_class:
            cache.use_class_thresholds(shape.score, torch.tensor([0.1, 0.5, 0.9, math.inf]))
        built = build_cache(json.loads(json.dumps(cache.describe())))
        assert isinstance(built, NearestCache)
        built.load_state_dict(cache.state_dict())
        assert built.describe() == cache.describe()
        assert (built.kept, built.seen) == (cache.kept, cache.seen)
        scores = cache(x)
        torch.testing.assert_close(built(x), scores, rtol=0, atol=0)
        torch.testing.assert_close(built.confidence(scores), cache.confidence(scores), rtol=0, atol=0)


def test_a_cached_model_with_a_store_comes_back_from_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()
    split_model = split(backbone, torch.randn(4, 8))
    x = torch.randn(300, 8)
    with torch.no_grad():
        answer_N, hidden = backbone(x).argmax(1), split_model.stages[0](x)[0]
    first = NearestCache("a", "input", StoreShape(feature="projected", width=5), CLASSES, reduction=Reduction())
    first.fit(x.half().numpy(), np.arange(300), answer_N, generator())
    first.use_class_thresholds("vote", module.vote(first(x)).quantile(torch.tensor([0.5, 0.6, 0.7, 0.8])))
    point = split_model.points[1].name
    shape = StoreShape(store="centroids", feature="raw", score="distance")
    second = NearestCache("b", point, shape, CLASSES, reduction=Reduction())
    second.fit(hidden.half().numpy(), np.arange(300), answer_N, generator())
    second.use_confidence("distance")
    planned = tuple(PlannedCache(c.name, c.point, 0.5, c.confidence_name, 0.3) for c in (first, second))
    certificate = Certificate(0.1, 0.95, 500, 3, 0.02, "none", 1, split_model.fingerprint, "f", "2026-01-01")
    cached = CachedModel(
        split_model,
        [first, second],
        Plan(planned, 0.01, 0.6),
        certificate,
        costs(len(split_model.stages)),
        task=Classification(),
        summary={},
    )
    fresh = torch.randn(200, 8)
    before = cached.predict(fresh)
    assert set(before.left_at_B.tolist()) == {0, 1, 2}, "every exit is in use"
    save(cached, tmp_path / "model")
    after = load(tmp_path / "model", backbone).predict(fresh)
    assert torch.equal(before.output, after.output)
    assert torch.equal(before.left_at_B, after.left_at_B)
    assert torch.equal(before.confidence_B, after.confidence_B)


def costs(stages: int) -> CostTable:
    def part(name: str) -> PartCost:
        return PartCost(name, 100.0, 10, 40, {1: Timing(1.0, 0.9, 1.1), 8: Timing(2.0, 1.9, 2.1)})

    routing = tuple(RoutingCost(0.01, 0.02, 0.001) for _ in range(stages))
    parts = tuple(part(f"s{k}") for k in range(stages))
    return CostTable("cpu", 1, part("backbone"), parts, routing, (part("a"), part("b")), (0, 1))
