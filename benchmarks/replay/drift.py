"""Traffic that changes and changes back, before a model that was fitted for what came before.

Each scenario is one stream. Our loop serves it; other rules are worked out on what the caches and the full model say to
the very same requests. False alarms are counted on calm requests that are drawn anew from recorded ones.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import offramp
from offramp.cost import flop_shares
from offramp.ladder import ALARM
from offramp.model import CachedModel
from offramp.monitoring import Monitor
from offramp.placement import CacheCosts, outcomes
from offramp.types import Records
from replay import rivals, truth
from replay.ledger import broken, ends, of_plans, stretches, windows
from replay.rivals import Run
from replay.service import TRACES, Case, case, fitted, others, refresh_policy, replay, tell, tiny_imagenet
from replay.traffic import Pictures, Schedule, Stream, arrivals_s, calm, changing, of_classes, schedule_s

MIXED = (2, 3, 4, 5)  # bird, cat, deer, dog: all that comes when the mix of classes changes
KINDS = ("blur", "noise", "jpeg", "brightness", "mix", "new classes")
SLOW = ("blur", "new classes")  # also as a ramp
POINTS = 48
ON_ALARM_ONLY = 10**9  # so many inputs never come: refits are for alarms here


@dataclass(frozen=True)
class Scenario:
    kind: str
    schedule: Schedule

    @property
    def name(self) -> str:
        return f"{self.kind}, {'slow' if self.schedule.ramp else 'sudden'}"


def scenarios(options: argparse.Namespace) -> list[Scenario]:
    calm_for, changed, back = options.lengths
    found = []
    for kind in options.kinds:
        found.append(Scenario(kind, Schedule(calm_for, changed, back)))
        if kind in SLOW:
            found.append(Scenario(kind, Schedule(calm_for, changed, back, ramp=changed // 2)))
    return found


def stream_of(scenario: Scenario, usual: Pictures, spare: Pictures, options: argparse.Namespace) -> Stream:
    changed, damage = spare, None
    if scenario.kind == "mix":
        changed = of_classes(spare, MIXED)
    elif scenario.kind == "new classes":
        changed = tiny_imagenet(options.workdir)
        changed = changed.rows(np.random.default_rng(options.seed).permutation(len(changed)))
    else:
        damage = scenario.kind
    return changing(scenario.name, scenario.schedule, usual, changed, damage, seed=options.seed)


def run(options: argparse.Namespace) -> dict[str, Any]:
    bench = case(options)
    cached, fresh = fitted(bench, options), others(bench, options)
    calm_pictures, spare = (fresh.rows(part) for part in (slice(0, options.parts[2]), slice(options.parts[2], None)))
    rows = []
    for scenario in scenarios(options):
        tell(f"-- {scenario.name}")
        rows.append(_row(bench, cached, scenario, stream_of(scenario, calm_pictures, spare, options), options))
    recorded = truth.records(cached, calm("calm", calm_pictures), bench.inputs, options.workdir)
    return {
        "part": "drift",
        "note": f"Fitted on {options.parts[0]:,} pictures and certified on {options.parts[1]:,}, all others come once. "
        "The pictures are all of CIFAR-10 in one random order, of which the full model knows 50,000 of 57,500. Trace "
        f"{options.trace}, {options.speed_up:g} times as fast; one caller, one picture a call; of the requests "
        f"{100 * options.shadow:g} % are sampled.",
        "tolerance": options.tolerance,
        "certificate": cached.certificate.to_json(),
        "shadow": options.shadow,
        "rows": rows,
        "false_alarms": false_alarms(recorded, cached, options),
    }


def _row(
    bench: Case, cached: CachedModel, scenario: Scenario, stream: Stream, options: argparse.Namespace
) -> dict[str, Any]:
    tell(f"what caches and full model say to {len(stream)} requests")
    records = truth.records(cached, stream, bench.inputs, options.workdir)
    costs = CacheCosts(*flop_shares(cached.costs))
    thresholds_K = tuple(planned.threshold for planned in cached.plan.caches)
    rules, missing = rivals.all_of(records, thresholds_K, costs, options.tolerance, options.shadow, options.seed)
    ways = [served(bench, cached, scenario, stream, records, options, refresh=refresh) for refresh in options.refreshes]
    ways += [as_way(rule, scenario.schedule) for rule in rules]
    return {
        "scenario": scenario.name,
        "schedule": vars(scenario.schedule),
        "requests": len(stream),
        "ways": ways,
        "missing": missing,
    }


# -- our loop --------------------------------------------------------------------------------------


def served(
    bench: Case,
    cached: CachedModel,
    scenario: Scenario,
    stream: Stream,
    records: Records,
    options: argparse.Namespace,
    *,
    refresh: bool,
) -> dict[str, Any]:
    schedule = scenario.schedule
    at_s = schedule_s(arrivals_s(TRACES[options.trace]), len(stream), options.speed_up)
    tell(f"{len(stream)} requests in {at_s[-1]:.0f} s, {'with' if refresh else 'without'} refits")
    policy = refresh_policy(options, **{"train_rows": ON_ALARM_ONLY} | options.policy) if refresh else None
    sampled_at = dict[int, int]()
    with ExitStack() as stack:
        size = options.reservoir_mb << 20
        model = offramp.online(cached, shadow=options.shadow, seed=options.seed, reservoir_bytes=size, refresh=policy)
        stack.enter_context(model)

        def look() -> None:
            model.settle()
            sampled_at[schedule.calm] = model.report()["sampled"]

        ledger = replay(model, stream.image_N, bench.inputs, at_s, marks={schedule.calm: look})
        model.settle()
        report = model.report()
    columns = ledger.columns()
    wrong_N = columns.answer_N != records.backbone_answer_N
    rows = stretches(ledger, columns, wrong_N)
    name = "offramp" if refresh else "offramp, no refits"
    way = as_way(Run(name, wrong_N, columns.cost_N), schedule)
    way |= alarmed(report["steps"], schedule, wrong_N, sampled_at[schedule.calm])
    way |= renewed(rows, schedule, columns.cost_N, wrong_N, at_s)
    return way | {
        "stretches": rows,
        "promise_broken_by_new_plans": [plan for plan in of_plans(rows) if plan["plan"] > 0 and broken(plan)],
        "steps": report["steps"],
        "refresh": report.get("refresh"),
        "late_s": {"p50": float(np.median(columns.late_s_N)), "worst": float(columns.late_s_N.max())},
    }


def alarmed(
    steps: list[dict[str, Any]], schedule: Schedule, wrong_N: NDArray[np.bool_], sampled_before: int
) -> dict[str, Any]:
    """The first alarm after the change began: how late, and what went out until then."""
    before = [step for step in steps if step["request"] <= schedule.calm and step["reason"].startswith(ALARM)]
    after = [step for step in steps if step["request"] > schedule.calm]
    alarm = next((step for step in after if step["reason"].startswith(ALARM)), None)
    found: dict[str, Any] = {"false_alarms": len(before), "alarm_request": None}
    if alarm is None:
        return found
    at, sampled = alarm["request"], alarm["evidence"].get("sampled")
    return found | {
        "alarm_request": at,
        "delay_requests": at - schedule.calm,
        "delay_sampled": sampled - sampled_before if sampled is not None and alarm is after[0] else None,
        "disagreements_until_alarm": int(wrong_N[schedule.calm : at].sum()),
        "changed_share_at_alarm": float(schedule.share_N()[min(at, schedule.length - 1)]),
    }


def renewed(
    rows: list[dict[str, Any]],
    schedule: Schedule,
    cost_N: NDArray[np.float64],
    wrong_N: NDArray[np.bool_],
    at_s: NDArray[np.float64],
) -> dict[str, Any]:
    """The first new plan with caches after the change began: how late, and how it does while the traffic stays so."""
    end = schedule.calm + schedule.changed
    new = [row["first_request"] for row in rows if row["plan"] > 0 and row["caches"]]
    first = next((request for request in new if request > schedule.calm), None)
    if first is None:
        return {"new_plan_request": None}
    found: dict[str, Any] = {
        "new_plan_request": first,
        "new_plan_after_requests": first - schedule.calm,
        "new_plan_after_s": float(at_s[first] - at_s[schedule.calm]),
        "disagreements_until_new_plan": int(wrong_N[schedule.calm : first].sum()),
    }
    if first < end:
        found["with_new_plan"] = _mean(cost_N[first:end], wrong_N[first:end])
    return found


# -- any way ---------------------------------------------------------------------------------------


def as_way(run: Run, schedule: Schedule) -> dict[str, Any]:
    """Saving and disagreement while it is calm, changed, and calm again, and along the stream."""
    begin, end = schedule.calm, schedule.calm + schedule.changed
    size = max(1, schedule.length // POINTS)
    return {
        "way": run.name,
        "calm": _mean(run.cost_N[:begin], run.wrong_N[:begin]),
        "changed": _mean(run.cost_N[begin:end], run.wrong_N[begin:end]),
        "back": _mean(run.cost_N[end:], run.wrong_N[end:]),
        "acted_at": run.changed_at[:100],
        "note": run.note,
        "series": {
            "requests": ends(schedule.length, size),
            "disagreement": windows(run.wrong_N, size),
            "saving": [1 - cost for cost in windows(run.cost_N, size)],
        },
    }


def _mean(cost_N: NDArray[np.float64], wrong_N: NDArray[np.bool_]) -> dict[str, Any]:
    errors, n = int(wrong_N.sum()), len(wrong_N)
    return {
        "requests": n,
        "disagreements": errors,
        "disagreement": errors / n if n else None,
        "saving": 1 - float(cost_N.mean()) if n else None,
    }


# -- false alarms ----------------------------------------------------------------------------------


def false_alarms(records: Records, cached: CachedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Sampled calm requests: what the caches said to recorded ones, drawn again and again. No model runs."""
    names = [planned.name for planned in cached.plan.caches]
    left_N, wrong_N = outcomes(records, tuple(planned.threshold for planned in cached.plan.caches))
    count, monitor = 0, Monitor(names, cached.certificate.tolerance, options.run_length, seed=options.seed)
    confidence_NK = np.column_stack([records.confidence_NK, np.ones(len(records))])
    told = dict[str, int]()
    for number in _drawn(len(records), options.calm_requests, options.seed):
        slot = int(left_N[number])
        cache = names[slot] if slot < len(names) else None
        heard = len(monitor.alarms)
        alarm = monitor.observe(cache, float(confidence_NK[number, slot]), agrees=not wrong_N[number])
        count += alarm is not None
        if len(monitor.alarms) > heard:  # the ones about hits and confidences are told, not acted on
            stream = monitor.alarms[-1].stream
            told[stream] = told.get(stream, 0) + 1
            monitor.alarms.clear()
    return {
        "sampled_requests": options.calm_requests,
        "drawn_from": len(records),
        "disagreement": float(wrong_N.mean()),
        "run_length": options.run_length,
        "alarms": count,
        "at_most_on_average": math.ceil(options.calm_requests / options.run_length),
        "told": told,
    }


def _drawn(among: int, draws: int, seed: int) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    for start in range(0, draws, 10_000):
        yield from rng.integers(among, size=min(10_000, draws - start)).tolist()


def quick(options: argparse.Namespace) -> None:
    options.method = "freeze"  # nothing to train
    options.parts, options.lengths = (1500, 1500, 1600), (400, 1200, 400)
    options.kinds = ["noise"] if options.kinds == list(KINDS) else options.kinds
    options.tolerance, options.fit_budget, options.calm_requests = 0.05, 150.0, 20_000
    options.speed_up, options.refresh_budget, options.shadow = 4.0, 300.0, 0.5
    options.policy = {"drift_rows": 100, "certify_rows": 200, "method": "freeze"}
