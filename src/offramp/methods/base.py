"""What a method is: the part of a fit in which the published recipes differ."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from offramp.candidates import Candidates
from offramp.errors import InputError
from offramp.placement import CacheCosts, Thresholds
from offramp.types import Records

Rule = Literal["certificate", "published"]
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A recipe; its fields are its hyper-parameters.

    rule: how thresholds are set. "certificate": by our joint search, under our certificate, whatever the caches.
    "published": by the method's own rule on the tuning inputs; the certificate then only reports what was measured.
    """

    name: ClassVar[str]
    source: ClassVar[str]  # paper and section
    needs_labels: ClassVar[bool] = False
    may_be_zero: ClassVar[tuple[str, ...]] = ()  # hyper-parameters; other numbers are positive

    rule: Rule = "certificate"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(f"unknown rule {self.rule!r} for method {self.name}; known: {', '.join(RULES)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and (value < 0 or (value == 0 and field.name not in self.may_be_zero)):
                raise InputError(f"{field.name} is {value} for method {self.name}; expected a number above 0")

    @abstractmethod
    def learn(self, candidates: Candidates, tolerance: float) -> None:
        """Train candidates on the train rows and judge them on the tune rows; certify rows are out of bounds."""

    @abstractmethod
    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        """(K,) the published rule: a threshold for each cache from what they said on the tuning inputs, infinity for
        a cache that it leaves off."""
