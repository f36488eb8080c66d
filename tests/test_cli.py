"""The shell: what it passes on, what it prints where, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_report import (
    document_without_caches,
    example_document,
    example_evaluation,
    example_optimized,
    example_profile,
)
from torch import Tensor, nn

import offramp
from offramp import cli
from offramp.errors import SplitError
from offramp.streams import as_batch, read_stream

CODE = """
import torch
from torch import nn

def build():
    print("a user's own words")
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

def double(x):
    return x.float() * 2
"""


class FakeCached:
    """Just enough of a cached model: answers with the sign of the first number."""

    exits = ("input.student", "backbone")

    def __init__(self, backbone: nn.Module, document: dict[str, Any]) -> None:
        self.split_model = SimpleNamespace(backbone=backbone, device=torch.device("cpu"))
        self.summary: dict[str, Any] = document

    def predict(self, x: Tensor) -> SimpleNamespace:
        first = x.flatten(1)[:, 0]
        return SimpleNamespace(
            answer_B=(first > 0).long(), left_at_B=(first > 1).long(), confidence_B=torch.ones(len(x)), output=x
        )

    def report(self) -> dict[str, Any]:
        return self.summary


class Calls:
    """Stands in for the package: notes what it was asked."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.fit_options: dict[str, Any] = {}
        self.streams: dict[str, Tensor | None] = {}
        self.saved: dict[str, Any] = {}

    def fit(self, backbone: nn.Module, stream: Iterable[object], **options: Any) -> FakeCached:
        print("words on stdout, by mistake")
        self.streams["fit"] = _rows(stream)
        held_out = options.pop("certify")
        self.streams["certify"] = None if held_out is None else _rows(held_out)
        self.fit_options = options
        return FakeCached(backbone, self.document)

    def save(self, cached: FakeCached, path: Path) -> None:
        path.mkdir(exist_ok=True)
        self.saved = dict(cached.summary)

    def load(self, path: Path, backbone: nn.Module, **_options: Any) -> FakeCached:
        assert path.is_dir()
        return FakeCached(backbone, self.saved)

    def evaluate(self, _cached: FakeCached, stream: Iterable[object]) -> SimpleNamespace:
        self.streams["eval"] = _rows(stream)
        return SimpleNamespace(to_json=example_evaluation)

    def optimize(self, cached: FakeCached, stream: Iterable[object], **options: Any) -> FakeCached:
        self.streams["optimize"], self.optimize_options = _rows(stream), options
        return FakeCached(cached.split_model.backbone, self.document | {"optimized": example_optimized()})

    def profile(self, _cached: FakeCached, stream: Iterable[object], **options: Any) -> SimpleNamespace:
        self.streams["profile"], self.profile_options = _rows(stream), options
        return SimpleNamespace(to_json=example_profile, write_trace=lambda path: path)

    def read_manifest(self, _folder: Path) -> dict[str, Any]:
        return {"summary": self.saved, "plan": self.document["plan"], "certificate": self.document["certificate"]}


