"""GATI: what it trains, its thresholds and composition against brute force, the memory limit, and whole fits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import images, make_costs, make_records, slow_cheapest, slow_outcome, slow_threshold, toy, traffic

import offramp
from offramp.caches import LearnedCache
from offramp.candidates import Trained
from offramp.choosing import Learned, choose
from offramp.distillation import Recipe
from offramp.errors import InputError
from offramp.fitting import fit, learn
from offramp.methods.gati import Gati
from offramp.placement import OFF
from offramp.recording import TUNE

METHOD = Gati(hidden=32, pooled=64, epochs=10, learning_rate=1e-2)
TRAFFIC = traffic(images(300, 0).split(100), images(500, 1).split(100))

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def learned(quick: None) -> Learned:
    return learn(toy(), method=METHOD, **TRAFFIC)


# --- the rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_published_rule_is_that_of_brute_force(seed: int) -> None:
    """Three variants at each of two layers: their own thresholds, then the best choice of at most one per layer."""
    records, costs = make_records(40, 6, seed), make_costs(6, seed, layers=2)
    for tolerance in (0.02, 0.1, 0.25):
        found = Gati().thresholds(records, costs, tolerance)
        own_K = [slow_threshold(records.confidence_NK[:, k], records.agreement_NK[:, k], tolerance) for k in range(6)]
        assert all(threshold in (own, OFF) for threshold, own in zip(found, own_K, strict=True))
        cost, wrong = slow_outcome(records, found, costs)
        assert wrong <= tolerance
        expected = slow_cheapest(records, costs, [[own] for own in own_K], tolerance, costs.before_K.tolist())
        assert cost == pytest.approx(expected)


@pytest.mark.parametrize(("caches", "layers"), [(6, 2), (9, 3), (36, 12)])
def test_at_most_one_variant_per_layer(caches: int, layers: int) -> None:
    """Exactly and greedily; the accuracy target holds either way."""
    records, costs = make_records(400, caches, 1), make_costs(caches, 1, layers=layers)
    found = np.array(Gati().thresholds(records, costs, 0.1))
    on_LV = np.isfinite(found).reshape(layers, -1)
    assert on_LV.any()
    assert on_LV.sum(axis=1).max() <= 1
    cost, wrong = slow_outcome(records, found.tolist(), costs)
    assert wrong <= 0.1
    assert cost < 1


def test_nothing_precise_enough_is_no_cache() -> None:
    records, costs = make_records(60, 4, 0), make_costs(4, 0)
    records.agreement_NK[:] = False
    assert Gati().thresholds(records, costs, 0.1) == (OFF,) * 4


# --- what is learned ----------------------------------------------------------------------------------


def test_every_layer_gets_its_variants_and_a_selector_each(learned: Learned) -> None:
    points = learned.candidates.split.points[1:]
    labels = {point.name: set[str]() for point in points}
    for trained in learned.trained:
        assert isinstance(trained.cache, LearnedCache)
        labels[trained.cache.point].add(trained.cache.shape.label)
        assert trained.cache.confidence_name == "selector"
        assert trained.log.steps == METHOD.epochs * len(learned.candidates.train_rows) // 64
    assert [point.shape for point in points] == [(8, 4, 4), (8, 4, 4), (128,)]
    assert all(found == {"layers-32", "layers-pool64-32", "conv1d3x1"} for found in labels.values())
    agreement_NK = learned.candidates.records(learned.trained, TUNE).agreement_NK
    assert agreement_NK.mean(axis=0).max() > 0.9


def rehearsed(learned: Learned, method: Gati) -> tuple[list[LearnedCache], Recipe]:
    """The caches that this method would train, and how."""
    candidates, asked = copy.copy(learned.candidates), list[Any]()
    candidates.train_round = lambda *given: asked.extend(given)  # type: ignore[method-assign]
    candidates.trained = []
    method.learn(candidates, 0.05)
    _, caches, recipe, limit_s = asked
    assert limit_s is None
    return caches, recipe(caches[0])


def test_the_recipe_is_the_papers(learned: Learned) -> None:
    _, recipe = rehearsed(learned, Gati(epochs=3))
    rows = 3 * len(learned.candidates.train_rows)
    assert recipe == Recipe(rows, batch_size=64, temperature=6.0, alpha=0.5)


def test_pooling_that_would_pool_nothing_is_left_out(learned: Learned) -> None:
    for pooled, variants in ((127, 3), (128, 2)):
        caches, _ = rehearsed(learned, Gati(pooled=pooled, layers=2))
        assert len(caches) == 2 * variants
        assert sum(cache.shape.pooled == pooled for cache in caches) == 2 * (variants - 2)


def size(trained: Trained) -> int:
    return sum(4 * value.numel() for value in trained.cache.parameters())


def test_the_memory_limit_holds_for_all_that_is_kept(learned: Learned) -> None:
    candidates = copy.copy(learned.candidates)
    candidates.train_round = lambda *_: None  # type: ignore[method-assign]
    small = min(map(size, learned.trained))
    for limit in (0, small, 3 * small, 10**9):
        candidates.trained = list(learned.trained)
        Gati(memory_limit_bytes=limit).learn(candidates, 0.05)
        assert sum(map(size, candidates.trained)) <= limit
        positions = [trained.position for trained in candidates.trained]
        assert len(positions) == len(set(positions))
        assert bool(positions) is (limit > 0)


def test_a_memory_limit_below_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="memory_limit_bytes is -1"):
        Gati(memory_limit_bytes=-1)


# --- whole fits ---------------------------------------------------------------------------------------


def test_fit_by_name_certifies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gati, "_recipe", lambda self, candidates: Recipe(640, 64, alpha=0.5, temperature=6.0))
    backbone = toy()
    cached = fit(backbone, method="gati", **TRAFFIC)
    assert cached.report()["fit"]["method"] == "gati"
    assert cached.certificate.bound <= 0.05
    assert cached.certificate.procedure.startswith("fixed-sequence")
    fresh = images(300, 2)
    assert float((cached(fresh).argmax(1) != backbone(fresh).argmax(1)).double().mean()) <= 0.1


def test_the_published_rule_makes_a_model_that_saves_and_loads(learned: Learned, tmp_path: Path) -> None:
    cached = choose(learned, tolerance=0.05, confidence_level=0.95, rule="published")
    assert cached.certificate.procedure.startswith("measured only")
    points = [planned.point for planned in cached.plan.caches]
    assert points
    assert len(points) == len(set(points))
    assert all(planned.confidence == "selector" for planned in cached.plan.caches)
    offramp.save(cached, tmp_path / "saved")
    loaded = offramp.load(tmp_path / "saved", toy())
    fresh = images(200, 3)
    assert torch.equal(loaded(fresh), cached(fresh))
    assert loaded.plan == cached.plan
