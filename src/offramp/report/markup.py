"""HTML that the report and the benchmark's page are built from: the page itself, sections, tables, lists.

Titles, notes and names are texts and are escaped here; a `body` and the cells of a table are HTML already.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources


def frame(title: str, body: str, *, script: str, version: object) -> str:
    """A whole page that loads nothing. script: JavaScript for the body; version: of the offramp that wrote it."""
    style = resources.files("offramp.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        "<link rel='icon' href='data:,'>\n"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n"
        f"<script>{script}</script>\n</head>\n<body>\n<main>\n{body}"
        f"<footer>Written by offramp {escape(version)}. This page loads nothing from the network.</footer>"
        "</main>\n</body>\n</html>\n"
    )


def section(title: str, note: str, body: str) -> str:
    paragraph = f"<p class='note'>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{body}</section>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], off: Sequence[bool] = ()) -> str:
    """Cells are HTML already; a head that ends with `>` makes a column of numbers. off: which rows are greyed out."""
    classes = [" class='number'" if title.endswith(">") else "" for title in head]
    top = "".join(f"<th{kind}>{escape(title.rstrip('>'))}</th>" for kind, title in zip(classes, head, strict=True))
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(classes, row, strict=True))
        quiet = " class='off'" if index < len(off) and off[index] else ""
        lines.append(f"<tr{quiet}>{cells}</tr>")
    return f"<div class='scroll'><table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def fact_list(facts: Iterable[tuple[str, object]]) -> str:
    """Names and what they are."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts) + "</dl>"


def bar(share: float, width: int, *, quiet: bool) -> str:
    """width: of the whole, in pixels."""
    return f"<span class='bar{' quiet' if quiet else ''}' style='width:{max(0.0, share) * width:.0f}px'></span>"


def code(text: object) -> str:
    return f"<code>{escape(text)}</code>"


def escape(text: object) -> str:
    return html.escape(str(text))
