"""Rows on their way through the stages: which of them wait for an answer, and what the others were answered.

What is known about rows is kept on the host, in plain lists: a decision then needs one thing of the device, a cache's
confidences, and between two stages, which leave the processor's caches full of weights, nothing is quicker to reach.

Shape suffixes: L rows in `live`, B rows of the caller, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Answered(NamedTuple):
    """Rows that left together: the caller's numbers of them, and for each its answer, its exit and how sure it was."""

    rows: Sequence[int]
    logits: Tensor
    left_at: Sequence[int]
    confidence: Sequence[float]


class Flight:
    """The rows of one batch between departure and landing. `waiting` and `open` are rows of `live`, in order."""

    def __init__(self, live: tuple[Tensor, ...]) -> None:
        self.live = live
        self.rows: Sequence[int] = range(live[0].shape[0])  # the caller's numbers of the rows in `live`
        self.waiting: Sequence[int] = self.rows  # those not answered yet
        self.open: Sequence[int] = self.rows  # those of them that caches may still answer
        self.said: dict[str, Tensor] = {}  # (L, C) logits of earlier caches that later ones read
        self.answered: list[Answered] = []

    def hits(self, confidence_L: Sequence[float], threshold: float, answers_from: float) -> list[int]:
        """The rows that a cache answers which is so sure of them. answers_from: at least the threshold of the plan."""
        hits = [row for row in self.open if confidence_L[row] >= answers_from]
        # NaN compares false twice: a miss, and later caches do not answer this row either. Nor do they answer what a
        # restricted cache refuses: in the plan that row never reached them.
        self.open = [row for row in self.open if confidence_L[row] < threshold]
        return hits

    def answer(self, hits: Sequence[int], logits_LC: Tensor, left_at: int, confidence_L: Sequence[float]) -> None:
        """These rows leave, with their rows of these logits and confidences."""
        if len(hits) == len(self.rows):
            self.answered.append(Answered(self.rows, logits_LC, [left_at] * len(hits), confidence_L))
            self.waiting = ()
            return
        rows, confidence = [self.rows[row] for row in hits], [confidence_L[row] for row in hits]
        logits = logits_LC.index_select(0, index_on(logits_LC.device, hits))
        self.answered.append(Answered(rows, logits, [left_at] * len(hits), confidence))
        gone = set(hits)
        self.waiting = [row for row in self.waiting if row not in gone]

    def land(self, logits_LC: Tensor, left_at: int) -> None:
        """All rows that still wait leave at the end, whose answer is sure by definition."""
        self.answer(self.waiting, logits_LC, left_at, [1.0] * len(self.rows))

    def compact(self) -> None:
        """Drop all rows that were answered."""
        index = index_on(self.live[0].device, self.waiting)
        self.live = tuple(value.index_select(0, index) for value in self.live)
        self.said = {name: value.index_select(0, index) for name, value in self.said.items()}
        self.rows = [self.rows[row] for row in self.waiting]
        opened = set(self.open)
        self.open = [number for number, row in enumerate(self.waiting) if row in opened]
        self.waiting = range(len(self.rows))

    # -- several flights as one ------------------------------------------------------------------------

    @classmethod
    def merged(cls, flights: Sequence[Flight]) -> Flight:
        """The rows of all these, which are at one split point. Rows that were answered must have been dropped."""
        together = cls(tuple(torch.cat(column) for column in zip(*(flight.live for flight in flights), strict=True)))
        names = set.intersection(*(set(flight.said) for flight in flights))
        together.said = {name: torch.cat([flight.said[name] for flight in flights]) for name in names}
        starts = itertools.accumulate((len(flight.rows) for flight in flights), initial=0)
        together.open = [start + row for flight, start in zip(flights, starts, strict=False) for row in flight.open]
        return together

    def part(self, flights: Sequence[Flight]) -> None:
        """Give the flights that were merged into this one their rows' answers, once no row waits."""
        logits, (left_at, confidence), end = self.logits(), self._exits(), 0
        for flight in flights:
            begin, end = end, end + len(flight.rows)
            own = logits[begin:end].clone()  # what one caller does to its answers does not reach another's
            flight.answered.append(Answered(flight.rows, own, left_at[begin:end], confidence[begin:end]))
            flight.waiting = ()

    # -- what was answered, in the caller's order, once no row waits -----------------------------------

    def logits(self) -> Tensor:
        """(B, C)."""
        if len(self.answered) == 1:
            return self.answered[0].logits
        logits = torch.cat([part.logits for part in self.answered])
        return logits.index_select(0, index_on(logits.device, self._order()))

    def exits(self) -> tuple[Tensor, Tensor]:
        """(B,) where each row left, and (B,) how sure the cache there was."""
        left_at, confidence = self._exits()
        device = self.live[0].device
        return torch.tensor(left_at, dtype=torch.long, device=device), torch.tensor(
            confidence, dtype=torch.float32, device=device
        )

    def left_at(self) -> list[int]:
        """(B,) where each row left."""
        return self._exits()[0]

    def _exits(self) -> tuple[list[int], list[float]]:
        order = self._order()
        left_at = [number for part in self.answered for number in part.left_at]
        confidence = [sure for part in self.answered for sure in part.confidence]
        return [left_at[k] for k in order], [confidence[k] for k in order]

    def _order(self) -> list[int]:
        """For each row of the caller its place among the answers as they came."""
        rows = [row for part in self.answered for row in part.rows]
        return sorted(range(len(rows)), key=rows.__getitem__)


def index_on(device: torch.device, rows: Sequence[int]) -> Tensor:
    """Numbers of rows, for `index_select`. Nobody waits for the copy to the device."""
    return torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True)
