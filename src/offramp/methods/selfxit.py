"""SelfXit (automated layer caching): exits found by a small architecture search, trained without labels, calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from offramp.caches import CacheShape, LearnedCache
from offramp.candidates import Candidates, Trained
from offramp.distillation import Recipe
from offramp.methods.base import Method
from offramp.methods.published import cheapest, hidden_points, loosest_thresholds
from offramp.placement import CacheCosts, Thresholds, oracle_cost
from offramp.recording import TUNE
from offramp.search import MAX_POINTS
from offramp.splitting import SplitPoint
from offramp.types import Records

SLOTS = 3  # for convolutions, and as many for linear layers
CHANNELS, KERNELS, STRIDES = (32, 64), (1, 3, 5), (1, 2, 3)
WIDTHS = (32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, kw_only=True)
class SelfXit(Method):
    """One exit per split point, its architecture found by random search.

    The space: three slots for convolutions with ReLU (32 or 64 channels, kernel 1, 3 or 5, stride 1, 2 or 3), three for
    linear layers with ReLU (32 to 2,048 wide), each slot as likely empty as not, then the linear head; the paper's
    other families for classification (two-layer MLP, one or two convolutions and a linear layer) lie in it. Of `trials`
    architectures, trained for `trial_epochs`, the one is kept that answers most per cost: its agreement on tune over
    what a request would cost on average if it left exactly where this exit agrees. The kept ones are trained from the
    start, `epochs` long, on KL(backbone || exit), no labels. Confidence: the largest softmax probability, after its
    temperature was fitted on tune; the temperature is folded into the head.

    Published rule: per exit the smallest threshold at which at most a share `tolerance` of its hits on tune disagrees;
    then all combinations of exits are evaluated and the cheapest is kept whose disagreement as a whole is within the
    tolerance (`published.cheapest`: of more than a dozen exits a greedy choice).

    What differs from the paper: activations are recorded pooled to at most 4,096 numbers; at most `layers` split points
    get an exit; a few `trials` instead of 100; the score of the search, because the paper only says that agreement and
    cost are traded; AdamW instead of SGD; kernels are padded, so that every architecture fits every map. Its families
    for sharpened logits, depthwise convolutions and face embeddings are left out.
    """

    name: ClassVar[str] = "selfxit"
    source: ClassVar[str] = "arXiv 2209.08625, section 4; SelfXit, TMLR 2024"

    layers: int = MAX_POINTS
    trials: int = 4
    trial_epochs: int = 2
    trial_share: float = 0.3  # of the time for training, at most, where there is a limit
    epochs: int = 15
    batch_size: int = 32
    learning_rate: float = 2e-3

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        del tolerance  # decides over thresholds only
        candidates.confidence = "max_softmax"
        time_left = candidates.time_left
        found = self._search(candidates, None if time_left is None else self.trial_share * time_left)
        exits = [candidates.build(candidates.split.points[one.position], _learned(one).shape) for one in found]
        candidates.trained = []
        candidates.train_round("exits", exits, lambda _: self._recipe(candidates, self.epochs), candidates.time_left)
        through = {one.cache.name for one in candidates.trained}
        # Where the user or the clock ended training, what the search has trained is better than nothing.
        candidates.trained += [one for one in found if one.cache.name not in through]
        _calibrate(candidates)

    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        choices_K = [[threshold] for threshold in loosest_thresholds(records, tolerance)]
        return cheapest(records, costs, choices_K, tolerance)

    def _search(self, candidates: Candidates, limit_s: float | None) -> list[Trained]:
        """The best of the trials at each split point."""
        trials = [
            candidates.build(point, shape)
            for point in hidden_points(candidates, self.layers)
            for shape in self._drawn(point, candidates.seed)
        ]
        candidates.train_round("trials", trials, lambda _: self._recipe(candidates, self.trial_epochs), limit_s)
        best: dict[int, Trained] = {}
        for trained in candidates.ordered():
            rival = best.get(trained.position)
            if rival is None or _score(candidates, trained) > _score(candidates, rival):
                best[trained.position] = trained
        return list(best.values())

    def _drawn(self, point: SplitPoint, seed: int) -> list[CacheShape]:
        """Different architectures at random, `trials` of them."""
        random = np.random.default_rng([seed, point.position])
        has_grid = len(point.shape) in (2, 3)
        drawn = dict.fromkeys(random_shape(random, has_grid=has_grid) for _ in range(10 * self.trials))
        return list(drawn)[: self.trials]

    def _recipe(self, candidates: Candidates, epochs: int) -> Recipe:
        return Recipe(
            rows=epochs * len(candidates.train_rows),
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            temperature=1.0,
        )


def random_shape(random: np.random.Generator, *, has_grid: bool) -> CacheShape:
    """One architecture of the space; activations without a grid have no use for convolutions."""
    convolutions = [
        (int(random.choice(CHANNELS)), int(random.choice(KERNELS)), int(random.choice(STRIDES)))
        for _ in range(SLOTS if has_grid else 0)
        if random.random() < 0.5
    ]
    hidden = [int(random.choice(WIDTHS)) for _ in range(SLOTS) if random.random() < 0.5]
    return CacheShape("layers", convolutions=tuple(convolutions), hidden=tuple(hidden))


def fitted_temperature(logits_NC: Tensor, answer_N: Tensor) -> float:
    """The T, within a factor of 20 of 1, at which the cross-entropy of softmax(logits / T) on the answers is least
    (Guo et al. 2017, section 4.2)."""
    logits_NC = logits_NC.double()

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits_NC / np.exp(log_temperature), answer_N))

    found = minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def _score(candidates: Candidates, trained: Trained) -> float:
    """Agreement on tune over the mean cost of a request that leaves at this exit exactly where it agrees."""
    agreement_N1 = candidates.records([trained], TUNE).agreement_NK
    return float(agreement_N1.mean()) / oracle_cost(agreement_N1, candidates.estimated_costs([trained]))


def _calibrate(candidates: Candidates) -> None:
    """Fold into each exit's head the temperature that fits its probabilities to how often it agrees on tune."""
    answer_N = candidates.answer_N[candidates.tune_rows]
    uncalibrated, candidates.trained = candidates.trained, []
    for one in uncalibrated:
        temperature = fitted_temperature(one.on(candidates.tune_rows), answer_N)
        head = _learned(one).head
        with torch.no_grad():
            head.weight.div_(temperature)
            head.bias.div_(temperature)
        candidates.add(one.cache, one.log)


def _learned(trained: Trained) -> LearnedCache:
    assert isinstance(trained.cache, LearnedCache)
    return trained.cache
