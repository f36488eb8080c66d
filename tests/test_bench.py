"""A benchmark: the suite file, what runs and what is skipped, the lines, the table and the page."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from torch import nn

from offramp.bench import Outcome, read_suite, run_suite
from offramp.bench import plots as plots_module
from offramp.bench.measuring import promise_kept
from offramp.bench.results import Results
from offramp.bench.suite import MODEL_KEYS, SOURCE_KEYS, Suite, parameters
from offramp.caches import CacheShape
from offramp.candidates import Candidates
from offramp.distillation import Recipe
from offramp.errors import InputError, MissingExtraError, StorageError
from offramp.methods import METHODS, Method, method_named
from offramp.methods.base import RULES
from offramp.placement import CacheCosts, Thresholds
from offramp.splitting import SplitModel, split
from offramp.streams import Batch
from offramp.types import Records

ROOT = Path(__file__).parents[1]

CODE = """
from pathlib import Path

import numpy as np
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    layers = [nn.Flatten()]
    for inputs in (12, 96, 96, 96):
        layers += [nn.Linear(inputs, 96), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(96, 3))

def missing():
    raise OSError("the weights | are gone")

def traffic():
    with open(Path(__file__).parent / "passes.txt", "a") as file:
        file.write("pass ")
    return torch.from_numpy(np.load(Path(__file__).parent / "train.npy")).split(100)
"""

SUITE = """
methods = ["toy", {name = "toy", fault = "weights"}]
rules = ["certificate", "published"]
tolerances = [0.1]
batch_sizes = [1, 4]
seeds = [0, 1]
time_budget_s = 2
latency_budget_s = 0.01

[[models]]
name = "small"
model = "mine.py:build"
data = "mine.py:traffic"
certify = "certify.npy"
evaluate = {source = "evaluate.npz", limit = 260}
batch_size = 50

[[models]]
name = "gone"
model = "mine.py:missing"
data = "train.npy"
evaluate = "evaluate.npz"
"""


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    """Linear caches at the last split points, which answer half of what they see. fault: what fails in learning."""

    name: ClassVar[str] = "toy"
    source: ClassVar[str] = "a test"
    learned: ClassVar[list[tuple[str, int]]] = []  # fault and seed of every call
    repaired: ClassVar[bool] = False

    fault: str = ""
    layers: tuple[Any, ...] = (1, 2)
    behind: Method | None = None
    rate: float | None = None

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        self.learned.append((self.fault, candidates.seed))
        if self.fault == "interrupt" and not self.repaired:
            raise KeyboardInterrupt
        if self.fault and not self.repaired:
            raise RuntimeError(f"no {self.fault} here")
        points = candidates.split.points[-3:]
        caches = [candidates.build(point, CacheShape("linear")) for point in points]
        candidates.train_round("toys", caches, lambda _cache: Recipe(rows=5000, batch_size=50), None)

    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        return tuple(np.median(records.confidence_NK, axis=0).tolist())


def know_toy(patch: pytest.MonkeyPatch) -> None:
    """Makes the toy a known method; a backbone is split once only, to save time."""
    splits: dict[nn.Module, SplitModel] = {}

    def split_once(backbone: nn.Module, example: Batch) -> SplitModel:
        if backbone not in splits:
            splits[backbone] = split(backbone, example)
        return splits[backbone]

    patch.setitem(METHODS, "toy", f"{__name__}:Toy")
    patch.setattr("offramp.fitting.split", split_once)


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    know_toy(monkeypatch)
    monkeypatch.setattr(Toy, "learned", [])
    monkeypatch.setattr(Toy, "repaired", False)


def make_inputs(folder: Path) -> None:
    """Train, certify and evaluation rows; 20 rows of the last are also train rows."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((960, 12)).astype(np.float32)
    (folder / "mine.py").write_text(CODE)
    np.save(folder / "train.npy", rows[:300])
    np.save(folder / "certify.npy", rows[300:700])
    np.savez(folder / "evaluate.npz", x=rows[[*range(700, 940), *range(20)]], labels=generator.integers(0, 3, 260))


