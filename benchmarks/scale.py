"""Time, memory and disk of `offramp.fit` against the number of inputs, each size in a process of its own.

The backbone is a small residual network on CIFAR-10 images of 16 x 16 pixels, trained here for some seconds. The stream
makes its inputs as it goes: a random image, shifted by up to two pixels, with noise, so that no two are equal; nothing
of it is kept in memory. Every size trains the same caches for the same number of steps, so that what grows is what the
inputs cost: recording them, and what each candidate says about them.

The memory is limited, not only observed. What the system cannot take back (anonymous memory) is under RLIMIT_DATA: a
fit that needs more fails. Mapped pages of recorded files it takes back when others need the room; here that is done
with MADV_PAGEOUT as soon as three quarters of the limit are resident, so that reading them again from disk is part of
the time. Time is given twice, because the machine may be shared: by the clock, and of the processor.

    python benchmarks/scale.py --out benchmarks/results/scale.json
    python benchmarks/scale.py --sizes 10000 30000
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import offramp
from offramp.caches import LearnedCache
from offramp.candidates import Candidates
from offramp.distillation import Recipe
from offramp.methods.offramp import Offramp
from offramp.search import Search

SIDE, CLASSES, BATCH = 16, 10, 100
MADV_PAGEOUT = 21  # Linux 5.4
EVERY_S = 0.05  # between two looks at the process
BACKBONE_STEPS = 400
SIZES = (1_000_000, 300_000, 100_000, 30_000, 10_000)  # what fails, fails early
TRAINED_ROWS = 20_000  # that every cache sees


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.skip(x))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.layers = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(F.relu(self.stem(x))).mean((2, 3)))


class Traffic:
    """`size` different inputs, made as they are asked for: shifted images with noise."""

    def __init__(self, images: np.ndarray, size: int, seed: int = 0) -> None:
        self.images, self.size, self.seed = images, size, seed

    def __len__(self) -> int:
        return -(-self.size // BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        random, generator = np.random.default_rng(self.seed), torch.Generator().manual_seed(self.seed)
        for start in range(0, self.size, BATCH):
            rows = random.integers(len(self.images), size=min(BATCH, self.size - start))
            yield varied(normalized(self.images[rows]), generator)


def varied(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """All shifted by the same few pixels, each with its own noise."""
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
    noise = 0.05 * torch.randn(images_BCHW.shape, generator=generator)
    return images_BCHW.roll((down, right), (2, 3)) + noise


def normalized(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).float() / 64 - 2


class BriefSearch(Search):
    def recipe(self, cache: LearnedCache) -> Recipe:
        return dataclasses.replace(super().recipe(cache), rows=TRAINED_ROWS)


class Brief(Offramp):
    """Our own method, with equally short trainings."""

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        BriefSearch(candidates, tolerance=tolerance).run()


# -- one size, in its own process ------------------------------------------------------------------


@dataclass
class Watch:
    """What the process used while it ran: (wall s, CPU s, anonymous bytes) at many moments, the most disk, and how
    often mapped pages were taken from it because more than `resident_limit` bytes were resident."""

    resident_limit: float
    moments: list[tuple[float, float, int]] = field(default_factory=list)
    disk: int = 0
    taken_back: int = 0

    def look(self) -> None:
        self.moments.append((time.monotonic(), time.process_time(), status("RssAnon")))
        if status("VmRSS") > self.resident_limit:
            take_back()
            self.taken_back += 1

    def phase(self, start: float, end: float) -> dict[str, float]:
        """Processor time between two moments, and the most anonymous memory."""
        walls, cpu, anonymous = (np.array(column) for column in zip(*self.moments, strict=True))
        inside = anonymous[(walls >= start - EVERY_S) & (walls <= end + EVERY_S)]
        return {
            "cpu_s": float(np.interp(end, walls, cpu) - np.interp(start, walls, cpu)),
            "anonymous_peak_bytes": int(inside.max()),
        }


@contextmanager
def watching(resident_limit: float) -> Iterator[Watch]:
    watch, ended = Watch(resident_limit), threading.Event()

    def run() -> None:
        for turn in range(sys.maxsize):
            watch.look()
            if turn % 20 == 0:
                watch.disk = max(watch.disk, mapped_bytes())
            if ended.wait(EVERY_S):
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


def status(name: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def mapped() -> Iterator[tuple[str, int, int]]:
    """(file, first address, bytes) of the mapped files that have no name: what the fit keeps on disk."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("(deleted)"):
            span, _, _, _, inode = line.split()[:5]
            low, high = (int(edge, 16) for edge in span.split("-"))
            yield inode, low, high - low


def mapped_bytes() -> int:
    return sum({inode: size for inode, _, size in mapped()}.values())


def take_back() -> None:
    """Evict the pages of these files, as a system short of memory does. Harmless where a map ends meanwhile."""
    libc = ctypes.CDLL(None)
    for _, low, size in mapped():
        libc.madvise(ctypes.c_void_p(low), ctypes.c_size_t(size), MADV_PAGEOUT)


