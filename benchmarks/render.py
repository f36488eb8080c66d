"""Write docs/results.md, and its pictures, from the JSON documents in benchmarks/results/.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ablations
import breaches
import common
import comparison
import detection_delay
import merging
import online
import optimized
import overhead
import recent
import replication
import scale

RESULTS = common.ROOT / "benchmarks" / "results"
PAGE = common.ROOT / "docs" / "results.md"
PICTURES = PAGE.parent / "pictures"

HEAD = """# Results

Written by `python benchmarks/render.py` from the JSON documents in `benchmarks/results/`; the command that made each of
them stands above its table. Every row: caches trained, tuned, certified and evaluated on disjoint images; time is that
of the whole call, caches and copies included, over that of the full model, measured alternately in one run (below 1 is
faster), in eager mode. The oracle lets each request leave at the first enabled cache that agrees. Certificates hold at
95 % confidence. Everything was measured on CPUs; nothing has been measured on a GPU yet.
"""

MISSING = "\nNot measured yet: {names}.\n"

SECTIONS = (
    *(
        "cifar10",
        "cifar10_one_core",
        "cifar10_long",
        "optimized_cifar10",
        "optimized_cifar10_int8",
        "optimized_cifar10_epyc",
        "optimized_cifar10_epyc_before",
        "optimized_cifar10_no_compiler",
        "optimized_resnet56_cifar10",
        "optimized_resnet56_cifar10_before",
        "optimized_mobilenet_v2",
        "optimized_sst2",
        "methods_cifar10",
        "methods_resnet56_cifar10",
        "methods_sst2",
        "methods_mobilenet_v2",
    ),
    *(
        "ablations",
        "ablations_records",
        "ablations_p95",
        "breaches",
        "breaches_own",
        "replication",
        "mobilenet_v2",
        "resnet56_cifar100",
    ),
    *("learning_curve", "overhead", "merging", "scale", "split_table", "detection_delay", "recent"),
    *("online_cold", "online_cold_own", "online_cold_first", "online_drift", "online_drift_mild"),
    *("online_faults", "online_threads", "online_cost"),
)


def main() -> None:
    parts, missing = [HEAD], []
    for name in SECTIONS:
        file = RESULTS / f"{name}.json"
        if file.exists():
            parts.append(section(name, json.loads(file.read_text())))
        else:
            missing.append(name)
    if missing:
        parts.append(MISSING.format(names=", ".join(missing)))
    PAGE.write_text("\n".join(parts))
    print(json.dumps({"page": str(PAGE.relative_to(common.ROOT)), "missing": missing}))


def section(name: str, document: dict[str, Any]) -> str:
    hardware, versions = document["hardware"], document["versions"]
    gpu = f"{hardware['gpu']}, " if "gpu" in hardware else ""
    facts = (
        f"`{document['command']}` on {document['date']}, commit {document['commit']}; {gpu}{hardware['cpu']}, "
        f"{hardware['threads']} threads; torch {versions['torch']}, Python {versions['python']}."
        f" {document.get('note', '')}"
    ).rstrip()
    body = DRAWN.get(name.split("_")[0], fits)(document)
    return f"## {document['benchmark']}\n\n{facts}\n\n{picture(name, document)}{body}\n"


def picture(name: str, document: dict[str, Any]) -> str:
    """The line that shows the picture of a document, which is written beside the page; empty where it has none."""
    drawing = online.picture(document) if name.startswith("online") else None
    if drawing is None:
        return ""
    PICTURES.mkdir(exist_ok=True)
    file = PICTURES / f"{name}.svg"
    file.write_text(drawing)
    return f"![{document['benchmark']}]({file.relative_to(PAGE.parent)})\n\n"


def fits(document: dict[str, Any]) -> str:
    rows = document["rows"]
    table = common.table(rows)
    if "unlabelled_inputs" in rows[0]:
        sizes = [f"{row['unlabelled_inputs']:,}" for row in rows]
        lines = table.splitlines()
        lines[0], lines[1] = "| inputs " + lines[0], "|---" + lines[1]
        table = "\n".join(lines[:2] + [f"| {size} {line}" for size, line in zip(sizes, lines[2:], strict=True)])
    empty = [f"Seed {row['seed']}, {100 * row['tolerance']:g} %: {row['plan']['reason']}" for row in rows]
    reasons = [line for line, row in zip(empty, rows, strict=True) if not row["plan"]["caches"]]
    return table + ("\n\nPlans without caches. " + " ".join(reasons) if reasons else "") + "\n\n" + candidates(rows[0])


def candidates(row: dict[str, Any]) -> str:
    lines = [
        f"Candidates of the first row (trained on {row['inputs']['train']:,} inputs, "
        f"{row['inputs']['augmented_copies']:,} augmented copies):",
        "",
        "| cache | agreement | AUROC of its best confidence | share of FLOPs | KiB | training s | enabled |",
        "|---|---|---|---|---|---|---|",
    ]
    for cache in row["candidates"]:
        best = max((value for value in cache["auroc"].values() if value is not None), default=float("nan"))
        lines.append(
            f"| `{cache['name']}` | {100 * cache['agreement']:.1f} % | {best:.3f} | "
            f"{100 * cache['flops_share']:.2f} % "
            f"| {cache['bytes'] / 1024:.0f} "
            f"| {cache['training']['seconds']:.0f} | {'yes' if cache['enabled'] else ''} |"
        )
    return "\n".join(lines)


def families(document: dict[str, Any]) -> str:
    lines = ["| model | split points | traced by | proof | seconds |", "|---|---|---|---|---|"]
    for row in document["rows"]:
        if row["status"] == "ok":
            proof = "passed" if row["proved"] else "not passed"
            lines.append(
                f"| {row['family']} | {row['points']} | {row['method']} | {proof} | {row['split_seconds']:.1f} |"
            )
        else:
            lines.append(f"| {row['family']} | - | - | {row['status']}: {row['reason']} | - |")
    return "\n".join(lines)


# By the first word of the document's name; `fits` draws the others.
DRAWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "methods": lambda document: comparison.tables(document["rows"]),
    "ablations": lambda document: ablations.table(document["rows"]),
    "breaches": lambda document: breaches.table(document["rows"]),
    "replication": lambda document: replication.table(document["rows"]),
    "optimized": lambda document: optimized.tables(document["rows"]),
    "overhead": lambda document: overhead.table(document["rows"]),
    "merging": lambda document: merging.table(document["rows"]),
    "scale": lambda document: scale.table(document["rows"]),
    "split": families,
    "detection": lambda document: detection_delay.table(document["rows"]),
    "recent": lambda document: recent.table(document["rows"]),
    "online": online.drawn,
}


if __name__ == "__main__":
    main()
