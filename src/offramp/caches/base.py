"""What every cache is: something at a split point that may answer in the backbone's place, and says how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from offramp.caches.reduction import Reduction
from offramp.confidence import CONFIDENCES, Selector


class Cache(nn.Module):
    """A cache at split point `point`; `reads` names the earlier cache whose logits it also sees, or is None.

    Kinds of cache differ in `from_feature`, which gives (B, C) scores: their largest is the answer, and they are what a
    later cache reads. Every kind also says which confidences suit its scores.
    """

    kind: ClassVar[str]  # as in descriptions
    suits_selector: ClassVar[bool] = True  # whether a fitted `Selector` may decide, beside `confidences()`

    def __init__(self, name: str, point: str, reduction: Reduction, reads: str | None = None) -> None:
        super().__init__()
        self.name, self.point, self.reduction, self.reads = name, point, reduction, reads
        self.confidence_name = next(iter(self.confidences()))
        self.selector: Selector | None = None

    def forward(self, activation: Tensor, read_BC: Tensor | None = None) -> Tensor:
        """(B, C) logits from the activation at the split point and, where this cache reads one, an earlier's logits."""
        return self.from_feature(self.reduction(activation), read_BC)

    def from_feature(self, feature: Tensor, read_BC: Tensor | None = None) -> Tensor:
        """The same from an activation that is already reduced, as recordings hold it."""
        raise NotImplementedError

    def look_up(self, activation: Tensor, read_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C) logits and (B,) confidence: what a request asks for."""
        logits_BC: Tensor = self(activation, read_BC)
        return logits_BC, self.confidence(logits_BC, read_BC)

    def confidences(self) -> Mapping[str, Any]:
        """Fixed scores to choose the confidence from: name -> function from (B, C) logits to (B,) in [0, 1]."""
        return CONFIDENCES

    def confidence(self, logits_BC: Tensor, read_BC: Tensor | None = None) -> Tensor:
        """(B,) confidence in [0, 1] of the answers that these logits give."""
        if self.selector is not None:
            score_B: Tensor = self.selector(logits_BC, read_BC)
            return score_B
        fixed_B: Tensor = self.confidences()[self.confidence_name](logits_BC)
        return fixed_B

    def use_confidence(self, name: str, selector: Selector | None = None) -> None:
        """Decide by this score from now on: a name in `confidences()`, or `selector` with its fitted module."""
        self.confidence_name, self.selector = name, selector

    def describe(self) -> dict[str, Any]:
        """All that `build_cache` needs to build this cache again, without its weights. JSON."""
        return {
            "type": self.kind,
            "name": self.name,
            "point": self.point,
            "reduction": self.reduction.grid,
            "reads": self.reads,
            "confidence": self.confidence_name,
            "selector_features": None if self.selector is None else len(self.selector.weight),
        }

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> Self:
        """The cache that `describe` described, with fresh weights and no confidence chosen yet."""
        raise NotImplementedError
