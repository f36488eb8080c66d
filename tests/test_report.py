"""The report: every section from one made-up document, in the terminal and as a page."""

from __future__ import annotations

import builtins
import copy
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from offramp import report
from offramp.errors import MissingExtraError, StorageError
from offramp.report import charts, wording

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CANDIDATES = (
    ("input", 0.0, "student"),
    ("layers.2", 0.31, "pooled"),
    ("layers.4", 0.58, "pooled"),
    ("layers.6", 0.86, "linear"),
)


def _cache(index: int) -> dict[str, Any]:
    point, _depth, kind = CANDIDATES[index]
    reliability = [
        {"confidence": x, "agreement": min(1.0, x + 0.02 * (index + 1)), "n": n}
        for x, n in ((0.25, 20), (0.45, 60), (0.65, 110), (0.85, 300), (0.97, 1400))
    ]
    return {
        "name": f"{point}.{kind}",
        "point": point,
        "enabled": index != 1,
        "reads": "input.student" if index > 1 else None,
        "parameters": 78_000 + 900 * index,
        "bytes": 312_000,
        "flops_share": 0.073 / (1 + 4 * index),
        "agreement": 0.87 + 0.03 * index,
        "auroc": {"max_softmax": 0.913, "margin": 0.921, "learned": 0.93},
        "confidence": "learned",
        "threshold": 0.91 - 0.03 * index,
        "reliability": reliability,
    }


def _path() -> list[dict[str, Any]]:
    steps = []
    for index in range(24):
        disagreement = 0.0011 * index
        steps.append(
            {
                "disagreement": disagreement,
                "cost": 1 - 0.72 * (index / 23) ** 0.35,
                "certified_errors": 2 * index,
                "bound": disagreement * 1.1 + 0.0016,
                "passed": index < 8,
                "chosen": index == 7,
            }
        )
    return steps


def example_document() -> dict[str, Any]:
    caches = [_cache(index) for index in range(len(CANDIDATES))]
    planned = [
        {
            "name": cache["name"],
            "point": cache["point"],
            "threshold": cache["threshold"],
            "confidence": "learned",
            "hit_rate": 0.2,
        }
        for cache in caches
        if cache["enabled"]
    ]
    plan = {
        "caches": planned,
        "estimated_disagreement": 0.0066,
        "estimated_cost": 0.42,
        "bypass_batch_sizes": [],
        "reason": "",
    }
    certificate = {
        "tolerance": 0.01,
        "confidence_level": 0.95,
        "n": 2500,
        "errors": 14,
        "bound": 0.008741,
        "candidates_tested": 9,
        "procedure": "fixed-sequence testing, exact binomial",
        "backbone_fingerprint": "9c3b5e0f21aa",
        "data_fingerprint": "77d0c2be4410",
        "created": "2026-11-21T01:30:00+00:00",
        "advice": "",
    }
    leaves = [
        {"name": "input.student", "point": "input", "share": 0.55, "cost": 0.075},
        {"name": "layers.4.pooled", "point": "layers.4", "share": 0.17, "cost": 0.66},
        {"name": "layers.6.linear", "point": "layers.6", "share": 0.06, "cost": 0.94},
        {"name": "backbone", "point": "output", "share": 0.22, "cost": 1.09},
    ]
    first = [{"image": PIXEL, "left_at": "input.student", "answer": str(i), "confidence": 0.999} for i in range(8)]
    last = [{"image": PIXEL, "left_at": "backbone", "answer": str(i), "confidence": None} for i in range(8)]
    return {
        "offramp": "0.1.0",
        "created": "2026-11-21T01:30:00+00:00",
        "backbone": {"name": "ResNet", "parameters": 11_173_962, "flops": 1.11e9, "fingerprint": "9c3b5e0f21aa"},
        "plan": plan,
        "certificate": certificate,
        "points": [{"name": name, "shape": [64, 8, 8], "depth": depth} for name, depth, _kind in CANDIDATES],
        "leaves": leaves,
        "cost": {
            "estimated_share": 0.42,
            "flops_share": 0.46,
            "measured": [
                {"batch_size": 1, "full_ms": 9.1, "cached_ms": 5.0},
                {"batch_size": 8, "full_ms": 43.0, "cached_ms": 21.5},
                {"batch_size": 32, "full_ms": 171.0, "cached_ms": 80.0},
            ],
        },
        "caches": caches,
        "path": _path(),
        "oracle_cost": 0.13,
        "samples": {"kind": "image", "first": first, "last": last},
        "fit": {
            "inputs": {"train": 20_000, "tune": 2500, "certify": 2500, "duplicates": 3},
            "seconds": {"record": 31.2, "train": 301.0, "search": 2.4},
            "seed": 0,
            "time_budget_s": 600.0,
        },
        "advice": "",
    }


