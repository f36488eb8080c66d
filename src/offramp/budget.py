"""How the chance of ever serving a plan that breaks its promise is spent over all certifications of a model's life.

One certificate fails with probability 1 - confidence_level. A model that is certified again and again would some day
serve a plan that only passed by luck, if each certification were allowed as much. So all of them share one budget, by
a schedule that is fixed before anything is seen: the k-th new certification may fail with probability

    allowance / (k (k + 1)),   which sums to the allowance over k = 1, 2, 3, ...

By the union bound all certificates of a life then hold together with probability 1 - total at the least, however many
there are, whatever made somebody ask for them, and whether they passed. (Shares of this form are spent slowly, as in
alpha-spending: Lan and DeMets, Biometrika 70, 1983; the hundredth certification still has 1/10,100 of the allowance,
which takes 3.3 times the inputs of the first one.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from offramp.errors import InputError


@dataclass(frozen=True)
class Spend:
    """What one certification may fail with, why it was made, and when."""

    what: str
    probability: float
    at: str


@dataclass(frozen=True)
class FailureBudget:
    """Immutable: `spent` gives the next one.

    allowance: what all new certifications may fail with together. before: what was spent on the plan that the life
    began with, if it came with a certificate. spends: the new certifications so far.
    """

    allowance: float
    before: float = 0.0
    spends: tuple[Spend, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.allowance < 1 or not 0 <= self.before < 1 - self.allowance:
            raise InputError(
                f"a failure budget of {self.allowance!r} for new certifications after {self.before!r}; expected "
                "probabilities that add up to less than 1, such as 0.05"
            )

    @property
    def total(self) -> float:
        """The probability that any certificate of this life fails."""
        return self.before + self.allowance

    @property
    def left(self) -> float:
        """What has not been spent yet; never 0."""
        return self.allowance / (len(self.spends) + 1)

    def next_probability(self) -> float:
        """What the next certification may fail with; 1 minus this is its confidence level."""
        k = len(self.spends) + 1
        return self.allowance / (k * (k + 1))

    def spent(self, what: str, at: str) -> FailureBudget:
        """The budget after one more certification, whether that passes or not."""
        return FailureBudget(self.allowance, self.before, (*self.spends, Spend(what, self.next_probability(), at)))

    def returned(self) -> FailureBudget:
        """The budget before the last certification, where that tested nothing: there was no plan to test, which was
        known without the inputs that would have certified it."""
        return FailureBudget(self.allowance, self.before, self.spends[:-1])

    def to_json(self) -> dict[str, Any]:
        return {
            "confidence_for_life": 1 - self.total,
            "allowance": self.allowance,
            "before": self.before,
            "left": self.left,
            "spends": [asdict(spend) for spend in self.spends],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        spends: Sequence[Mapping[str, Any]] = document["spends"]
        return cls(document["allowance"], document["before"], tuple(Spend(**spend) for spend in spends))
