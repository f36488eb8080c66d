"""The shell: parse, call the public names, print.

Only typer is imported at the top: `offramp --help` must not wait for torch. With `--json`, one JSON document is the
last line on stdout and everything meant for people goes to stderr. Exit codes: 0 done, 2 a mistake that offramp
explains in one message, 1 anything unforeseen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.errors import ArtifactError, InputError, OfframpError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

    from offramp.model import CachedModel
    from offramp.sources import DataOptions
    from offramp.splitting import SplitModel
    from offramp.types import CostTable

INHERITED = ("batch_size", "column", "transform", "size", "tokenizer", "max_length")
SHOWN_PREDICTIONS = 10

app = typer.Typer(
    help="Certified early answers from a pretrained PyTorch model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DATA = "Reading data"
ModelSpec = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="FILE.py:NAME, PACKAGE:NAME, a transformers folder, a .pt2 file, timm:NAME or torchvision:NAME",
    ),
]
DataSpec = Annotated[
    str, typer.Argument(metavar="DATA", help="A .parquet, .npy or .npz file, a folder of images, FILE.py:NAME")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `offramp fit` wrote")]
OtherModel = Annotated[str | None, typer.Option("--model", help="The full model, if it is not where it was at `fit`")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on the last line of stdout")]
Html = Annotated[Path | None, typer.Option("--html", help="Write the report as a page to this file")]
Device = Annotated[str | None, typer.Option(help="Where to run, for example cuda")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per batch (default: 64)", rich_help_panel=_DATA)]
Column = Annotated[str | None, typer.Option(help="Parquet column with the inputs", rich_help_panel=_DATA)]
Transform = Annotated[
    str | None,
    typer.Option(help="FILE.py:NAME, uint8 NCHW batch -> model input (default: float in 0..1)", rich_help_panel=_DATA),
]
Size = Annotated[int | None, typer.Option(help="Resize images to SIZE x SIZE", rich_help_panel=_DATA)]
Tokenizer = Annotated[str | None, typer.Option(help="Folder of the tokenizer, for text", rich_help_panel=_DATA)]
MaxLength = Annotated[int | None, typer.Option(help="Tokens per text (default: 128)", rich_help_panel=_DATA)]
Rows = Annotated[str | None, typer.Option(help="START:STOP, only these rows of the source", rich_help_panel=_DATA)]
Limit = Annotated[int | None, typer.Option(help="At most so many rows", rich_help_panel=_DATA)]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a mistake that offramp explains ends with exit code 2 and no traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=arguments, prog_name="offramp")
    except OfframpError as error:
        print(f"offramp: {error}", file=sys.stderr)
        if "--json" in arguments:
            print(json.dumps({"error": str(error), "kind": type(error).__name__}))
        sys.exit(2)


def _version(value: bool) -> None:  # noqa: FBT001 - typer's callback
    if value:
        from importlib.metadata import PackageNotFoundError, version

        with contextlib.suppress(PackageNotFoundError):  # run from a source tree
            print(f"offramp {version('offramp')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    model: ModelSpec,
    *,
    data: Annotated[str | None, typer.Option(help="Inputs to try the model on; see `offramp fit --help`")] = None,
    input_shape: Annotated[str | None, typer.Option(help="Without data: shape of one input, such as 3x224x224")] = None,
    measure: Annotated[bool, typer.Option(help="Measure the time of each stage")] = True,
    batch_size: BatchSize = None,
    column: Column = None,
    transform: Transform = None,
    size: Size = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    as_json: AsJson = False,
) -> None:
    """Show where a model can be split, with the cost up to each point; or say why it cannot."""
    if (data is None) == (input_shape is None):
        raise InputError("`offramp inspect` needs example inputs: pass either --data DATA or --input-shape 3x224x224")
    with _output(as_json=as_json) as output:
        from offramp.cost import measure as measure_cost
        from offramp.sources import load_model
        from offramp.splitting import split

        given = _given(
            batch_size=batch_size or 4,
            column=column,
            transform=transform,
            size=size,
            tokenizer=tokenizer,
            max_length=max_length,
        )
        backbone = load_model(model)
        example = _random_rows(input_shape) if input_shape else _first_batch(str(data), _options(given), backbone)
        split_model = split(backbone, example)
        table = measure_cost(split_model, budget_s=6.0) if measure else None
        points = _points(split_model, table)
        output.show(_points_table(points, model))
        output.document = {
            "model": model,
            "method": split_model.method,
            "fingerprint": split_model.fingerprint,
            "points": points,
        }


@app.command()
def fit(
    model: ModelSpec,
    data: DataSpec,
    *,
    out: Annotated[Path, typer.Option(help="Folder to write the artefact to")],
    certify: Annotated[str | None, typer.Option(help="Data to certify on (default: a part of DATA)")] = None,
    certify_rows: Annotated[str | None, typer.Option(help="START:STOP, rows of the certification data")] = None,
    tolerance: Annotated[float, typer.Option(help="Highest share of answers that may differ")] = 0.01,
    confidence_level: Annotated[float, typer.Option(help="How sure the certificate must be")] = 0.95,
    method: Annotated[str, typer.Option(help="Recipe to learn the caches by")] = "offramp",
    time_budget: Annotated[float | None, typer.Option(help="Seconds that learning may take")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random")] = 0,
    workdir: Annotated[Path | None, typer.Option(help="Keep recordings here and resume from them")] = None,
    device: Device = None,
    batch_size: BatchSize = None,
    column: Column = None,
    transform: Transform = None,
    size: Size = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    rows: Rows = None,
    limit: Limit = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Learn caches from unlabelled DATA, certify a plan and save it."""
    with _output(as_json=as_json) as output:
        import offramp
        from offramp import report
        from offramp.sources import load_model, load_stream

        given = _given(
            batch_size=batch_size,
            column=column,
            transform=transform,
            size=size,
            tokenizer=tokenizer,
            max_length=max_length,
        )
        options = _options(given)
        stream = load_stream(data, dataclasses.replace(options, rows=rows, limit=limit))
        held_out = None
        if certify is None and certify_rows is not None and rows is None:
            raise InputError(
                "--certify-rows without --certify takes them from DATA: say with --rows which rows to learn from"
            )
        if certify is not None or certify_rows is not None:
            held_out = load_stream(certify or data, dataclasses.replace(options, rows=certify_rows))
        cached: CachedModel = offramp.fit(
            _on(load_model(model), device),
            stream,
            certify=held_out,
            tolerance=tolerance,
            confidence_level=confidence_level,
            method=method,
            time_budget_s=time_budget,
            device=device,
            seed=seed,
            progress=True,
            workdir=workdir,
        )
        cached.summary["source"] = {"model": _lasting(model), **_lasting_paths(given)}
        offramp.save(cached, out)
        document = cached.report()
        output.show(report.terminal(document))
        output.say(f"Saved to {out}. Next: offramp eval {out} DATA, offramp report {out} --html report.html")
        _write_page(output, document, html)
        output.document = {"artifact": str(out), "report": document}


