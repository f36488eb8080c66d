"""Which caches are worth training, in three rounds.

    students   networks with their own trunk on the raw input, priced at a few percent of the backbone. Early caches
               need capacity: they bring most of the saving (docs/experiments.md). The larger reads the smaller one. For
               token ids none where the backbone's own vectors come almost free: a student would not learn better ones.
    pooled     probes on the pooled activation of every split point: cheap, and enough late in the backbone. In
               sequences the order of the positions counts, hence a small convolution over them.
    trunks     convolutional caches on feature maps of the backbone's second half. Before it they know no more than the
               student, at its end pooled caches know as much (docs/experiments.md). Like students they learn from
               mixtures too, where there are any.

Later caches read the logits of the student that the best plan so far ends with (`offramp.blending`); in the end pooled
ones behind a trunk that is in the best plan read that trunk instead, and through it the student. What is enabled is
decided elsewhere (`placement`), jointly with the thresholds; a cache trained in vain costs nothing at run time. When
time is short, fewer caches are trained, each for long enough, rather than all of them for too short.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import numpy as np

from offramp.augment import is_image
from offramp.caches import CacheShape, LearnedCache
from offramp.candidates import Candidates, Trained
from offramp.distillation import Recipe
from offramp.mixtures import Mixer, suits_mixing
from offramp.placement import plan_path
from offramp.recording import TUNE
from offramp.splitting import SplitPoint

Item = TypeVar("Item")
Choice = Callable[[list[LearnedCache], int], list[LearnedCache]]

STUDENT_SHARES = (0.06, 0.12)  # of the backbone's FLOPs
STUDENT_TEMPERATURE = 4.0  # softer than for pooled caches, which gain nothing by it
TRUNK_SHARE, OF_WHAT_IS_LEFT = 0.015, 0.04  # of the backbone's FLOPs, and of those that a hit saves
TRUNK_DEPTHS, TRUNKS_FROM = (5 / 8, 3 / 4), 1 / 2  # the shares of its FLOPs next to which they are, the better first
MAX_POINTS = 12  # split points that get pooled caches
OVER_POSITIONS = CacheShape("layers", convolutions=((64, 3, 1), (64, 1, 1)), hidden=(128,))
POOLED_TIME, TRUNK_TIME = 0.15, 0.15  # of the training time, at most, where students are to be trained as well
# Of their full training that caches have to get to be worth beginning. One student trained to the end saves more than
# two that are not (docs/experiments.md), so a second one waits for a budget that trains both in full.
LEAST, LEAST_STUDENTS = 0.5, 1.0
MIXED = 0.5  # of its full training: what a student has to get beside mixtures for these to be worth asking about
STARVED = 0.1  # of its full training: a student that cannot have so much is not begun where pooled caches can be had


class Search:
    """Trains candidates round by round.

    student_shares: of the backbone's FLOPs, the most that each student may cost, rising; none: no students. pooled,
    trunks: whether there are these rounds. reads: whether later caches read the logits of a student.
    student_temperature: of the students' recipes. mixtures: whether students of images, and trunks, train on them as
    well, where there is time. bfloat16: of all recipes.
    """

    def __init__(
        self,
        candidates: Candidates,
        *,
        tolerance: float,
        student_shares: Sequence[float] = STUDENT_SHARES,
        pooled: bool = True,
        trunks: bool = True,
        reads: bool = True,
        student_temperature: float = STUDENT_TEMPERATURE,
        mixtures: bool = True,
        bfloat16: bool = True,
    ) -> None:
        self.candidates, self.tolerance = candidates, tolerance
        self.split = candidates.split
        self.student_shares, self.pooled, self.trunks, self.reads = student_shares, pooled, trunks, reads
        self.student_temperature, self.mixtures, self.bfloat16 = student_temperature, mixtures, bfloat16

    def run(self) -> None:
        """Ends early, with what there is, when the user stops it."""
        students, time_left = list(self._students()), self.candidates.time_left
        mixer = self._mixer(students)
        if mixer is not None and mixer.known:  # an earlier run has asked
            self.candidates.mix(mixer)
        pooled_s = trunks_s = students_s = None
        if time_left is not None:
            trunks_s = min(TRUNK_TIME * time_left, sum(map(self._seconds, self._trunks(None))))
            pooled_s = min(
                POOLED_TIME * time_left if students else time_left - trunks_s,
                sum(map(self._seconds, self._pooled(None))),
            )
            students_s = time_left - pooled_s - trunks_s
            if students and self.pooled and STARVED * self._seconds(students[0]) > students_s:
                students, pooled_s = [], time_left - trunks_s
        students_s = self._after_mixing(mixer, students, students_s)
        self._round("students", self._affordable(students, students_s, first), students_s)
        reader = self._reader()
        self._round("pooled", self._affordable(list(self._pooled(reader)), pooled_s, evenly), pooled_s)
        time_left = self.candidates.time_left  # all of it: what earlier rounds did not need as well
        self._round("trunks", self._affordable(list(self._trunks(reader)), time_left, first), time_left)
        self._read_trunks()

    # -- the rounds --------------------------------------------------------------------------------

    def _students(self) -> Iterator[LearnedCache]:
        if not self.candidates.recording.has_inputs:
            return
        point = self.split.points[0]
        floating = point.dtype.is_floating_point
        if not (is_image(tuple(point.shape), floating=floating) or self._needs_own_vectors(point)):
            return
        kind, previous = ("student" if floating else "transformer"), None
        for share in self.student_shares:
            shape = self.candidates.widest(point, kind, share)
            if shape is None or (previous and shape.width <= previous.shape.width):
                continue
            previous = self.candidates.build(point, shape, previous)
            yield previous

    def _mixer(self, students: list[LearnedCache]) -> Mixer | None:
        """What makes mixtures for these students, where they can have any."""
        if not (students and self.mixtures and suits_mixing(self.split, self.candidates.recording)):
            return None
        trunks = {self.candidates.position(trunk) for trunk in self._trunks(None)}
        return self.candidates.mixer(bfloat16=self.bfloat16, keep=sorted(trunks))

    def _after_mixing(self, mixer: Mixer | None, students: list[LearnedCache], limit_s: float | None) -> float | None:
        """What is left of the time for students once there are mixtures: none are asked for where the smallest student
        could not have `MIXED` of its full training as well."""
        if mixer is None or not students or self.candidates.mixtures is not None:
            return limit_s
        if limit_s is not None:
            spare_s = limit_s - MIXED * self._seconds(students[0])
            if spare_s < 0 or mixer.estimated_seconds() > spare_s:  # in this order: the estimate runs the backbone
                return limit_s
        started = time.monotonic()
        self.candidates.mix(mixer)
        return None if limit_s is None else limit_s - (time.monotonic() - started)

    def _needs_own_vectors(self, point: SplitPoint) -> bool:
        """Whether these are token ids, and the backbone's vectors for them cost more than a student."""
        vectors = next((later for later in self.split.points if later.dtype.is_floating_point), None)
        is_ids = not point.dtype.is_floating_point and len(point.shape) == 1
        return is_ids and (vectors is None or vectors.depth > STUDENT_SHARES[-1])

    def _pooled(self, reader: Trained | None) -> Iterator[LearnedCache]:
        if not self.pooled:
            return
        points = self.candidates.points if reader is None else self.split.points[1:]
        points = [point for point in points if point.dtype.is_floating_point]
        reads = None if reader is None else reader.cache
        for point in evenly(points, MAX_POINTS):
            if len(point.shape) == 2:
                yield self.candidates.build(point, OVER_POSITIONS, reads)
                continue
            yield self.candidates.build(point, CacheShape("mlp", 64 if point.depth < 0.5 else 32), reads)
            if point.depth > 0.5:
                yield self.candidates.build(point, CacheShape("linear"), reads)

    def _trunks(self, reader: Trained | None) -> Iterator[LearnedCache]:
        late = [point for point in self.split.points[1:] if point.depth >= TRUNKS_FROM]
        maps = [point for point in late if len(point.shape) == 3 and point.dtype.is_floating_point]
        if not self.trunks or not maps:
            return
        nearest = [min(maps, key=lambda point: abs(point.depth - depth)).position for depth in TRUNK_DEPTHS]
        for position in dict.fromkeys(nearest):
            point = self.split.points[position]
            shape = self.candidates.widest(point, "conv", min(TRUNK_SHARE, OF_WHAT_IS_LEFT * (1 - point.depth)))
            if shape is not None:
                yield self.candidates.build(point, shape, None if reader is None else reader.cache)

    def _reader(self) -> Trained | None:
        """The student that later caches read: the last one in the best plan of students alone."""
        if not self.candidates.trained or not self.reads:
            return None
        return next(reversed(self._enabled()), self.candidates.trained[0])

    def _read_trunks(self) -> None:
        """What a trunk has found out goes on to the pooled caches behind it."""
        if not self.reads or not self.candidates.trained:
            return
        trunks = [one for one in self._enabled() if _kind(one) == "conv"]
        for later in self.candidates.ordered():
            before = [trunk for trunk in trunks if trunk.position < later.position]
            if before and _kind(later) != "conv":
                self.candidates.reread(later, before[-1].cache)

    def _enabled(self) -> list[Trained]:
        """The candidates in the best plan so far, in the order in which a request meets them."""
        trained = self.candidates.ordered()
        records, costs = self.candidates.records(trained, TUNE), self.candidates.estimated_costs(trained)
        best = plan_path(records, costs, self.tolerance)[-1]
        return [one for one, threshold in zip(trained, best.thresholds_K, strict=True) if np.isfinite(threshold)]

    def recipe(self, cache: LearnedCache) -> Recipe:
        """How a cache of this shape is trained at this split point, given the number of train rows."""
        recipe = self._recipe(cache.shape.kind, self.candidates.position(cache))
        return dataclasses.replace(recipe, bfloat16=self.bfloat16)

    def _recipe(self, kind: str, position: int) -> Recipe:
        n = len(self.candidates.train_rows)
        if kind in ("linear", "mlp"):
            return Recipe(rows=int(np.clip(30 * n, 20_000, 600_000)), batch_size=min(256, max(16, n // 8)))
        if kind == "layers":
            return Recipe(rows=int(np.clip(8 * n, 20_000, 400_000)), batch_size=min(64, max(16, n // 8)))
        passes, most = {"student": (60, 3_000_000), "transformer": (40, 1_500_000)}.get(kind, (40, 400_000))
        rows = int(np.clip(passes * n, 30_000, most))
        recipe = Recipe(rows=rows, batch_size=min(128, max(16, n // 8)), learning_rate=4e-3)
        mixtures = self.candidates.mixtures
        mixed = mixtures is not None and (not position or position in mixtures.features)
        recipe = dataclasses.replace(recipe, mixtures=mixed)
        return recipe if position else dataclasses.replace(recipe, temperature=self.student_temperature)

    # -- time --------------------------------------------------------------------------------------

    def _round(self, name: str, caches: Sequence[LearnedCache], limit_s: float | None) -> None:
        self.candidates.train_round(name, caches, self.recipe, limit_s)

    def _seconds(self, cache: LearnedCache) -> float:
        return self.candidates.seconds_for(cache, self.recipe(cache))

    def _affordable(
        self,
        caches: list[LearnedCache],
        limit_s: float | None,
        choice: Choice,
    ) -> list[LearnedCache]:
        """As many of these, by `choice`, as can get the least part of their full training within the limit; one at
        least."""
        if limit_s is None:
            return caches
        for count in range(len(caches), 1, -1):
            chosen = choice(caches, count)
            at_input = self.candidates.position(chosen[-1]) == 0
            if (LEAST_STUDENTS if at_input else LEAST) * sum(map(self._seconds, chosen)) <= limit_s:
                return chosen
        return choice(caches, 1)


def _kind(trained: Trained) -> str:
    return cast(LearnedCache, trained.cache).shape.kind


def first(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, from the beginning."""
    return list(items[:count])


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spread, first and last among them; a single one is the middle one."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(k)] for k in np.linspace(0, len(items) - 1, count)]
