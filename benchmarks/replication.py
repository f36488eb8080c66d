"""The rows that the papers print, beside ours on the same backbone or the nearest one that is here.

    python benchmarks/methods.py cifar10 --workdir work --out benchmarks/results/methods_cifar10.json
    python benchmarks/replication.py work/cifar10 --out benchmarks/results/replication.json

Reads what methods.py left of the case cifar10 (ResNet-18): its rows in benchmarks/results/, and in its folder what
every cache said about the 5,000 images for tuning and certifying. Agreement is that of the cache on all of these: none
was trained on them. What is named "ours" are our versions of the methods; "offramp" is our own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
from comparison import Row, batch_1_mean

from offramp.methods.base import RULES

# arXiv 2101.07344, public results of the authors' code: agreement on CIFAR-10 after each of the eight blocks.
GATI = {
    "FC": (55.14, 60.68, 78.64, 85.34, 94.50, 99.19, 99.95, 100.0),
    "Pool": (55.19, 68.34, 78.26, 84.61, 92.49, 99.01, 99.95, 100.0),
    "Conv": (57.63, 66.04, 75.91, 82.64, 93.28, 98.28, 99.94, 100.0),
}
GATI_MB = {"FC": 33.0, "Pool": 17.0, "Conv": 0.8}  # after block 7
BLOCK_7 = "layers.6"
HALF = 0.5
ROWS = common.ROOT / "benchmarks" / "results" / "methods_cifar10.json"


@dataclass(frozen=True)
class Replicated:
    """One published figure beside ours; `why` says what differs, in a sentence."""

    source: str
    what: str
    published: str
    ours: str
    why: str


@dataclass(frozen=True)
class Said:
    """What the caches of one method said, from the folder `records` of methods.py."""

    name: list[str]
    depth_K: np.ndarray[Any, Any]
    bytes_K: np.ndarray[Any, Any]
    agreement_NK: np.ndarray[Any, Any]

    @classmethod
    def load(cls, folder: Path, method: str) -> Said:
        with np.load(folder / "records" / f"{method}.npz") as stored:
            return cls(stored["name"].tolist(), stored["depth"], stored["bytes"], stored["agreement"])

    def of(self, point: str) -> list[tuple[str, float, int]]:
        """(shape, agreement in percent, bytes) of the caches at this split point."""
        found = []
        for k, name in enumerate(self.name):
            where, shape = name.split("/", 1)
            if where == point:
                found.append((shape, 100 * float(self.agreement_NK[:, k].mean()), int(self.bytes_K[k])))
        return found

    def first_half(self) -> float:
        """Share of inputs with which a cache in the first half of the backbone agrees."""
        return float(self.agreement_NK[:, self.depth_K <= HALF].any(axis=1).mean())


def listed(found: list[tuple[str, float, int]], *, sizes: bool) -> str:
    if not found:
        return "none"
    if sizes:
        return ", ".join(f"{shape} {size / 1e6:.2f} MB at {agreement:.2f} %" for shape, agreement, size in found)
    return ", ".join(f"{shape} {agreement:.2f}" for shape, agreement, _ in found)


def gati(folder: Path) -> Iterator[Replicated]:
    theirs, own = Said.load(folder, "gati"), Said.load(folder, "offramp")
    for block in range(1, 9):
        point = f"layers.{block - 1}"
        if not theirs.of(point):
            continue
        yield Replicated(
            "GATI",
            f"agreement after block {block}, %",
            ", ".join(f"{kind} {values[block - 1]:.2f}" for kind, values in GATI.items()),
            f"ours: {listed(theirs.of(point), sizes=False)}; offramp: {listed(own.of(point), sizes=False)}",
            "Theirs: the checkpoint with the best agreement on the test images, another training of ResNet-18 on "
            "lossless images, 100 epochs. Ours: pooled to 4,096 numbers, trained for as long as its fit allows.",
        )
    published = ", ".join(f"{kind} {size:g} MB at {GATI[kind][6]:.2f} %" for kind, size in GATI_MB.items())
    found = f"ours: {listed(theirs.of(BLOCK_7), sizes=True)}; offramp: {listed(own.of(BLOCK_7), sizes=True)}"
    why = "Agreement is relative to two different trainings of the backbone."
    yield Replicated("GATI", "size of a cache after block 7", published, found, why)


def freeze(folder: Path, rows: list[Row]) -> Iterator[Replicated]:
    both = {name: Said.load(folder, name) for name in ("freeze", "offramp")}
    oracle = ", ".join(f"{name} {100 * said.first_half():.1f} %" for name, said in both.items())
    why = "An oracle picks the layer. 10,000 stored inputs at each of at most 12 split points, the input among them."
    yield Replicated("Freeze Inference", "a cache in the first half agrees (oracle)", "91.58 %", oracle, why)
    for name, said in both.items():
        early = {cache for cache, depth in zip(said.name, said.depth_K, strict=True) if depth <= HALF}
        reached = [
            f"{100 * sum(share for cache, share in row['details']['hit_rates'].items() if cache in early):.1f} % "
            f"at {100 * row['tolerance']:g} %"
            for row in rows
            if (row["name"], row["rule"]) == (name, "certificate") and "error" not in row
        ]
        what = f"answered in the first half under a certificate, by {name}"
        yield Replicated(
            "Freeze Inference", what, "-", ", ".join(reached) or "no row", "The paper has no rule that bounds errors."
        )


def selfxit(rows: list[Row]) -> Iterator[Replicated]:
    why = "Best cases of the paper, at an accuracy loss that it calls low; which model they belong to is not said."
    for rule in RULES:
        yield Replicated(
            "SelfXit",
            f"savings, {rule} rule",
            "up to 58 % of FLOPs, 46 % of latency",
            savings(rows, "selfxit", rule),
            why,
        )


def branchynet(rows: list[Row]) -> Iterator[Replicated]:
    why = "ResNet-110, 80.70 -> 79.17 % accuracy, trained jointly; here ResNet-18, the backbone stays as it is."
    published = "41.5 / 13.8 / 44.7 % per exit, 1.9 x faster"
    for rule in RULES:
        found = savings(rows, "branchynet", rule, exits=True)
        yield Replicated("BranchyNet", f"entropy exits, {rule} rule", published, found, why)


def earlyon(rows: list[Row]) -> Iterator[Replicated]:
    why = "ResNet-50, its own 1 % target missed; here its own calibration, labels are the backbone's answers."
    found = savings(rows, "earlyon 0.3", None, full=full_accuracy(rows))
    yield Replicated("earlyon", "FLOPs at accuracy lost", "81.4 % at 1.7 points", found, why)


def savings(rows: list[Row], name: str, rule: str | None, *, exits: bool = False, full: float | None = None) -> str:
    """The rows of this name and rule in words. full: the backbone's accuracy, to say what was lost."""
    found = []
    for row in rows:
        if (row["name"], row["rule"]) != (name, rule) or "error" in row:
            continue
        text = (
            f"at {100 * row['tolerance']:g} %: {100 * (1 - row['flops_ratio']):.1f} % fewer FLOPs, "
            f"{100 * (1 - batch_1_mean(row)):.1f} % lower latency, {100 * row['disagreement']:.2f} % differ"
        )
        if exits:
            shares = [*row["details"]["hit_rates"].values()]
            text += ", exits " + " / ".join(f"{100 * share:.1f}" for share in (*shares, 1 - sum(shares)))
        if full is not None and row["accuracy"] is not None:
            text += f", {100 * (full - row['accuracy']):.2f} points lost"
        found.append(text)
    return "; ".join(found) or "no row"


def full_accuracy(rows: list[Row]) -> float | None:
    found = [row["accuracy"] for row in rows if row["name"] == "full model, eager" and "error" not in row]
    return found[0] if found else None


def table(replicated: list[dict[str, Any]]) -> str:
    lines = ["| published by | what | published | measured here | what differs |", "|---|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in replicated])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the case's folder in the --workdir of methods.py")
    parser.add_argument("--rows", type=Path, default=ROWS, help=f"(default: {ROWS.relative_to(common.ROOT)})")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text())["rows"]
    parts = [gati(options.folder), freeze(options.folder, rows), selfxit(rows), branchynet(rows), earlyon(rows)]
    found = [asdict(one) for part in parts for one in part]
    print(table(found))
    common.finish(common.document("Published rows, and what is measured here", found), options.out)


if __name__ == "__main__":
    main()
