"""What near repeats within a stream are worth: two fixed-camera clips, frame by frame in time order, without a plan.

Backbones of ../shared/models: MobileNetV2 (ImageNet) at the clips' 256 x 144, ResNet-18 (CIFAR-10) at 32 x 32. Neither
was made for these scenes, so both often waver between classes. Settings are chosen on the first half of each clip, one
for both backbones: the largest share answered where at most `--tolerance` of all requests get another answer than the
full model's. All figures shown are of the second halves, which begin with empty caches.

Opponents: ResultCache (exact repeats), and the fixed rule that reuses the last answer for some frames (as DeepCache
reuses features, arXiv 2312.00858), which runs the model as often as the recent cache does, evenly spaced.

    python benchmarks/recent.py --out benchmarks/results/recent.json
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from overhead import cached_model
from PIL import Image
from torch import Tensor, nn

from offramp.caches.recent import GRID as PLACES
from offramp.caches.recent import RecentCache
from offramp.caches.result import ResultCache, Results
from offramp.splitting import split

GRID: dict[str, tuple[Any, ...]] = {
    "distance": (0.02, 0.05, 0.1, 0.2),
    "margin": (0.0, 0.2, 0.4, 0.6),
    "agreements": (1, 3),
    "max_gap": (4, 16),
}
TRUSTED = 10  # audits that agreed, after which an entry answers all but one in 256 requests
Frames = Sequence[tuple[str, int]]  # key of the stream, and number of the frame
Settings = Mapping[str, Any]


class Backbone:
    """A model with its inputs, and what it says to each."""

    def __init__(self, name: str, model: nn.Module, inputs: Tensor) -> None:
        self.name, self.model, self.inputs = name, model, inputs
        self.pooled = F.adaptive_avg_pool2d(inputs, PLACES)  # a recent cache sees the same in it, and sooner
        with torch.inference_mode():
            self.logits = torch.cat([model(row) for row in inputs.split(1)])
        self.answers = self.logits.argmax(1).tolist()


def clips() -> tuple[NDArray[np.str_], Tensor]:
    """Of each frame the name of its clip, and the picture as uint8, in time order."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(common.SHARED / "data" / "video" / "frames.parquet")
    pictures = [np.asarray(Image.open(io.BytesIO(cell)).convert("RGB")) for cell in table["image"].to_pylist()]
    return np.array(table["video"].to_pylist()), torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())


def backbones(frames: Tensor) -> list[Backbone]:
    zoo = common.zoo()
    small = F.interpolate(frames.float(), (32, 32), mode="bilinear", antialias=True)
    return [
        Backbone("MobileNetV2", zoo.mobilenet_v2_imagenet(), frames.float() / 127.5 - 1),
        Backbone("ResNet-18 (CIFAR-10)", zoo.resnet18_cifar10(), zoo.normalize(small, "cifar10")),
    ]


# --- replays --------------------------------------------------------------------------------------


def replay(backbone: Backbone, frames: Frames, results: Results) -> Counter[str]:
    """One frame a call, with the recorded answer where the model would run."""
    found = Counter(requests=len(frames))
    inputs = backbone.pooled if isinstance(results, RecentCache) else backbone.inputs
    for key, number in frames:
        rows = slice(number, number + 1)
        with RecentCache.stream(key):
            recalled = results.recall((inputs[rows],), backbone.name, backbone.logits[:0])
            assert recalled is not None
            results.remember(recalled, backbone.logits[rows][recalled.run_A], torch.ones(len(recalled.run_A)))
        for logits_C in recalled.logits_HC:
            found.update(answered=1, wrong=int(logits_C.argmax()) != backbone.answers[number])
    return found


def recent(backbone: Backbone, streams: Sequence[Frames], settings: Settings, seeds: int) -> dict[str, Any]:
    """Sums over streams and seeds, each with a cache of its own."""
    found = Counter[str]()
    estimated = 0.0
    for frames, seed in itertools.product(streams, range(seeds)):
        recents = RecentCache(seed=seed, **settings)
        recents.answering = True
        found += replay(backbone, frames, recents)
        totals = recents.totals()
        found.update(audits=totals.audits, audit_failures=totals.audit_failures)
        estimated += totals.estimated_disagreements
    same = shares(found)
    return same | {
        "estimated_wrong": estimated / found["requests"],
        "reused_wrong": reused(backbone, streams, same["answered"]),
    }


