"""What the benchmarks share: real data as streams, one case from fit to evaluation, results as JSON.

Each benchmark prints a table and, as its last line on stdout, one JSON document with units in its keys; with `--out`
the document is also written to a file. Nothing here is part of the package.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from offramp.choosing import Learned, choose
from offramp.evaluation import evaluate
from offramp.fitting import learn
from offramp.recording import Recording

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
LEVEL = 0.95
STARTED_AS = tuple(sys.argv)
# Read when the run begins: the tree may move on while it lasts.
COMMIT = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.strip()


class Images:
    """A re-iterable stream of batches from uint8 images, transformed batch by batch: (inputs, labels), or inputs alone
    where there are no labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Tensor], Tensor], size: int = 100):
        self.images, self.labels, self.transform, self.size = images, labels, transform, size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        for start in range(0, len(self.images), self.size):
            rows = slice(start, start + self.size)
            inputs = self.transform(torch.from_numpy(self.images[rows]))
            yield (inputs, torch.from_numpy(self.labels[rows])) if len(self.labels) else inputs

    def rows(self, rows: slice) -> Images:
        return Images(self.images[rows], self.labels[rows], self.transform, self.size)

    def __add__(self, more: Images) -> Images:
        images, labels = (np.concatenate(pair) for pair in ((self.images, more.images), (self.labels, more.labels)))
        return Images(images, labels, self.transform, self.size)

    @property
    def count(self) -> int:
        return len(self.images)


class Tokens:
    """The same of sentences, padded to one length: dicts of input_ids and attention_mask, and labels."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray, size: int = 100):
        self.ids, self.mask, self.labels, self.size = ids, mask, labels, size

    def __len__(self) -> int:
        return -(-len(self.ids) // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.ids), self.size):
            rows = slice(start, start + self.size)
            parts = {"input_ids": self.ids[rows], "attention_mask": self.mask[rows], "labels": self.labels[rows]}
            yield {name: torch.from_numpy(part) for name, part in parts.items()}

    def rows(self, rows: slice) -> Tokens:
        return Tokens(self.ids[rows], self.mask[rows], self.labels[rows], self.size)

    def __add__(self, more: Tokens) -> Tokens:
        pairs = (self.ids, more.ids), (self.mask, more.mask), (self.labels, more.labels)
        return Tokens(*(np.concatenate(pair) for pair in pairs), size=self.size)

    @property
    def count(self) -> int:
        return len(self.ids)


def sentences(table: Mapping[str, int], tokenizer: Any, *, length: int, seed: int) -> Tokens:
    """Sentences with their labels, cut or padded to `length` tokens, shuffled by `seed`."""
    encoded = tokenizer(list(table), truncation=True, max_length=length, padding="max_length", return_tensors="np")
    order = np.random.default_rng(seed).permutation(len(table))
    ids, mask = (encoded[name][order].astype(np.int64) for name in ("input_ids", "attention_mask"))
    return Tokens(ids, mask, np.array(list(table.values()), dtype=np.int64)[order])


def labelled_text(parquet: str) -> dict[str, int]:
    """The different sentences of a file under ../shared/data, each with its label."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(SHARED / "data" / parquet)
    return dict(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))