def write_suite(folder: Path, text: str = SUITE) -> Path:
    (folder / "suite.toml").write_text(text)
    return folder / "suite.toml"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder with the suite's first run in `out`."""
    folder = tmp_path_factory.mktemp("bench")
    make_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        know_toy(patch)
        return folder, run_suite(read_suite(write_suite(folder)), folder / "out")


def done(outcome: Outcome) -> list[dict[str, Any]]:
    return [dict(line) for line in outcome.lines if line["status"] == "done"]


# -- running ---------------------------------------------------------------------------------------


def test_every_cell_has_a_line(first: tuple[Path, Outcome]) -> None:
    folder, outcome = first
    lines = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    assert lines == list(outcome.lines)
    assert outcome.ran == len(lines) == 2 * (1 + 2 * 2 * 2)  # per model its own cell, and seeds x methods x rules
    assert len({line["key"] for line in lines}) == len(lines)
    small = [line for line in done(outcome) if line["model"] == "small"]
    assert [(line["method"], line["seed"], line["rule"]) for line in small] == [
        ("full model", None, None),
        *(("toy", seed, rule) for seed in (0, 1) for rule in RULES),
    ]


def test_a_failed_cell_says_why_and_the_rest_runs(first: tuple[Path, Outcome]) -> None:
    _folder, outcome = first
    failed = [line for line in outcome.lines if line["status"] == "failed"]
    assert outcome.failed == len(failed) == 4 + 9
    why = {(line["model"], line["error"]["type"], line["error"]["message"]) for line in failed}
    assert why == {("small", "RuntimeError", "no weights here"), ("gone", "OSError", "the weights | are gone")}


def test_a_model_is_recorded_once_for_all_methods_and_seeds(first: tuple[Path, Outcome]) -> None:
    folder, _outcome = first
    assert (folder / "passes.txt").read_text().split() == ["pass"]


def test_a_line_holds_what_was_measured(first: tuple[Path, Outcome]) -> None:
    _folder, outcome = first
    published = [line for line in done(outcome) if line["rule"] == "published"]
    assert len(published) == 2
    for line in published:
        result = line["evaluation"]
        assert (result["n"], line["dropped_from_evaluate"]) == (240, 20), "what was recorded is not evaluated on"
        assert line["flops_saved"] == pytest.approx(1 - result["flops_ratio"])
        assert line["flops_saved"] > 0.1
        assert line["oracle_flops_saved"] == pytest.approx(1 - result["oracle_flops_ratio"])
        assert line["within_tolerance"] == promise_kept(result["interval"], 0.1)
        assert [ratio["batch_size"] for ratio in result["latency"]] == [1, 4]
        speed, ratio = line["throughput"][1], result["latency"][1]
        assert speed["cached_rows_per_s"] == pytest.approx(4 / (ratio["cached_mean_ms"] / 1000))
        assert 0 <= result["accuracy"] <= 1
        assert line["certificate"]["procedure"].startswith("measured only")
        assert line["parameters"] == {"fault": "", "layers": [1, 2], "behind": None, "rate": None}
        assert line["cache_bytes"] > 0
        assert {"record", "train", "choose"} <= set(line["seconds"])
        assert line["fit_s"] == pytest.approx(sum(line["seconds"].values()))
    assert published[0]["seconds"]["record"] == published[1]["seconds"]["record"] > 0, "recording counts in every fit"
    certificates = [line["certificate"]["data_fingerprint"] for line in published]
    assert certificates[0] != certificates[1], "each seed deals the certification rows anew"


def test_savings_by_class_add_up(first: tuple[Path, Outcome]) -> None:
    _folder, outcome = first
    for line in done(outcome):
        classes = line["classes"]
        n = sum(entry["n"] for entry in classes)
        assert n == 240
        assert sum(entry["n"] * entry["flops_saved"] for entry in classes) / n == pytest.approx(line["flops_saved"])
        left = sum(line["evaluation"]["hit_rates"].values())
        assert sum(entry["n"] * entry["hit_rate"] for entry in classes) / n == pytest.approx(left)


