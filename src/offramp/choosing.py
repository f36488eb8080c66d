"""From trained candidates to a certified model: a path of plans on tune, a fixed sequence on certify, a last timing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch
from torch import Tensor

from offramp.calibration import Verdict, check_levels, upper_bound
from offramp.calibration import certify as certify_path
from offramp.candidates import Candidates, Trained
from offramp.cost import shares
from offramp.evaluation import compare_latency
from offramp.methods import Method
from offramp.methods.base import Rule
from offramp.model import CachedModel
from offramp.placement import CacheCosts, Candidate, expected_cost, hit_rates, outcomes
from offramp.recording import CERTIFY, TUNE, keeping
from offramp.summary import Findings, summarise
from offramp.tail import steady_path
from offramp.types import Certificate, CostTable, LatencyRatio, Plan, PlannedCache, Records

PATH_REACH = 3.0  # the path of plans goes on to this multiple of the tolerance
WEIGHT_FLOPS = 0.5  # a plan's cost is half measured time and half FLOPs, which carry over to other machines
BATCH_SIZES = (1, 8, 32)
LATENCY_S, LATENCY_SHARE = 3.0, 0.01  # for timing the finished model, per batch size, and at most of a budget


@dataclass
class Learned:
    """The neural half of a fit: trained candidates and their measured costs. `choose` makes a model of it."""

    method: Method
    candidates: Candidates
    trained: list[Trained]
    costs: CostTable
    seconds: dict[str, float]
    time_budget_s: float | None
    interrupted: bool
    to_text: Callable[[Tensor], str] | None = None  # a row of token ids -> its text, where the stream knows


def choose(learned: Learned, *, tolerance: float, confidence_level: float, rule: Rule | None = None) -> CachedModel:
    """The cached model of these candidates at this tolerance.

    rule: "certificate" or "published" in place of the method's own choice. Call it again with another tolerance or
    rule to have a second model from the same caches; each certificate holds by itself.
    """
    check_levels(tolerance, confidence_level)
    method = learned.method if rule is None else dataclasses.replace(learned.method, rule=rule)
    with keeping(learned.candidates.recording):
        return _choose(dataclasses.replace(learned, method=method), tolerance, confidence_level)


def _choose(learned: Learned, tolerance: float, confidence_level: float) -> CachedModel:
    started = time.monotonic()
    candidates, trained, costs = learned.candidates, learned.trained, learned.costs
    path, errors_M, verdict = _judged_path(learned, tolerance, confidence_level)
    candidate = path[max(verdict.index, 0)]
    plan = _plan(candidate, trained, verdict, path)
    certificate = _certificate(learned, plan, verdict, tolerance, confidence_level)
    cached = _assemble(candidates, trained, plan, certificate, costs)
    latency: tuple[LatencyRatio, ...] = ()
    if plan.caches and candidates.recording.has_inputs:  # else there is nothing to time it on
        latency = _latency(cached, learned)
        if learned.method.rule == "certificate":  # a published rule is left as it is published
            plan = never_slower(plan, latency)
            certificate = certificate if plan.caches else dataclasses.replace(certificate, errors=0, bound=0.0)
            cached = _assemble(candidates, trained, plan, certificate, costs)
    chosen = candidate if plan.caches else path[0]
    findings = Findings(
        trained, path, errors_M, verdict, chosen, latency, learned.seconds, learned.time_budget_s, learned.to_text
    )
    cached.summary.update(summarise(candidates, cached, costs, findings))
    cached.summary["fit"]["method"] = learned.method.name
    cached.summary["fit"]["seconds"]["choose"] = time.monotonic() - started
    if learned.interrupted:
        cached.summary["advice"] += " Training was interrupted; a full run may save more."
    return cached


def _judged_path(
    learned: Learned, tolerance: float, confidence_level: float
) -> tuple[tuple[Candidate, ...], list[int], Verdict]:
    """Plans in the order of testing, their disagreements on certify, and which of them it is."""
    candidates, trained = learned.candidates, learned.trained
    n = len(candidates.recording.index(CERTIFY))
    if not trained:
        nothing = (Candidate((), 0.0, 1.0, ()),)
        return nothing, [0], certify_path([0], n, tolerance, confidence_level)
    costs = CacheCosts(*shares(learned.costs, weight_flops=WEIGHT_FLOPS))
    tune, certify = candidates.records(trained, TUNE), candidates.records(trained, CERTIFY)
    if learned.method.rule == "published":
        path = _published_path(learned.method, tune, costs, tolerance)
        errors_M = count_errors(certify, path)
        bound = upper_bound(errors_M[-1], n, confidence_level)
        return path, errors_M, Verdict(len(path) - 1, errors_M[-1], n, bound, len(path), "")
    path = steady_path(tune, costs, PATH_REACH * tolerance, tolerance).path
    errors_M = count_errors(certify, path)
    return path, errors_M, certify_path(errors_M, n, tolerance, confidence_level)


def _published_path(method: Method, tune: Records, costs: CacheCosts, tolerance: float) -> tuple[Candidate, ...]:
    """No cache, and the one plan of the method's own rule."""
    thresholds_K = method.thresholds(tune, costs, tolerance)
    _, disagrees_N = outcomes(tune, thresholds_K)
    nothing = Candidate((float("inf"),) * len(thresholds_K), 0.0, 1.0, (0.0,) * len(thresholds_K))
    rates_K = tuple(hit_rates(tune, thresholds_K).tolist())
    cost = expected_cost(tune, thresholds_K, costs)
    return nothing, Candidate(thresholds_K, float(disagrees_N.mean()), cost, rates_K)


