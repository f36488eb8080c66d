"""Whether caches still pay, from what requests cost lately, and how long to wait before they are tried again.

Whether answers are right is the monitor's business; here it is only whether they are cheap. Traffic that no cache
knows, by chance or because somebody wants it so, makes every request pay for all look-ups and the whole backbone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

WINDOW = 512  # requests that count, when it is asked whether caches pay: the weight of each later one is 1/512
TRIED = 64  # sampled requests that have to be seen before caches are tried again; twice as many each time, up to
MOST_TRIED = 4096
RESTS_ABOVE, PAYS_BELOW = 1.02, 0.95  # of the backbone's cost, so that chance alone moves nothing to and fro


class Economy:
    """Follows the mean cost of a request, in units of the backbone's, by where it left. Not thread-safe.

    cost_by_exit: of a request that left at each cache of the plan, and last of one that no cache answered: the stages
    until there and all look-ups. expected: what the plan was measured to cost. The bill of a flood of requests that
    never hit is bounded: where the look-ups of one cost less than RESTS_ABOVE - 1, by that; else the mean is above
    RESTS_ABOVE after a few WINDOWs, and caches rest from then on. They return after TRIED, 2 TRIED, 4 TRIED ... sampled
    requests whose cost under the plan is below PAYS_BELOW on average.
    """

    def __init__(self, cost_by_exit: Sequence[float], expected: float) -> None:
        self.cost_by_exit, self.expected = tuple(cost_by_exit), min(expected, 1.0)
        self.mean, self._seen = self.expected, 0
        self.rests = 0

    def must_rest(self, exits: Iterable[int]) -> bool:
        """Counts requests that the caches were asked about; whether these cost more than they save by now."""
        mean, costs, last = self.mean, self.cost_by_exit, len(self.cost_by_exit) - 1
        for at in exits:
            mean += ((costs[at] if at < last else costs[last]) - mean) / WINDOW
            self._seen += 1
        self.mean = mean
        return mean > RESTS_ABOVE and self._seen >= WINDOW

    def rest(self) -> Trial:
        """Caches rest from now on; what has to be seen before they are asked again."""
        self.rests += 1
        self.mean, self._seen = self.expected, 0
        return Trial(self.cost_by_exit, min(TRIED << (self.rests - 1), MOST_TRIED))

    def to_json(self) -> dict[str, Any]:
        return {"mean_cost": self.mean, "rests": self.rests}


class Trial:
    """Sampled requests while caches rest, and what they would cost under the plan: the latest `needed` count."""

    def __init__(self, cost_by_exit: Sequence[float], needed: int) -> None:
        self.cost_by_exit, self.needed = tuple(cost_by_exit), needed
        self._seen, self._sum = 0, 0.0

    def pays(self, exit_: int) -> bool:
        """Counts one request, which would leave there; whether caches pay again. Judged block by block."""
        self._sum += self.cost_by_exit[min(exit_, len(self.cost_by_exit) - 1)]
        self._seen += 1
        if self._seen < self.needed:
            return False
        mean, self._seen, self._sum = self._sum / self._seen, 0, 0.0
        return mean < PAYS_BELOW
