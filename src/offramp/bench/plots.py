"""The results of a benchmark as one HTML page that needs nothing else, in the style of the report (`offramp.report`).

Marks are means over seeds. Colour tells caches from the limit, the shape of a mark its rule: full where thresholds are
certified, open where they are published.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.bench import table
from offramp.bench.results import DONE, FAILED, Line
from offramp.report import charts, markup

ROW, LABEL, LETTER = 24, 17, 8  # pixels: height per row of a chart and per label in one, width of a letter
PLOT_WIDTH = 800  # pixels, about
OUTLINE = {"width": 2, "color": charts.CACHE}
DEAREST = -0.25  # a saving that is coloured as the worst
MOST_WRITTEN = 20  # classes up to which the savings are written into the chart


@dataclass(frozen=True)
class Mark:
    """A method under a rule at a tolerance: means over seeds, shares throughout. p50, mean, p95: time of a call at
    `batch_size` over the full model's; classes: class -> inputs, FLOPs saved on them."""

    method: str
    rule: str
    tolerance: float
    disagreement: float
    saved: float
    oracle: float
    batch_size: int
    p50: float
    mean: float
    p95: float
    classes: Mapping[int, tuple[int, float]]

    @property
    def label(self) -> str:
        return markup.escape(f"{self.method}, {self.rule}")

    @property
    def row(self) -> str:
        return markup.escape(f"{self.method}, {self.rule}, {table.level(self.tolerance)}")

    @property
    def symbol(self) -> str:
        return "circle" if self.rule == "certificate" else "circle-open"


def html(lines: Sequence[Line]) -> str:
    """The whole page. Raises MissingExtraError when plotly is not installed."""
    plotly = charts.plotly()
    models = list(dict.fromkeys(line["model"] for line in lines))
    body = "".join(_model(model, [line for line in lines if line["model"] == model]) for model in models)
    return markup.frame(
        "offramp: benchmark",
        f"{_header(lines, models)}{body}{_numbers(lines)}",
        script=plotly.offline.get_plotlyjs(),
        version=lines[0].get("offramp", "") if lines else "",
    )


def marks_of(lines: Sequence[Line]) -> list[Mark]:
    """One mark per method, rule and tolerance that was measured, in the order of the lines."""
    found: dict[tuple[str, str, float], list[Line]] = {}
    for line in lines:
        if line["status"] == DONE and line["rule"] is not None:
            found.setdefault((line["method"], line["rule"], line["tolerance"]), []).append(line)
    return [_mark(key, group) for key, group in found.items()]