def _rows(stream: Iterable[object]) -> Tensor:
    return torch.cat([batch.args[0] for batch in read_stream(stream)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls(example_document())
    for name in ("fit", "save", "load", "evaluate", "optimize", "profile"):
        monkeypatch.setattr(offramp, name, getattr(calls, name))
    monkeypatch.setattr("offramp.artifact.read_manifest", calls.read_manifest)
    return calls


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = np.arange(20, dtype=np.float32).repeat(12).reshape(20, 12) - 2
    np.save(tmp_path / "data.npy", rows)
    return tmp_path / "data.npy"


def run(*arguments: object) -> int:
    """The exit code of `offramp ARGUMENTS`."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(argument) for argument in arguments])
    return int(exit_info.value.code or 0)


def _last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1, "with --json, stdout holds the document and nothing else"
    return json.loads(out.splitlines()[-1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_help_does_not_load_torch() -> None:
    script = (
        "import sys\nfrom offramp import cli\n"
        "try: cli.main(['fit', '--help'])\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'plotly', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_commands_and_their_options_are_these() -> None:
    from typer.main import get_command

    command: Any = get_command(cli.app)
    reading = {"batch_size", "column", "transform", "size", "tokenizer", "max_length"}
    part = {"rows", "limit"}
    loaded = {"folder", "data", "model", "device"}
    assert {name: {p.name for p in sub.params} for name, sub in command.commands.items()} == {
        "inspect": {"model", "data", "input_shape", "measure", "as_json"} | reading,
        "fit": {"model", "data", "out", "certify", "certify_rows", "tolerance", "confidence_level", "method", "as_json"}
        | {"time_budget", "seed", "workdir", "device", "html"}
        | reading
        | part,
        "eval": loaded | {"html", "as_json"} | reading | part,
        "predict": loaded | {"out", "as_json"} | reading | part,
        "optimize": loaded | {"backend", "precision", "out", "as_json"} | reading | part,
        "profile": loaded | {"budget", "trace", "as_json"} | reading | part,
        "report": {"folder", "html", "as_json"},
        "demo": {"folder", "seed", "as_json"},
        "bench": {"suite", "out", "as_json"},
    }


def test_fit_passes_everything_on(calls: Calls, code: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--tolerance", 0.02, "--confidence-level", 0.9, "--time-budget", 30, "--seed", 7, "--rows", ":12"]
    assert run("fit", f"{code}:build", data, "--out", tmp_path / "out", "--certify-rows", "12:", *arguments) == 0
    assert calls.fit_options == {
        "tolerance": 0.02, "confidence_level": 0.9, "method": "offramp", "time_budget_s": 30.0, "device": None,
        "seed": 7, "progress": True, "workdir": None,
    }  # fmt: skip
    assert calls.streams["fit"] is not None
    assert calls.streams["certify"] is not None
    assert (len(calls.streams["fit"]), len(calls.streams["certify"])) == (12, 8)


def test_fit_without_certification_data_leaves_the_parting_to_fit(
    calls: Calls, code: Path, data: Path, tmp_path: Path
) -> None:
    assert run("fit", f"{code}:build", data, "--out", tmp_path / "out") == 0
    assert calls.streams["certify"] is None


def test_what_fit_was_told_is_remembered(
    calls: Calls, code: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--transform", "mine.py:double", "--batch-size", 5]
    assert run("fit", "mine.py:build", data.name, "--out", "out", *options) == 0
    assert calls.saved["source"] == {"model": f"{code}:build", "transform": f"{code}:double", "batch_size": 5}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("eval", tmp_path / "out", data, "--limit", 3) == 0
    assert calls.streams["eval"] is not None
    assert calls.streams["eval"][:, 0].tolist() == [-4.0, -2.0, 0.0]


def test_words_go_to_stdout_and_with_json_to_stderr(
    calls: Calls, code: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", f"{code}:build", data, "--out", tmp_path / "a") == 0
    captured = capsys.readouterr()
    assert "Saves 54" in captured.out
    assert run("fit", f"{code}:build", data, "--out", tmp_path / "b", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["report"]["certificate"] == calls.document["certificate"]
    assert "Saves 54" in err
    assert "words on stdout, by mistake" in err


@pytest.mark.usefixtures("calls")
def test_predict_tells_answer_exit_and_confidence(
    code: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", f"{code}:build", data, "--out", tmp_path / "out")
    capsys.readouterr()
    assert run("predict", tmp_path / "out", data, "--json", "--out", tmp_path / "answers.jsonl", "--rows", "1:6") == 0
    document = _last_json(capsys)
    assert document["n"] == 5
    assert [row["answer"] for row in document["predictions"]] == [0, 0, 1, 1, 1]
    assert [row["left_at"] for row in document["predictions"]][-2:] == ["backbone", "backbone"]
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == document["predictions"]
    assert run("predict", tmp_path / "out", data) == 0
    assert "The first 10 of 20 answers" in capsys.readouterr().out


@pytest.mark.usefixtures("calls")
def test_eval_prints_the_comparison(code: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", f"{code}:build", data, "--out", tmp_path / "out")
    capsys.readouterr()
    assert run("eval", tmp_path / "out", data, "--json", "--html", tmp_path / "page.html") == 0
    assert _last_json(capsys) == example_evaluation()
    assert "On fresh inputs" in (tmp_path / "page.html").read_text()


def test_optimize_says_where_each_part_runs_and_what_was_left_out(
    calls: Calls, code: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", f"{code}:build", data, "--out", tmp_path / "out")
    capsys.readouterr()
    several = ("--backend", "openvino", "--backend", "eager")
    assert run("optimize", tmp_path / "out", data, *several, "--precision", "int8", "--limit", 5) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "input to block1 1 openvino int8 0.25 ms 1 ms 2e-02" in printed
    assert "left out: compile: no C++ <compiler>" in printed
    assert "at most 0.93 % of the answers differ" in printed
    assert printed.endswith(f"Saved to {tmp_path / 'out'}.")
    assert calls.optimize_options == {"backends": ["openvino", "eager"], "precision": "int8"}
    streamed = calls.streams["optimize"]
    assert streamed is not None
    assert len(streamed) == 5
    assert run("optimize", tmp_path / "out", data, "--json", "--out", tmp_path / "elsewhere") == 0
    assert (tmp_path / "elsewhere").is_dir()
    document = _last_json(capsys)
    assert document["report"]["optimized"] == example_optimized()
    assert document["artifact"] == str(tmp_path / "elsewhere")
    assert calls.optimize_options == {"backends": None, "precision": "float32"}


def test_profile_says_where_the_time_goes(
    calls: Calls, code: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", f"{code}:build", data, "--out", tmp_path / "out")
    capsys.readouterr()
    sizes = ("--batch-size", 1, "--batch-size", 8)
    assert run("profile", tmp_path / "out", data, *sizes, "--budget", 2, "--trace", "t.json", "--limit", 5) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Unwatched 1.9 ms, full model 4 ms" in printed
    assert "Trace written to t.json; open it in https://ui.perfetto.dev" in printed
    assert calls.profile_options == {"batch_sizes": [1, 8], "budget_s": 2.0}
    streamed = calls.streams["profile"]
    assert streamed is not None
    assert len(streamed) == 5
    assert run("profile", tmp_path / "out", data, "--json") == 0
    assert _last_json(capsys) == example_profile()
    assert calls.profile_options == {"batch_sizes": (1, 32), "budget_s": 10.0}


def test_report_needs_no_model(
    calls: Calls, code: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", f"{code}:build", data, "--out", tmp_path / "out")
    code.unlink()
    capsys.readouterr()
    assert run("report", tmp_path / "out", "--json", "--html", tmp_path / "page.html") == 0
    assert _last_json(capsys)["plan"] == calls.document["plan"]
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_a_plan_without_caches_is_a_success(
    calls: Calls, code: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.document = document_without_caches()
    assert run("fit", f"{code}:build", data, "--out", tmp_path / "out") == 0
    assert "needs at least 2,995" in " ".join(capsys.readouterr().out.replace("│", "").split())


def test_inspect_lists_the_split_points(code: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", f"{code}:build", "--input-shape", "3x2x2", "--json") == 0
    document = _last_json(capsys)
    points = document["points"]
    assert points[0]["name"] == "input"
    assert points[0]["shape"] == [3, 2, 2]
    assert [point["depth"] for point in points] == sorted(point["depth"] for point in points)
    assert all(point["time_ms"]["1"] >= 0 for point in points)
    assert run("inspect", f"{code}:build", "--data", data, "--no-measure") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "can be split at" in text
    assert "ms, batch" not in text


def test_inspect_says_why_a_model_cannot_be_split(
    code: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise SplitError("the operation aten.nonzero mixes rows")

    import offramp.splitting  # noqa: F401

    monkeypatch.setattr(sys.modules["offramp.splitting"], "split", refuse)
    assert run("inspect", f"{code}:build", "--input-shape", "12") == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "offramp: the operation aten.nonzero mixes rows"
    assert "Traceback" not in err + out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{code}:build"], "needs example inputs: pass either --data DATA or --input-shape"),
        (["inspect", "{code}:build", "--input-shape", "3x-1"], "must look like 3x224x224"),
        (["fit", "nothing.py:f", "{data}", "--out", "x"], "no such file: nothing.py"),
        (["fit", "{code}:build", "nothing.npy", "--out", "x"], "no such file: nothing.npy"),
        (
            ["fit", "{code}:build", "{data}", "--out", "x", "--certify-rows", "5:"],
            "say with --rows which rows to learn from",
        ),
        (["eval", "nowhere", "{data}"], "no such folder: nowhere; expected one that `offramp fit --out DIR` wrote"),
        (["report", "{folder}"], "manifest.json is missing"),
        (["bench", "nothing.toml", "--out", "{folder}"], "the suite nothing.toml could not be read"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(
    code: Path, data: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(code=code, data=data, folder=tmp_path) for argument in arguments]
    assert run(*filled) == 2
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("offramp: ")
    assert out.replace("a user's own words", "").strip() == ""
    assert run(*filled, "--json") == 2
    assert message in _last_json(capsys)["error"]


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("failed", 1)])
def test_bench_prints_the_table_and_fails_with_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str, code: int
) -> None:
    from offramp import bench

    def run_suite(suite: str, out: Path) -> bench.Outcome:
        print("words on stdout, by mistake")
        assert suite == "suite of suite.toml"
        return bench.Outcome(({"status": status},), 1, "| table |\n", out / "results.jsonl", out / "table.md", None)

    monkeypatch.setattr(bench, "read_suite", lambda path: f"suite of {path}")
    monkeypatch.setattr(bench, "run_suite", run_suite)
    assert run("bench", "suite.toml", "--out", tmp_path) == code
    assert capsys.readouterr().out.splitlines()[-1] == "| table |"
    assert run("bench", "suite.toml", "--out", tmp_path, "--json") == code
    document = _last_json(capsys)
    assert (document["ran"], document["failed"], document["lines"]) == (1, code, [{"status": status}])
    assert document["results"] == str(tmp_path / "results.jsonl")
    assert document["page"] is None


@pytest.mark.usefixtures("calls")
def test_artefact_that_does_not_name_its_model(
    code: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    assert run("eval", tmp_path / "out", data) == 2
    assert "pass --model MODEL" in capsys.readouterr().err
    assert run("eval", tmp_path / "out", data, "--model", f"{code}:build") == 0


@pytest.mark.usefixtures("calls")
def test_unforeseen_errors_keep_their_traceback(code: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("no folder")
    with pytest.raises(FileExistsError):
        cli.main(["fit", f"{code}:build", str(data), "--out", str(tmp_path / "out")])


def test_json_has_no_numbers_that_json_lacks() -> None:
    plain = cli._plain({"a": float("inf"), "b": (np.float32(0.5), np.arange(2)), "c": Path("x"), 1: float("nan")})
    assert plain == {"a": None, "b": [0.5, [0, 1]], "c": "x", "1": None}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("importlib.metadata")
    from importlib.metadata import PackageNotFoundError, version

    try:
        expected = version("offramp")
    except PackageNotFoundError:
        pytest.skip("offramp is not installed, only on the path")
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == f"offramp {expected}"


def test_stream_of_the_shell_is_one_fit_accepts(data: Path) -> None:
    from offramp.sources import load_stream

    assert len(as_batch(next(iter(load_stream(str(data)))))) == 20
