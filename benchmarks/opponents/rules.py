"""What a rule is: how thresholds are set for caches that are trained and recorded, whatever the caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from offramp.candidates import Candidates
from offramp.methods import Method
from offramp.placement import OFF, CacheCosts, Thresholds, outcomes
from offramp.types import Records


@dataclass(frozen=True)
class Rule:
    """`thresholds` gets the tuning and the certification records apart; most rules know no difference."""

    name: str
    guarantee: str
    thresholds: Callable[[Records, Records, CacheCosts, float], Thresholds]


@dataclass(frozen=True, kw_only=True)
class Given(Method):
    """Thresholds that a rule has set, for `offramp.choosing.choose` to make a model of."""

    name: ClassVar[str] = "given"
    source: ClassVar[str] = "benchmarks/opponents"

    thresholds_K: Thresholds

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        """Nothing: the caches are those of another method."""

    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        del records, costs, tolerance
        return self.thresholds_K


def joined(first: Records, second: Records) -> Records:
    """The inputs of both, of the same caches."""
    labelled = first.label_N is not None and second.label_N is not None
    return dataclasses.replace(
        first,
        confidence_NK=np.concatenate([first.confidence_NK, second.confidence_NK]),
        answer_NK=np.concatenate([first.answer_NK, second.answer_NK]),
        agreement_NK=np.concatenate([first.agreement_NK, second.agreement_NK]),
        backbone_answer_N=np.concatenate([first.backbone_answer_N, second.backbone_answer_N]),
        label_N=np.concatenate([first.label_N, second.label_N]) if labelled else None,
    )


def on_all(
    rule: Callable[[Records, CacheCosts, float], Thresholds],
) -> Callable[[Records, Records, CacheCosts, float], Thresholds]:
    """A rule that knows one sample only gets all that is held out: as much evidence as ours."""
    return lambda tune, certify, costs, tolerance: rule(joined(tune, certify), costs, tolerance)


def losing(records: Records, thresholds_K: Thresholds, costs: CacheCosts) -> set[int]:
    """The enabled caches whose look-ups by requests that go on cost more than their hits save.

    That is negative utility in Apparate's sense (section 3.3). A cache that an enabled one reads is never among them.
    """
    left_at_N, _ = outcomes(records, thresholds_K)
    enabled = {k for k, threshold in enumerate(thresholds_K) if np.isfinite(threshold)}
    read = {records.reads_K[k] for k in enabled}
    saved = {k: (left_at_N == k).sum() * (1 - costs.before_K[k]) for k in enabled}
    spent = {k: (left_at_N > k).sum() * costs.cache_K[k] for k in enabled}
    return {k for k in enabled - read if saved[k] <= spent[k]}


def paying(records: Records, thresholds_K: Thresholds, costs: CacheCosts) -> Thresholds:
    """The same thresholds without the caches that lose, nor those that lose when they are gone."""
    while lost := losing(records, thresholds_K, costs):
        thresholds_K = tuple(OFF if k in lost else threshold for k, threshold in enumerate(thresholds_K))
    return thresholds_K
