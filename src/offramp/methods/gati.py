"""GATI: several small networks per layer, a learned selector each, and a composition of at most one per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from offramp.caches import CacheShape, LearnedCache
from offramp.candidates import Candidates, Trained
from offramp.distillation import Recipe
from offramp.errors import InputError
from offramp.methods.base import Method
from offramp.methods.published import cheapest, hidden_points, loosest_thresholds
from offramp.placement import CacheCosts, Thresholds
from offramp.recording import TUNE
from offramp.search import MAX_POINTS
from offramp.types import Records


@dataclass(frozen=True, kw_only=True)
class Gati(Method):
    """Learned caches after GATI, offline: explore, train selectors, compose. Its online retraining is not here.

    Explore: behind each layer the variants FC (flatten, linear to `hidden`, ReLU), Pool (the same from the flattened
    activation averaged to `pooled` numbers) and Conv (a 1-D convolution of `kernel` over it, ReLU), each with a linear
    head; loss: `alpha` T^2 KL + (1 - alpha) CE on the backbone's answer, T being the `temperature`. Selector: P(agree),
    the learned confidence of `offramp.confidence`. Published rule: a hit is P(agree) at or above a threshold, per cache
    the smallest at which at least 1 - tolerance of its hits on tune agree (precision first: a false hit costs
    correctness, a false miss only time). Compose: at most one cache per layer, so that the expected cost is least while
    at least 1 - tolerance of all answers on tune agree; `published.cheapest` says how, exactly or greedily.

    memory_limit_bytes: of the parameters of all caches together; None: no limit. It is a limit on what is kept at all,
    whatever the rule: sizes are known in `learn`, so the composition is made there, by FLOPs.

    What differs from the paper: activations are recorded pooled to at most 4,096 numbers, so that FC reads about what
    the paper's Pool(4096) read, and Pool here goes on to 1,024 (it is left out where there are no more than that); at
    most `layers` layers; AdamW and `epochs` of it instead of SGD for 100; a selector of a few statistics of the scores
    instead of a linear layer on them; Conv begins as the identity; the backbone's answers come from the same pass as
    the activations.
    """

    name: ClassVar[str] = "gati"
    source: ClassVar[str] = "arXiv 2101.07344: predictor and selector networks, composition"

    may_be_zero: ClassVar[tuple[str, ...]] = ("alpha", "memory_limit_bytes")

    hidden: int = 1024
    pooled: int = 1024
    kernel: int = 3
    layers: int = MAX_POINTS
    alpha: float = 0.5
    temperature: float = 6.0
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 2e-3
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha > 1:
            raise InputError(f"alpha weighs two losses, so it is a share between 0 and 1; received {self.alpha}")

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        candidates.confidence = "selector"
        caches = list(self._variants(candidates))
        candidates.train_round("predictors", caches, lambda _: self._recipe(candidates), candidates.time_left)
        if self.memory_limit_bytes is not None and candidates.trained:
            ordered = candidates.ordered()
            kept_K = self._within_memory(candidates, ordered, tolerance)
            candidates.trained = [one for one, threshold in zip(ordered, kept_K, strict=True) if np.isfinite(threshold)]

    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        # Caches at one split point, and only these, cost the same to reach.
        return _composed(records, costs, tolerance, costs.before_K.tolist())

    def _variants(self, candidates: Candidates) -> Iterator[LearnedCache]:
        for point in hidden_points(candidates, self.layers):
            numbers = np.prod(candidates.recording.features[point.position].shape[1:])
            yield candidates.build(point, CacheShape("layers", hidden=(self.hidden,)))
            if numbers > self.pooled:
                yield candidates.build(point, CacheShape("layers", pooled=self.pooled, hidden=(self.hidden,)))
            yield candidates.build(point, CacheShape("conv1d", self.kernel))

    def _recipe(self, candidates: Candidates) -> Recipe:
        return Recipe(
            rows=self.epochs * len(candidates.train_rows),
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            temperature=self.temperature,
            alpha=self.alpha,
        )

    def _within_memory(self, candidates: Candidates, ordered: Sequence[Trained], tolerance: float) -> Thresholds:
        """The composition by FLOPs within the memory limit."""
        bytes_K = [sum(value.numel() * value.element_size() for value in one.cache.parameters()) for one in ordered]

        def fits(thresholds_K: Thresholds) -> bool:
            used = sum(size for size, threshold in zip(bytes_K, thresholds_K, strict=True) if np.isfinite(threshold))
            return self.memory_limit_bytes is None or used <= self.memory_limit_bytes

        records, costs = candidates.records(ordered, TUNE), candidates.estimated_costs(ordered)
        return _composed(records, costs, tolerance, [one.position for one in ordered], fits)


def _composed(
    records: Records,
    costs: CacheCosts,
    tolerance: float,
    layer_K: Sequence[float],
    fits: Callable[[Thresholds], bool] | None = None,
) -> Thresholds:
    choices_K = [[threshold] for threshold in loosest_thresholds(records, tolerance)]
    return cheapest(records, costs, choices_K, tolerance, layer_K=layer_K, fits=fits)