def example_optimized() -> dict[str, Any]:
    """The section of an optimized model's report."""
    document = example_document()
    part = {"part": "input to block1", "rows": 1, "backend": "openvino", "precision": "int8"}
    return {
        "precision": "int8",
        "parts": [part | {"ms": 0.25, "eager_ms": 1.0, "difference": 0.02}],
        "left_out": ["compile: no C++ <compiler>"],
        "latency": [{"batch_size": 1, "full_ms": 3.0, "cached_ms": 1.0}],
        "plan": document["plan"],
        "certificate": document["certificate"] | {"bound": 0.0093},
    }


def example_evaluation() -> dict[str, Any]:
    latency = {"batch_size": 8, "mean": 0.5, "p50": 0.49, "p95": 0.61, "full_mean_ms": 43.0, "cached_mean_ms": 21.5}
    return {
        "n": 2500,
        "disagreements": 15,
        "disagreement": 0.006,
        "interval": [0.0034, 0.0099],
        "hit_rates": {"input.student": 0.55},
        "flops_ratio": 0.461,
        "oracle_flops_ratio": 0.13,
        "latency": [latency],
        "accuracy": 0.893,
        "backbone_accuracy": 0.892,
        "details": {},
    }


def example_profile() -> dict[str, Any]:
    stage = {
        "kind": "stage",
        "name": "input to the end",
        "share": 0.25,
        "ms": 0.5,
        "calls": 40,
        "runs": 40,
        "rows": 140,
    }
    cache = {"kind": "cache", "name": "cache [b]/student", "share": 0.75, "ms": 1.5}
    size = {
        "batch_size": 1,
        "bypassed": False,
        "calls": 200,
        "ms": 2.0,
        "plain_ms": 1.9,
        "full_ms": 4.0,
        "exits": {"[b]/student": 160, "backbone": 40},
        "parts": [
            cache | {"calls": 200, "runs": 200, "rows": 200},
            stage,
            {"kind": "full", "name": "full model", "share": 0.0, "ms": 0.0, "calls": 0, "runs": 0, "rows": 0},
        ],
    }
    return {"device": "cpu", "threads": 1, "sizes": [size]}


def document_without_caches() -> dict[str, Any]:
    document = example_document()
    reason = "tolerance 0.001 needs at least 2,995 certification inputs; 2,500 were given"
    document["plan"] |= {"caches": [], "estimated_cost": 1.0, "estimated_disagreement": 0.0, "reason": reason}
    document["certificate"] |= {"errors": 0, "bound": 0.0, "advice": "certify on 2,995 inputs or more"}
    document["leaves"] = [{"name": "backbone", "point": "output", "share": 1.0, "cost": 1.0}]
    document["cost"] |= {"estimated_share": 1.0, "flops_share": 1.0, "measured": []}
    for entry in (*document["caches"], *document["path"]):
        entry.update({key: False for key in ("enabled", "passed", "chosen") if key in entry})
    return document


def _printed(document: dict[str, Any], width: int = 110) -> str:
    return _drawn(report.terminal(document), width)


def _drawn(renderable: RenderableType, width: int = 110) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    return stream.getvalue().replace(wording.NO_BREAK_SPACE, " ")


def _visible(page: str) -> str:
    """The page's own markup: without scripts and style."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return page.replace(wording.NO_BREAK_SPACE, " ")


class _Outline(HTMLParser):
    """Checks that elements nest, and notes what the page would load."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_terminal_says_the_promise_and_where_requests_leave() -> None:
    text = _printed(example_document() | {"evaluation": example_evaluation()})
    assert "Saves 54 % of the FLOPs with 3 caches." in text
    assert "With 95 % confidence, at most 0.88 % of the answers differ" in " ".join(text.replace("│", "").split())
    assert re.search(r"input\.student +input +55 %|input\.student +input +55\.0 %", text)
    assert "0.50" in text
    assert "On 2,500 fresh inputs" in text


def test_terminal_gives_the_reason_when_there_are_no_caches() -> None:
    text = " ".join(_printed(document_without_caches()).replace("│", "").split())
    assert "No caches: tolerance 0.001 needs at least 2,995 certification inputs" in text
    assert "certify on 2,995 inputs or more" in text
    assert "Saves" not in text


def test_terminal_prints_names_as_they_are() -> None:
    document = example_document()
    document["leaves"][0]["name"] = "[red]odd[/red]"
    document["backbone"]["name"] = "[bold]Net"
    text = _printed(document)
    assert "[red]odd[/red]" in text
    assert "offramp: [bold]Net" in text


def test_profile_says_where_the_time_goes() -> None:
    lines = [" ".join(line.split()) for line in _drawn(report.profile_table(example_profile())).splitlines()]
    assert lines == [
        "Batch 1: 2 ms a call",
        "part time per call calls rows",
        "cache [b]/student 75.0 % █████████ 1.5 ms 100 % 1",
        "input to the end 25.0 % ███ 0.5 ms 20 % 3.5",
        "Unwatched 1.9 ms, full model 4 ms. 200 calls; rows left at [b]/student 80.0 %, backbone 20.0 %",
        "",
        "calls: the share that reaches the part; rows: the mean number that it then works on",
    ]
    bypassed = example_profile()
    bypassed["sizes"][0]["bypassed"] = True
    assert "The full model alone runs. Unwatched 1.9 ms" in _drawn(report.profile_table(bypassed))


