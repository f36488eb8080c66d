"""Rows on their way: who leaves, who may still be answered, and everybody's answer in the end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from offramp.flight import Flight

NAN = math.nan


def flight(rows: int = 4) -> Flight:
    return Flight((torch.arange(rows).float()[:, None],))


def says(*numbers: float) -> Tensor:
    """(L, 1) logits."""
    return torch.tensor(numbers)[:, None]


def test_a_threshold_is_met_when_it_is_equalled_and_never_by_nan() -> None:
    flown = flight()
    assert flown.hits([0.5, 0.4, NAN, 0.9], 0.5, 0.5) == [0, 3]
    assert list(flown.open) == [1], "a row whose confidence was NaN is closed to later caches"
    assert list(flown.waiting) == [0, 1, 2, 3], "nobody has left yet"


def test_a_threshold_is_as_exact_as_when_it_was_certified() -> None:
    """Records hold float32 and are compared with float64: rounded up, 0.7 would be met by what is below it."""
    sure = torch.tensor([0.7]).tolist()
    assert sure[0] < 0.7
    assert flight(1).hits(sure, 0.7, 0.7) == []


def test_what_a_restricted_cache_refuses_waits_and_is_closed_to_later_caches() -> None:
    flown = flight(3)
    assert flown.hits([0.9, 0.7, 0.1], 0.5, 0.8) == [0]
    assert list(flown.open) == [2]
    assert list(flown.waiting) == [0, 1, 2]


@pytest.mark.parametrize("compact", [True, False])
def test_every_row_gets_its_own_answer_in_the_callers_order(*, compact: bool) -> None:
    flown = flight(5)
    sure = [0.9, 0.1, NAN, 0.8, 0.2]
    flown.said["first"] = says(0, 1, 2, 3, 4)
    flown.answer(flown.hits(sure, 0.5, 0.5), says(10, 11, 12, 13, 14), 0, sure)
    if compact:
        flown.compact()
        assert flown.live[0].flatten().tolist() == flown.said["first"].flatten().tolist() == [1, 2, 4]
        assert (list(flown.rows), list(flown.waiting), list(flown.open)) == ([1, 2, 4], [0, 1, 2], [0, 2])
    at = {row: number for number, row in enumerate(flown.rows)}
    again = [1.0] * len(flown.rows)
    again[at[1]] = 0.3
    assert flown.hits(again, 0.5, 0.5) == [at[4]], "what has left or was NaN is not answered"
    flown.answer([at[4]], flown.live[0] + 20, 1, again)
    flown.land(flown.live[0] + 30, 2)
    assert not flown.waiting
    assert flown.logits().flatten().tolist() == [10, 31, 32, 13, 24]
    left_at, confidence = flown.exits()
    assert left_at.tolist() == [0, 2, 2, 0, 1]
    torch.testing.assert_close(confidence, torch.tensor([0.9, 1, 1, 0.8, 1]))


def test_logits_of_rows_that_leave_together_are_not_copied() -> None:
    flown, logits = flight(), says(1, 2, 3, 4)
    flown.land(logits, 0)
    assert flown.logits() is logits
    assert flown.exits()[0].tolist() == [0] * 4
