"""What all certifications of a life may fail with together: never more than the budget, however many there are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from offramp.budget import FailureBudget
from offramp.calibration import fixed_sequence, inputs_needed
from offramp.errors import InputError


def after(budget: FailureBudget, certifications: int) -> FailureBudget:
    for number in range(certifications):
        budget = budget.spent(f"number {number}", "2026-11-28")
    return budget


@pytest.mark.parametrize("certifications", [0, 1, 2, 10, 200])
def test_what_is_spent_and_what_is_left_add_up_to_the_allowance(certifications: int) -> None:
    budget = after(FailureBudget(0.05), certifications)
    spent = math.fsum(spend.probability for spend in budget.spends)
    assert spent + budget.left == pytest.approx(0.05)
    assert 0 < budget.next_probability() < budget.left
    assert len(budget.spends) == certifications


def test_the_schedule_is_the_published_one() -> None:
    budget = after(FailureBudget(0.05), 4)
    assert [spend.probability for spend in budget.spends] == pytest.approx([0.05 / n for n in (2, 6, 12, 20)])


def test_what_came_before_is_part_of_the_total() -> None:
    budget = FailureBudget(0.05, before=0.05)
    assert budget.total == pytest.approx(0.1)
    assert budget.to_json()["confidence_for_life"] == pytest.approx(0.9)
    assert budget.next_probability() == FailureBudget(0.05).next_probability()


def test_it_survives_json() -> None:
    budget = after(FailureBudget(0.05, before=0.01), 3)
    assert FailureBudget.from_json(json.loads(json.dumps(budget.to_json()))) == budget


def test_the_hundredth_certification_is_dearer_but_affordable() -> None:
    first, hundredth = (after(FailureBudget(0.05), k).next_probability() for k in (0, 99))
    needed = [inputs_needed(0.01, 1 - probability) for probability in (first, hundredth)]
    assert needed[1] / needed[0] == pytest.approx(3.3, abs=0.2)


@pytest.mark.parametrize(("allowance", "before"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.05, -0.1), (math.nan, 0.0)])
def test_a_budget_that_makes_no_sense_is_refused(allowance: float, before: float) -> None:
    with pytest.raises(InputError, match="probabilities that add up to less than 1"):
        FailureBudget(allowance, before)


def lives_with_a_failure(schedule: object, lives: int, certifications: int, rng: np.random.Generator) -> int:
    """Lives in which some plan that is just above the tolerance is certified, at levels by this schedule."""
    tolerance, n, broken = 0.02, 1000, 0
    for _ in range(lives):
        budget = FailureBudget(0.05)
        for _ in range(certifications):
            level = 1 - (budget.next_probability() if schedule == "published" else 0.05)
            budget = budget.spent("", "")
            if fixed_sequence([int(rng.binomial(n, tolerance * 1.0001))], n, tolerance, level) >= 0:
                broken += 1
                break
    return broken


@pytest.mark.slow
def test_over_a_whole_life_the_confidence_level_holds() -> None:
    rng = np.random.default_rng(0)
    lives = 2000
    broken = lives_with_a_failure("published", lives, 30, rng)
    assert broken <= 0.05 * lives + 3 * math.sqrt(lives * 0.05 * 0.95)
    assert lives_with_a_failure("each at 95 %", 200, 30, rng) > 0.5 * 200, "what one level for all of them would do"
