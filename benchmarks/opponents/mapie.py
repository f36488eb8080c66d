"""MAPIE's risk control (BinaryClassificationController, Learn then Test) on our records.

A plan counts as a binary classifier of requests, "the answer differs", whose false positives are controlled. MAPIE
knows nothing of caches: what a user would hand it is a list of plans with one threshold shared by all caches, at levels
read off the tuning records, each without the caches that do not pay there. The order of testing is learned on the
tuning records too (its split fixed sequence), the test is on the certification records, and of the plans that pass the
cheapest is taken.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from offramp.placement import OFF, CacheCosts, Thresholds, expected_cost, outcomes
from offramp.types import Records
from opponents.rules import Rule, paying

CONFIDENCE_LEVEL = 0.95
LEVELS = 60


def thresholds(tune: Records, certify: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
    """(K,) the shared threshold where a cache is on, infinity where it is off; all off when no plan passes."""
    from mapie.risk_control import BinaryClassificationController, BinaryRisk

    plans_MK = shared_plans(tune, costs)
    loss = BinaryRisk(
        risk_occurrence=lambda truth_N, differs_N: (differs_N == 1) & (truth_N == 0),
        risk_condition=lambda truth_N, _differs_N: np.ones(len(truth_N), dtype=bool),
        higher_is_better=False,
    )
    controller = BinaryClassificationController(
        predict_function=lambda records, *plan_K: outcomes(records, plan_K)[1].astype(int),
        risk=loss,
        target_level=tolerance,
        confidence_level=CONFIDENCE_LEVEL,
        best_predict_param_choice=loss,
        list_predict_params=plans_MK,
        fwer_method="split_fixed_sequence",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where nothing passes, which is an answer
        controller.learn_fixed_sequence_order(
            tune, np.zeros(len(tune), int), beta_grid=np.logspace(-25, 0, 2 * len(plans_MK)), binary=True
        )
        controller.calibrate(certify, np.zeros(len(certify), int))
    valid = [tuple(float(value) for value in plan_K) for plan_K in controller.valid_predict_params]
    off = (OFF,) * len(tune.reads_K)
    return min([off, *valid], key=lambda plan_K: expected_cost(tune, plan_K, costs))


def shared_plans(tune: Records, costs: CacheCosts) -> NDArray[np.float64]:
    """(M, K) plans that share a threshold, at even quantiles of the caches' confidences."""
    confidence = np.asarray(tune.confidence_NK, dtype=np.float64)
    levels = np.unique(np.nanquantile(confidence, np.linspace(0, 1, LEVELS)))
    shared = {paying(tune, (float(level),) * len(tune.reads_K), costs) for level in levels}
    return np.array(sorted(shared))


RULE = Rule(
    "MAPIE, one shared threshold",
    f"With {100 * CONFIDENCE_LEVEL:g} % confidence at most a share `tolerance` of the answers differs.",
    thresholds,
)
