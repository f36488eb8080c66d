"""Which request comes when: streams of pictures that change and change back, with the arrival times of a trace.

Nothing here runs a model. No picture comes twice in a stream, so what trained, tuned or certified caches is never what
they are measured on, and requests of one kind are exchangeable.

Shape suffixes: N requests of a stream, P pictures.
"""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from replay.damage import DAMAGES, damaged

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Schedule:
    """How many requests are calm, changed, and calm again. A ramp of 0 requests is a sudden change; otherwise the share
    of changed requests rises over the first `ramp` of the changed ones, and falls over the last."""

    calm: int
    changed: int
    back: int
    ramp: int = 0

    @property
    def length(self) -> int:
        return self.calm + self.changed + self.back

    def share_N(self) -> Floats:
        """The probability that each request is a changed one."""
        share_N = np.zeros(self.length)
        inside = np.arange(self.changed)
        ramp = max(self.ramp, 1)
        rising, falling = (inside + 1) / ramp, (self.changed - inside) / ramp
        share_N[self.calm : self.calm + self.changed] = np.minimum(np.minimum(rising, falling), 1.0)
        return share_N


@dataclass(frozen=True)
class Pictures:
    """uint8 NCHW pictures with their labels, and whether the full model was trained on them."""

    image_P: Bytes
    label_P: Ints
    known_P: Bools

    def __len__(self) -> int:
        return len(self.label_P)

    def rows(self, index: Ints | slice) -> Pictures:
        return Pictures(self.image_P[index], self.label_P[index], self.known_P[index])


@dataclass(frozen=True)
class Stream:
    """Requests in their order. changed_N: whether it is one of the changed traffic. known_N: whether the full model was
    trained on the picture (before it was damaged)."""

    name: str
    image_N: Bytes
    changed_N: Bools
    known_N: Bools

    def __len__(self) -> int:
        return len(self.changed_N)


def calm(name: str, pictures: Pictures) -> Stream:
    """These pictures in their order."""
    return Stream(name, pictures.image_P, np.zeros(len(pictures), dtype=bool), pictures.known_P)


def changing(
    name: str, schedule: Schedule, usual: Pictures, changed: Pictures, damage: str | None, *, seed: int
) -> Stream:
    """Calm requests take the usual pictures one by one, changed ones those of `changed`, damaged where asked.

    Raises ValueError when there are too few: none is sent twice.
    """
    rng = np.random.default_rng(seed)
    changed_N = rng.random(schedule.length) < schedule.share_N()
    wanted = int((~changed_N).sum()), int(changed_N.sum())
    if wanted[0] > len(usual) or wanted[1] > len(changed):
        raise ValueError(
            f"{name}: {wanted[0]} calm and {wanted[1]} changed requests need as many pictures; there are {len(usual)} "
            f"and {len(changed)}"
        )
    image_N = np.empty((schedule.length, *usual.image_P.shape[1:]), dtype=np.uint8)
    known_N = np.empty(schedule.length, dtype=bool)
    image_N[~changed_N], known_N[~changed_N] = usual.image_P[: wanted[0]], usual.known_P[: wanted[0]]
    taken = changed.image_P[: wanted[1]]
    image_N[changed_N] = taken if damage is None else damaged(taken, DAMAGES[damage], rng)
    known_N[changed_N] = changed.known_P[: wanted[1]]
    return Stream(name, image_N, changed_N, known_N)


def of_classes(pictures: Pictures, labels: Collection[int]) -> Pictures:
    return pictures.rows(np.flatnonzero(np.isin(pictures.label_P, list(labels))))


# -- when they come --------------------------------------------------------------------------------


def arrivals_s(trace: Path) -> Floats:
    """Seconds since the first request, of every request of a trace."""
    with trace.open(newline="") as file:
        stamps = [row["TIMESTAMP"] for row in csv.DictReader(file)]
    moments = np.array([_seconds(stamp) for stamp in stamps])
    return np.maximum.accumulate(moments - moments[0])


def _seconds(stamp: str) -> float:
    """Of a stamp with up to nine digits behind the second; datetime knows six."""
    whole, _, fraction = stamp.partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def schedule_s(trace_s: Floats, requests: int, speed_up: float) -> Floats:
    """When each request comes: the gaps of the trace, begun anew where it ends, all shorter by this factor."""
    gaps_s = np.resize(np.diff(trace_s), max(requests - 1, 0))
    return np.concatenate([[0.0], np.cumsum(gaps_s)])[:requests] / speed_up
