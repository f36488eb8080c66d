"""SelfXit: its search space, the search, the temperature, its thresholds against brute force, and whole fits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import images, make_costs, make_records, slow_cheapest, slow_outcome, slow_threshold, toy, traffic

from offramp.caches import CacheShape, LearnedCache, Reduction
from offramp.candidates import Candidates
from offramp.choosing import Learned, choose
from offramp.distillation import Recipe
from offramp.fitting import fit, learn
from offramp.methods import selfxit
from offramp.methods.selfxit import SelfXit, fitted_temperature, random_shape
from offramp.placement import OFF
from offramp.recording import TUNE

METHOD = SelfXit(trials=3, trial_epochs=2, epochs=8, learning_rate=1e-2)
TRAFFIC = traffic(images(300, 0).split(100), images(500, 1).split(100))
NARROW = (32, 64)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfxit, "WIDTHS", NARROW)


@pytest.fixture(scope="module")
def rounds() -> list[tuple[str, list[LearnedCache], Recipe]]:
    """What `learned` asked to be trained, round by round."""
    return []


@pytest.fixture(scope="module")
def learned(quick: None, rounds: list[tuple[str, list[LearnedCache], Recipe]]) -> Iterator[Learned]:
    inner = Candidates.train_round

    def noted(
        self: Candidates,
        name: str,
        caches: Sequence[LearnedCache],
        recipe: Callable[[LearnedCache], Recipe],
        limit_s: float | None,
    ) -> None:
        assert limit_s is None
        inner(self, name, caches, recipe, limit_s)
        rounds.append((name, copy.deepcopy(list(caches)), recipe(caches[0])))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(selfxit, "WIDTHS", NARROW)
        monkeypatch.setattr(Candidates, "train_round", noted)
        yield learn(toy(), method=METHOD, **TRAFFIC)


# --- the rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_published_rule_is_that_of_brute_force(seed: int) -> None:
    """Each exit's own threshold, then the best of all subsets."""
    records, costs = make_records(40, 5, seed), make_costs(5, seed)
    for tolerance in (0.02, 0.1, 0.25):
        found = SelfXit().thresholds(records, costs, tolerance)
        own_K = [slow_threshold(records.confidence_NK[:, k], records.agreement_NK[:, k], tolerance) for k in range(5)]
        assert all(threshold in (own, OFF) for threshold, own in zip(found, own_K, strict=True))
        cost, wrong = slow_outcome(records, found, costs)
        assert wrong <= tolerance
        expected = slow_cheapest(records, costs, [[own] for own in own_K], tolerance, range(5))
        assert cost == pytest.approx(expected)


def test_more_exits_than_can_be_enumerated_are_chosen_greedily() -> None:
    records, costs = make_records(300, 16, 2), make_costs(16, 2)
    found = SelfXit().thresholds(records, costs, 0.1)
    cost, wrong = slow_outcome(records, found, costs)
    assert wrong <= 0.1
    assert cost < 0.9