def measure(size: int, folder: Path, limit_bytes: int) -> dict[str, Any]:
    """One fit under the limit, as a row."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    backbone = Backbone().eval()
    backbone.load_state_dict(load_file(folder / "backbone.safetensors"))
    stream = Traffic(np.load(folder / "images.npy"), size)
    before = status("RssAnon")
    with watching(0.75 * limit_bytes) as watch:
        started = time.monotonic()
        cached = offramp.fit(backbone, stream, method=Brief(), progress=False)
        watch.disk = max(watch.disk, mapped_bytes())
        wall_s = time.monotonic() - started
    report = cached.report()
    phases, start = {}, started
    for name, seconds in report["fit"]["seconds"].items():
        phases[name] = {"wall_s": seconds} | watch.phase(start, start + seconds)
        start += seconds
    return {
        "inputs": size,
        "parts": report["fit"]["inputs"],
        "wall_s": wall_s,
        "cpu_s": watch.phase(started, started + wall_s)["cpu_s"],
        "phases": phases,
        "anonymous_before_bytes": before,
        "anonymous_peak_bytes": max(moment[2] for moment in watch.moments),
        "resident_peak_bytes": status("VmHWM"),
        "pages_taken_back": watch.taken_back,
        "limit_bytes": limit_bytes,
        "disk_bytes": watch.disk,
        "candidates": len(report["caches"]),
        "training_s": sum(cache["training"]["seconds"] for cache in report["caches"]),
        "plan": report["plan"],
        "certificate": {name: report["certificate"][name] for name in ("n", "errors", "bound")},
    }


# -- all sizes -------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Small images and a backbone trained on them, for the processes to read."""
    images = common.images("cifar10/test.parquet", normalized, side=SIDE)
    np.save(folder / "images.npy", images.images)
    torch.manual_seed(0)
    backbone, generator = Backbone().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=BACKBONE_STEPS)
    labels = torch.from_numpy(images.labels)
    for _ in range(BACKBONE_STEPS):
        rows = torch.randint(len(labels), (128,), generator=generator)
        inputs = varied(normalized(images.images[rows.numpy()]), generator)
        loss = F.cross_entropy(backbone(inputs), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_file(backbone.state_dict(), folder / "backbone.safetensors")


def line(sizes: list[int], seconds: list[float]) -> dict[str, float]:
    """Least squares on relative residuals, so that the small sizes count as well: seconds = fixed + each * size."""
    design = np.column_stack([np.ones(len(sizes)), sizes]) / np.array(seconds)[:, None]
    fixed, each = np.linalg.lstsq(design, np.ones(len(sizes)), rcond=None)[0]
    return {
        "fixed_s": float(fixed),
        "each_ms": 1000 * float(each),
        "largest_deviation": float(np.abs(design @ [fixed, each] - 1).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--memory", type=float, default=4.0, help="limit of the memory in GiB (default 4)")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # measure here, with what is in this folder
    options = parser.parse_args()
    limit_bytes = int(options.memory * 2**30)
    if options.one:
        print(json.dumps(measure(options.sizes[0], options.one, limit_bytes)))
        return
    if not common.SHARED.exists():
        parser.exit(0, "skipped: the data in ../shared is not there\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for size in options.sizes:
            command = [sys.executable, __file__, "--one", folder, "--sizes", str(size), "--memory", str(options.memory)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            rows.sort(key=lambda row: int(row["inputs"]))
            print(table(rows), file=sys.stderr, flush=True)
            if options.out:  # the next size may take an hour
                common.finish(document(rows), options.out)
    print(table(rows))
    common.finish(document(rows), options.out)


def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return common.document("Scale: time, memory and disk against the number of inputs", rows)


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/results.md shows them, with the lines through the processor times."""
    lines = [
        "| inputs | record: clock, processor | train | choose | whole fit | memory, most: anonymous "
        "| with mapped pages | pages taken back | disk | certification inputs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [row["phases"][name] for name in ("record", "train", "choose")] + [row]
        clocks = " | ".join(f"{part['wall_s']:.0f} s, {part['cpu_s']:.1f} s" for part in times)
        anonymous, resident, disk = (
            f"{row[f'{name}_bytes'] / 2**20:,.0f} MiB" for name in ("anonymous_peak", "resident_peak", "disk")
        )
        lines.append(
            f"| {row['inputs']:,} | {clocks} | {anonymous} | {resident} | {row['pages_taken_back']} times | {disk} | "
            f"{row['certificate']['n']:,} |"
        )
    return "\n".join([*lines, "", *(fitted(rows, name) for name in ("record", "whole fit"))])


def fitted(rows: list[dict[str, Any]], name: str) -> str:
    """The line through the processor times of a phase, in words."""
    if len(rows) < 3:
        return ""
    times = [row["cpu_s"] if name == "whole fit" else row["phases"][name]["cpu_s"] for row in rows]
    found = line([row["inputs"] for row in rows], times)
    return (
        f"Processor time, {name}: {found['fixed_s']:.1f} s + {found['each_ms']:.3f} ms per input; largest deviation of "
        f"a size from that line {100 * found['largest_deviation']:.0f} %.\n"
    )


if __name__ == "__main__":
    main()
