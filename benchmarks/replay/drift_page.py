"""How the results of drift.py are shown: a table, and one chart per scenario."""

from __future__ import annotations

from typing import Any

from replay.chart import Line, Panel, svg

KINDS = {"offramp": "ours", "offramp, no refits": "second", "without the loop": "other", "Apparate's rule": "third"}


HEADS = (
    *("scenario", "way", "alarm after requests (sampled)", "differ until then", "new plan after"),
    *("differ: calm", "changed", "with the new plan", "back", "saved: calm", "changed", "with the new plan", "back"),
)
PARTS = ("calm", "changed", "with_new_plan", "back")


def table(document: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    for row in document["rows"]:
        for way in row["ways"]:
            cells = [row["scenario"], way["way"], _alarm(way, row), _until(way), _renewed(way)]
            cells += [_percent(way.get(part), "disagreement", 2) for part in PARTS]
            cells += [_percent(way.get(part), "saving", 1) for part in PARTS]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", sentence(document)])


def _alarm(way: dict[str, Any], row: dict[str, Any]) -> str:
    if "alarm_request" not in way:  # another rule's: when it first did something after the change
        calm = row["schedule"]["calm"]
        first = next((at for at in way["acted_at"] if at > calm), None)
        return "-" if first is None else f"{first - calm:,}"
    if way["alarm_request"] is None:
        return "none"
    sampled = "" if way["delay_sampled"] is None else f" ({way['delay_sampled']:,})"
    return f"{way['delay_requests']:,}{sampled}"


def _until(way: dict[str, Any]) -> str:
    return f"{way['disagreements_until_alarm']:,}" if way.get("alarm_request") is not None else "-"


def _renewed(way: dict[str, Any]) -> str:
    if way.get("new_plan_request") is None:
        return "-"
    return f"{way['new_plan_after_requests']:,} requests, {way['new_plan_after_s']:.0f} s"


def _percent(part: dict[str, Any] | None, key: str, digits: int) -> str:
    return "-" if part is None or part[key] is None else f"{100 * part[key]:.{digits}f} %"


def sentence(document: dict[str, Any]) -> str:
    calm = document["false_alarms"]
    told = "; ".join(f"{count} about {stream}" for stream, count in calm["told"].items() if stream != "disagreement")
    return (
        f"Tolerance {100 * document['tolerance']:g} %. False alarms in {calm['sampled_requests']:,} calm sampled "
        f"requests: {calm['alarms']}; at most {calm['at_most_on_average']} are promised on average. These requests are "
        f"{calm['drawn_from']:,} recorded ones drawn again and again, of which {100 * calm['disagreement']:.2f} % "
        f"differ; no model ran for them. Changes of hits and confidences told without cause: {told or 'none'}. "
        "Apparate's rule runs every input to the end: its saving is what it would be if requests stopped where they "
        "are answered. What happens to another rule first after the change stands in the place of its alarm."
    )


def picture(document: dict[str, Any]) -> str:
    tolerance = 100 * document["tolerance"]
    return svg([_panel(row, tolerance) for row in document["rows"]], "requests", columns=2, width=1060)


def _panel(row: dict[str, Any], tolerance: float) -> Panel:
    calm, changed = row["schedule"]["calm"], row["schedule"]["changed"]
    lines = [Line("tolerance", [(0.0, tolerance), (float(row["requests"]), tolerance)], "limit", dashed=True)]
    for way in row["ways"]:
        if way["way"] in KINDS:
            values = [100 * value for value in way["series"]["disagreement"]]
            points = [(float(x), y) for x, y in zip(way["series"]["requests"], values, strict=True)]
            lines.append(Line(way["way"], points, KINDS[way["way"]]))
    marks = [(float(calm), "changes"), (float(calm + changed), "back")]
    marks += [
        (float(way["new_plan_request"]), "new plan") for way in row["ways"] if way.get("new_plan_request") is not None
    ]
    return Panel(f"{row['scenario']}: answers that differ", lines, marks=marks)