@app.command(name="eval")
def evaluate(
    folder: Folder,
    data: DataSpec,
    *,
    model: OtherModel = None,
    device: Device = None,
    batch_size: BatchSize = None,
    column: Column = None,
    transform: Transform = None,
    size: Size = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    rows: Rows = None,
    limit: Limit = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Compare a cached model with the full model on fresh DATA."""
    with _output(as_json=as_json) as output:
        import offramp
        from offramp import report

        given = _given(
            batch_size=batch_size,
            column=column,
            transform=transform,
            size=size,
            tokenizer=tokenizer,
            max_length=max_length,
        )
        cached, stream = _opened(folder, data, model, device, given, rows=rows, limit=limit)
        evaluation = offramp.evaluate(cached, stream).to_json()
        output.show(report.evaluation_table(evaluation))
        _write_page(output, {**cached.report(), "evaluation": evaluation}, html)
        output.document = evaluation


@app.command()
def optimize(
    folder: Folder,
    data: DataSpec,
    *,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="eager, compile, aotinductor, onnxruntime or openvino; repeat it for several (default: all)"),
    ] = None,
    precision: Annotated[str, typer.Option(help="The lowest allowed: float32, bfloat16 or int8")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write to this folder instead of FOLDER itself")] = None,
    model: OtherModel = None,
    device: Device = None,
    batch_size: BatchSize = None,
    column: Column = None,
    transform: Transform = None,
    size: Size = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    rows: Rows = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Put a cached model on the fastest back ends of this machine, and certify it on fresh DATA.

    FOLDER keeps the model as it was fitted as well: that is what runs where a part cannot be built again.
    """
    with _output(as_json=as_json) as output:
        import offramp
        from offramp import report

        given = _given(
            batch_size=batch_size,
            column=column,
            transform=transform,
            size=size,
            tokenizer=tokenizer,
            max_length=max_length,
        )
        cached, stream = _opened(folder, data, model, device, given, rows=rows, limit=limit)
        optimized = offramp.optimize(cached, stream, backends=backend, precision=precision)
        offramp.save(optimized, out or folder)
        document = optimized.report()
        output.show(report.optimized_table(document["optimized"]))
        output.say(f"Saved to {out or folder}.")
        output.document = {"artifact": str(out or folder), "report": document}


@app.command()
def profile(
    folder: Folder,
    data: DataSpec,
    *,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Rows per call; repeat it for several (default: 1 and 32)")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds per batch size")] = 10.0,
    trace: Annotated[
        Path | None, typer.Option(help="Write single calls to this file, for ui.perfetto.dev; .gz compresses it")
    ] = None,
    model: OtherModel = None,
    device: Device = None,
    column: Column = None,
    transform: Transform = None,
    size: Size = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    rows: Rows = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Show where the time of a call goes: stages, caches, decisions, Python; beside the full model, on rows of DATA."""
    with _output(as_json=as_json) as output:
        import offramp
        from offramp import report

        given = _given(column=column, transform=transform, size=size, tokenizer=tokenizer, max_length=max_length)
        cached, stream = _opened(folder, data, model, device, given, rows=rows, limit=limit)
        profiled = offramp.profile(cached, stream, batch_sizes=batch_size or (1, 32), budget_s=budget)
        output.document = profiled.to_json()
        output.show(report.profile_table(output.document))
        if trace is not None:
            output.say(f"Trace written to {profiled.write_trace(trace)}; open it in https://ui.perfetto.dev")


@app.command()
def predict(
    folder: Folder,
    data: DataSpec,
    *,
    out: Annotated[Path | None, typer.Option(help="Write one JSON line per input to this file")] = None,
    model: OtherModel = None,
    device: Device = None,
    batch_size: BatchSize = None,
    column: Column = None,
    transform: Transform = None,
    size: Size = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    rows: Rows = None,
    limit: Limit = None,
    as_json: AsJson = False,
) -> None:
    """Answer DATA with a cached model; say where each request left."""
    with _output(as_json=as_json) as output:
        given = _given(
            batch_size=batch_size,
            column=column,
            transform=transform,
            size=size,
            tokenizer=tokenizer,
            max_length=max_length,
        )
        cached, stream = _opened(folder, data, model, device, given, rows=rows, limit=limit)
        predictions = list(_predictions(cached, stream))
        if out is not None:
            _write_lines(out, predictions)
            output.say(f"{len(predictions)} answers written to {out}")
        output.show(_predictions_table(predictions))
        output.document = {"n": len(predictions), "predictions": predictions}


@app.command(name="report")
def show_report(folder: Folder, *, html: Html = None, as_json: AsJson = False) -> None:
    """Show what a fitted artefact saves and promises; the model itself is not needed."""
    with _output(as_json=as_json) as output:
        from offramp import report
        from offramp.artifact import report_of

        document = report_of(_manifest(folder))
        output.show(report.terminal(document))
        _write_page(output, document, html)
        output.document = document


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Folder for the results")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fit, certify and compare on scikit-learn's handwritten digits: three minutes on a laptop."""
    with _output(as_json=as_json) as output:
        from offramp.demo import run

        output.document = run(folder, seed=seed, show=output.show)


