"""The proof by repetition: over many certifications the promise is broken no more often than it may be.

Three witnesses. Simulated traffic whose true risk is known by construction; an independent implementation of
Learn then Test (MAPIE) on the same losses; and recorded real traffic, re-split many times. A planted off-by-one (serve
the first plan that failed, the defect of a published implementation) must break each check that counts violations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from offramp.calibration import fixed_sequence, p_value
from offramp.placement import CacheCosts, Candidate, outcomes, plan_path
from offramp.types import Records

pytestmark = pytest.mark.slow

RECORDS = Path(__file__).parent / "data" / "resnet18_cifar10_records.npz"
Procedure = Callable[[NDArray[np.int64], int, float, float], int]


def first_that_failed(errors_M: NDArray[np.int64], n: int, tolerance: float, confidence_level: float) -> int:
    """The planted defect: one step too far."""
    return min(fixed_sequence(errors_M, n, tolerance, confidence_level) + 1, len(errors_M) - 1)


def check_violations(violations: int, draws: int, confidence_level: float) -> None:
    """AssertionError when the promise was broken too often: beyond 3 standard errors above 1 - confidence_level."""
    allowed = 1 - confidence_level
    limit = allowed + 3 * math.sqrt(allowed * confidence_level / draws)
    assert violations / draws <= limit, f"{violations} of {draws} certified plans exceed the tolerance"


# --- known risk -------------------------------------------------------------------------------------------------


def violations_at_known_risk(
    procedure: Procedure, tolerance: float, n: int, draws: int, *, confidence_level: float = 0.95, seed: int = 0
) -> int:
    """In how many of `draws` certifications the chosen candidate's true risk is above the tolerance.

    One cache with uniform confidence that disagrees with probability 1.5 (1 - confidence)^2. Answering from
    confidence t on then has the risk (1 - t)^3 / 2 exactly. 60 thresholds from strict to loose are placed so that the
    thirtieth is the tightest violation: a risk one thousandth above the tolerance. The errors of a draw are counted
    from n simulated requests: how many disagreeing ones lie between neighbouring thresholds is multinomial.
    """
    risks_M = tolerance * 1.001 * (1.06 ** np.arange(-30, 30))
    thresholds_M = 1 - np.cbrt(2 * risks_M)
    assert np.allclose((1 - thresholds_M) ** 3 / 2, risks_M)
    between = np.diff(risks_M, prepend=0.0)
    rng = np.random.default_rng(seed)
    errors_DM = rng.multinomial(n, [*between, 1 - between.sum()], size=draws)[:, :-1].cumsum(axis=1)
    chosen = [procedure(errors_M, n, tolerance, confidence_level) for errors_M in errors_DM]
    return sum(index >= 0 and bool(risks_M[index] > tolerance) for index in chosen)


@pytest.mark.parametrize(("tolerance", "n"), [(0.01, 1000), (0.01, 6000), (0.02, 500), (0.02, 3000)])
def test_the_tolerance_is_exceeded_no_more_often_than_promised(tolerance: float, n: int) -> None:
    check_violations(violations_at_known_risk(fixed_sequence, tolerance, n, 2000), 2000, 0.95)


@pytest.mark.parametrize(("tolerance", "n"), [(0.01, 6000), (0.02, 3000)])
def test_serving_the_first_plan_that_failed_is_caught(tolerance: float, n: int) -> None:
    violations = violations_at_known_risk(first_that_failed, tolerance, n, 2000)
    with pytest.raises(AssertionError, match="exceed the tolerance"):
        check_violations(violations, 2000, 0.95)


def test_the_simulated_losses_are_those_of_plain_requests() -> None:
    """The multinomial shortcut above against requests drawn one by one."""
    rng = np.random.default_rng(5)
    confidence = rng.random(400_000)
    disagrees = rng.random(400_000) < 1.5 * (1 - confidence) ** 2
    for risk in (0.002, 0.01, 0.05):
        measured = (disagrees & (confidence >= 1 - np.cbrt(2 * risk))).mean()
        assert measured == pytest.approx(risk, abs=4 * math.sqrt(risk / 400_000))


# --- an independent implementation ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_mapie_certifies_the_same_thresholds(seed: int) -> None:
    """One cache is a binary classifier: "answer" when the confidence reaches the threshold, right when it agrees.

    MAPIE's Learn-then-Test controller gets the same confidences and agreements, our loss as a custom risk (answered
    and differs, over all requests) and the same thresholds. Its p-value is min(Hoeffding, exact binomial tail) for
    binary losses; the tail is never above Hoeffding's bound, so it must equal ours, but for one thing: it rounds
    n * mean up to a whole number of errors, and where that product lands just above a whole number it counts one error
    too many. There its p-value must be the one of errors + 1.
    """
    mapie = pytest.importorskip("mapie.risk_control")
    rng = np.random.default_rng(seed)
    n, tolerance, confidence_level = 1500, 0.02, 0.95
    confidence = rng.random(n)
    agrees = rng.random(n) >= 1.5 * (1 - confidence) ** 2
    thresholds = np.linspace(0.3, 0.95, 40)
    loss = mapie.BinaryRisk(
        risk_occurrence=lambda y_true, y_pred: (y_pred == 1) & (y_true == 0),
        risk_condition=lambda y_true, _y_pred: np.ones(len(y_true), dtype=bool),
        higher_is_better=False,
    )
    controller = mapie.BinaryClassificationController(
        predict_function=lambda X: np.column_stack([1 - X[:, 0], X[:, 0]]),
        risk=loss,
        target_level=tolerance,
        confidence_level=confidence_level,
        best_predict_param_choice=loss,
        list_predict_params=thresholds,
        fwer_method="fixed_sequence",
    )
    controller.calibrate(confidence[:, None], agrees.astype(int))

    errors = np.array([int((~agrees & (confidence >= threshold)).sum()) for threshold in thresholds])
    rounded = np.ceil(n * (errors / n)).astype(int)
    assert (rounded - errors).max() <= 1
    ours = [p_value(int(count), n, tolerance) for count in rounded]
    assert controller.p_values[:, 0] == pytest.approx(ours, abs=1e-9)

    strict_first = errors[::-1]
    index = fixed_sequence(strict_first, n, tolerance, confidence_level)
    assert index >= 0
    certified = thresholds[::-1][: index + 1]
    theirs = np.sort(controller.valid_predict_params)[::-1]
    assert set(theirs) <= set(certified)
    assert len(certified) - len(theirs) <= int((rounded != errors).any())


# --- recorded real traffic --------------------------------------------------------------------------------------


def violation_rate_over_resplits(
    records: Records,
    costs: CacheCosts,
    tolerance: float,
    confidence_level: float,
    splits: int,
    seed: int,
    *,
    tune: int = 1500,
    certify: int = 3000,
    replace: bool = True,
    procedure: Procedure = fixed_sequence,
) -> float:
    """Share of re-splits in which the certified plan's true disagreement is above the tolerance.

    The truth is exact, without sampling noise of its own: the records left after the tuning inputs were taken out
    *are* the traffic, and a plan's true disagreement is its share of all of them. Certification inputs are drawn from
    this finite traffic. With replacement their errors are exactly binomial; without, they are hypergeometric, hence
    less spread, and the promise holds with room to spare. Each tuning split serves ten certification draws, which
    are independent given its path.
    """
    rng = np.random.default_rng(seed)
    violations = done = 0
    while done < splits:
        order = rng.permutation(len(records))
        path = plan_path(records.rows(order[:tune]), costs, 3 * tolerance, prices=20, steps=60)
        disagrees_NM = disagreements(records.rows(order[tune:]), path)
        for _ in range(min(10, splits - done)):
            drawn = rng.choice(len(disagrees_NM), certify, replace=replace)
            index = procedure(disagrees_NM[drawn].sum(axis=0), certify, tolerance, confidence_level)
            violations += index >= 0 and bool(disagrees_NM[:, index].mean() > tolerance)
            done += 1
    return violations / splits


def disagreements(records: Records, path: tuple[Candidate, ...]) -> NDArray[np.bool_]:
    """(N, M) which requests each plan answers differently from the backbone."""
    return np.column_stack([outcomes(records, candidate.thresholds_K)[1] for candidate in path])


@pytest.fixture(scope="module")
def real() -> tuple[Records, CacheCosts]:
    """Recorded caches of a ResNet-18 on CIFAR-10 images that neither it nor its caches were trained on.

    The file holds `confidence` and `agreement` (N, K), `reads` (K,) and, in units of the backbone's cost, `before` and
    `cache` (K,); `benchmarks/cifar10.py --records` makes it.
    """
    if not RECORDS.exists():
        pytest.skip(f"needs recorded traffic in tests/data/{RECORDS.name}")
    with np.load(RECORDS) as stored:
        agreement = stored["agreement"].astype(bool)
        nothing = np.zeros(agreement.shape, dtype=np.int64)
        confidence = stored["confidence"].astype(np.float32)
        costs = CacheCosts(stored["before"], stored["cache"])
        reads_K = tuple(stored["reads"].tolist())
    return Records(confidence, nothing, agreement, nothing[:, 0], reads_K), costs


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("tolerance", [0.01, 0.02])
def test_real_traffic_exceeds_the_tolerance_no_more_often_than_promised(
    real: tuple[Records, CacheCosts], tolerance: float, *, replace: bool
) -> None:
    rate = violation_rate_over_resplits(*real, tolerance, 0.95, 200, 0, replace=replace)
    check_violations(round(rate * 200), 200, 0.95)


def test_serving_the_first_plan_that_failed_breaks_it_on_coarse_real_paths(
    real: tuple[Records, CacheCosts],
) -> None:
    """On a dense path one step too far costs little; on every eighth plan it must show."""

    def one_too_far(errors_M: NDArray[np.int64], n: int, tolerance: float, confidence_level: float) -> int:
        coarse = errors_M[::8]
        return 8 * first_that_failed(coarse, n, tolerance, confidence_level)

    rate = violation_rate_over_resplits(*real, 0.02, 0.95, 200, 0, procedure=one_too_far)
    with pytest.raises(AssertionError, match="exceed the tolerance"):
        check_violations(round(rate * 200), 200, 0.95)
