"""The results of a benchmark as a table: one row per line, the same cells in Markdown and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from offramp.bench.results import DONE, Line

NOTHING = "-"


def markdown(lines: Sequence[Line]) -> str:
    """A Markdown table of these lines, ending with a newline."""
    head, body = rows(lines)
    written = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in written)


def rows(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Titles, and the cells of one row per line. A failed line says why in its last cell."""
    sizes = sorted({ratio["batch_size"] for line in lines if line["status"] == DONE for ratio in _latency(line)})
    first = [f"time, batch {size}: mean, p50, p95" for size in sizes[:1]]
    later = [f"time, batch {size}" for size in sizes[1:]]
    speed = [f"rows/s, batch {size}: cached / full" for size in sizes[-1:]]
    head = [
        "model", "method", "rule", "seed", "tolerance", "bound (errors / n)", "disagreement [interval]", "kept",
        "leave early", "FLOPs saved", "oracle", *first, *later, *speed, "accuracy cached / full", "KiB", "fit s",
        "failed",
    ]  # fmt: skip
    return head, [_row(line, sizes, len(head)) for line in lines]


def sentence(line: Line) -> str:
    """The line in a few words, for progress."""
    result = line["evaluation"]
    return (
        f"{name(line)}: saves {percent(line['flops_saved'])} of the FLOPs (oracle "
        f"{percent(line['oracle_flops_saved'])}), differs {percent(result['disagreement'], 2)}"
    )


def name(line: Line) -> str:
    """Method, rule and tolerance."""
    parts = [line["method"], line["rule"], None if line["tolerance"] is None else level(line["tolerance"])]
    return ", ".join(part for part in parts if part)


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def level(share: float) -> str:
    """A level as the suite sets it: 0.005 -> 0.5 %."""
    return f"{round(100 * share, 6):g} %"


def _row(line: Line, sizes: Sequence[int], length: int) -> list[str]:
    tolerance, seed = line["tolerance"], line["seed"]
    cells = [
        line["model"],
        line["method"],
        line["rule"] or NOTHING,
        NOTHING if seed is None else str(seed),
        NOTHING if tolerance is None else level(tolerance),
    ]
    if line["status"] == DONE:
        return [*cells, *_measured(line, sizes), ""]
    reason = f"{line['error']['type']}: {' '.join(line['error']['message'].split())}"
    return [*cells, *[NOTHING] * (length - len(cells) - 1), reason]


def _measured(line: Line, sizes: Sequence[int]) -> list[str]:
    result, certificate = line["evaluation"], line["certificate"]
    low, high = result["interval"]
    at = {ratio["batch_size"]: ratio for ratio in _latency(line)}
    rate = {entry["batch_size"]: entry for entry in line["throughput"]}
    first = [f"{at[size]['mean']:.2f}, {at[size]['p50']:.2f}, {at[size]['p95']:.2f}" for size in sizes[:1]]
    speed = [f"{rate[size]['cached_rows_per_s']:,.0f} / {rate[size]['full_rows_per_s']:,.0f}" for size in sizes[-1:]]
    accuracy = [result["accuracy"], result["backbone_accuracy"]]
    return [
        f"{percent(certificate['bound'], 2)} ({certificate['errors']} / {certificate['n']})",
        f"{percent(result['disagreement'], 2)} [{100 * low:.2f}, {100 * high:.2f}]",
        line["within_tolerance"],
        percent(sum(result["hit_rates"].values())),
        percent(line["flops_saved"]),
        percent(line["oracle_flops_saved"]),
        *first,
        *(f"{at[size]['mean']:.2f}" for size in sizes[1:]),
        *speed,
        " / ".join(NOTHING if share is None else percent(share, 2) for share in accuracy),
        f"{line['cache_bytes'] / 1024:.0f}",
        f"{line['fit_s']:.0f}",
    ]


def _latency(line: Line) -> list[Mapping[str, Any]]:
    latency: list[Mapping[str, Any]] = line["evaluation"]["latency"]
    return latency