# --- the search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation_shape", [(8, 1, 1), (8, 2, 2), (5, 3, 7), (9, 16), (40,)])
def test_every_architecture_of_the_space_fits_every_activation(activation_shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    shapes = [random_shape(random, has_grid=len(activation_shape) > 1) for _ in range(40)]
    for shape in shapes:
        cache = LearnedCache("c", "p", shape, activation_shape, 3, reduction=Reduction()).eval()
        assert cache(torch.randn(2, *activation_shape)).shape == (2, 3)
    assert {len(shape.hidden) for shape in shapes} == {0, 1, 2, 3}
    convolutions = {0, 1, 2, 3} if len(activation_shape) > 1 else {0}
    assert {len(shape.convolutions) for shape in shapes} == convolutions
    assert len({shape.label for shape in shapes}) == len(set(shapes))


def test_the_space_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    random = np.random.default_rng(1)
    shapes = [random_shape(random, has_grid=True) for _ in range(2000)]
    slots = {slot for shape in shapes for slot in shape.convolutions}
    assert slots == {(out, kernel, stride) for out in (32, 64) for kernel in (1, 3, 5) for stride in (1, 2, 3)}
    assert {width for shape in shapes for width in shape.hidden} == {32, 64, 128, 256, 512, 1024, 2048}
    assert CacheShape("layers", hidden=(512,)) in shapes, "the two-layer MLP lies in the space"
    assert any(len(shape.convolutions) == 2 and not shape.hidden for shape in shapes)


def test_the_search_keeps_what_answers_most_per_cost(
    learned: Learned, rounds: list[tuple[str, list[LearnedCache], Recipe]]
) -> None:
    (first, trials, trial_recipe), (second, exits, recipe) = rounds
    assert (first, second) == ("trials", "exits")
    n = len(learned.candidates.train_rows)
    assert trial_recipe == Recipe(2 * n, batch_size=32, learning_rate=1e-2, temperature=1.0)
    assert recipe == Recipe(8 * n, batch_size=32, learning_rate=1e-2, temperature=1.0)
    assert recipe.alpha == 1, "KL alone: no labels"
    candidates, tune = learned.candidates, learned.candidates.recording.index(TUNE)
    flops = {point.name: point.depth for point in candidates.split.points}
    for chosen in exits:
        scores: dict[str, float] = {}
        for trial in (trial for trial in trials if trial.point == chosen.point):
            feature = torch.from_numpy(candidates.recording.features[candidates.position(trial)][tune])
            with torch.no_grad():
                answer_N = trial.from_feature(feature).argmax(1).numpy()
            agreement = float((answer_N == candidates.recording.logits_NC[tune].argmax(1)).mean())
            look_up = candidates.flops_of(trial) / candidates.flops
            mean_cost = look_up + agreement * flops[trial.point] + (1 - agreement)
            scores[trial.shape.label] = agreement / mean_cost
        assert len(scores) == 3
        assert scores[chosen.shape.label] == pytest.approx(max(scores.values()))


def test_the_same_seed_draws_the_same_architectures(learned: Learned) -> None:
    points = learned.candidates.split.points
    assert METHOD._drawn(points[1], 0) == METHOD._drawn(points[1], 0)
    assert METHOD._drawn(points[1], 0) != METHOD._drawn(points[2], 0)
    assert METHOD._drawn(points[1], 0) != METHOD._drawn(points[1], 1)
    assert len(set(METHOD._drawn(points[3], 0))) == 3


def test_when_training_is_ended_early_the_trials_stay(learned: Learned) -> None:
    """The user's Ctrl-C during the first round: what it has trained is calibrated and kept."""
    candidates, asked = copy.copy(learned.candidates), list[str]()
    candidates.trained = []

    def ended(name: str, caches: Sequence[LearnedCache], *_: object) -> None:
        asked.append(name)
        if name == "trials":
            candidates.trained = [copy.deepcopy(learned.trained[0])]

    candidates.train_round = ended  # type: ignore[method-assign,assignment]
    METHOD.learn(candidates, 0.05)
    assert asked == ["trials", "exits"]
    assert [trained.cache.name for trained in candidates.trained] == [learned.trained[0].cache.name]


# --- the temperature ----------------------------------------------------------------------------------


def cross_entropy(logits_NC: Tensor, answer_N: Tensor, temperature: float) -> float:
    total = 0.0
    for row, answer in zip(logits_NC.tolist(), answer_N.tolist(), strict=True):
        total -= row[answer] / temperature - math.log(sum(math.exp(value / temperature) for value in row))
    return total / len(logits_NC)


def test_the_temperature_minimises_the_cross_entropy() -> None:
    random = torch.Generator().manual_seed(0)
    logits_NC = 6 * torch.randn(60, 4, generator=random)
    answer_N = torch.where(torch.rand(60, generator=random) < 0.7, logits_NC.argmax(1), 0)
    found = fitted_temperature(logits_NC, answer_N)
    grid = np.geomspace(1 / 20, 20, 400)
    losses = [cross_entropy(logits_NC, answer_N, float(temperature)) for temperature in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], rel=0.02)
    assert cross_entropy(logits_NC, answer_N, found) <= min(losses) + 1e-6
    assert fitted_temperature(logits_NC, logits_NC.argmax(1)) == pytest.approx(1 / 20, rel=0.01), "never wrong"


def test_exits_are_calibrated_and_answer_as_before(
    learned: Learned, rounds: list[tuple[str, list[LearnedCache], Recipe]]
) -> None:
    candidates, tune = learned.candidates, learned.candidates.recording.index(TUNE)
    answer_N = torch.from_numpy(candidates.recording.logits_NC[tune].argmax(1))
    before = {cache.name: cache for cache in rounds[1][1]}
    assert len(learned.trained) == len(before) == 3
    for trained in learned.trained:
        assert trained.cache.confidence_name == "max_softmax"
        feature = torch.from_numpy(candidates.recording.features[trained.position][tune])
        with torch.no_grad():
            raw_NC = before[trained.cache.name].from_feature(feature)
        temperature = fitted_temperature(raw_NC, answer_N)
        torch.testing.assert_close(trained.on(tune), raw_NC / temperature, rtol=1e-3, atol=1e-3)
        assert torch.equal(trained.on(tune).argmax(1), raw_NC.argmax(1))
        torch.testing.assert_close(
            torch.from_numpy(trained.confidence_N), trained.on(tune).softmax(1).amax(1).double(), rtol=0, atol=1e-6
        )


# --- whole fits ---------------------------------------------------------------------------------------


def test_fit_by_name_certifies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SelfXit, "_recipe", lambda self, candidates, epochs: Recipe(640, 64, temperature=1.0))
    backbone = toy()
    cached = fit(backbone, method="selfxit", **TRAFFIC)
    assert cached.report()["fit"]["method"] == "selfxit"
    assert cached.certificate.bound <= 0.05
    assert cached.certificate.procedure.startswith("fixed-sequence")


def test_the_published_rule_makes_a_model(learned: Learned) -> None:
    cached = choose(learned, tolerance=0.05, confidence_level=0.95, rule="published")
    assert cached.certificate.procedure.startswith("measured only")
    assert cached.plan.caches
    assert cached.plan.estimated_disagreement <= 0.05
    fresh, backbone = images(400, 2), toy()
    assert float((cached(fresh).argmax(1) != backbone(fresh).argmax(1)).double().mean()) <= 0.12