@app.command()
def bench(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="A TOML file of models, data, methods and settings")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the results; the same command again resumes")],
    as_json: AsJson = False,
) -> None:
    """Compare methods on models as SUITE says: JSON lines, a table and a page of plots. Exit code 1 if a cell fails."""
    with _output(as_json=as_json) as output:
        from offramp.bench import read_suite, run_suite

        outcome = run_suite(read_suite(suite), out)
        output.say(outcome.table.rstrip())
        output.document = {
            "results": outcome.results_path,
            "table": outcome.table_path,
            "page": outcome.page_path,
            "ran": outcome.ran,
            "failed": outcome.failed,
            "lines": outcome.lines,
        }
    if outcome.failed:
        raise typer.Exit(1)


class Output:
    """Where a command's words go: people read stdout, or stderr when stdout belongs to the JSON document."""

    def __init__(self, *, as_json: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=as_json, soft_wrap=False)
        self.document: Mapping[str, Any] = {}

    def show(self, renderable: RenderableType) -> None:
        self._console.print(renderable)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _output(*, as_json: bool) -> Iterator[Output]:
    output = Output(as_json=as_json)
    if not as_json:
        yield output
        return
    with contextlib.redirect_stdout(sys.stderr):  # a user's own code may print
        yield output
    print(json.dumps(_plain(output.document)))


