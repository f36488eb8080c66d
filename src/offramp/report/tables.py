"""The report in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from offramp.report import wording
from offramp.report.wording import Document, count, milliseconds, percent

BAR_WIDTH = 24


def terminal(document: Document) -> RenderableType:
    """The report as something rich can print: the promise, where requests leave, what it costs."""
    parts: list[RenderableType] = [_summary(document)]
    if wording.has_caches(document) and document.get("leaves"):
        parts.append(_leaves(document))
    if measured := document.get("cost", {}).get("measured"):
        parts.append(_latency(measured))
    if evaluation := document.get("evaluation"):
        parts.append(evaluation_table(evaluation))
    if optimized := document.get("optimized"):
        parts.append(optimized_table(optimized))
    if advice := wording.advice(document):
        parts.append(Text(advice, style="yellow"))
    return Group(*parts)


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """How the cached model did on fresh inputs, beside the full model."""
    table = _table(f"On {count(evaluation['n'])} fresh inputs", "", "cached", "full model")
    low, high = evaluation["interval"]
    table.add_row("answers that differ", f"{percent(evaluation['disagreement'])}", "")
    table.add_row("  exact interval", f"{percent(low)} to {percent(high)}", "")
    if evaluation.get("accuracy") is not None and evaluation.get("backbone_accuracy") is not None:
        table.add_row("accuracy", percent(evaluation["accuracy"], 1), percent(evaluation["backbone_accuracy"], 1))
    table.add_row("FLOPs, caches included", percent(evaluation["flops_ratio"], 1), percent(1.0))
    table.add_row("  limit (oracle)", percent(evaluation["oracle_flops_ratio"], 1), "")
    for entry in evaluation.get("latency", ()):
        name = f"mean time, batch {entry['batch_size']}"
        table.add_row(name, milliseconds(entry["cached_mean_ms"]), milliseconds(entry["full_mean_ms"]))
    return table


def optimized_table(optimized: Mapping[str, Any]) -> RenderableType:
    """Which back end each part of an optimized model runs on, what was left out, and how fast it is as a whole."""
    parts = _table("Parts", "part", "rows", "back end", "time", "eager", "difference")
    for part in optimized["parts"]:
        times = milliseconds(part["ms"]), milliseconds(part["eager_ms"])
        where = f"{part['backend']} {part['precision']}"
        parts.add_row(Text(part["part"]), str(part["rows"]), where, *times, f"{part['difference']:.0e}")
    shown: list[RenderableType] = [parts]
    shown += [Text(f"left out: {why}", style="yellow") for why in optimized["left_out"]]
    if optimized["latency"]:
        shown.append(_latency(optimized["latency"], "Measured time of one call, both on their back ends"))
    if not wording.has_caches(optimized):
        shown.append(Text(f"No caches: {wording.reason(optimized)}", style="yellow"))
    shown.append(Text(wording.promise(optimized), style="green"))
    return Group(*shown)


def profile_table(profile: Mapping[str, Any]) -> RenderableType:
    """Where the time of a call goes, per batch size, as `Profile.to_json` says it; without parts that never ran."""
    legend = Text("calls: the share that reaches the part; rows: the mean number that it then works on", style="dim")
    return Group(*(_call(size) for size in profile["sizes"]), legend)


def _call(size: Mapping[str, Any]) -> RenderableType:
    title = f"Batch {size['batch_size']}: {milliseconds(size['ms'])} a call"
    table = _table(title, "part", "time", "", "per call", "calls", "rows")
    for part in (part for part in size["parts"] if part["runs"]):
        share, rows = float(part["share"]), f"{part['rows'] / part['runs']:.3g}"
        bar = Text("█" * round(share * BAR_WIDTH / 2) or "▏", style="green" if part["kind"] == "cache" else "dim")
        reached = percent(part["calls"] / size["calls"], 0)
        table.add_row(Text(part["name"]), percent(share, 1), bar, milliseconds(part["ms"]), reached, rows)
    total = sum(size["exits"].values())
    left = ", ".join(f"{name} {percent(rows / total, 1)}" for name, rows in size["exits"].items())
    bypass = "The full model alone runs. " if size["bypassed"] else ""
    beside = f"Unwatched {milliseconds(size['plain_ms'])}, full model {milliseconds(size['full_ms'])}"
    return Group(table, Text(f"{bypass}{beside}. {count(size['calls'])} calls; rows left at {left}\n"))


def _summary(document: Document) -> Panel:
    text = Text()
    if not wording.has_caches(document):
        text.append("No caches", style="bold yellow")
        text.append(f": {wording.reason(document)}\nEvery request runs the full model; nothing changes.")
    else:
        text.append(wording.headline(document), style="bold green")
        text.append(f"\n{wording.promise(document)}")
    name = document.get("backbone", {}).get("name", "backbone")
    return Panel(text, title=Text(f"offramp: {name}"), title_align="left", border_style="dim")


def _leaves(document: Document) -> Table:
    table = _table("Where requests leave", "at", "split point", "requests", "", "FLOPs each")
    for leaf in document["leaves"]:
        share = float(leaf["share"])
        bar = Text("█" * round(share * BAR_WIDTH) or "▏", style="green" if leaf["name"] != "backbone" else "dim")
        table.add_row(
            Text(leaf["name"]), Text(str(leaf["point"] or "end")), percent(share, 1), bar, percent(leaf["cost"], 1)
        )
    return table


def _latency(measured: list[Mapping[str, Any]], title: str = "Measured time of one call") -> Table:
    table = _table(title, "batch", "full model", "cached", "cached / full")
    for row in measured:
        ratio = row["cached_ms"] / row["full_ms"]
        table.add_row(
            str(row["batch_size"]), milliseconds(row["full_ms"]), milliseconds(row["cached_ms"]), f"{ratio:.2f}"
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, header_style="dim", no_wrap=True)
    return table
