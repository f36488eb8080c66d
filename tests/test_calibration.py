"""Exact bounds against scipy, the published table of counts, and the walk along a sequence of candidates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from offramp.calibration import (
    advice,
    certify,
    check_levels,
    fixed_sequence,
    inputs_needed,
    interval,
    p_value,
    upper_bound,
)
from offramp.errors import InputError

COUNTS = [(0, 1), (1, 1), (0, 299), (3, 250), (25, 3500), (250, 250), (1234, 5000), (4999, 5000)]
SIZES = (250, 500, 1000, 2000, 5000, 10000)
# (tolerance, confidence level, n to pass without errors, most errors that pass at each of SIZES; -1: none)
TABLE = [
    (0.005, 0.90, 460, (-1, 0, 1, 5, 18, 40)),
    (0.01, 0.90, 230, (0, 1, 5, 13, 40, 86)),
    (0.02, 0.90, 114, (1, 5, 13, 31, 86, 181)),
    (0.05, 0.90, 45, (7, 18, 40, 87, 229, 471)),
    (0.01, 0.95, 299, (-1, 1, 4, 12, 38, 83)),
    (0.02, 0.95, 149, (1, 4, 12, 29, 83, 176)),
    (0.05, 0.95, 59, (6, 16, 38, 83, 224, 463)),
]


@pytest.mark.parametrize(("errors", "n"), COUNTS)
@pytest.mark.parametrize("confidence_level", [0.5, 0.9, 0.95, 0.999])
def test_bounds_equal_scipy(errors: int, n: int, confidence_level: float) -> None:
    one_sided = binomtest(errors, n, alternative="less").proportion_ci(confidence_level, "exact")
    assert upper_bound(errors, n, confidence_level) == pytest.approx(one_sided.high, abs=1e-10)
    two_sided = binomtest(errors, n).proportion_ci(confidence_level, "exact")
    assert interval(errors, n, confidence_level) == pytest.approx((two_sided.low, two_sided.high), abs=1e-10)


@pytest.mark.parametrize(("errors", "n"), COUNTS)
@pytest.mark.parametrize("tolerance", [0.001, 0.01, 0.3])
def test_p_value_equals_scipy(errors: int, n: int, tolerance: float) -> None:
    expected = binomtest(errors, n, tolerance, alternative="less").pvalue
    assert p_value(errors, n, tolerance) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("tolerance", "confidence_level", "needed", "most"), TABLE)
def test_most_errors_that_pass(tolerance: float, confidence_level: float, needed: int, most: tuple[int, ...]) -> None:
    assert inputs_needed(tolerance, confidence_level) == needed
    assert needed == math.ceil(math.log(1 - confidence_level) / math.log(1 - tolerance))
    for n, errors in zip(SIZES, most, strict=True):
        candidates = np.arange(errors + 5)
        assert fixed_sequence(candidates, n, tolerance, confidence_level) == errors
        if errors >= 0:
            assert p_value(errors, n, tolerance) <= 1 - confidence_level < p_value(errors + 1, n, tolerance)


def test_needing_exactly_n_means_that_one_fewer_fails() -> None:
    for tolerance in (0.003, 0.01, 0.2):
        n = inputs_needed(tolerance, 0.95)
        assert upper_bound(0, n, 0.95) <= tolerance < upper_bound(0, n - 1, 0.95)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.0021, 0.004, 0.006])
def test_inputs_needed_at_a_rate_equals_a_plain_search(rate: float) -> None:
    n = 1
    while upper_bound(math.ceil(n * rate - 1e-9), n, 0.9) > 0.01:
        n += 1
    assert inputs_needed(0.01, 0.9, rate) == n


def test_the_walk_stops_at_the_first_failure_and_keeps_the_last_that_passed() -> None:
    passes, fails = 25, 26  # at n = 3500, 1 %, 95 %
    assert upper_bound(passes, 3500, 0.95) <= 0.01 < upper_bound(fails, 3500, 0.95)
    assert fixed_sequence([0, 3, passes, fails, 5], 3500, 0.01, 0.95) == 2
    assert fixed_sequence([0, 3, passes], 3500, 0.01, 0.95) == 2
    assert fixed_sequence([fails, 0], 3500, 0.01, 0.95) == -1
    assert fixed_sequence([0, 0], 298, 0.01, 0.95) == -1
    assert fixed_sequence([], 3500, 0.01, 0.95) == -1


def test_certify_reports_its_evidence() -> None:
    verdict = certify([0, 10, 30, 4], 3500, 0.01, 0.95)
    assert (verdict.index, verdict.errors, verdict.n, verdict.candidates_tested) == (1, 10, 3500, 3)
    assert verdict.bound == upper_bound(10, 3500, 0.95) <= 0.01
    nothing = certify([0], 100, 0.01, 0.95)
    assert (nothing.index, nothing.errors, nothing.bound, nothing.candidates_tested) == (-1, 0, 0.0, 1)
    everything = certify([0, 1], 3500, 0.01, 0.95)
    assert (everything.index, everything.candidates_tested, everything.advice) == (1, 2, "")


def test_advice_gives_numbers_that_are_true() -> None:
    few = advice([0], 100, 0.01, 0.95, -1)
    assert "100 certification inputs" in few
    assert "299" in few
    close = advice([0, 30], 3500, 0.01, 0.95, 0)
    needed = inputs_needed(0.01, 0.95, 30 / 3500)
    assert "30 of 3500 certification inputs (0.8571 %)" in close
    assert f"with {needed} certification inputs" in close
    assert upper_bound(30, 3500, 0.95) <= 0.0117
    assert "tolerance of 1.17 %" in close
    assert "no number of inputs" in advice([0, 40], 3500, 0.01, 0.95, 0)


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_levels_outside_the_open_interval_are_refused(wrong: float) -> None:
    with pytest.raises(InputError, match=rf"tolerance is {wrong!r}; expected a number above 0 and below 1"):
        check_levels(wrong, 0.95)
    with pytest.raises(InputError, match=rf"confidence_level is {wrong!r}; expected"):
        check_levels(0.01, wrong)
    with pytest.raises(InputError):
        fixed_sequence([0], 100, wrong, 0.95)
    with pytest.raises(InputError):
        upper_bound(0, 100, wrong)


@pytest.mark.parametrize(("errors", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_impossible_counts_are_refused(errors: int, n: int) -> None:
    for call in (lambda: upper_bound(errors, n, 0.95), lambda: fixed_sequence([errors], n, 0.01, 0.95)):
        with pytest.raises(InputError, match="errors among"):
            call()


def test_a_rate_at_the_tolerance_needs_infinitely_many() -> None:
    with pytest.raises(InputError, match="no number of inputs"):
        inputs_needed(0.01, 0.95, 0.01)
