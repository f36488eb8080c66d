"""Our own method: students at the input, pooled caches behind them, trunks where they pay (`offramp.search`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from offramp.candidates import Candidates
from offramp.methods.base import Method
from offramp.placement import CacheCosts, Thresholds, plan_path
from offramp.search import STUDENT_SHARES, STUDENT_TEMPERATURE, Search
from offramp.types import Records


@dataclass(frozen=True, kw_only=True)
class Offramp(Method):
    """Three rounds of learned caches. Its rule without a certificate: the cheapest plan within the tolerance.

    The fields are those of `offramp.search.Search`; what each is worth is measured by benchmarks/ablations.py.
    """

    name: ClassVar[str] = "offramp"
    source: ClassVar[str] = "docs/design.md"

    student_shares: tuple[float, ...] = STUDENT_SHARES
    pooled: bool = True
    trunks: bool = True
    reads: bool = True
    student_temperature: float = STUDENT_TEMPERATURE
    mixtures: bool = True
    bfloat16: bool = True

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        Search(
            candidates,
            tolerance=tolerance,
            student_shares=self.student_shares,
            pooled=self.pooled,
            trunks=self.trunks,
            reads=self.reads,
            student_temperature=self.student_temperature,
            mixtures=self.mixtures,
            bfloat16=self.bfloat16,
        ).run()

    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        return plan_path(records, costs, tolerance)[-1].thresholds_K
