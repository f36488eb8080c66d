"""Running a suite: one recording per model, one fit per seed and method, one line per cell.

The backbone's pass is recorded once and shared by all methods and seeds; a seed deals the tune and certify rows anew.
The time of recording counts in every fit. A cell that fails is a line that says why, and the rest goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from rich.console import Console
from rich.text import Text
from torch import nn

from offramp.bench import plots, table
from offramp.bench.measuring import HeldOut, measurements
from offramp.bench.results import DONE, FAILED, Line, Results, write
from offramp.bench.suite import FULL_MODEL, Cell, DataEntry, ModelEntry, Suite
from offramp.candidates import Candidates
from offramp.choosing import Learned, choose
from offramp.errors import MissingExtraError
from offramp.fitting import learn
from offramp.methods import Method
from offramp.methods.base import Rule
from offramp.model import CachedModel
from offramp.placement import CacheCosts, Thresholds
from offramp.sources import DataOptions, load_model, load_stream
from offramp.types import Records

LEAST_LEARNING = 0.1  # of a time budget: what recording leaves to a method at least

Made = TypeVar("Made")


@dataclass(frozen=True)
class Outcome:
    """What a run left: the suite's lines, those of earlier runs among them, how many are new, and the files.

    page_path: None where plotly is missing.
    """

    lines: tuple[Line, ...]
    ran: int
    table: str
    results_path: Path
    table_path: Path
    page_path: Path | None

    @property
    def failed(self) -> int:
        return sum(line["status"] == FAILED for line in self.lines)


def run_suite(suite: Suite, out: Path) -> Outcome:
    """Measure what is not yet in `out/results.jsonl`, append it there, and write `out/table.md` and `out/index.html`.

    Progress is told on stderr. Ctrl-C ends the run: complete cells are kept, table and page show them. Raises
    StorageError when results cannot be written; whatever else fails is the line of a cell.
    """
    bench = _Bench(suite, Results(out / "results.jsonl"))
    try:
        for model in suite.models:
            bench.run(model)
    except KeyboardInterrupt:
        _finish(bench, out)
        bench.say("Interrupted. Complete cells are kept; run the same suite again to go on.", style="yellow")
        raise
    return _finish(bench, out)


def _finish(bench: _Bench, out: Path) -> Outcome:
    suite = bench.suite
    found = [bench.results.get(cell) for model in suite.models for cell in suite.cells(model)]
    lines = tuple(line for line in found if line is not None)
    text, table_path = table.markdown(lines), out / "table.md"
    write(table_path, text)
    page_path: Path | None = out / "index.html"
    try:
        write(out / "index.html", plots.html(lines))
    except MissingExtraError:
        page_path = None
        bench.say("No page of plots: plotly is not installed; run: pip install 'offramp[report]'", style="yellow")
    outcome = Outcome(lines, bench.ran, text, bench.results.path, table_path, page_path)
    files = (outcome.results_path, table_path, page_path)
    bench.say("Written: " + ", ".join(str(file) for file in files if file is not None))
    return outcome


@dataclass(frozen=True, kw_only=True)
class _FullModel(Method):
    """Learns nothing: a fit by it is the recording, and its cached model the full model."""

    name: ClassVar[str] = FULL_MODEL
    source: ClassVar[str] = ""

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        del candidates, tolerance

    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        del records, costs, tolerance
        return ()


@dataclass
class _Prepared:
    """A model, recorded, and the inputs to evaluate on."""

    backbone: nn.Module
    recorded: Learned
    held_out: HeldOut


class _Bench:
    """One run of a suite."""

    def __init__(self, suite: Suite, results: Results) -> None:
        self.suite, self.results, self.ran = suite, results, 0
        self.console = Console(stderr=True)
        self.show = self.console.is_terminal

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style=style), soft_wrap=True)

    def run(self, model: ModelEntry) -> None:
        """All of the model's cells that are not done."""
        cells = list(self.suite.cells(model))
        pending = [cell for cell in cells if not self.results.is_done(cell)]
        self.say(f"{model.name}: {len(pending)} of {len(cells)} cells to measure", style="bold")
        prepared = self._try(pending, lambda: self._prepare(model)) if pending else None
        if prepared is None:
            return
        for _, group in itertools.groupby(pending, key=lambda cell: (cell.seed, cell.method)):
            self._fit(prepared, list(group))

    def _prepare(self, model: ModelEntry) -> _Prepared:
        suite = self.suite
        backbone = load_model(model.model)
        if suite.device is not None:
            backbone = backbone.to(suite.device)
        recorded = self._learn(
            backbone,
            _stream(model, model.data),
            certify=None if model.certify is None else _stream(model, model.certify),
            method=_FullModel(),
            time_budget_s=suite.time_budget_s,
        )
        full = self._choose(recorded, suite.learning_tolerance, None)
        stream, name = _stream(model, model.evaluate), model.evaluate.source
        return _Prepared(backbone, recorded, HeldOut(stream, full, recorded.candidates.recording, name=name))

    def _fit(self, prepared: _Prepared, cells: Sequence[Cell]) -> None:
        """The cells of one seed and method, which share what was learned."""
        learned = self._try(cells, lambda: self._learned(prepared, cells[0]))
        if learned is None:
            return
        for cell in cells:
            line = self._try([cell], lambda cell=cell: self._measure(prepared, learned, cell))  # type: ignore[misc]
            if line is not None:
                self.ran += 1
                self.say(f"  {table.sentence(line)}")

    def _learned(self, prepared: _Prepared, cell: Cell) -> Learned:
        """What the cell's method learns from the model's recording; the full model's cell needs nothing more."""
        if cell.method is None or cell.seed is None:
            return prepared.recorded
        budget_s, record_s = self.suite.time_budget_s, prepared.recorded.seconds["record"]
        self.say(f"{cell.model.name}, seed {cell.seed}: learning by {cell.method.label}")
        learned = self._learn(
            prepared.backbone,
            prepared.recorded.candidates.recording.dealt_again(cell.seed),
            method=cell.method.method,
            seed=cell.seed,
            time_budget_s=None if budget_s is None else max(budget_s - record_s, LEAST_LEARNING * budget_s),
        )
        learned.seconds["record"] = record_s
        return learned

    def _learn(self, backbone: nn.Module, stream: Any, **options: Any) -> Learned:
        tolerance, level = self.suite.learning_tolerance, self.suite.confidence_level
        learned = learn(backbone, stream, tolerance=tolerance, confidence_level=level, progress=self.show, **options)
        if learned.interrupted:  # half-trained caches are not what the suite asks for
            raise KeyboardInterrupt
        return learned

    def _measure(self, prepared: _Prepared, learned: Learned, cell: Cell) -> Line:
        tolerance = self.suite.learning_tolerance if cell.tolerance is None else cell.tolerance
        cached = self._choose(learned, tolerance, cell.rule)
        report = cached.report()
        measured = measurements(
            cached,
            prepared.held_out,
            tolerance=tolerance,
            batch_sizes=self.suite.batch_sizes,
            latency_budget_s=self.suite.latency_budget_s,
            progress=self.show,
        )
        facts = {
            "plan": report["plan"],
            "certificate": report["certificate"],
            "candidates": [
                {name: cache[name] for name in ("name", "enabled", "agreement", "auroc", "flops_share", "bytes")}
                for cache in report["caches"]
            ],
            "fit_s": sum(report["fit"]["seconds"].values()),
            "seconds": report["fit"]["seconds"],
            "inputs": report["fit"]["inputs"],
            "dropped_from_evaluate": prepared.held_out.dropped,
            "backbone": report["backbone"],
            "device": report["fit"]["device"],
            "threads": report["fit"]["threads"],
        }
        return self.results.add(cell, DONE, measured | facts)

    def _choose(self, learned: Learned, tolerance: float, rule: Rule | None) -> CachedModel:
        return choose(learned, tolerance=tolerance, confidence_level=self.suite.confidence_level, rule=rule)

    def _try(self, cells: Sequence[Cell], make: Callable[[], Made]) -> Made | None:
        """What `make` gives; None when it fails, with a line for each of the cells that cannot be measured then."""
        try:
            return make()
        except Exception as error:
            for cell in cells:
                self.results.add(cell, FAILED, {"error": {"type": type(error).__name__, "message": str(error)}})
            self.ran += len(cells)
            self.say(f"  {len(cells)} failed: {type(error).__name__}: {error}", style="red")
            return None


def _stream(model: ModelEntry, data: DataEntry) -> Any:
    return load_stream(data.source, DataOptions(**model.reading, rows=data.rows, limit=data.limit))
