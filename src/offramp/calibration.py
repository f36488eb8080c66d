"""From counts of disagreements to a statement that holds: exact bounds, and which candidate plan is certified.

Everything rests on one fact. A plan fixed before the certification inputs were looked at disagrees with the backbone
on a binomial number of them, so the exact (Clopper-Pearson) bound holds without any approximation. Several plans are
tested by a fixed sequence (Learn then Test, Angelopoulos et al., arXiv 2110.01052, section 4): ordered beforehand from
safest to loosest, each at the full level, until the first failure. The last plan *that passed* is certified; returning
the one that failed, as a published implementation does, breaks the promise.

Shape suffix: M candidate plans. Rates and bounds are shares of all requests, between 0 and 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from offramp.errors import InputError
from offramp.types import FloatArray, IntArray


@dataclass(frozen=True)
class Verdict:
    """What a fixed sequence showed.

    index: the certified candidate, -1 when none passed. errors, bound: its disagreements among the n certification
    inputs and the upper bound on its rate (both 0 when none passed: without caches nothing can disagree).
    candidates_tested counts the first failure too. advice: what it would have taken to certify the next candidate.
    """

    index: int
    errors: int
    n: int
    bound: float
    candidates_tested: int
    advice: str


def check_levels(tolerance: float, confidence_level: float) -> None:
    """InputError unless both lie strictly between 0 and 1."""
    _check_share("tolerance", tolerance, "the highest share of answers that may differ, such as 0.01 for 1 %")
    _check_share("confidence_level", confidence_level, "how sure the certificate must be, such as 0.95 for 95 %")


def upper_bound(errors: int, n: int, confidence_level: float) -> float:
    """One-sided exact upper bound on a rate after `errors` in `n` (Clopper and Pearson, Biometrika 26, 1934)."""
    _check_share("confidence_level", confidence_level, "such as 0.95")
    _check_counts(errors, n)
    return float(_upper_bounds(np.asarray(errors), n, confidence_level))


def interval(errors: int, n: int, confidence_level: float) -> tuple[float, float]:
    """Two-sided exact interval of a rate after `errors` in `n` (Clopper and Pearson, Biometrika 26, 1934)."""
    _check_share("confidence_level", confidence_level, "such as 0.95")
    _check_counts(errors, n)
    one_sided = (1 + confidence_level) / 2
    high = float(_upper_bounds(np.asarray(errors), n, one_sided))
    low = 1 - float(_upper_bounds(np.asarray(n - errors), n, one_sided))
    return (low if errors else 0.0), high


def p_value(errors: int, n: int, tolerance: float) -> float:
    """P(Bin(n, tolerance) <= errors): how surprising so few errors are if the rate is above `tolerance`.

    It is at most 1 - confidence_level exactly when `upper_bound` is at most `tolerance`.
    """
    from scipy.special import betainc

    _check_share("tolerance", tolerance, "such as 0.01")
    _check_counts(errors, n)
    return 1.0 if errors == n else float(betainc(n - errors, errors + 1, 1 - tolerance))


def inputs_needed(tolerance: float, confidence_level: float, error_rate: float = 0.0) -> int:
    """The fewest certification inputs n with which a plan of this measured error rate passes.

    The plan is taken to make ceil(n * error_rate) errors, so never fewer than its rate says; without errors this is
    ceil(log(1 - confidence_level) / log(1 - tolerance)), 299 for 1 % at 95 %. InputError when error_rate >= tolerance.
    """
    check_levels(tolerance, confidence_level)
    if not 0 <= error_rate < tolerance:
        raise InputError(
            f"error_rate is {error_rate!r}; expected at least 0 and less than the tolerance ({tolerance!r}): "
            "no number of inputs certifies a plan that exceeds it."
        )
    errors, step = 0, 1
    while not _affordable(errors, tolerance, confidence_level, error_rate):
        errors, step = errors + step, 2 * step
    lowest = max(errors - step // 2, 0)
    while lowest < errors:
        middle = (lowest + errors) // 2
        if _affordable(middle, tolerance, confidence_level, error_rate):
            errors = middle
        else:
            lowest = middle + 1
    return _inputs_for(errors, tolerance, confidence_level)


def fixed_sequence(errors_M: ArrayLike, n: int, tolerance: float, confidence_level: float) -> int:
    """Index of the last candidate that passed before the first that failed; -1 when the first one fails.

    errors_M: disagreements of each candidate on the same n certification inputs. The candidates and their order,
    safest first, must have been fixed without these inputs.
    """
    check_levels(tolerance, confidence_level)
    errors = _checked_errors(errors_M, n)
    failed = _upper_bounds(errors, n, confidence_level) > tolerance
    return (int(np.argmax(failed)) if failed.any() else len(errors)) - 1


def certify(errors_M: ArrayLike, n: int, tolerance: float, confidence_level: float) -> Verdict:
    """`fixed_sequence` with its evidence and, for the user, what would have been needed for more."""
    index = fixed_sequence(errors_M, n, tolerance, confidence_level)
    errors = _checked_errors(errors_M, n)
    certified = int(errors[index]) if index >= 0 else 0
    return Verdict(
        index=index,
        errors=certified,
        n=n,
        bound=upper_bound(certified, n, confidence_level) if index >= 0 else 0.0,
        candidates_tested=min(index + 2, len(errors)),
        advice=advice(errors, n, tolerance, confidence_level, index),
    )


def advice(errors_M: ArrayLike, n: int, tolerance: float, confidence_level: float, index: int) -> str:
    """One or two sentences in numbers: what would have certified the candidate after `index`; "" after the last."""
    errors = _checked_errors(errors_M, n)
    needed = inputs_needed(tolerance, confidence_level)
    level = f"{_percent(tolerance)} at {_percent(confidence_level)} confidence"
    if n < needed:
        return (
            f"{n} certification inputs cannot certify {level}, even without a single disagreement: that takes "
            f"{needed} inputs, or a tolerance of {_loosened(0, n, confidence_level)}."
        )
    if index + 1 >= len(errors):
        return ""
    failed = int(errors[index + 1])
    sentence = (
        f"The next cheaper plan disagreed on {failed} of {n} certification inputs ({_percent(failed / n)}) and would "
        f"have passed with a tolerance of {_loosened(failed, n, confidence_level)}"
    )
    if failed / n >= tolerance:
        return sentence + f"; no number of inputs certifies that rate for {level}."
    more = inputs_needed(tolerance, confidence_level, failed / n)
    return sentence + f", or, at that rate, with {more} certification inputs."


def _upper_bounds(errors: IntArray, n: int, confidence_level: float) -> FloatArray:
    """Upper bounds for an array of error counts; 1 where everything was an error."""
    from scipy.special import betaincinv

    some_correct = np.minimum(errors, n - 1)
    bounds = betaincinv(some_correct + 1, np.maximum(n - some_correct, 1), confidence_level)
    return np.asarray(np.where(errors >= n, 1.0, bounds))


def _inputs_for(errors: int, tolerance: float, confidence_level: float) -> int:
    """The fewest inputs with which exactly this many errors pass."""
    from scipy.special import betaincinv

    def passes(n: int) -> bool:
        return bool(betaincinv(errors + 1, n - errors, confidence_level) <= tolerance)

    high = errors + 1
    while not passes(high):
        high *= 2
    low = errors + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle + 1, high)
    return low


def _affordable(errors: int, tolerance: float, confidence_level: float, error_rate: float) -> bool:
    """Whether a plan of this rate makes no more than `errors` on as many inputs as those errors need to pass."""
    return math.ceil(_inputs_for(errors, tolerance, confidence_level) * error_rate - 1e-9) <= errors


def _checked_errors(errors_M: ArrayLike, n: int) -> IntArray:
    errors = np.asarray(errors_M, dtype=np.int64).reshape(-1)
    if len(errors):
        _check_counts(int(errors.min()), n)
        _check_counts(int(errors.max()), n)
    return errors


def _check_share(name: str, value: float, meaning: str) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name} is {value!r}; expected a number above 0 and below 1: {meaning}.")


def _check_counts(errors: int, n: int) -> None:
    if not (n >= 1 and 0 <= errors <= n):
        raise InputError(f"{errors} errors among {n} inputs; expected at least one input and 0 <= errors <= inputs.")


def _loosened(errors: int, n: int, confidence_level: float) -> str:
    """The bound as a percentage, rounded up to two decimals so that the number shown really passes."""
    return f"{math.ceil(upper_bound(errors, n, confidence_level) * 1e4) / 1e2:g} %"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