def test_the_full_model_differs_in_nothing(first: tuple[Path, Outcome]) -> None:
    _folder, outcome = first
    full = done(outcome)[0]
    assert (full["evaluation"]["disagreements"], full["flops_saved"], full["oracle_flops_saved"]) == (0, 0, 0)
    assert full["backbone"]["flops"] > 0


def test_the_table_has_a_row_per_cell(first: tuple[Path, Outcome]) -> None:
    folder, outcome = first
    assert (folder / "out" / "table.md").read_text() == outcome.table
    lines = outcome.table.splitlines()
    assert len(lines) == 2 + len(outcome.lines)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(re.findall(r"\|", lines[0]))}
    assert "time, batch 1: mean, p50, p95" in lines[0]
    assert "rows/s, batch 4: cached / full" in lines[0]
    assert any(line.startswith("| small | toy | published | 1 | 10 % |") for line in lines)
    assert any(line.endswith(r"| OSError: the weights \| are gone |") for line in lines)


def test_the_page_stands_alone_and_shows_every_model(first: tuple[Path, Outcome]) -> None:
    pytest.importorskip("plotly")
    folder, outcome = first
    assert outcome.page_path == folder / "out" / "index.html"
    page = (folder / "out" / "index.html").read_text()
    for words in ("small: saving and disagreement", "small: time of a call", "small: saving per class"):
        assert words in page
    assert "gone: saving" not in page, "nothing of it was measured"
    assert "toy, published" in page
    assert "the oracle saves" in page
    assert "13 of 18 cells failed" in page
    assert not re.search(r"<(script|link)[^>]+(src|href)=['\"]http", page)


def test_marks_are_means_over_seeds(first: tuple[Path, Outcome]) -> None:
    _folder, outcome = first
    (mark,) = [mark for mark in plots_module.marks_of(outcome.lines) if mark.rule == "published"]
    lines = [line for line in done(outcome) if line["rule"] == "published"]
    assert mark.saved == pytest.approx(np.mean([line["flops_saved"] for line in lines]))
    assert mark.batch_size == 1
    assert mark.p95 == pytest.approx(np.mean([line["evaluation"]["latency"][0]["p95"] for line in lines]))
    n = {entry["class"]: entry["n"] for entry in lines[0]["classes"]}
    assert {number: found[0] for number, found in mark.classes.items()} == n


