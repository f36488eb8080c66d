"""Freeze Inference: a store of activations at every split point, and a threshold for each from the tuning inputs."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from offramp.caches.nearest import CLASS_LEVEL, NEVER, NearestCache, StoreShape
from offramp.candidates import Candidates, Trained
from offramp.confidence import auroc
from offramp.distillation import TrainingLog
from offramp.methods.base import Method
from offramp.methods.published import loosest_threshold, loosest_thresholds
from offramp.placement import CacheCosts, Thresholds
from offramp.progress import bar
from offramp.recording import TUNE
from offramp.search import MAX_POINTS, evenly
from offramp.splitting import SplitPoint
from offramp.types import FloatArray, Records

CLASS_ROWS = 30  # tuning inputs that a cache must answer with a class for that class to get a threshold of its own


@dataclass(frozen=True, kw_only=True)
class Freeze(Method):
    """Nearest-neighbour caches at every split point, the input too; nothing is trained.

    The paper asks at every layer of the backbone; here at most 12 split points, evenly spread, have a store, and none
    where the live values are token ids. It searches raw activations and discusses smaller ones: here all recorded
    activations are reduced already (`offramp.caches.reduction`), and the default is to project them further.

    neighbours, store, feature, points, centroids, width, whiten, max_bytes: see `StoreShape`; the limits are for each
    cache. confidence: "vote" of the neighbours, or "distance", how much nearer the answer is than any other. per_class:
    one threshold per cache and answer, as GATI (arXiv 2101.07344) has them in its published code, in place of one per
    cache; an answer that a cache gives to fewer than CLASS_ROWS tuning inputs goes by the cache's threshold.

    Class thresholds are fitted for the tolerance of the fit, and the confidences on tune are those of the inputs they
    were fitted on. With another tolerance in `choose`, all classes of a cache are tightened together, never loosened.
    """

    name: ClassVar[str] = "freeze"
    source: ClassVar[str] = "Kumar et al., Accelerating Deep Learning Inference via Freezing, arXiv 2002.02645"

    neighbours: int = 10
    store: Literal["points", "centroids"] = "points"
    feature: Literal["raw", "pooled", "projected"] = "projected"
    confidence: Literal["vote", "distance"] = "vote"
    per_class: bool = True
    points: int = 10_000
    centroids: int = 8
    width: int = 64
    whiten: bool = False
    max_bytes: int = 2**24

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shape()  # refuses what no store can be

    def shape(self) -> StoreShape:
        """The form of every store."""
        same = [field.name for field in dataclasses.fields(StoreShape) if field.name != "score"]
        return StoreShape(score=self.confidence, **{name: getattr(self, name) for name in same})

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        """Ends early, with the stores that there are, when the user stops it or the time is up."""
        candidates.confidence = self.confidence
        points = [point for point in candidates.points if point.dtype.is_floating_point]
        chosen = evenly(points, MAX_POINTS)
        with bar("storing activations", len(chosen), show=candidates.show) as progress:
            for point in chosen:
                left_s = candidates.time_left
                if candidates.stop.requested or (left_s is not None and left_s <= 1):
                    return
                progress.note(point.name)
                self._store(candidates, point)
                if self.per_class:
                    self._threshold_classes(candidates, candidates.trained[-1], tolerance)
                progress.advance()

    def _store(self, candidates: Candidates, point: SplitPoint) -> None:
        """Add the candidate at this split point."""
        started, recording, rows = time.monotonic(), candidates.recording, candidates.train_rows
        shape = self.shape()
        cache = NearestCache(
            f"{point.name}/{shape.label}",
            point.name,
            shape,
            candidates.classes,
            reduction=recording.reductions[point.position],
        ).to(candidates.split.device)
        generator = torch.Generator().manual_seed(candidates.seed)
        cache.fit(recording.features[point.position], rows, candidates.answer_N[rows], generator)
        candidates.add(cache, TrainingLog(steps=0, seconds=time.monotonic() - started, final_loss=math.nan))

    def _threshold_classes(self, candidates: Candidates, trained: Trained, tolerance: float) -> None:
        """Put the score of this candidate against each answer's own threshold in place of the bare score."""
        cache = trained.cache
        assert isinstance(cache, NearestCache)
        records = candidates.records([trained], TUNE)
        threshold_C = class_thresholds(records, candidates.classes, tolerance)
        cache.use_class_thresholds(self.confidence, torch.from_numpy(threshold_C))
        cache.cpu()
        trained.confidence_N = cache.confidence(trained.on(candidates.tune_rows)).double().numpy()
        cache.to(candidates.split.device)
        trained.auroc[cache.confidence_name] = auroc(trained.confidence_N, records.agreement_NK[:, 0])

    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        """Each cache by itself: the smallest threshold whose hits among all tuning inputs disagree at most at the rate
        `tolerance`; off where none does. With class thresholds none below the level that these were fitted to."""
        del costs
        if self.per_class:
            below = records.confidence_NK < CLASS_LEVEL
            records = dataclasses.replace(records, confidence_NK=np.where(below, np.nan, records.confidence_NK))
        return tuple(loosest_thresholds(records, tolerance))


def class_thresholds(records: Records, classes: int, tolerance: float) -> FloatArray:
    """(classes,) the smallest score whose hits with this answer disagree at most at the rate `tolerance`; of all hits
    for an answer that fewer than CLASS_ROWS inputs got. NEVER, above every score, where there is no such score.

    records: what one cache said about the tuning inputs.
    """
    score_N, answer_N, agreement_N = records.confidence_NK[:, 0], records.answer_NK[:, 0], records.agreement_NK[:, 0]
    threshold_C = np.full(classes, loosest_threshold(score_N, agreement_N, tolerance))
    for answer in range(classes):
        got_N = answer_N == answer
        if got_N.sum() >= CLASS_ROWS:
            threshold_C[answer] = loosest_threshold(score_N[got_N], agreement_N[got_N], tolerance)
    return np.asarray(np.minimum(threshold_C, NEVER))