def _plain(value: Any) -> Any:
    """The same in strict JSON: numpy values as Python's, tuples as lists, numbers that JSON lacks as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _given(**options: object) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _options(given: Mapping[str, Any], source: Mapping[str, Any] | None = None) -> DataOptions:
    """What the user gave now, else what was given at `fit`, else the defaults."""
    from offramp.sources import DataOptions

    inherited = {name: value for name, value in (source or {}).items() if name in INHERITED}
    return DataOptions(**{**inherited, **given})


def _lasting(spec: str) -> str:
    """A name that means the same from another folder: paths in it become absolute."""
    place, colon, name = spec.rpartition(":")
    if place.endswith(".py"):
        return f"{Path(place).resolve()}{colon}{name}"
    return str(Path(spec).resolve()) if Path(spec).exists() else spec


def _lasting_paths(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _lasting(value) if name in ("transform", "tokenizer") else value for name, value in given.items()}


def _manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of an artefact."""
    from offramp.artifact import read_manifest

    if not folder.is_dir():
        raise ArtifactError(f"no such folder: {folder}; expected one that `offramp fit --out DIR` wrote")
    return read_manifest(folder)


def _source(folder: Path) -> dict[str, Any]:
    """What `fit` noted about model and data; empty for an artefact that was not saved by the shell."""
    return dict(_manifest(folder)["summary"].get("source") or {})


def _opened(
    folder: Path,
    data: str,
    model: str | None,
    device: str | None,
    given: Mapping[str, Any],
    *,
    rows: str | None,
    limit: int | None,
) -> tuple[CachedModel, Any]:
    """A fitted model, and DATA as a stream, read as the user says now or said at `fit`."""
    from offramp.sources import load_stream

    source = _source(folder)
    stream = load_stream(data, dataclasses.replace(_options(given, source), rows=rows, limit=limit))
    return _load(folder, source, model, device), stream


def _load(folder: Path, source: Mapping[str, Any], model: str | None, device: str | None) -> CachedModel:
    import offramp
    from offramp.sources import load_model

    spec = model or source.get("model")
    if spec is None:
        raise InputError(f"{folder} does not say which model it was made for; pass --model MODEL")
    cached: CachedModel = offramp.load(folder, _on(load_model(spec), device), device=device)
    return cached


