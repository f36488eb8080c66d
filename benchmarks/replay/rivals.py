"""The same stream under other rules, from what the caches and the full model say to every request of it.

Nothing is served here: a rule decides which cache answers, and the records tell what that answer was.

Shape suffix: N requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detection_delay import mapie
from numpy.typing import NDArray
from opponents import apparate

from offramp.evaluation import costs_at_exits
from offramp.placement import CacheCosts, Thresholds, outcomes
from offramp.types import Records

RETUNED_EVERY, WINDOW = 128, 512  # requests; Apparate looks at its ramps every 128, and at the recent window


@dataclass(frozen=True)
class Run:
    """What a rule did with every request: its cost in units of the full model's, and whether the answer differs.

    changed_at: the requests at which it did something about its thresholds. note: what its costs mean.
    """

    name: str
    wrong_N: NDArray[np.bool_]
    cost_N: NDArray[np.float64]
    changed_at: list[int] = field(default_factory=list)
    note: str = ""


def unwatched(records: Records, thresholds_K: Thresholds, costs: CacheCosts) -> Run:
    """The certified plan, whatever comes."""
    left_N, wrong_N = outcomes(records, thresholds_K)
    return Run("without the loop", wrong_N, costs_at_exits(costs)[left_N])


def tuned_anew(records: Records, thresholds_K: Thresholds, costs: CacheCosts, tolerance: float) -> Run:
    """Apparate's rule on the window before each request; until there is one, the certified plan's thresholds.

    Every input runs to the end there, which is how the window is known: the answer is early, the work is not less.
    """
    wrong_N = np.empty(len(records), dtype=bool)
    left_N = np.empty(len(records), dtype=np.int64)
    changes = []
    for start in range(0, len(records), RETUNED_EVERY):
        if start >= WINDOW:
            window = records.rows(np.arange(start - WINDOW, start))
            before, thresholds_K = thresholds_K, apparate.thresholds(window, costs, tolerance)
            changes += [start] if thresholds_K != before else []
        rows = np.arange(start, min(start + RETUNED_EVERY, len(records)))
        left_N[rows], wrong_N[rows] = outcomes(records.rows(rows), thresholds_K)
    note = "if requests stopped where they are answered; there they run to the end, and every ramp is looked up"
    return Run("Apparate's rule", wrong_N, costs_at_exits(costs)[left_N], changes, note)


def monitored(
    records: Records, thresholds_K: Thresholds, costs: CacheCosts, tolerance: float, share: float, seed: int
) -> Run:
    """The certified plan until MAPIE's monitor, told the tolerance and shown a sample of the requests, alarms once;
    from then on the full model alone."""
    plain = unwatched(records, thresholds_K, costs)
    sampled = np.flatnonzero(np.random.default_rng(seed).random(len(records)) < share)
    at = next(_alarms(plain.wrong_N[sampled], tolerance), None)
    wrong_N, cost_N = plain.wrong_N.copy(), plain.cost_N.copy()
    if at is None:
        return Run("MAPIE's monitor", wrong_N, cost_N)
    alarm = int(sampled[at - 1])
    wrong_N[alarm + 1 :], cost_N[alarm + 1 :] = False, 1.0
    return Run("MAPIE's monitor", wrong_N, cost_N, [alarm])


def _alarms(wrong_N: NDArray[np.bool_], tolerance: float) -> Iterator[int]:
    return iter(mapie(packaged=False, tolerance=tolerance)(wrong_N)) if len(wrong_N) else iter(())


def all_of(
    records: Records, thresholds_K: Thresholds, costs: CacheCosts, tolerance: float, share: float, seed: int
) -> tuple[list[Run], dict[str, Any]]:
    """Each rule's run, and what could not run here."""
    runs, missing = [unwatched(records, thresholds_K, costs)], {}
    runs.append(tuned_anew(records, thresholds_K, costs, tolerance))
    try:
        runs.append(monitored(records, thresholds_K, costs, tolerance, share, seed))
    except ImportError:
        missing["MAPIE's monitor"] = "MAPIE is not installed (extra `bench`)"
    return runs, missing