@pytest.mark.parametrize("document", [example_document(), document_without_caches()], ids=["caches", "none"])
def test_page_is_well_formed_and_loads_nothing(document: dict[str, Any]) -> None:
    outline = _Outline()
    outline.feed(report.html(document))
    assert outline.open == []
    assert all(value.startswith("data:") for value in outline.loads)


def test_page_holds_plotly_once_and_every_section() -> None:
    page = report.html(example_document() | {"evaluation": example_evaluation()})
    assert page.count("Plotly.newPlot(") - charts.plotly().offline.get_plotlyjs().count("Plotly.newPlot(") == 4
    assert len(page) < 6_000_000
    headings = re.findall(r"<h2>(.*?)</h2>", _visible(page))
    assert headings == [
        "Where requests leave",
        "What a request costs",
        "In numbers",
        "From safe to eager",
        "Can the caches tell?",
        "On fresh inputs",
        "Caches",
        "Leave first",
        "Leave last",
        "Certificate",
        "How it was fitted",
    ]
    assert "at most 0.88 % of the answers" in _visible(page)


def test_page_without_caches_shows_the_reason_and_no_saving() -> None:
    text = _visible(report.html(document_without_caches()))
    assert "<p class='reason'>tolerance 0.001 needs at least 2,995" in text
    assert "Where requests leave" not in text
    assert "Saves" not in text


def test_page_escapes_every_text() -> None:
    attack = "<script>alert('x')</script>\"&"
    document = json.loads(json.dumps(example_document()))
    document["samples"] = {
        "kind": "text",
        "first": [{"text": attack, "left_at": attack, "answer": attack, "confidence": 0.9}],
        "last": [],
    }
    document["backbone"]["name"] = document["advice"] = document["offramp"] = attack
    document["certificate"]["procedure"] = document["certificate"]["data_fingerprint"] = attack
    for entry in (*document["caches"], *document["leaves"][:-1], *document["points"]):
        entry["name"] = attack
        entry["point"] = entry["reads"] = entry["confidence"] = attack
    for cache in document["caches"]:
        cache["auroc"] = {attack: 0.9}
    page = report.html(document)
    assert "<script>alert" not in page
    outline = _Outline()
    outline.feed(page)
    assert outline.open == []


def test_page_does_without_the_optional_sections() -> None:
    document = example_document()
    small = {key: document[key] for key in ("plan", "certificate")}
    assert "Certificate" in _visible(report.html(small))
    assert "Saves 58 %" in _printed(small)


def test_rendering_leaves_the_document_alone() -> None:
    document = example_document()
    before = copy.deepcopy(document)
    report.html(document)
    report.terminal(document)
    assert document == before


def test_missing_plotly_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'offramp\[report\]'"):
        report.html(example_document())
    assert "Saves" in _printed(example_document())


def test_write_html_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = report.write_html(example_document(), tmp_path / "deep" / "report.html")
    before = target.read_text(encoding="utf-8")
    assert before.startswith("<!doctype html>")

    def full_disk(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("offramp.report.files.os.replace", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        report.write_html(document_without_caches(), target)
    assert target.read_text(encoding="utf-8") == before
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0087401, "0.88 %"), (0.01, "1 %"), (0.0100001, "1.01 %"), (0.0, "0 %"), (0.00001, "0.01 %")],
)
def test_a_bound_never_looks_smaller_than_it_is(value: float, text: str) -> None:
    assert wording.percent_up(value).replace(wording.NO_BREAK_SPACE, " ") == text


def test_labels_keep_their_distance() -> None:
    placed = charts._spread([80.0, 79.0, 78.0, 2.0, 1.0], 8)
    assert all(upper - lower >= 8 for upper, lower in pairwise(placed))
    assert min(placed) >= 0
    assert charts._spread([90.0, 50.0], 8) == [90.0, 50.0]


def test_an_optimized_model_shows_its_parts_its_own_certificate_and_what_was_left_out() -> None:
    document = example_document() | {"optimized": example_optimized()}
    said = " ".join(_printed(document).split())
    page = report.html(document)
    assert "input to block1 1 openvino int8 0.25 ms 1 ms 2e-02" in said
    for text in (said, page):
        assert text.count("at most 0.93") == 1
        assert "openvino" in text
    assert "left out: compile: no C++ <compiler>" in said
    assert "compile: no C++ &lt;compiler&gt;" in page
    assert "openvino" not in report.html(example_document())


def test_a_full_model_in_lower_precision_is_not_called_unchanged() -> None:
    alone = document_without_caches()
    section = example_optimized() | {"plan": alone["plan"]}
    said = " ".join(_printed({**alone, "optimized": section}).split())
    assert "at most 0.93" in said
    section["certificate"] |= {"bound": 0.0}
    assert "at most" not in " ".join(_printed({**alone, "optimized": section}).split())
