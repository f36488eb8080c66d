"""A refit, in a process of its own: `python -m offramp.refitting FOLDER`, with the backbone on standard input.

Reads the job and its inputs from the folder, and leaves there a plan, if one was certified that is cheaper than what
serves, and in `outcome.json` what became of it. The caches that serve now take part beside new ones: traffic is often
too scarce to learn better ones from, and their thresholds are set anew in any case. `offramp.refresh` starts it.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn

from offramp.artifact import load, save
from offramp.caches import Cache
from offramp.candidates import Candidates
from offramp.choosing import Learned, choose
from offramp.cost import flop_shares
from offramp.distillation import TrainingLog
from offramp.fitting import learn
from offramp.methods import Method, method_named
from offramp.model import CachedModel
from offramp.observing import cost_of
from offramp.placement import CacheCosts, Thresholds, expected_cost
from offramp.recording import CERTIFY as HELD_BACK
from offramp.recording import recording_of
from offramp.refresh import CERTIFY, CURRENT, EXAMPLE, JOB, OUTCOME, RESULT, TRAIN, stored
from offramp.splitting import split
from offramp.state import write_whole
from offramp.streams import Batch
from offramp.types import Records

BATCH = 128
TICK_S = 0.05  # how often it is seen to that the share of the processors is kept


@dataclass(frozen=True, kw_only=True)
class Continued(Method):
    """Another method, whose caches are joined by those that serve already."""

    name: ClassVar[str] = "continued"
    source: ClassVar[str] = "docs/design.md"

    base: Method
    serving: Sequence[Cache] = field(default=(), repr=False)

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        self.base.learn(candidates, tolerance)
        points = [point.name for point in candidates.points]
        known: set[str | None] = {None, *(trained.cache.name for trained in candidates.trained)}
        for cache in self.serving:
            if cache.point not in points or cache.reads not in known:
                continue  # its activations, or what it reads, were not kept
            candidates.add(cache, TrainingLog(steps=0, seconds=0.0, final_loss=math.nan))
            known.add(cache.name)

    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        return self.base.thresholds(records, costs, tolerance)


def refit(folder: Path, backbone: nn.Module) -> dict[str, Any]:
    """What became of the job in this folder; where that is a plan, it is there as well."""
    started, job = time.monotonic(), json.loads((folder / JOB).read_text())
    train, newer = stored(folder / TRAIN), stored(folder / CERTIFY)
    now = load(folder / CURRENT, backbone) if (folder / CURRENT).exists() else None
    traffic: Any
    if job["observed"]:
        split_model = split(backbone, stored(folder / EXAMPLE).to(job["device"]))
        traffic, certify = recording_of(split_model, train, newer, job["seed"]), None
    else:
        traffic, certify = as_stream(train.to(job["device"])), as_stream(newer.to(job["device"]))
    learned = learn(
        backbone,
        traffic,
        certify=certify,
        tolerance=job["tolerance"],
        confidence_level=job["confidence_level"],
        method=Continued(base=method_named(job["method"]), serving=() if now is None else renamed(now)),
        time_budget_s=job["time_budget_s"],
        seed=job["seed"],
        progress=False,
    )
    cached = choose(learned, tolerance=job["tolerance"], confidence_level=job["confidence_level"])
    outcome: dict[str, Any] = {
        "certified": False,
        "tested": cached.certificate.candidates_tested > 1,  # the first candidate has no caches
        "errors": cached.certificate.errors,
        "n": cached.certificate.n,
        "bound": cached.certificate.bound,
        "caches": [planned.name for planned in cached.plan.caches],
    }
    if not cached.plan.caches:
        return outcome | {"reason": cached.plan.reason, "seconds": time.monotonic() - started}
    limits = {planned.name: planned.threshold for planned in cached.plan.caches}
    cost, cost_now = flops(learned, limits, limits_now(now, job["answers_from"]))
    if job["observed"]:  # without inputs it cannot be told what caches on them would say, only what they have cost
        cost_now = cost_of(newer)
    outcome |= {"cost": cost, "cost_now": cost_now, "seconds": time.monotonic() - started}
    if cost >= cost_now:
        return outcome | {"reason": f"it is not cheaper than what serves: {cost:.3f} and {cost_now:.3f} of the FLOPs"}
    save(cached, folder / RESULT)
    return outcome | {"certified": True}


def as_stream(rows: Batch) -> list[Any]:
    """Batches as a user's stream yields them. All inputs of a model are passed one way: by position, or by name."""
    batches = (rows.rows(slice(at, at + BATCH)) for at in range(0, len(rows), BATCH))
    return [dict(batch.kwargs) if batch.kwargs else batch.args for batch in batches]


def flops(learned: Learned, *plans: Mapping[str, float]) -> list[float]:
    """FLOPs of a newer request under each of these plans, in units of the backbone's. A plan: the confidences that the
    candidates named there answer from. No model runs: all that they say was recorded."""
    said = learned.candidates.records(learned.trained, HELD_BACK)
    names, costs = [one.cache.name for one in learned.trained], CacheCosts(*flop_shares(learned.costs))
    return [expected_cost(said, [limits.get(name, math.inf) for name in names], costs) for limits in plans]


def limits_now(now: CachedModel | None, answers_from: Sequence[float | None]) -> dict[str, float]:
    """From which confidence each cache that serves answers now, by the name that it has among the candidates."""
    if now is None:
        return {}
    names = (old_name(planned.name) for planned in now.plan.caches)
    return {name: limit for name, limit in zip(names, answers_from, strict=True) if limit is not None}


def renamed(serving: CachedModel) -> list[Cache]:
    """The caches of the model that serves, under names that no new one has."""
    caches = []
    for cache in serving.caches:
        own = copy.deepcopy(cast(Cache, cache))
        own.name = old_name(own.name)
        own.reads = None if own.reads is None else old_name(own.reads)
        caches.append(own)
    return caches


def old_name(name: str) -> str:
    """`input/student16x1` becomes `input/student16x1@1`, and that becomes `...@2`: the age of a cache in refits."""
    stem, _, age = name.partition("@")
    return f"{stem}@{int(age or 0) + 1}"


# -- the process -----------------------------------------------------------------------------------


@contextmanager
def keeping_to_share(share: float) -> Iterator[None]:
    """Within, this process takes at most this share of all processors on average: it sleeps when it is ahead."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, math.floor(share * processors)))
    os.nice(10)
    started, used = time.monotonic(), time.process_time()

    def pause(*_: object) -> None:
        ahead_s = (time.process_time() - used) / (share * processors) - (time.monotonic() - started)
        if ahead_s > 0:
            time.sleep(ahead_s)

    signal.signal(signal.SIGALRM, pause)
    signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def end_with_parent() -> None:
    """The parent holds the other end of our standard input as long as it lives."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(folder: Path) -> None:
    length = int.from_bytes(sys.stdin.buffer.read(8), "little")
    # Our parent's own model, through a pipe.
    backbone = torch.load(io.BytesIO(sys.stdin.buffer.read(length)), weights_only=False)
    end_with_parent()
    with keeping_to_share(json.loads((folder / JOB).read_text())["cpu_share"]):
        outcome = refit(folder, backbone)
    write_whole(folder / OUTCOME, json.dumps(outcome).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