def test_a_second_run_measures_only_what_failed(first: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, outcome = first
    monkeypatch.setattr(Toy, "repaired", True)
    again = run_suite(read_suite(folder / "suite.toml"), folder / "out")
    assert sorted(Toy.learned) == [("weights", 0), ("weights", 1)]
    assert (again.ran, again.failed) == (4 + 9, 9)
    assert [line for line in done(again) if line in done(outcome)] == done(outcome), "what was measured is as it was"
    Toy.learned.clear()
    suite = SUITE.replace("mine.py:missing", "mine.py:build").replace("[0, 1]", "[0]").split("[[models]]")[:2]
    third = run_suite(read_suite(write_suite(folder, "[[models]]".join(suite))), folder / "out")
    assert (third.ran, third.failed, Toy.learned) == (0, 0, [])
    assert len(third.lines) == 1 + 2 * 2, "the table shows the suite at hand"


def test_ctrl_c_leaves_what_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs(tmp_path)
    text = SUITE.replace("weights", "interrupt").replace("[0, 1]", "[0]").split("[[models]]")
    path = write_suite(tmp_path, "[[models]]".join(text[:2]))
    with pytest.raises(KeyboardInterrupt):
        run_suite(read_suite(path), tmp_path / "out")
    assert len((tmp_path / "out" / "table.md").read_text().splitlines()) == 2 + 3
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"key": "half a li')  # as a crash may leave it
    monkeypatch.setattr(Toy, "repaired", True)
    Toy.learned.clear()
    outcome = run_suite(read_suite(path), tmp_path / "out")
    assert (outcome.ran, outcome.failed, Toy.learned) == (2, 0, [("interrupt", 0)])


def test_without_plotly_there_are_lines_and_a_table(
    first: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _outcome = first

    def missing() -> None:
        raise MissingExtraError("no plotly")

    monkeypatch.setattr("offramp.report.charts.plotly", missing)
    (tmp_path / "results.jsonl").write_text((folder / "out" / "results.jsonl").read_text())
    text = SUITE.split("[[models]]")[0].replace(', {name = "toy", fault = "weights"}', "") + (
        "[[models]]" + SUITE.split("[[models]]")[1]
    )
    outcome = run_suite(read_suite(write_suite(folder, text)), tmp_path)
    assert (outcome.ran, outcome.page_path) == (0, None)
    assert "pip install 'offramp[report]'" in capsys.readouterr().err
    assert (tmp_path / "table.md").exists()


def test_data_that_was_all_recorded_is_no_data_to_evaluate_on(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    text = SUITE.split("[[models]]")
    path = write_suite(tmp_path, "[[models]]".join(text[:2]).replace('"evaluate.npz", limit = 260', '"train.npy"'))
    outcome = run_suite(read_suite(path), tmp_path / "out")
    assert outcome.failed == len(outcome.lines) == 9
    assert "all 300 inputs of" in outcome.lines[0]["error"]["message"]


def test_results_that_cannot_be_written_are_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be kept in"):
        Results(tmp_path / "file" / "results.jsonl")


@pytest.mark.parametrize(
    ("interval", "expected"), [((0.0, 0.01), "yes"), ((0.005, 0.02), "open"), ((0.011, 0.02), "no")]
)
def test_a_promise_is_kept_broken_or_open(interval: tuple[float, float], expected: str) -> None:
    assert promise_kept(interval, 0.01) == expected


# -- the suite file --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rules =", "rule =", "the suite has the unknown key 'rule'; known: models, methods, rules, tolerances"),
        ("batch_size = 50", "batchsize = 50", "model 'small' has the unknown key 'batchsize'; known: name, model"),
        ("limit = 260", "stop = 9", "`evaluate` of model 'small' has the unknown key 'stop'; known: source, rows"),
        ('fault = "weights"', "faults = 2", "method 'toy' has the unknown key 'faults'; known: fault, layers"),
        ('fault = "weights"', 'rate = "fast"', "`rate` of method 'toy' must be a number; received 'fast'"),
        ('fault = "weights"', "layers = 3", "`layers` of method 'toy' must be a list; received 3"),
        ('fault = "weights"', "fault = 2", "`fault` of method 'toy' must be a text; received 2"),
        ('fault = "weights"', 'rule = "published"', "rules are set for the whole suite"),
        ('"toy", ', '"tyo", ', "unknown method 'tyo'; known: .*offramp.*toy"),
        ('"toy", ', "3, ", "a method is a name or a table"),
        (', {name = "toy", fault = "weights"}', ', "toy"', "two methods of the suite are called 'toy'"),
        ('["toy", {name = "toy", fault = "weights"}]', "[]", "`methods` must be a list with .*known: .*offramp"),
        ('"published"]', '"guess"]', "unknown rule 'guess'; known: certificate, published"),
        ('["certificate", "published"]', "[]", "`rules` must be a list .*received \\[\\]; known: certificate, publ"),
        ("tolerances = [0.1]", "tolerances = []", "`tolerances` must be a list with at least one entry"),
        ("tolerances = [0.1]", "tolerances = [1.5]", "tolerance"),
        ("seeds = [0, 1]", "seeds = [-1]", "each of `seeds` must be at least 0; received -1"),
        ("seeds = [0, 1]", "seeds = [0.5]", "each of `seeds` must be a whole number; received 0.5"),
        ("[1, 4]", "[true]", "each of `batch_sizes` must be a whole number; received True"),
        ("time_budget_s = 2", "time_budget_s = 0", "`time_budget_s` must be a positive number of seconds"),
        ('name = "gone"', 'name = "small"', "two models of the suite are called 'small'"),
        ('evaluate = "evaluate.npz"', "", "model 'gone' lacks 'evaluate'; it needs: name, model, data, evaluate"),
        ('evaluate = "evaluate.npz"', 'evaluate = "train.npy"', "same inputs as `data` and as `evaluate`"),
        ('certify = "certify.npy"', 'certify = "mine.py:traffic"', "same inputs as `data` and as `certify`"),
        ("[[models]]", "[[models]", "is not TOML"),
    ],
)
def test_a_bad_suite_is_refused_before_anything_runs(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SUITE
    with pytest.raises(InputError, match=message):
        read_suite(write_suite(tmp_path, SUITE.replace(old, new)))


def test_a_suite_without_models_or_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks 'models'; it needs: models, methods"):
        read_suite(write_suite(tmp_path, 'methods = ["toy"]'))
    with pytest.raises(InputError, match="`models` must be a list with at least one entry.*known: name, model, data"):
        read_suite(write_suite(tmp_path, 'methods = ["toy"]\nmodels = []'))
    with pytest.raises(InputError, match="could not be read"):
        read_suite(tmp_path / "none.toml")


def test_paths_are_relative_to_the_suite(tmp_path: Path) -> None:
    suite = read_suite(write_suite(tmp_path, SUITE.replace("mine.py:missing", "torchvision:resnet18")))
    small, other = suite.models
    assert small.model == f"{tmp_path / 'mine.py'}:build"
    assert small.evaluate.source == str(tmp_path / "evaluate.npz")
    assert other.model == "torchvision:resnet18"
    assert other.certify is None


def test_hyper_parameters_reach_the_method(tmp_path: Path) -> None:
    given = 'layers = [[3, 4], [5]], behind = "toy", rate = 2'
    suite = read_suite(write_suite(tmp_path, SUITE.replace('fault = "weights"', given)))
    method = suite.methods[1].method
    assert isinstance(method, Toy)
    assert method.layers == ((3, 4), (5,))
    assert method.behind == Toy()
    assert isinstance(method.rate, float)
    assert suite.methods[1].label == "toy(layers=[[3, 4], [5]], behind=toy, rate=2)"


@pytest.mark.parametrize("name", METHODS)
def test_a_suite_can_set_every_hyper_parameter_of_every_method(tmp_path: Path, name: str) -> None:
    default = method_named(name)
    given = {key: value for key, value in parameters(default).items() if value is not None}
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in {"name": name, **given}.items())
    text = SUITE.replace('{name = "toy", fault = "weights"}', f"{{{table}}}")
    assert read_suite(write_suite(tmp_path, text)).methods[1].method == default


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("seeds = [0, 1]", "seeds = [0, 1, 2]", True),
        ('rules = ["certificate", "published"]', 'rules = ["published"]', True),
        ("tolerances = [0.1]", "tolerances = [0.1, 0.05]", True),
        ("tolerances = [0.1]", "tolerances = [0.1, 0.2]", False),
        ("time_budget_s = 2", "time_budget_s = 3", False),
        ("batch_sizes = [1, 4]", "batch_sizes = [1]", False),
        ("limit = 260", "limit = 250", False),
    ],
)
def test_keys_change_with_what_a_result_depends_on(tmp_path: Path, old: str, new: str, *, same: bool) -> None:
    def key(text: str) -> str:
        suite = read_suite(write_suite(tmp_path, text))
        cells = suite.cells(suite.models[0])
        return next(cell.key for cell in cells if cell.method is not None and cell.rule == "published")

    assert (key(SUITE) == key(SUITE.replace(old, new))) is same


# -- documents -------------------------------------------------------------------------------------


def test_the_suites_in_the_documents_are_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        assert read_suite(write_suite(tmp_path, block)).models
    known = [*Suite.__dataclass_fields__, *MODEL_KEYS, *SOURCE_KEYS]
    assert [name for name in known if f"`{name}`" not in text] == [], "every key is explained"


def test_the_example_is_valid() -> None:
    suite = read_suite(ROOT / "examples" / "bench_digits.toml")
    assert suite.models[0].model == "offramp.bench.digits:model"
    assert suite.rules == RULES


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    outcome = run_suite(read_suite(ROOT / "examples" / "bench_digits.toml"), tmp_path)
    assert outcome.failed == 0
    assert all(line["evaluation"]["n"] == 347 for line in outcome.lines)