def count_errors(records: Records, path: Iterable[Candidate]) -> list[int]:
    """Disagreements of each plan of the path on these records."""
    return [int(outcomes(records, candidate.thresholds_K)[1].sum()) for candidate in path]


def _plan(candidate: Candidate, trained: list[Trained], verdict: Verdict, path: tuple[Candidate, ...]) -> Plan:
    if not trained:
        return Plan(reason="no cache was trained: training ended before the first one, or none fits this backbone")
    if verdict.index < 0:
        return Plan(reason=f"nothing could be certified. {verdict.advice}".strip())
    enabled = [k for k, threshold in enumerate(candidate.thresholds_K) if np.isfinite(threshold)]
    if not enabled:
        what = (
            "no cache saves more than it costs" if len(path) == 1 else f"no plan with caches passed. {verdict.advice}"
        )
        return Plan(reason=what if verdict.advice or len(path) == 1 else "the published rule leaves every cache off")
    planned = tuple(
        PlannedCache(
            trained[k].cache.name,
            trained[k].cache.point,
            float(candidate.thresholds_K[k]),
            trained[k].cache.confidence_name,
            float(candidate.hit_rates_K[k]),
        )
        for k in enabled
    )
    return Plan(planned, candidate.disagreement, candidate.cost)


def _certificate(
    learned: Learned, plan: Plan, verdict: Verdict, tolerance: float, confidence_level: float
) -> Certificate:
    procedure = "fixed-sequence testing, exact binomial bound"
    if learned.method.rule == "published":
        procedure = f"measured only: thresholds by the published rule of {learned.method.name}, exact binomial bound"
    return Certificate(
        tolerance=tolerance,
        confidence_level=confidence_level,
        n=verdict.n,
        errors=verdict.errors if plan.caches else 0,
        bound=verdict.bound if plan.caches else 0.0,
        procedure=procedure,
        candidates_tested=verdict.candidates_tested,
        backbone_fingerprint=learned.candidates.split.fingerprint,
        data_fingerprint=learned.candidates.recording.fingerprint(CERTIFY),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        advice=verdict.advice,
    )


def _assemble(
    candidates: Candidates, trained: list[Trained], plan: Plan, certificate: Certificate, costs: CostTable
) -> CachedModel:
    names = [planned.name for planned in plan.caches]
    caches = [candidate.cache for candidate in trained if candidate.cache.name in names]
    return CachedModel(candidates.split, caches, plan, certificate, costs.of(names), task=candidates.task, summary={})


def _latency(cached: CachedModel, learned: Learned) -> tuple[LatencyRatio, ...]:
    sample = learned.candidates.recording.sample.to(cached.split_model.device)
    budget_s = within(LATENCY_S, learned.time_budget_s, LATENCY_SHARE)
    with torch.inference_mode():
        return compare_latency(cached, sample, BATCH_SIZES, budget_s=budget_s)


def never_slower(plan: Plan, latency: tuple[LatencyRatio, ...]) -> Plan:
    """The plan, switched off at the batch sizes where it was measured not to be faster; without caches if at all."""
    slower = tuple(ratio.batch_size for ratio in latency if ratio.mean >= 1)
    if len(slower) < len(latency):
        return dataclasses.replace(plan, bypass_batch_sizes=slower)
    measured = ", ".join(f"{ratio.mean:.2f} at batch {ratio.batch_size}" for ratio in latency)
    return Plan(reason=f"the best certified plan was not faster than the full model: time ratio {measured}")


def within(seconds: float, time_budget_s: float | None, share: float) -> float:
    """`seconds`, or this share of the budget where that is less."""
    return seconds if time_budget_s is None else min(seconds, share * time_budget_s)
