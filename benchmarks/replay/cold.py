"""Cold start: the bare full model, live traffic, and nothing else. What is saved, and whether the promise holds."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import offramp
from offramp.calibration import interval
from replay import truth
from replay.chart import Line, Panel, svg
from replay.ledger import broken, ends, of_plans, since_swap, stretches, windows
from replay.service import TRACES, case, refresh_policy, replay, tell
from replay.traffic import arrivals_s, calm, schedule_s

EXAMPLES, POINTS = 4, 120
LEVEL = 0.95

ABOUT = {
    "all": "Requests are all 57,500 pictures of CIFAR-10 in one random order, each once. The full model was trained on "
    "50,000 of them and is surer there than on others, so more is saved than on fresh pictures: these are told apart.",
    "test": "Requests are the 7,500 pictures of CIFAR-10 that the full model was not trained on, in one random order, "
    "each once.",
}


def run(options: argparse.Namespace) -> dict[str, Any]:
    bench = case(options)
    stream = calm("cold start", bench.pictures.rows(slice(0, options.requests)))
    bare = offramp.uncached(
        bench.backbone, bench.inputs(stream.image_N[:EXAMPLES]), tolerance=options.tolerance, confidence_level=LEVEL
    )
    tell(f"the full model's answers to {len(stream)} requests")
    full_N = truth.answers(bare, stream, bench.inputs, options.workdir)
    at_s = schedule_s(arrivals_s(TRACES[options.trace]), len(stream), options.speed_up)
    tell(f"{len(stream)} requests in {at_s[-1]:.0f} s")
    policy = refresh_policy(options, **options.policy)
    size = options.reservoir_mb << 20
    with offramp.online(bare, shadow=options.shadow, seed=options.seed, reservoir_bytes=size, refresh=policy) as model:
        ledger = replay(model, stream.image_N, bench.inputs, at_s)
        model.settle()
        report = model.report()
    columns = ledger.columns()
    wrong_N = columns.answer_N != full_N
    rows = stretches(ledger, columns, wrong_N)
    plans = of_plans(rows)
    kinds = {"trained on": stream.known_N, "not trained on": ~stream.known_N}
    return {
        "part": "cold",
        "note": f"{ABOUT[options.population]} {_pace(options, at_s[-1])}",
        "tolerance": options.tolerance,
        "rows": rows,
        "plans": plans,
        "promise_broken": [row for row in [*plans, *rows] if broken(row)],
        "requests": len(stream),
        "disagreements": int(wrong_N.sum()),
        "saving": 1 - float(columns.cost_N.mean()),
        "last_tenth": last(columns.cost_N, wrong_N, np.ones(len(wrong_N), dtype=bool)),
        "by_picture": {name: last(columns.cost_N, wrong_N, kind_N) for name, kind_N in kinds.items()},
        "shadowed": report["shadowed"],
        "shadow": options.shadow,
        "latency_ms": report["latency_ms"],
        "late_s": {"p50": float(np.median(columns.late_s_N)), "worst": float(columns.late_s_N.max())},
        "series": series(columns.cost_N, wrong_N, columns.stretch_N, rows),
        "refresh": report["refresh"],
        "steps": report["steps"],
    }


def _pace(options: argparse.Namespace, seconds: float) -> str:
    return (
        f"Arrival times: trace {options.trace}, {options.speed_up:g} times as fast, {seconds / 60:.0f} minutes; one "
        f"caller, one picture a call, torch on {options.threads} thread."
    )


def last(cost_N: Any, wrong_N: Any, kind_N: Any) -> dict[str, Any]:
    """The requests of one kind in the last tenth of the run: what a user has in the end."""
    at = np.flatnonzero(kind_N[len(kind_N) * 9 // 10 :]) + len(kind_N) * 9 // 10
    if not len(at):
        return {"requests": 0}
    errors = int(wrong_N[at].sum())
    return {
        "requests": len(at),
        "disagreement": errors / len(at),
        "interval": interval(errors, len(at), LEVEL),
        "saving": 1 - float(cost_N[at].mean()),
    }


def series(cost_N: Any, wrong_N: Any, stretch_N: Any, rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What the picture shows, after every so many requests."""
    size = max(1, len(cost_N) // POINTS)
    at = ends(len(cost_N), size)
    seen = np.cumsum(wrong_N)
    return {
        "requests": [float(n) for n in at],
        "saving": [1 - cost for cost in windows(cost_N, size)],
        "saving_so_far": [1 - float(cost_N[:n].mean()) for n in at],
        "disagreement_so_far": [float(seen[n - 1]) / n for n in at],
        "disagreement_since_swap": since_swap(stretch_N, wrong_N, at),
        "certified_bound": [rows[stretch_N[n - 1]]["certified_bound"] for n in at],
    }


# -- what is shown ---------------------------------------------------------------------------------


def table(document: dict[str, Any]) -> str:
    lines = [
        "| plan | from request on | caches | certified | answered | differ [p of so many, were it the tolerance] "
        "| saved |",
        "|---" * 7 + "|",
    ]
    for row in document["plans"]:
        bound = f"{100 * row['certified_bound']:.2f} % on {row['certified_on']:,}" if row["caches"] else "no caches"
        lines.append(
            f"| {row['plan']} | {row['first_request']:,} | {row['caches']} | {bound} | {row['requests']:,} "
            f"| {row['disagreements']:,} ({100 * row['disagreement']:.2f} %) [{row['p_value']:.2f}] "
            f"| {100 * row['saving']:.1f} % |"
        )
    return "\n".join([*lines, "", sentence(document)])


def sentence(document: dict[str, Any]) -> str:
    broken_rows = document["promise_broken"]
    held = (
        "No plan and no stretch of requests is above the tolerance by the exact test at 5 %, and at no request does "
        "the 95 % confidence sequence of a stretch exclude it"
        if not broken_rows
        else f"The promise did not hold in {len(broken_rows)} of the stretches"
    )
    kinds = "; ".join(
        f"pictures that the full model was {name}: {100 * kind['saving']:.1f} % saved, "
        f"{100 * kind['disagreement']:.2f} % differ of {kind['requests']:,}"
        for name, kind in document["by_picture"].items()
        if kind["requests"]
    )
    return (
        f"{held}. Tolerance {100 * document['tolerance']:g} %; of {document['requests']:,} requests "
        f"{document['disagreements']:,} differ. In the last tenth of the run, {kinds}. Shadows ran "
        f"{document['shadowed']:,} requests to the end, which is not taken off the saving; learning is not either."
    )


def picture(document: dict[str, Any]) -> str:
    drawn = document["series"]

    def line(name: str, key: str, kind: str, *, steps: bool = False) -> Line:
        values = [100 * value for value in drawn[key]]
        return Line(name, list(zip(drawn["requests"], values, strict=True)), kind, steps=steps)

    tolerance = 100 * document["tolerance"]
    limit = Line("tolerance", [(0.0, tolerance), (drawn["requests"][-1], tolerance)], "limit", dashed=True)
    swaps = [(float(row["first_request"]), f"plan {row['plan']}") for row in document["plans"][1:]]
    saving = Panel(
        "FLOPs saved",
        [line("so far", "saving_so_far", "other"), line("now", "saving", "ours")],
        top=100.0,
        marks=swaps,
    )
    differ = Panel(
        "answers that differ from the full model's",
        [
            limit,
            line("certified bound", "certified_bound", "second", steps=True),
            line("since the swap", "disagreement_since_swap", "ours"),
            line("so far", "disagreement_so_far", "other"),
        ],
        top=2 * tolerance,
        marks=swaps,
    )
    return svg([saving, differ], "requests")


def quick(options: argparse.Namespace) -> None:
    options.requests, options.speed_up, options.tolerance = 3000, 2.5, 0.05
    options.refresh_budget = 300.0
    options.policy = {"train_rows": 200, "certify_rows": 200, "method": "freeze"}