def images(parquet: str, transform: Callable[[Tensor], Tensor], *, side: int, seed: int | None = None) -> Images:
    """All images of a file under ../shared/data as uint8 NCHW, resized to `side`; shuffled by `seed`."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(SHARED / "data" / parquet)
    pictures = []
    for cell in table["image"].to_pylist():
        picture = Image.open(io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell)).convert("RGB")
        pictures.append(np.asarray(picture if picture.width == side else picture.resize((side, side), Image.BILINEAR)))
    labels = np.array(table["label"].to_pylist(), dtype=np.int64)
    order = np.arange(len(labels)) if seed is None else np.random.default_rng(seed).permutation(len(labels))
    return Images(np.stack(pictures).transpose(0, 3, 1, 2)[order], labels[order], transform)


def zoo() -> ModuleType:
    """The model definitions in ../shared/models."""
    spec = importlib.util.spec_from_file_location("zoo", SHARED / "models" / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(description: str | None, *, records: bool = False) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    parser.add_argument("--time-budget", type=float, default=1000, help="seconds for one fit (default 1000)")
    parser.add_argument("--latency-budget", type=float, default=10, help="seconds per latency comparison (default 10)")
    parser.add_argument("--workdir", type=Path, help="keep what is recorded and trained here, and go on from it")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    if records:
        parser.add_argument("--records", type=Path, help="keep the records of the first seed in this .npz file")
    if not SHARED.exists():
        parser.exit(0, "skipped: the data and models in ../shared are not there\n")
    return parser.parse_args()


def fits(
    backbone: nn.Module, train: Images, certify: Images, options: argparse.Namespace
) -> Iterator[tuple[int, Learned]]:
    """One learned set of caches per seed. The backbone's pass is recorded once and counted in every fit's time."""
    recorded: Recording | None = None
    record_s = 0.0
    for seed in range(options.seeds):
        started = time.monotonic()
        stream: Any = train if recorded is None else recorded.dealt_again(seed)
        learned = learn(
            backbone,
            stream,
            certify=certify if recorded is None else None,
            time_budget_s=options.time_budget - record_s,
            seed=seed,
            progress=sys.stderr.isatty(),
            workdir=options.workdir,
        )
        if recorded is None:
            recorded, record_s = learned.candidates.recording, learned.seconds["record"]
        learned.seconds["record"] = record_s
        # Those that an earlier run has left in --workdir took their time then, so it is at least this.
        learned.seconds["train"] = max(learned.seconds["train"], sum(one.log.seconds for one in learned.trained))
        print(f"seed {seed}: learned in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        yield seed, learned


def row(learned: Learned, held_out: Images, tolerance: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Choose at one tolerance, evaluate on images that nothing else has seen, and put all of it in one row."""
    started = time.monotonic()
    cached = choose(learned, tolerance=tolerance, confidence_level=LEVEL)
    chosen_s = time.monotonic() - started
    result = evaluate(cached, held_out, latency_budget_s=options.latency_budget)
    report = cached.report()
    return {
        "seed": seed,
        "tolerance": tolerance,
        "plan": report["plan"],
        "certificate": {k: report["certificate"][k] for k in ("n", "errors", "bound", "candidates_tested", "advice")},
        "evaluation": asdict(result),
        "flops_saved": 1 - result.flops_ratio,
        "oracle_flops_saved": 1 - result.oracle_flops_ratio,
        "cache_parameters": sum(part.parameters for part in cached.costs.caches),
        "cache_bytes": sum(part.parameter_bytes for part in cached.costs.caches),
        "fit_s": sum(learned.seconds.values()) + chosen_s,
        "seconds": report["fit"]["seconds"],
        "inputs": report["fit"]["inputs"],
        "candidates": [
            {k: cache[k] for k in ("name", "enabled", "agreement", "auroc", "flops_share", "bytes", "training")}
            for cache in report["caches"]
        ],
    }


def document(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows with what is needed to read them: hardware, versions, date, commit."""
    return {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": COMMIT,
        "hardware": {"cpu": _cpu(), "threads": torch.get_num_threads(), "machine": platform.machine(), **_gpu()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": shlex.join(["python", f"benchmarks/{Path(STARTED_AS[0]).name}", *_settings(STARTED_AS[1:])]),
        "rows": rows,
    }


def _settings(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that say where files are kept."""
    kept, places = [], ("--out", "--picture", "--records", "--workdir", "--fitted")
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument not in places and before not in places:
            kept.append(argument)
    return kept


def finish(result: dict[str, Any], out: Path | None) -> None:
    """Write the document where asked, and as the last line on stdout."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows, as docs/results.md shows them."""
    head = (
        "| seed | tolerance | certified (errors / n, bound) | measured disagreement [95 % interval] | FLOPs saved "
        "| oracle | batch 1 time: mean, p50, p95 | batch 32 mean | accuracy cached / full | leave at | KiB | fit s |"
    )
    lines = [head, "|" + "---|" * 12]
    for item in rows:
        result, certificate = item["evaluation"], item["certificate"]
        at = {ratio["batch_size"]: ratio for ratio in result["latency"]}
        left = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result["hit_rates"].items())
        low, high = (100 * edge for edge in result["interval"])
        lines.append(
            f"| {item['seed']} | {100 * item['tolerance']:g} % | {certificate['errors']} / {certificate['n']}, "
            f"{100 * certificate['bound']:.2f} % | {100 * result['disagreement']:.2f} % [{low:.2f}, {high:.2f}] | "
            f"{100 * item['flops_saved']:.1f} % | {100 * item['oracle_flops_saved']:.1f} % | "
            f"{at[1]['mean']:.2f}, {at[1]['p50']:.2f}, {at[1]['p95']:.2f} | {at[32]['mean']:.2f} | "
            f"{_percent(result['accuracy'])} / {_percent(result['backbone_accuracy'])} | {left} | "
            f"{item['cache_bytes'] / 1024:.0f} | {item['fit_s']:.0f} |"
        )
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _gpu() -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
