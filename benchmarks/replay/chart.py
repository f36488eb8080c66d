"""Line charts as SVG text: no script, no font, nothing loaded; readable on a light and on a dark page.

Each line carries its name at its right end instead of a legend.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

COLOURS = {"ours": "#0d9488", "limit": "#d97706", "other": "#8a94a6", "second": "#7c6fd0", "third": "#c2557a"}
LEFT, RIGHT, TOP, BOTTOM = 56, 118, 30, 34
LABEL_GAP = 13.0

Point = tuple[float, float]
Place = Callable[[Point], Point]


@dataclass(frozen=True)
class Line:
    """kind: its colour, one of COLOURS. steps: the value holds until the next point."""

    name: str
    points: Sequence[Point]
    kind: str = "ours"
    steps: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart. top: the highest y that is shown (default: what the lines need). marks: vertical lines with a word."""

    title: str
    lines: Sequence[Line]
    top: float | None = None
    marks: Sequence[tuple[float, str]] = ()
    unit: str = "%"


def svg(panels: Sequence[Panel], x_title: str, *, columns: int = 1, width: int = 860, height: int = 210) -> str:
    """All panels, row by row. Heights are per panel, widths of the whole; both in pixels."""
    rows = -(-len(panels) // columns)
    each = width / columns
    total = rows * height + 22
    body = [
        f"<g transform='translate({(at % columns) * each:.1f} {(at // columns) * height})'>"
        f"{_panel(panel, each, height)}</g>"
        for at, panel in enumerate(panels)
    ]
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {total}' width='{width}' height='{total}' "
        "role='img' font-family='system-ui, sans-serif' font-size='12'>"
        "<style>text{fill:#444b57}.t{font-weight:600}.g{stroke:#8a94a6;stroke-opacity:.25}"
        "@media(prefers-color-scheme:dark){text{fill:#c9d1dc}}</style>"
        + "".join(body)
        + f"<text x='{width / 2:.0f}' y='{total - 6}' text-anchor='middle'>{html.escape(x_title)}</text></svg>\n"
    )


def ticks(top: float, most: int = 5) -> list[float]:
    """Round numbers from 0 up to `top`."""
    rough = top / most
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
    return [k * step for k in range(math.floor(top / step + 1e-9) + 1)]


def _panel(panel: Panel, width: float, height: float) -> str:
    values = [y for line in panel.lines for _, y in line.points]
    top = panel.top if panel.top is not None else 1.08 * max([*values, 1e-9])
    end = max((x for line in panel.lines for x, _ in line.points), default=1.0)
    inner, tall = width - LEFT - RIGHT, height - TOP - BOTTOM

    def place(point: Point) -> Point:
        return LEFT + inner * point[0] / end, TOP + tall * (1 - min(max(point[1], 0.0), top) / top)

    parts = [f"<text class='t' x='{LEFT}' y='16'>{html.escape(panel.title)}</text>"]
    for tick in ticks(top):
        y = place((0, tick))[1]
        parts.append(f"<line class='g' x1='{LEFT}' x2='{LEFT + inner:.1f}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{tick:g} {panel.unit}</text>")
    parts += [
        f"<text x='{place((tick, 0))[0]:.1f}' y='{TOP + tall + 16}' text-anchor='middle'>{tick:,.0f}</text>"
        for tick in ticks(end)[1:]
    ]
    for x, word in panel.marks:
        at = place((x, 0))[0]
        parts.append(
            f"<line x1='{at:.1f}' x2='{at:.1f}' y1='{TOP}' y2='{TOP + tall}' stroke='{COLOURS['other']}' "
            f"stroke-dasharray='2 3'/><text x='{at + 3:.1f}' y='{TOP + 10}' font-size='10'>{html.escape(word)}</text>"
        )
    parts += [_line(line, place) for line in panel.lines if line.points]
    return "".join(parts + _names([line for line in panel.lines if line.points], place))


def _line(line: Line, place: Place) -> str:
    points = list(line.points)
    if line.steps:
        points = [points[0], *(p for a, b in itertools.pairwise(points) for p in ((b[0], a[1]), b))]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
    dashes = " stroke-dasharray='5 4'" if line.dashed else ""
    return f"<polyline points='{path}' fill='none' stroke='{COLOURS[line.kind]}' stroke-width='1.8'{dashes}/>"


def _names(lines: Sequence[Line], place: Place) -> list[str]:
    """The names at the right ends, moved apart where they would lie on each other."""
    texts, last = list[str](), -math.inf
    for (x, y), line in sorted(((place(line.points[-1]), line) for line in lines), key=lambda end: end[0][1]):
        last = max(y, last + LABEL_GAP)
        name = html.escape(line.name)
        texts.append(f"<text x='{x + 5:.1f}' y='{last + 4:.1f}' style='fill:{COLOURS[line.kind]}'>{name}</text>")
    return texts