def exact(backbone: Backbone, streams: Sequence[Frames]) -> dict[str, Any]:
    found = Counter[str]()
    for frames in streams:
        found += replay(backbone, frames, ResultCache())
    return shares(found)


def shares(found: Mapping[str, int]) -> dict[str, Any]:
    """Of all requests; requests over all seeds."""
    names = ("answered", "wrong", "audits", "audit_failures")
    return {"requests": found["requests"]} | {name: found.get(name, 0) / found["requests"] for name in names}


def reused(backbone: Backbone, streams: Sequence[Frames], share: float) -> float:
    """Wrong answers, of all requests, when this share of the frames of a key get its last answer, evenly spaced."""
    wrong = 0
    for frames in streams:
        last: dict[str, tuple[int, int]] = {}  # per key its frames so far, and the answer in use
        for key, number in frames:
            seen, answer = last.get(key, (0, -1))
            truth = backbone.answers[number]
            if seen == 0 or int((seen + 1) * (1 - share)) > int(seen * (1 - share)):
                answer = truth
            wrong += answer != truth
            last[key] = seen + 1, answer
    return wrong / sum(map(len, streams))


# --- what is compared -----------------------------------------------------------------------------


def settings_of(values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(GRID, values, strict=True))


def chosen(models: Sequence[Backbone], streams: Sequence[Frames], tolerance: float, seeds: int) -> dict[str, Any]:
    """The settings that answer most within the tolerance, over all models, with what they did."""
    best: tuple[float, dict[str, Any]] | None = None
    for values in itertools.product(*GRID.values()):
        runs = [recent(model, streams, settings_of(values), seeds) for model in models]
        answered, wrong = (float(np.mean([run[name] for run in runs])) for name in ("answered", "wrong"))
        if wrong <= tolerance and (best is None or answered > best[0]):
            best = answered, settings_of(values) | {"first_half": {"answered": answered, "wrong": wrong}}
    if best is None:
        raise SystemExit(f"no setting disagrees on at most {tolerance:.1%} of the requests of the first halves")
    return best[1]


def compared(
    backbone: Backbone, parts: Mapping[str, Frames], settings: Settings, seeds: int
) -> Iterator[dict[str, Any]]:
    """Rows of one backbone on the second halves: what and where, shares of all requests."""
    everywhere = list(parts.values())
    for name, streams in [*((name, [frames]) for name, frames in parts.items()), ("both", everywhere)]:
        yield {"what": "the settings chosen", "where": name} | recent(backbone, streams, settings, seeds)
        yield {"what": "exact repeats", "where": name} | exact(backbone, streams)
    for name, values in GRID.items():
        for value in values:
            changed = dict(settings) | {name: value}
            yield {"what": f"{name} {value:g}", "where": "both"} | recent(backbone, everywhere, changed, seeds)
    mixed = [frame for pair in zip(*everywhere, strict=False) for frame in pair]
    shared = [("one key", number) for _, number in mixed]
    for entries in (1, 2, 8, 32):
        for what, frames in (("a key per clip", mixed), ("one key", shared)):
            found = recent(backbone, [frames], dict(settings) | {"entries": entries}, seeds)
            yield {"what": f"{what}, entries {entries}", "where": "interleaved"} | found


# --- time -----------------------------------------------------------------------------------------