def _mark(key: tuple[str, str, float], group: Sequence[Line]) -> Mark:
    latency = [min(line["evaluation"]["latency"], key=lambda ratio: int(ratio["batch_size"])) for line in group]
    by_class: dict[int, list[Mapping[str, Any]]] = {}
    for line in group:
        for entry in line["classes"]:
            by_class.setdefault(entry["class"], []).append(entry)
    return Mark(
        *key,
        disagreement=_mean(line["evaluation"]["disagreement"] for line in group),
        saved=_mean(line["flops_saved"] for line in group),
        oracle=_mean(line["oracle_flops_saved"] for line in group),
        batch_size=latency[0]["batch_size"],
        p50=_mean(ratio["p50"] for ratio in latency),
        mean=_mean(ratio["mean"] for ratio in latency),
        p95=_mean(ratio["p95"] for ratio in latency),
        classes={
            number: (entries[0]["n"], _mean(entry["flops_saved"] for entry in entries))
            for number, entries in by_class.items()
        },
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


# -- the page --------------------------------------------------------------------------------------


def _header(lines: Sequence[Line], models: Sequence[str]) -> str:
    methods = {line["method"] for line in lines if line["rule"] is not None}
    failed = sum(line["status"] == FAILED for line in lines)
    words = f"{len(methods)} method{'s' * (len(methods) != 1)} on {len(models)} model{'s' * (len(models) != 1)}"
    advice = f"<p class='advice'>{failed} of {len(lines)} cells failed; the table says why.</p>" if failed else ""
    return (
        "<header><div class='brand'><b>offramp</b> benchmark</div>"
        f"<h1>{markup.escape(words)}</h1><p class='lead'>All caches of a model were learned from one recording, and "
        "evaluated on inputs that nothing was learned, tuned or certified on. Marks are means over seeds: full ones "
        f"with certified thresholds, open ones with the method's published rule.</p>{advice}</header>\n"
    )


def _model(model: str, lines: Sequence[Line]) -> str:
    marks = marks_of(lines)
    if not marks:
        return ""
    parts = []
    for tolerance in dict.fromkeys(mark.tolerance for mark in marks):
        chart = saving_chart([mark for mark in marks if mark.tolerance == tolerance], tolerance)
        parts.append(f"<h3>Tolerance {table.level(tolerance)}</h3>{charts.draw(chart)}")
    note = (
        "FLOPs saved, caches included, against the share of answers that differ. A dash above a mark is its oracle: "
        "each request leaves at the first of its caches that agrees. Left of the dotted line is within the tolerance."
    )
    saving = markup.section(f"{model}: saving and disagreement", note, "".join(parts))
    note = "Median to 95th percentile of the time of a call, over the full model's; the dot is the mean."
    time = markup.section(f"{model}: time of a call", note, charts.draw(latency_chart(marks)))
    note = "FLOPs saved on the inputs of each class, by the full model's answer."
    return saving + time + markup.section(f"{model}: saving per class", note, charts.draw(class_chart(marks)))


def _numbers(lines: Sequence[Line]) -> str:
    head, rows = table.rows(lines)
    body = markup.table(head, [[markup.escape(cell) for cell in row] for row in rows])
    return markup.section("In numbers", "Time: cached over full model. Kept: by the whole interval, else open.", body)


# -- the charts ------------------------------------------------------------------------------------


def saving_chart(marks: Sequence[Mark], tolerance: float) -> Any:
    """Saving against disagreement: a mark per method and rule, above it its oracle."""
    height = 300 + LABEL * len(marks)
    low, high = min(0.0, *(100 * mark.saved for mark in marks)) - 4, 104.0
    figure = charts.new_figure(height)
    for mark in marks:
        x, y, top = 100 * mark.disagreement, 100 * mark.saved, 100 * mark.oracle
        figure.add_scatter(
            x=[x, x], y=[y, top], mode="lines", line={"color": charts.BACKBONE, "width": 1}, hoverinfo="skip"
        )
        figure.add_scatter(
            x=[x],
            y=[top],
            mode="markers",
            marker={"symbol": "line-ew-open", "size": 13, "color": charts.BACKBONE},
            hovertext=f"{mark.label}: the oracle saves {table.percent(mark.oracle)}",
            hoverinfo="text",
        )
        figure.add_scatter(
            x=[x],
            y=[y],
            mode="markers",
            marker={"symbol": mark.symbol, "size": 11, "color": charts.CACHE, "line": OUTLINE},
            hovertext=f"{mark.label}: saves {table.percent(mark.saved)}, differs {table.percent(mark.disagreement, 2)}",
            hoverinfo="text",
        )
    width = 1.15 * max(100 * tolerance, *(100 * mark.disagreement for mark in marks))
    unit = (high - low) / (height - 66)  # percent per pixel: 66 pixels are the margins above and below
    for mark, y in _label_places(marks, width / PLOT_WIDTH, unit):
        place = 100 * mark.disagreement, 100 * mark.saved
        charts.add_label(figure, markup.escape(mark.method), *place, shift=y - place[1], offset=(10, 0))
    figure.add_vline(x=100 * tolerance, line={"color": charts.LIMIT, "width": 1.5, "dash": "dot"})
    charts.add_label(figure, f"tolerance {table.level(tolerance)}", 100 * tolerance, high, anchor=("left", "top"))
    figure.update_xaxes(title="answers that differ from the full model's, %", range=[-0.03 * width, width])
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(title="FLOPs saved, %", range=[low, high], tickvals=[0, 25, 50, 75, 100])
    figure.update_layout(margin={"r": 160})
    return figure


def _label_places(marks: Sequence[Mark], unit_x: float, unit_y: float) -> Iterator[tuple[Mark, float]]:
    """Each mark and the height of its label: beside the mark, or as far below as other labels need it to be. Units are
    those of one pixel."""
    taken: list[tuple[float, float, float]] = []  # left and right edge, height
    for mark in sorted(marks, key=lambda mark: -mark.saved):
        left, y = 100 * mark.disagreement, 100 * mark.saved
        right = left + unit_x * LETTER * len(mark.method)
        for other_left, other_right, other_y in sorted(taken, key=lambda place: -place[2]):
            if left < other_right and other_left < right and abs(y - other_y) < LABEL * unit_y:
                y = other_y - LABEL * unit_y
        taken.append((left, right, y))
        yield mark, y


def latency_chart(marks: Sequence[Mark]) -> Any:
    """A bar from the median to the 95th percentile of the time ratio per mark, with its mean."""
    figure = charts.new_figure(110 + ROW * len(marks))
    for mark in marks:
        figure.add_scatter(
            x=[mark.p50, mark.p95],
            y=[mark.row] * 2,
            mode="lines",
            line={"color": charts.CACHE_SOFT, "width": 9},
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=[mark.mean],
            y=[mark.row],
            mode="markers",
            marker={"symbol": mark.symbol, "size": 9, "color": charts.CACHE, "line": OUTLINE},
            hovertext=f"mean {mark.mean:.2f}, median {mark.p50:.2f}, 95th percentile {mark.p95:.2f}",
            hoverinfo="text",
        )
    figure.add_vline(x=1, line={"color": charts.BACKBONE, "width": 1.5, "dash": "dot"})
    figure.update_xaxes(title=f"time of a call of batch {marks[0].batch_size}, full model = 1", showgrid=False)
    figure.update_xaxes(range=[0, 1.05 * max(1.0, *(mark.p95 for mark in marks), *(mark.mean for mark in marks))])
    figure.update_yaxes(range=[len(marks) - 0.5, -0.5], showgrid=False)
    return figure


def class_chart(marks: Sequence[Mark]) -> Any:
    """Marks by classes, coloured by the saving; where caches cost more than they save, the colour is the limit's."""
    numbers = sorted({number for mark in marks for number in mark.classes})
    saved = [[mark.classes[number][1] if number in mark.classes else None for number in numbers] for mark in marks]
    zero = -DEAREST / (1 - DEAREST)
    figure = charts.new_figure(110 + ROW * len(marks))
    figure.add_heatmap(
        x=[str(number) for number in numbers],
        y=[mark.row for mark in marks],
        z=saved,
        zmin=DEAREST,
        zmax=1,
        colorscale=[[0, charts.LIMIT], [zero, "rgba(13, 148, 136, 0)"], [1, charts.CACHE]],
        showscale=False,
        hovertext=[[_class_hover(mark, number) for number in numbers] for mark in marks],
        hoverinfo="text",
        xgap=1,
        ygap=2,
    )
    if len(numbers) <= MOST_WRITTEN:
        figure.data[0].text = [["" if share is None else f"{100 * share:.0f}" for share in row] for row in saved]
        figure.data[0].texttemplate = "%{text}"
    figure.update_xaxes(title="class, by the full model's answer; FLOPs saved, %", type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return figure


def _class_hover(mark: Mark, number: int) -> str:
    n, saved = mark.classes.get(number, (0, 0.0))
    return f"{mark.row}<br>class {number}: {n} inputs, saves {table.percent(saved)}"
