"""Tables of the rows of methods.py: who kept a promise, and who is ahead at the same measured disagreement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp.bench.measuring import promise_kept

OURS = "offramp"
ALL_OF_IT = (0.0, 1.0)  # disagreement and cost of the full model
HEAD = (
    "| who | rule | measured disagreement [95 % interval] | within tolerance | answered by caches | FLOPs "
    "| batch 1 time: mean, p50, p95 | batch 32: time, rows/s | accuracy | MiB | build s "
    "| ours at that disagreement: FLOPs, batch 1 mean |"
)
COLUMNS = HEAD.count("|") - 1

Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """A Markdown table for each tolerance and one for what has none; below them, what each of them promises."""
    parts = []
    for tolerance in sorted({row["tolerance"] for row in rows if row["tolerance"] is not None}):
        at = [row for row in rows if row["tolerance"] == tolerance]
        parts.append(f"Tolerance {100 * tolerance:g} %:\n\n{_table(at, rows)}")
    without = [row for row in rows if row["tolerance"] is None]
    if without:
        parts.append(f"Without a tolerance:\n\n{_table(without, rows)}")
    return "\n\n".join([*parts, _verdict(rows), _promises(rows)])


def _table(some: Sequence[Row], rows: Sequence[Row]) -> str:
    return "\n".join([HEAD, "|" + "---|" * COLUMNS, *(line(row, rows) for row in some)])


def line(row: Row, rows: Sequence[Row] = ()) -> str:
    """One line. Times and FLOPs are over the full model's; rows: those among which ours are, for the last column."""
    what = f"| {row['name']} | {row['rule'] or '-'} |"
    if "error" in row:
        message = row["error"].splitlines()[0].replace("|", "/")
        return f"{what} failed: {message} |" + " - |" * (COLUMNS - 3)
    low, high = row["interval"]
    kept = "-" if row["tolerance"] is None else promise_kept(row["interval"], row["tolerance"])
    at = {ratio["batch_size"]: ratio for ratio in row["latency"]}
    hits = row["details"].get("hit_rates")
    return (
        f"{what} {percent(row['disagreement'])} [{100 * low:.2f}, {100 * high:.2f}] | {kept} | "
        f"{'-' if hits is None else f'{100 * sum(hits.values()):.0f} %'} | {_ratio(row['flops_ratio'])} | "
        f"{at[1]['mean']:.2f}, {at[1]['p50']:.2f}, {at[1]['p95']:.2f} | "
        f"{at[32]['mean']:.2f}, {32000 / at[32]['cached_mean_ms']:.0f} | {percent(row['accuracy'])} | "
        f"{row['bytes'] / 2**20:.1f} | {row['build_s']:.0f} | {_ours_beside(row, rows)} |"
    )


def _ours_beside(row: Row, rows: Sequence[Row]) -> str:
    if row["name"] == OURS or not ours_among(rows):
        return "-"
    flops, time = (ours_at(row["disagreement"], rows, cost) for cost in (flops_ratio, batch_1_mean))
    return f"{flops:.2f}, {time:.2f}"


# -- who is ahead ----------------------------------------------------------------------------------


def flops_ratio(row: Row) -> float | None:
    value: float | None = row["flops_ratio"]
    return value


def batch_1_mean(row: Row) -> float:
    return float(next(ratio["mean"] for ratio in row["latency"] if ratio["batch_size"] == 1))


def ours_among(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["name"] == OURS and "error" not in row]


def ours_at(disagreement: float, rows: Sequence[Row], cost: Any) -> float:
    """The cost of ours at this measured disagreement: on the straight lines between our rows and the full model.

    Only rows that no other row of ours beats in both respects count. A mixture of two plans, drawn by chance for each
    request, lies on the line between them, so what is said here could be served; beyond our last row nothing is said to
    be cheaper than it.
    """
    points = sorted({ALL_OF_IT, *((row["disagreement"], float(cost(row))) for row in ours_among(rows))})
    front: list[tuple[float, float]] = []
    for point in points:
        if not front or point[1] < front[-1][1]:
            front.append(point)
    where, costs = zip(*front, strict=True)
    return float(np.interp(disagreement, where, costs))


def ahead(rows: Sequence[Row], cost: Any) -> list[tuple[Row, float]]:
    """The rows that are cheaper than ours at their own measured disagreement, by a hundredth at least, and our cost
    there. Rows without that cost, and those without any caches, are not compared."""
    found = []
    for row in rows:
        if row["name"] == OURS or "error" in row or row["details"].get("hit_rates") == {} or cost(row) is None:
            continue
        ours = ours_at(row["disagreement"], rows, cost)
        if round(cost(row), 2) < round(ours, 2):
            found.append((row, ours))
    return found


def _verdict(rows: Sequence[Row]) -> str:
    if not ours_among(rows):
        return "Ours has no row here."
    lines = ["Ahead of ours at the same measured disagreement:", ""]
    for what, cost in (("FLOPs", flops_ratio), ("batch 1 mean time", batch_1_mean)):
        lines += [f"- {_title(row)}: {what} {cost(row):.2f}, ours {ours:.2f}" for row, ours in ahead(rows, cost)]
    return "\n".join(lines) if len(lines) > 2 else "At the same measured disagreement nothing here is ahead of ours."


def _title(row: Row) -> str:
    parts = [row["name"], row["rule"], None if row["tolerance"] is None else f"{100 * row['tolerance']:g} %"]
    return ", ".join(part for part in parts if part)


def _promises(rows: Sequence[Row]) -> str:
    promises = {f"{row['name']}, {row['rule']}" if row["rule"] else row["name"]: row["guarantee"] for row in rows}
    return "\n".join(["What is promised:", "", *(f"- {who}: {promise}" for who, promise in promises.items())])


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