def _on(model: nn.Module, device: str | None) -> nn.Module:
    return model if device is None else model.to(device)


def _write_page(output: Output, document: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        from offramp import report

        output.say(f"Page written to {report.write_html(document, path)}")


def _random_rows(shape: str) -> Any:
    """Four random inputs of the given shape, such as 3x224x224."""
    import torch

    sizes = shape.lower().replace(",", "x").split("x")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(f"the shape of one input must look like 3x224x224, without the batch; received {shape!r}")
    return torch.randn(4, *map(int, sizes), generator=torch.Generator().manual_seed(0))


def _first_batch(data: str, options: DataOptions, backbone: nn.Module) -> Any:
    from offramp.sources import load_stream
    from offramp.streams import read_stream

    batch = next(iter(read_stream(load_stream(data, options), backbone)), None)
    if batch is None:
        raise InputError(f"{data} holds no inputs")
    return dict(batch.kwargs) or batch.args


def _points(split_model: SplitModel, table: CostTable | None) -> list[dict[str, Any]]:
    """Each split point with the cost of everything before it."""
    sizes = sorted(table.backbone.time_ms) if table else []
    elapsed = dict.fromkeys(sizes, 0.0)
    points = []
    for position, point in enumerate(split_model.points):
        entry: dict[str, Any] = {
            "name": point.name,
            "shape": list(point.shape),
            "depth": point.depth,
            "live_bytes": point.live_bytes,
        }
        if table:
            entry["flops"] = sum(stage.flops for stage in table.stages[:position])
            entry["time_ms"] = {str(size): elapsed[size] for size in sizes}
            for size in sizes:
                elapsed[size] += table.stages[position].time_ms[size].median_ms
        points.append(entry)
    return points


def _points_table(points: list[dict[str, Any]], model: str) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from offramp.report.wording import percent, quantity

    sizes = list(points[0].get("time_ms", {}))
    table = Table(
        title=Text(f"{model} can be split at {len(points)} points; cost of all that comes before"),
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for title in (
        "split point",
        "activation",
        "live",
        "FLOPs",
        *(f"ms, batch {size}" for size in sizes),
    ):
        table.add_column(title, header_style="dim", no_wrap=True, justify="left" if title == "split point" else "right")
    for point in points:
        table.add_row(
            Text(point["name"]),
            "x".join(map(str, point["shape"])),
            quantity(point["live_bytes"], "B"),
            percent(point["depth"], 1),
            *(f"{point['time_ms'][size]:.3g}" for size in sizes),
        )
    return table


def _predictions(cached: CachedModel, stream: Any) -> Iterator[dict[str, Any]]:
    from offramp.streams import read_stream

    split_model = cached.split_model
    for batch in read_stream(stream, split_model.backbone):
        on_device = batch.to(split_model.device)
        prediction = cached.predict(*on_device.args, **on_device.kwargs)
        rows = zip(
            prediction.answer_B.tolist(), prediction.left_at_B.tolist(), prediction.confidence_B.tolist(), strict=True
        )
        for answer, left_at, confidence in rows:
            yield {"answer": answer, "left_at": cached.exits[left_at], "confidence": confidence}


def _predictions_table(predictions: list[dict[str, Any]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    shown = min(len(predictions), SHOWN_PREDICTIONS)
    table = Table(
        title=f"The first {shown} of {len(predictions)} answers", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for title in ("input", "answer", "left at", "confidence"):
        table.add_column(title, header_style="dim")
    for index, entry in enumerate(predictions[:SHOWN_PREDICTIONS]):
        table.add_row(str(index), str(entry["answer"]), Text(entry["left_at"]), f"{entry['confidence']:.3f}")
    return table


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    from offramp.errors import StorageError

    try:
        path.write_text("".join(json.dumps(_plain(entry)) + "\n" for entry in entries), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"the answers could not be written to {path}: {error}") from error
