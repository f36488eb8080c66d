"""The figures of the page: plotly, with labels beside the marks instead of legends.

Colours of text and lines come from the page's style sheet (`style.css` overrides what plotly writes), so that one
figure works in light and in dark mode; only the data colours are set here, chosen to be readable on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from offramp.errors import MissingExtraError
from offramp.report.markup import escape
from offramp.report.wording import Document, count, level, percent, percent_up

CACHE = "#0d9488"
CACHE_SOFT = "rgba(13, 148, 136, 0.18)"
BACKBONE = "#8a94a6"
LIMIT = "#d97706"
LEAST_LABELLED = 0.005  # share of requests below which a cache has no label in the figure

Path = Sequence[Mapping[str, Any]]


def plotly() -> Any:
    """The plotly package, or the error that says how to install it."""
    try:
        import plotly.graph_objects
        import plotly.io
        import plotly.offline
        import plotly.subplots
    except ImportError as error:
        raise MissingExtraError(
            "the HTML report draws its figures with plotly, which is not installed; "
            "run: pip install 'offramp[report]'. The terminal report (`offramp report DIR`) needs nothing."
        ) from error
    return plotly


def new_figure(height: int) -> Any:
    """An empty figure in the style of the page; height: in pixels."""
    figure = plotly().graph_objects.Figure()
    _style(figure, height)
    return figure


def add_label(
    figure: Any,
    text: str,
    x: float,
    y: float,
    *,
    anchor: tuple[str, str] = ("left", "middle"),
    shift: float = 0.0,
    offset: tuple[float, float] = (8, 0),
) -> None:
    """Write a text (HTML) beside the point (x, y). anchor: the part of the text that is there; shift: upwards, in units
    of y; offset: in pixels, to the right where the text begins at the point, and upwards."""
    shift_x = offset[0] if anchor[0] == "left" else 0
    figure.add_annotation(
        x=x,
        y=y + shift,
        text=text,
        showarrow=False,
        xanchor=anchor[0],
        yanchor=anchor[1],
        xshift=shift_x,
        yshift=offset[1],
    )


def draw(figure: Any) -> str:
    """The figure as HTML for a page that has plotly."""
    options = {"displayModeBar": False, "responsive": True}
    fragment = plotly().io.to_html(figure, include_plotlyjs=False, full_html=False, config=options)
    return str(fragment)


def leaving_chart(document: Document) -> Any:
    """Share of requests still running, along the depth of the network; each drop is a cache that answers."""
    depth_of = {point["name"]: 100 * point["depth"] for point in document.get("points", ())}
    leaves = document["leaves"][:-1]
    depths = [depth_of.get(leaf["point"], 0.0) for leaf in leaves]
    left = [100 - 100 * gone for gone in accumulate(leaf["share"] for leaf in leaves)]
    before = [100.0, *left[:-1]]

    figure = new_figure(height=380)
    outline_x = [0.0, *(x for depth in depths for x in (depth, depth)), 100.0]
    outline_y = [100.0, *(y for pair in zip(before, left, strict=True) for y in pair), left[-1]]
    figure.add_scatter(
        x=outline_x,
        y=outline_y,
        mode="lines",
        fill="tozeroy",
        fillcolor=CACHE_SOFT,
        line={"width": 0},
        hoverinfo="skip",
    )
    for depth, top, bottom in zip(depths, before, left, strict=True):
        figure.add_scatter(
            x=[depth, depth], y=[top, bottom], mode="lines", line={"color": CACHE, "width": 5}, hoverinfo="skip"
        )
    figure.add_scatter(
        x=[100, 100], y=[left[-1], 0], mode="lines", line={"color": BACKBONE, "width": 5}, hoverinfo="skip"
    )
    middles = [(top + bottom) / 2 for top, bottom in zip(before, left, strict=True)]
    shown = [row for row in zip(leaves, depths, middles, strict=True) if row[0]["share"] >= LEAST_LABELLED]
    heights = _spread([middle for _leaf, _depth, middle in shown], 8)
    for (leaf, depth, middle), y in zip(shown, heights, strict=True):
        text = f"<b>{percent(leaf['share'])}</b> {escape(leaf['name'])}"
        add_label(figure, text, depth, middle, shift=(y - middle))
    last = document["leaves"][-1]
    add_label(figure, f"<b>{percent(last['share'])}</b> full model", 100, left[-1] / 2)
    figure.update_xaxes(title="depth in the network, % of the full model's FLOPs", range=[-1, 100.6], showgrid=False)
    figure.update_yaxes(title="requests still running, %", range=[0, 103], tickvals=[0, 25, 50, 75, 100])
    figure.update_layout(margin={"r": 150})
    return figure


def cost_chart(document: Document) -> Any:
    """Cost of each request in units of the full model, cheapest first: the area is the mean cost."""
    leaves = sorted(document["leaves"], key=lambda leaf: float(leaf["cost"]))
    figure = new_figure(height=380)
    start = 0.0
    for leaf in leaves:
        width, height = 100 * leaf["share"], 100 * leaf["cost"]
        colour = BACKBONE if leaf["name"] == "backbone" else CACHE
        name = "full model" if leaf["name"] == "backbone" else leaf["name"]
        figure.add_bar(
            x=[start],
            y=[height],
            width=[width],
            offset=0,
            marker={"color": colour, "line": {"width": 0}},
            opacity=0.75,
            hovertext=f"{escape(name)}: {percent(leaf['share'], 1)} of requests",
            hoverinfo="text",
        )
        if width >= 7:
            add_label(figure, f"<b>{percent(leaf['cost'])}</b>", start + width / 2, height, anchor=("center", "bottom"))
        start += width
    mean = sum(leaf["share"] * leaf["cost"] for leaf in leaves) / max(sum(leaf["share"] for leaf in leaves), 1e-9)
    _rule(figure, y=100, text="full model: 100 %", colour=BACKBONE)
    _rule(figure, y=100 * mean, text=f"mean: {percent(mean)}", colour=CACHE)
    top = max(100.0, *(100 * leaf["cost"] for leaf in leaves))
    figure.update_xaxes(title="requests, cheapest first, %", range=[0, 100], showgrid=False)
    figure.update_yaxes(title="FLOPs, % of the full model", range=[0, top * 1.1], tickvals=[0, 25, 50, 75, 100])
    figure.update_layout(margin={"r": 120}, bargap=0)
    return figure


def path_chart(document: Document) -> Any:
    """Saving against disagreement for the series of plans; a band reaches up to the bound of each tested plan."""
    path = document["path"]
    certificate = document["certificate"]
    tolerance = 100 * certificate["tolerance"]
    figure = new_figure(height=420)
    xs, ys = [100 * step["disagreement"] for step in path], [100 * (1 - step["cost"]) for step in path]
    figure.add_scatter(x=xs, y=ys, mode="lines", line={"color": BACKBONE, "width": 1.5}, hoverinfo="skip")
    tested = _tested(path)
    _bound_band(figure, tested)
    figure.add_scatter(
        x=xs,
        y=ys,
        mode="markers",
        marker={"size": 7, "color": [_path_colour(step, tested) for step in path]},
        hovertext=[_path_hover(step, tested) for step in path],
        hoverinfo="text",
    )
    width = _path_width(tested, tolerance)
    for step in path:
        if step.get("chosen"):
            _mark_chosen(figure, step, width)
    figure.add_vline(x=tolerance, line={"color": LIMIT, "width": 1.5, "dash": "dot"})
    add_label(figure, f"tolerance {level(certificate['tolerance'])}", tolerance, 0, anchor=("left", "bottom"))
    if document.get("oracle_cost") is not None:
        _rule(figure, y=100 * (1 - document["oracle_cost"]), text="the oracle", colour=BACKBONE)
    figure.update_xaxes(title="disagreement, %: on the tuning inputs (dots), certified bound (right edge of the band)")
    figure.update_xaxes(range=[-0.03 * tolerance, width], showgrid=False)
    figure.update_yaxes(title="estimated work saved, %", range=[-3, 103], tickvals=[0, 25, 50, 75, 100])
    figure.update_layout(margin={"r": 120})
    return figure


def reliability_chart(caches: Sequence[Mapping[str, Any]]) -> Any:
    """One small panel per cache: how often it agreed, against how confident it was."""
    columns = min(len(caches), 4)
    rows = -(-len(caches) // columns)
    titles = [f"<b>{escape(cache['name'])}</b>" for cache in caches]
    figure = plotly().subplots.make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=titles,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.16,
    )
    _style(figure, height=90 + 230 * rows)
    for index, cache in enumerate(caches):
        _reliability_panel(figure, cache, index // columns + 1, index % columns + 1)
    figure.update_xaxes(range=[0, 104], tickvals=[0, 50, 100], showgrid=False)
    figure.update_yaxes(range=[0, 106], tickvals=[0, 50, 100])
    for column in range(1, columns + 1):
        figure.update_xaxes(title="confidence, %", row=rows, col=column)
    figure.update_yaxes(title="agreement, %", col=1)
    figure.update_layout(margin={"t": 40})
    return figure


def _reliability_panel(figure: Any, cache: Mapping[str, Any], row: int, column: int) -> None:
    cell = {"row": row, "col": column}
    bins = [entry for entry in cache["reliability"] if entry["n"]]
    figure.add_scatter(
        x=[0, 100],
        y=[0, 100],
        mode="lines",
        line={"color": BACKBONE, "width": 1, "dash": "dot"},
        hoverinfo="skip",
        **cell,
    )
    figure.add_scatter(
        x=[100 * entry["confidence"] for entry in bins],
        y=[100 * entry["agreement"] for entry in bins],
        mode="lines+markers",
        line={"color": CACHE, "width": 1.5},
        marker={"color": CACHE, "size": 8},
        hovertext=[f"{count(entry['n'])} inputs, {percent(entry['agreement'], 1)} agree" for entry in bins],
        hoverinfo="text",
        **cell,
    )
    threshold = cache.get("threshold")
    if cache.get("enabled") and threshold is not None and threshold <= 1:
        figure.add_vline(x=100 * threshold, line={"color": LIMIT, "width": 1.5, "dash": "dot"}, **cell)


def _bound_band(figure: Any, tested: Path) -> None:
    """From the disagreement on the tuning inputs to the certified bound, over all plans that were tested."""
    heights = [100 * (1 - step["cost"]) for step in tested]
    xs = [100 * step["disagreement"] for step in tested] + [100 * step["bound"] for step in reversed(tested)]
    outline = {"color": CACHE, "width": 0}
    figure.add_scatter(
        x=xs,
        y=heights + heights[::-1],
        mode="lines",
        fill="toself",
        fillcolor=CACHE_SOFT,
        line=outline,
        hoverinfo="skip",
    )
    for step in tested:
        if step.get("chosen") or not step["passed"]:
            x, y = [100 * step["disagreement"], 100 * step["bound"]], [100 * (1 - step["cost"])] * 2
            colour = CACHE if step["passed"] else LIMIT
            figure.add_scatter(x=x, y=y, mode="lines", line={"color": colour, "width": 2}, hoverinfo="skip")


def _mark_chosen(figure: Any, step: Mapping[str, Any], width: float) -> None:
    x, y = 100 * step["disagreement"], 100 * (1 - step["cost"])
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        hoverinfo="skip",
        marker={"size": 17, "color": "rgba(0,0,0,0)", "line": {"color": CACHE, "width": 3}},
    )
    right = (
        x > width / 4
    )  # beside the point is the empty side of the rising curve: above on the left, below on the right
    figure.add_annotation(
        x=x,
        y=y,
        text="<b>the certified plan</b>",
        showarrow=False,
        xanchor="right" if right else "left",
        yanchor="bottom" if right else "top",
        yshift=12 if right else -12,
    )


def _tested(path: Path) -> list[Mapping[str, Any]]:
    """Testing goes from the safe end until the first failure; what lies beyond was not tested."""
    first_failure = next((index for index, step in enumerate(path) if not step["passed"]), len(path))
    return [step for step in path[: first_failure + 1] if step.get("bound") is not None]


def _path_colour(step: Mapping[str, Any], tested: Path) -> str:
    if step["passed"]:
        return CACHE
    return LIMIT if step in tested else BACKBONE


def _path_hover(step: Mapping[str, Any], tested: Path) -> str:
    text = f"saves {percent(1 - step['cost'], 1)}, differs {percent(step['disagreement'], 2)} on tune"
    if step not in tested:
        return f"{text}; not tested"
    verdict = "passed" if step["passed"] else "failed"
    return f"{text}; {step['certified_errors']} errors on certify, bound {percent_up(step['bound'])}: {verdict}"


def _path_width(tested: Path, tolerance: float) -> float:
    """Wide enough for the tested plans and the tolerance; far-off plans beyond are cut off."""
    return max(2.5 * tolerance, 1.1 * max((100 * step["bound"] for step in tested), default=0.0))


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Label heights at least `gap` apart, moved as little as a top-down pass can."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - gap) if placed else height)
    floor = gap / 2
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = max(placed[index], floor)
        floor = placed[index] + gap
    return placed


def _rule(figure: Any, *, y: float, text: str, colour: str) -> None:
    figure.add_hline(y=y, line={"color": colour, "width": 1.5, "dash": "dot"})
    figure.add_annotation(x=1, y=y, xref="paper", text=text, showarrow=False, xanchor="left", xshift=6)


def _style(figure: Any, height: int) -> None:
    figure.update_layout(
        height=height,
        showlegend=False,
        template="none",
        font={"family": "inherit", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 14, "b": 52},
        hoverlabel={"font": {"size": 13}},
        dragmode=False,
    )
    figure.update_xaxes(zeroline=False, showline=False, ticks="", automargin=True, fixedrange=True)
    figure.update_yaxes(zeroline=False, showline=False, ticks="", automargin=True, fixedrange=True)