def times(backbone: Backbone, frame: int, settings: Settings, budget_s: float) -> dict[str, Any]:
    """Median milliseconds of a call: the model, the same with a look-up that misses or is silent, and a hit."""
    row = backbone.inputs[frame : frame + 1]
    cached = cached_model(split(backbone.model, row), [], 2.0)
    calls = {"model_ms": _call(cached, row, None)}
    hit, silent, miss = (RecentCache(**settings) for _ in range(3))
    with RecentCache.stream("a camera"):
        for recents in (hit, silent):  # until the entry answers nearly always
            cached.result_cache = recents
            recents.margin, recents.max_gap, recents.answering = 0.0, 1e9, True
            while recents.totals().audits < TRUSTED:
                cached(row)
        silent.answering = False
        calls |= {"hit_ms": _call(cached, row, hit), "silent_ms": _call(cached, row, silent)}
        calls["miss_ms"] = _call(cached, row, miss, new=True)
        spent: dict[str, list[float]] = {name: [] for name in calls}
        started = time.perf_counter()
        while time.perf_counter() - started < budget_s:
            for name, call in calls.items():
                begun = time.perf_counter()
                call()
                spent[name].append(1000 * (time.perf_counter() - begun))
    return {name: float(np.median(values)) for name, values in spent.items()}


def _call(cached: Any, row: Tensor, results: Results | None, *, new: bool = False) -> Callable[[], None]:
    scale = itertools.count(1)

    def call() -> None:
        cached.result_cache = results
        cached(row * (-1.5) ** next(scale) if new else row)

    return call


# --- the page -------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows, as docs/results.md shows them."""
    lines = [
        "| backbone | what | where | answered | of all requests wrong | the same, estimated by the audits | wrong when "
        "the last answer is reused as often | audits |",
        "|---" * 8 + "|",
    ]
    for row in (row for row in rows if "what" in row):
        told = [f"{row[name]:.2%}" if name in row else "-" for name in ("wrong", "estimated_wrong", "reused_wrong")]
        lines.append(
            f"| {row['backbone']} | {row['what']} | {row['where']} | {row['answered']:.1%} | {' | '.join(told)} | "
            f"{row['audits']:.1%} |"
        )
    (picked,) = (row for row in rows if "settings" in row)
    named = ", ".join(f"{name} {picked['settings'][name]:g}" for name in GRID)
    first = picked["first_half"]
    timed = [
        f"- {row['backbone']}: the model {row['model_ms']:.2f} ms; a call that is answered {row['hit_ms']:.2f} ms, one "
        f"that is looked up and runs {row['silent_ms']:.2f} ms (entry found, silent) or {row['miss_ms']:.2f} ms (new)."
        for row in rows
        if "model_ms" in row
    ]
    chosen_line = (
        f"Chosen on the first halves at {picked['tolerance']:.1%} of all requests wrong: {named}; there "
        f"{first['answered']:.1%} were answered and {first['wrong']:.2%} wrong. Rows that name one setting change it "
        "alone."
    )
    return "\n".join([chosen_line, "", *lines, "", "Medians of one call at batch 1:", "", *timed])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of all requests (default 0.01)")
    parser.add_argument("--seeds", type=int, default=5, help="of the audits (default 5)")
    parser.add_argument("--latency-budget", type=float, default=10, help="seconds of timing per backbone (default 10)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's)")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    if not common.SHARED.exists():
        parser.exit(0, "skipped: the data and models in ../shared are not there\n")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    names, frames = clips()
    models = backbones(frames)
    halves: list[dict[str, Frames]] = [{}, {}]
    for name in np.unique(names).tolist():
        numbers = np.flatnonzero(names == name).tolist()
        middle = len(numbers) // 2
        for half, part in zip(halves, (numbers[:middle], numbers[middle:]), strict=True):
            half[name] = [(name, number) for number in part]
    picked = chosen(models, list(halves[0].values()), options.tolerance, min(options.seeds, 2))
    first_half = picked.pop("first_half")
    print(f"chosen: {picked}, {first_half}", file=sys.stderr, flush=True)
    rows: list[dict[str, Any]] = [{"settings": picked, "tolerance": options.tolerance, "first_half": first_half}]
    for model in models:
        found = [*compared(model, halves[1], picked, options.seeds)]
        found.append(times(model, 0, picked, options.latency_budget))
        rows += [{"backbone": model.name} | row for row in found]
    print(table(rows))
    common.finish(common.document("Near repeats within a stream", rows), options.out)


if __name__ == "__main__":
    main()
