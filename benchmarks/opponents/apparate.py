"""Apparate's threshold rule (SOSP 2024, section 3.2; dywsjtu/apparate, MIT), restated on our records.

A ramp answers when 1 - confidence is below its threshold. All thresholds start at 0, where nothing is answered. Each
round loosens the one ramp that loses the least agreement per cost saved, as long as the agreement on the recent window
stays within the budget. A ramp's step doubles when it was taken; when no ramp may move, all steps are halved, down to
the least. Three first steps are tried and the cheapest result is kept. Afterwards ramps of negative utility are taken
out and the rest is tuned again (section 3.3; its loop that tries other ramps over time needs a stream, not a window).

Not restated: every input still runs to the end there, so a wrong early answer is corrected late and latency, not work,
is saved. The code's budget is fixed at 1.5 %; here it is the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.placement import NEVER, OFF, CacheCosts, Thresholds, expected_cost
from offramp.types import Records
from opponents.rules import Rule, losing, on_all

FIRST_STEPS = (0.0125, 0.025, 0.05)
LEAST_STEP = 0.0125


def thresholds(records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
    """(K,) confidence thresholds; infinity for ramps that were taken out."""
    active = set(range(len(records.reads_K)))
    while True:
        plans = [climbed(records, costs, tolerance, active, step) for step in FIRST_STEPS]
        best = min(plans, key=lambda plan: expected_cost(records, plan, costs))
        lost = losing(records, best, costs)
        if not lost:
            return best
        active -= lost


def climbed(records: Records, costs: CacheCosts, tolerance: float, active: set[int], first_step: float) -> Thresholds:
    """The thresholds that one climb with this first step ends at."""
    window = Window.of(records, costs, active)
    budget = tolerance * len(records) + 1e-9
    error_K, step_K = np.zeros(len(records.reads_K)), np.full(len(records.reads_K), first_step)
    while True:
        moves = [(*window.move(k, error_K[k] + step_K[k]), k) for k in sorted(active) if error_K[k] <= 1]
        allowed = [move for move in moves if window.errors + move[1] <= budget]
        if allowed:
            *_, k = min(allowed, key=lambda move: (move[1] / move[0] if move[0] > 0 else 0.0, -move[0]))
            error_K[k] += step_K[k]
            step_K[k] *= 2
            window.take(k, error_K[k])
        elif (step_K > LEAST_STEP).any():
            step_K = np.maximum(step_K / 2, LEAST_STEP)
        else:
            return tuple(_threshold(error_K[k]) if k in active else OFF for k in range(len(error_K)))


@dataclass
class Window:
    """The recent requests while thresholds move: where each leaves now, and how many answers differ."""

    confidence_KN: NDArray[np.float64]
    wrong_KN: NDArray[np.int64]  # row K, the backbone, is never wrong
    cost_K: NDArray[np.float64]  # of leaving at each ramp, and at the backbone
    left_N: NDArray[np.intp]
    errors: int = 0

    @classmethod
    def of(cls, records: Records, costs: CacheCosts, active: set[int]) -> Window:
        confidence_NK = np.asarray(records.confidence_NK, dtype=np.float64)
        wrong_NK = np.column_stack([~records.agreement_NK, np.zeros(len(records), dtype=bool)])
        paid_K = np.cumsum([cost if k in active else 0.0 for k, cost in enumerate(costs.cache_K)])
        return cls(
            np.where(np.isnan(confidence_NK), -np.inf, confidence_NK).T.copy(),
            wrong_NK.T.astype(np.int64).copy(),
            np.append(costs.before_K + paid_K, 1.0 + paid_K[-1]),
            np.full(len(records), len(paid_K)),
        )

    def move(self, k: int, error: float) -> tuple[float, int]:
        """What loosening ramp k to this threshold would save, and how many more answers would differ."""
        new = self._new(k, error)
        left = self.left_N[new]
        saved = float((self.cost_K[left] - self.cost_K[k]).sum())
        return saved, int((self.wrong_KN[k, new] - self.wrong_KN[left, new]).sum())

    def take(self, k: int, error: float) -> None:
        new = self._new(k, error)
        self.errors += int((self.wrong_KN[k, new] - self.wrong_KN[self.left_N[new], new]).sum())
        self.left_N[new] = k

    def _new(self, k: int, error: float) -> NDArray[np.intp]:
        return np.flatnonzero((self.left_N > k) & (self.confidence_KN[k] >= _threshold(error)))


def _threshold(error: float) -> float:
    """The least confidence with 1 - confidence < error."""
    return NEVER if error <= 0 else float(np.nextafter(1 - error, 2))


RULE = Rule(
    "Apparate's tuner",
    "Agreement within the tolerance on the recent window, as measured; kept up by tuning anew all the time.",
    on_all(thresholds),
)
