"""The figures of a report in words: one place, so that terminal and page say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]
"""What `CachedModel.report()` returns. Sections that are missing are left out of the rendering."""

NO_BREAK_SPACE = "\u00a0"

CERTIFICATE_SAYS = (
    "How often answers differ from the full model's, on average over traffic like the certification inputs.",
    "It holds at the stated confidence level over the draw of those inputs, and covers the search for the plan.",
    "A request that no cache answers gets the full model's own answer.",
)
CERTIFICATE_DOES_NOT_SAY = (
    "That the full model is right: agreement is measured, accuracy is not.",
    "Anything about one request, one class or one group of users: the bound is an average.",
    "Anything about traffic that has drifted away from the certification inputs.",
)


def percent(share: float, digits: int | None = None) -> str:
    """A share in percent: whole numbers from 10 % up, one digit below, two below 1 %."""
    value = 100 * share
    if digits is None:
        digits = 0 if abs(value) >= 10 or value == 0 else 1 if abs(value) >= 1 else 2
    return f"{value:.{digits}f}{NO_BREAK_SPACE}%"


def percent_up(share: float) -> str:
    """An upper bound in percent, rounded up to two digits: a bound must never look smaller than it is."""
    hundredths = math.ceil(round(share * 10_000, 6))
    return f"{hundredths / 100:g}{NO_BREAK_SPACE}%"


def level(share: float) -> str:
    """A level that the user set, as it was set: 0.95 -> 95 %, 0.999 -> 99.9 %."""
    return f"{round(100 * share, 6):g}{NO_BREAK_SPACE}%"


def count(number: float) -> str:
    """A number with thousands separators."""
    return f"{number:,.0f}"


def quantity(number: float, unit: str = "") -> str:
    """A large number with an SI prefix: 1.1 G, 340 k."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{NO_BREAK_SPACE}{prefix}{unit}"
    return f"{number:.3g}{NO_BREAK_SPACE}{unit}" if unit else f"{number:.3g}"


def milliseconds(value: float) -> str:
    return f"{value:.3g}{NO_BREAK_SPACE}ms"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}{NO_BREAK_SPACE}s"
    return f"{int(seconds // 60)}{NO_BREAK_SPACE}min {seconds % 60:.0f}{NO_BREAK_SPACE}s"


def has_caches(document: Document) -> bool:
    return bool(document["plan"]["caches"])


def saving(document: Document) -> float:
    """Share of the work that the plan saves: FLOPs on the certification inputs, else the plan's estimate."""
    cost = document.get("cost", {}).get("flops_share")
    return 1 - float(document["plan"]["estimated_cost"] if cost is None else cost)


def answered_by_caches(document: Document) -> float:
    """Share of requests that some cache answers."""
    return sum(float(leaf["share"]) for leaf in document.get("leaves", ())[:-1])


def headline(document: Document) -> str:
    if not has_caches(document):
        return "No caches: every request runs the full model."
    caches = len(document["plan"]["caches"])
    return f"Saves {percent(saving(document))} of the FLOPs with {caches} cache{'s' if caches > 1 else ''}."


def promise(document: Document) -> str:
    """The certificate in one sentence."""
    certificate = document["certificate"]
    if not has_caches(document) and not certificate["bound"]:  # with one, the full model runs in lower precision
        return "All answers are the full model's own."
    kept = certificate["bound"] <= certificate["tolerance"]
    return (
        f"{'With' if kept else 'Not within the tolerance: with'} {level(certificate['confidence_level'])} confidence, "
        f"at most {percent_up(certificate['bound'])} of the answers differ from the full model's on traffic like the "
        f"certification inputs ({count(certificate['errors'])} of {count(certificate['n'])} differed; "
        f"tolerance {level(certificate['tolerance'])})."
    )


def reason(document: Document) -> str:
    """Why there are no caches."""
    return str(document["plan"].get("reason") or "No plan with caches passed.")


def advice(document: Document) -> str:
    return str(document.get("advice") or document["certificate"].get("advice") or "")
