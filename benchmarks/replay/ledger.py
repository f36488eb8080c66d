"""What became of every request: who answered, whether the full model says the same, what it cost. No model here.

A stretch is a run of requests that one rung answered. The promise is about each plan, so it is checked for each: the
exact binomial test of a whole stretch, and a confidence sequence that is looked at after every request.

Shape suffix: N requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from offramp.monitoring import confidence_sequence

TEST_LEVEL = 0.05


@dataclass(frozen=True)
class Served:
    """A rung that answered requests: its plan's number, and what was certified about the plan."""

    plan: int
    rung: str
    caches: int
    tolerance: float
    bound: float
    certified_on: int


class Ledger:
    """One line per request, in the order of answering."""

    def __init__(self) -> None:
        self.served: list[Served] = []
        self._lines: list[tuple[int, int, float, float, float]] = []

    def add(self, served: Served, answer: int, cost: float, late_s: float, took_s: float) -> None:
        """`served` must be the same object as long as the same rung answers."""
        if not self.served or self.served[-1] is not served:
            self.served.append(served)
        self._lines.append((len(self.served) - 1, answer, cost, late_s, took_s))

    def __len__(self) -> int:
        return len(self._lines)

    def columns(self) -> Columns:
        stretch, answer, cost, late_s, took_s = (np.array(column) for column in zip(*self._lines, strict=True))
        return Columns(stretch, answer, cost, late_s, took_s)


@dataclass(frozen=True)
class Columns:
    stretch_N: NDArray[np.int64]
    answer_N: NDArray[np.int64]
    cost_N: NDArray[np.float64]
    late_s_N: NDArray[np.float64]
    took_s_N: NDArray[np.float64]


def stretches(ledger: Ledger, columns: Columns, wrong_N: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Each stretch with its counts, and whether the promise held."""
    rows = []
    for number, served in enumerate(ledger.served):
        at = np.flatnonzero(columns.stretch_N == number)
        errors_N = wrong_N[at]
        n, errors = len(at), int(errors_N.sum())
        rows.append(
            {
                "first_request": int(at[0]),
                "requests": n,
                "plan": served.plan,
                "rung": served.rung,
                "caches": served.caches,
                "tolerance": served.tolerance,
                "certified_bound": served.bound,
                "certified_on": served.certified_on,
                "disagreements": errors,
                "disagreement": errors / n,
                "saving": 1 - float(columns.cost_N[at].mean()),
                "p_value": p_above(errors, n, served.tolerance),
                "lowest_ever": lowest_ever(errors_N, 1 - TEST_LEVEL),
            }
        )
    return rows


def of_plans(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stretches of each plan on its own rung, `certified`, added up: what its certificate is about."""
    plans = []
    for number in sorted({row["plan"] for row in rows}):
        mine = [row for row in rows if row["plan"] == number and row["rung"] == "certified"]
        if not mine:
            continue
        n, errors = sum(row["requests"] for row in mine), sum(row["disagreements"] for row in mine)
        plans.append(
            {
                key: mine[0][key]
                for key in ("plan", "caches", "first_request", "tolerance", "certified_bound", "certified_on")
            }
            | {
                "requests": n,
                "disagreements": errors,
                "disagreement": errors / n,
                "saving": sum(row["saving"] * row["requests"] for row in mine) / n,
                "p_value": p_above(errors, n, mine[0]["tolerance"]),
                "lowest_ever": max(row["lowest_ever"] for row in mine),
            }
        )
    return plans


def broken(row: dict[str, Any]) -> bool:
    """Whether the exact test or, at any request, the confidence sequence says that the rate is above the tolerance."""
    return bool(row["p_value"] <= TEST_LEVEL or row["lowest_ever"] > row["tolerance"])


def p_above(errors: int, n: int, rate: float) -> float:
    """The probability of so many errors, or more, if the true rate were `rate`."""
    return float(binom.sf(errors - 1, n, rate))


def lowest_ever(wrong_N: NDArray[np.bool_], level: float) -> float:
    """The highest lower limit of the confidence sequence at any request: it rises at disagreements only."""
    seen = np.cumsum(wrong_N)
    at = np.flatnonzero(wrong_N)
    return max((confidence_sequence(int(seen[n]), int(n) + 1, level)[0] for n in at.tolist()), default=0.0)


def windows(value_N: NDArray[Any], size: int) -> list[float]:
    """The mean of every `size` requests; the last window may be shorter."""
    return [float(value_N[start : start + size].mean()) for start in range(0, len(value_N), size)]


def ends(n: int, size: int) -> list[int]:
    """How many requests there were at the end of each window."""
    return [min(start + size, n) for start in range(0, n, size)]


def since_swap(stretch_N: NDArray[np.int64], wrong_N: NDArray[np.bool_], at: list[int]) -> list[float]:
    """The disagreement since the last change of what answers, after so many requests each."""
    seen = np.concatenate([[0], np.cumsum(wrong_N)])
    rates = []
    for n in at:
        begun = int(np.searchsorted(stretch_N, stretch_N[n - 1]))
        rates.append(float(seen[n] - seen[begun]) / (n - begun))
    return rates
