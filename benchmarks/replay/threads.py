"""16 threads call while plans are swapped: is every answer one plan's, as a whole?

Two plans take turns, with steps down their ladders in between. Each answers every batch differently, row by row: their
caches are untrained and as good as random, so nothing is learned. What every rung answers to every batch is worked out
afterwards, alone, and compared bit by bit.
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import overhead
import torch
from merging import Half
from torch import Tensor

import offramp
from offramp.ladder import BYPASSED, Rung
from offramp.model import CachedModel
from offramp.online_model import OnlineModel
from offramp.refresh import Candidate
from offramp.splitting import split
from replay.service import cifar, importable_zoo, tell

POSITIONS, THRESHOLD = ((2, 4), (4, 6)), 0.6  # of the caches of each plan
BATCHES, ROWS = 6, 8
NO_ALARMS = 1e12  # a run length: steps are taken by hand here
NO_REFITS = 10**9  # so many inputs to learn from never come
ROUND = ("other plan", "down", "back", "down", "down", "up")


def plans_of(sample: Tensor) -> list[CachedModel]:
    """ResNet-18 under two plans, each with two caches that answer some images."""
    torch.manual_seed(0)
    split_model = split(importable_zoo().resnet18_cifar10(), sample[:4])
    return [
        overhead.cached_model(
            split_model, [overhead.cache_at(split_model, position, Half) for position in positions], THRESHOLD
        )
        for positions in POSITIONS
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    zoo = importable_zoo()
    pictures = torch.from_numpy(cifar("test", options.workdir, known=False).image_P[: BATCHES * ROWS])
    batches = list(zoo.normalize(pictures, "cifar10").split(ROWS))
    first, second = plans_of(batches[0])
    logging.getLogger("offramp").setLevel(logging.ERROR)  # each step is a warning
    policy = offramp.Refresh(train_rows=NO_REFITS)
    settings: dict[str, Any] = {"shadow": options.shadow, "run_length": NO_ALARMS, "seed": options.seed}
    with offramp.online(first, **settings, refresh=policy) as model:
        rungs, said, seconds = crossfire(model, second, batches, options.callers, options.swaps)
        report = model.report()
    tell(f"{len(said)} answers in {seconds:.0f} s, {len(rungs)} rungs")
    whole, other = judged(rungs, said, batches)
    return {
        "part": "threads",
        "note": f"{ROWS} pictures a call, torch on {options.threads} thread.",
        "rows": [
            {
                "callers": options.callers,
                "swaps": options.swaps,
                "seconds": seconds,
                "answers": len(said),
                "rungs": len(rungs),
                "answers_by_rung": whole,
                "answers_of_no_plan": other,
                "requests_counted": report["requests"],
                "requests_sent": ROWS * len(said),
            }
        ],
    }


def crossfire(
    model: OnlineModel, other: CachedModel, batches: list[Tensor], callers: int, swaps: int
) -> tuple[list[Rung], list[tuple[int, Tensor]], float]:
    """Every rung that was served, every answer with the number of its batch, and how long it took."""
    said: list[list[tuple[int, Tensor]]] = [[] for _ in range(callers)]
    over, errors = threading.Event(), list[BaseException]()

    def call(thread: int) -> None:
        number = thread
        try:
            with torch.inference_mode():
                while not over.is_set():
                    number = (number + 1) % len(batches)
                    said[thread].append((number, model(batches[number])))
        except BaseException as error:  # told by the thread that waits
            errors.append(error)

    threads = [threading.Thread(target=call, args=(thread,)) for thread in range(callers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    rungs = [model.rung]
    for step in steps(model, other, swaps):
        before = sum(map(len, said))
        step()
        rungs.append(model.rung)
        while sum(map(len, said)) == before and not errors:  # between two swaps somebody is answered
            time.sleep(0.001)
    over.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return rungs, [one for mine in said for one in mine], time.perf_counter() - started


def steps(model: OnlineModel, other: CachedModel, swaps: int) -> Iterator[Callable[[], object]]:
    """In rounds: the other plan, as if a refit had brought it; a step down; the first again; two steps down; up."""

    def swap() -> None:
        model._adopt(Candidate(other, "another plan", {}))

    does = {"other plan": swap, "down": model.step_back, "back": model.roll_back, "up": model.restore}
    for number in range(swaps):
        yield does[ROUND[number % len(ROUND)]]


def judged(rungs: list[Rung], said: list[tuple[int, Tensor]], batches: list[Tensor]) -> tuple[dict[str, int], int]:
    """How many answers are each rung's, and how many no rung's. Equal outputs of two rungs count for the first."""
    different = {(rung.name, rung.answers_from, id(rung.model.plan)): rung for rung in rungs}
    counts, strange = Counter[str](), 0
    for number, batch in enumerate(batches):
        with torch.inference_mode():
            outputs = {_bytes(rung.model(batch)): _name(rung) for rung in reversed(list(different.values()))}
        for mine, output in said:
            if mine == number:
                name = outputs.get(_bytes(output))
                strange += name is None
                counts.update([] if name is None else [name])
    return dict(counts), strange


def _name(rung: Rung) -> str:
    names = [planned.name for planned in rung.model.plan.caches]
    return rung.name if rung.name == BYPASSED else f"{rung.name}: {', '.join(names)}"


def _bytes(output: Tensor) -> bytes:
    return np.ascontiguousarray(output.numpy()).tobytes()


def table(document: dict[str, Any]) -> str:
    lines = ["| threads that call | swaps | seconds | answers | of each rung | of no plan |", "|---" * 6 + "|"]
    for row in document["rows"]:
        by_rung = "; ".join(f"{name}: {count:,}" for name, count in row["answers_by_rung"].items())
        lines.append(
            f"| {row['callers']} | {row['swaps']:,} | {row['seconds']:.0f} | {row['answers']:,} | {by_rung} "
            f"| {row['answers_of_no_plan']} |"
        )
    return "\n".join(lines)


def quick(options: argparse.Namespace) -> None:
    options.swaps = 60
