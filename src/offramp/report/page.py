"""The report as one HTML page that needs nothing else: style, figures and plotly itself are inside.

Every text that comes from the document passes `markup.escape`; sections whose data the document lacks are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from offramp.errors import StorageError
from offramp.report import charts, wording
from offramp.report.files import write_text
from offramp.report.markup import bar, code, escape, fact_list, frame, section, table
from offramp.report.wording import Document, count, duration, level, milliseconds, percent, percent_up, quantity

PANELS = 8  # caches whose reliability is drawn


def html(document: Document) -> str:
    """The whole page. Raises MissingExtraError when plotly is not installed."""
    plotly = charts.plotly()
    sections = [
        _header(document),
        _tiles(document),
        _leaving(document),
        _path(document),
        _evaluation(document),
        _optimized(document),
        _caches(document),
        _samples(document),
        _certificate(document),
        _facts(document),
    ]
    name = document.get("backbone", {}).get("name", "report")
    script = plotly.offline.get_plotlyjs()
    return frame(f"offramp: {name}", "".join(sections), script=script, version=document.get("offramp", ""))


def write_html(document: Document, path: str | os.PathLike[str]) -> Path:
    """Write the page to `path`; a reader never sees half of it. Raises StorageError when that fails."""
    page = html(document)
    target = Path(path)
    try:
        write_text(target, page)
    except OSError as error:
        raise StorageError(f"the report could not be written to {target}: {error}") from error
    return target


def _header(document: Document) -> str:
    backbone = document.get("backbone", {})
    brand = f"<b>offramp</b> report on {escape(backbone.get('name', 'the backbone'))}"
    if document.get("created"):
        brand += f", {escape(str(document['created'])[:10])}"
    parts = [f"<div class='brand'>{brand}</div><h1>{escape(wording.headline(document))}</h1>"]
    if not wording.has_caches(document):
        parts.append(f"<p class='reason'>{escape(wording.reason(document))}</p>")
    else:
        parts.append(f"<p class='lead'>{escape(wording.promise(document))}</p>")
    if advice := wording.advice(document):
        parts.append(f"<p class='advice'>{escape(advice)}</p>")
    return f"<header>{''.join(parts)}</header>\n"


def _tiles(document: Document) -> str:
    if not wording.has_caches(document):
        return ""
    cost, certificate = document.get("cost", {}), document["certificate"]
    tiles = [(percent(wording.saving(document)), "of the FLOPs saved, caches included")]
    if document.get("leaves"):
        tiles.append((percent(wording.answered_by_caches(document)), "of requests answered by caches"))
    tiles.append(
        (f"≤ {percent_up(certificate['bound'])}", f"of answers differ ({level(certificate['confidence_level'])} sure)")
    )
    if measured := cost.get("measured"):
        best = min(measured, key=lambda row: float(row["cached_ms"] / row["full_ms"]))
        speed = best["full_ms"] / best["cached_ms"]
        tiles.append((f"{speed:.2f}×", f"as fast at batch {best['batch_size']}, measured"))
    boxes = "".join(
        f"<div class='tile'><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in tiles
    )
    return f"<div class='tiles'>{boxes}</div>\n"


def _leaving(document: Document) -> str:
    if not wording.has_caches(document) or not document.get("leaves"):
        return ""
    note = "Requests enter on the left. Each vertical line is a cache that answers some; the shaded area is work done."
    where = section("Where requests leave", note, charts.draw(charts.leaving_chart(document)))
    note = (
        "The width of a block is its share of requests, its height their FLOPs, caches included; the area is the mean."
    )
    costs = section("What a request costs", note, charts.draw(charts.cost_chart(document)))
    return where + f"<div class='pair'>{costs}{_measured(document)}</div>\n"


def _measured(document: Document) -> str:
    rows = [
        (str(row["batch_size"]), milliseconds(row["full_ms"]), milliseconds(row["cached_ms"]), _ratio_bar(row))
        for row in document.get("cost", {}).get("measured", ())
    ]
    leaves = [
        (
            escape("full model" if leaf["name"] == "backbone" else leaf["name"]),
            code(leaf["point"] or "end"),
            percent(leaf["share"], 1),
            percent(leaf["cost"], 1),
        )
        for leaf in document["leaves"]
    ]
    body = table(("answered by", "split point", "requests>", "cost>"), leaves)
    if rows:
        head = ("batch", "full model>", "cached>", "cached / full")
        body += f"<h3>Measured time of one call</h3>{table(head, rows)}"
    return section(
        "In numbers", "Cost: FLOPs of a request that leaves there, caches included, in percent of a full run.", body
    )


def _ratio_bar(row: Mapping[str, Any]) -> str:
    ratio = row["cached_ms"] / row["full_ms"]
    return f"{bar(min(ratio, 1.0), 70, quiet=ratio >= 1)} {ratio:.2f}"


def _path(document: Document) -> str:
    if not document.get("path"):
        return ""
    note = (
        "Plans from “nothing” to “everything”, found on the tuning inputs. They are tested in this order on inputs "
        "kept aside, until one fails: a plan passes when its bound stays left of the tolerance. "
        "The last one that passed is used. Work here is an estimate from measured time and FLOPs."
    )
    body = charts.draw(charts.path_chart(document))
    panels = [cache for cache in document.get("caches", ()) if cache.get("reliability")]
    panels = [cache for cache in panels if cache["enabled"]] or panels
    plans = section("From safe to eager", note, body)
    if not panels:
        return plans
    note = (
        "How often a cache agreed with the full model, by how confident it was, in bins of inputs. "
        "What matters is that agreement is near 100 % right of the threshold (dotted)."
    )
    return plans + section("Can the caches tell?", note, charts.draw(charts.reliability_chart(panels[:PANELS])))


def _evaluation(document: Document) -> str:
    evaluation = document.get("evaluation")
    if not evaluation:
        return ""
    low, high = evaluation["interval"]
    rows = [
        ("answers that differ", f"{percent(evaluation['disagreement'])} ({percent(low)} to {percent(high)})", ""),
        ("FLOPs, caches included", percent(evaluation["flops_ratio"], 1), percent(1.0)),
        ("limit: FLOPs of the oracle", percent(evaluation["oracle_flops_ratio"], 1), ""),
    ]
    if evaluation.get("accuracy") is not None and evaluation.get("backbone_accuracy") is not None:
        rows.insert(1, ("accuracy", percent(evaluation["accuracy"], 1), percent(evaluation["backbone_accuracy"], 1)))
    rows += [
        (
            f"mean time of a call, batch {entry['batch_size']}",
            f"{milliseconds(entry['cached_mean_ms'])} (ratio {entry['mean']:.2f}, p95 {entry['p95']:.2f})",
            milliseconds(entry["full_mean_ms"]),
        )
        for entry in evaluation.get("latency", ())
    ]
    note = (
        f"{count(evaluation['n'])} inputs that neither training, tuning nor certification has seen. "
        "The interval is exact (Clopper-Pearson)."
    )
    return section("On fresh inputs", note, table(("", "cached", "full model"), rows))


def _optimized(document: Document) -> str:
    """Where the parts of an optimized model run."""
    optimized = document.get("optimized")
    if not optimized:
        return ""
    head = ("part", "rows>", "back end", "time>", "eager>", "largest difference>")
    rows = [
        (
            code(part["part"]),
            str(part["rows"]),
            escape(f"{part['backend']}, {part['precision']}"),
            milliseconds(part["ms"]),
            milliseconds(part["eager_ms"]),
            f"{part['difference']:.0e}",
        )
        for part in optimized["parts"]
    ]
    note = f"Each part on the back end that was fastest for it. {wording.promise(optimized)}"
    left_out = "".join(f"<li>{escape(why)}</li>" for why in optimized["left_out"])
    return section("On other back ends", note, table(head, rows) + (f"<ul>{left_out}</ul>" if left_out else ""))


def _caches(document: Document) -> str:
    caches = document.get("caches", ())
    if not caches:
        return ""
    head = ("cache", "split point", "reads", "parameters>", "FLOPs>", "agrees", "AUROC>", "answers when")
    rows = [_cache_row(cache) for cache in caches]
    off = [not cache["enabled"] for cache in caches]
    note = (
        "All candidates that were trained; the ones in use are marked. FLOPs in percent of the full model. "
        "AUROC: how well its confidence tells answers that agree from those that do not (1 is perfect, 0.5 is chance)."
    )
    return section("Caches", note, table(head, rows, off))


def _cache_row(cache: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"<span class='on'>● {escape(cache['name'])}</span>" if cache["enabled"] else f"○ {escape(cache['name'])}"
    threshold = cache.get("threshold")
    in_use = cache["enabled"] and threshold is not None
    return (
        name,
        code(cache["point"]),
        escape(cache.get("reads") or "-"),
        quantity(cache["parameters"]),
        percent(cache["flops_share"]),
        f"{bar(cache['agreement'], 60, quiet=not cache['enabled'])} {percent(cache['agreement'], 1)}",
        _auroc(cache),
        f"{escape(_title(cache['confidence']))} ≥ {threshold:.3f}" if in_use else "never",
    )


def _auroc(cache: Mapping[str, Any]) -> str:
    """That of the score in use; the others show when the mouse rests on it."""
    scores = {_title(name): _number(value) for name, value in (cache.get("auroc") or {}).items()}
    others = ", ".join(f"{name} {value}" for name, value in scores.items())
    return f"<span title='{escape(others)}'>{scores.get(_title(cache['confidence']), '-')}</span>"


def _samples(document: Document) -> str:
    samples = document.get("samples") or {}
    show = {"image": _images, "text": _texts}.get(samples.get("kind") or "")
    if show is None or not wording.has_caches(document):
        return ""
    return (
        "<div class='pair'>"
        + section("Leave first", "Inputs that an early cache answers, most confident first.", show(samples["first"]))
        + section("Leave last", "Inputs that stay longest.", show(samples["last"]))
        + "</div>\n"
    )


def _images(samples: Iterable[Mapping[str, Any]]) -> str:
    figures = "".join(
        f"<figure><img alt='' src='data:image/png;base64,{escape(sample['image'])}'>{_caption(sample)}</figure>"
        for sample in samples
    )
    return f"<div class='samples'>{figures}</div>"


def _texts(samples: Iterable[Mapping[str, Any]]) -> str:
    return "".join(
        f"<blockquote>{escape(sample['text'])}<small>{_caption(sample)}</small></blockquote>" for sample in samples
    )


def _caption(sample: Mapping[str, Any]) -> str:
    confidence = sample.get("confidence")
    sure = "" if confidence is None else f", {percent(confidence)} sure"
    return f"<b>{escape(sample['answer'])}</b> at {escape(sample['left_at'])}{sure}"


def _certificate(document: Document) -> str:
    certificate, backbone = document["certificate"], document.get("backbone", {})
    facts = [
        ("Bound", f"{percent_up(certificate['bound'])} at confidence level {level(certificate['confidence_level'])}"),
        ("Evidence", f"{count(certificate['errors'])} of {count(certificate['n'])} certification inputs differed"),
        ("Tolerance", level(certificate["tolerance"])),
        ("Procedure", f"{certificate['procedure']}; {count(certificate['candidates_tested'])} plans tested"),
        ("Model", f"{backbone.get('name', '')} {certificate['backbone_fingerprint']}".strip()),
        ("Data", certificate["data_fingerprint"]),
        ("Date", certificate["created"]),
    ]
    says = "".join(f"<li>{escape(line)}</li>" for line in wording.CERTIFICATE_SAYS)
    not_says = "".join(f"<li>{escape(line)}</li>" for line in wording.CERTIFICATE_DOES_NOT_SAY)
    return (
        "<section class='certificate'><h2>Certificate</h2>"
        f"<p class='statement'>{escape(wording.promise(document))}</p>{fact_list(facts)}"
        f"<div class='pair'><div><h3>It says</h3><ul>{says}</ul></div>"
        f"<div><h3>It does not say</h3><ul>{not_says}</ul></div></div></section>\n"
    )


def _facts(document: Document) -> str:
    fit, backbone = document.get("fit", {}), document.get("backbone", {})
    facts: list[tuple[str, str]] = []
    if backbone:
        size = f"{quantity(backbone['parameters'])} parameters, {quantity(backbone['flops'], 'FLOP')} per request"
        facts.append(("Backbone", f"{backbone['name']}: {size}"))
    if inputs := fit.get("inputs"):
        facts.append(
            ("Inputs", ", ".join(f"{count(number)} {part}" for part, number in inputs.items() if number is not None))
        )
    if seconds := fit.get("seconds"):
        facts.append(("Time", ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())))
    if fit.get("time_budget_s") is not None:
        facts.append(("Time budget", duration(fit["time_budget_s"])))
    if fit.get("seed") is not None:
        facts.append(("Seed", str(fit["seed"])))
    return section("How it was fitted", "", fact_list(facts)) if facts else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _title(name: str) -> str:
    return name.replace("_", " ")
