"""Nearest-neighbour caches: stored activations with the backbone's answers to them, and no gradient step.

The idea is Freeze Inference's (Kumar et al., "Accelerating Deep Learning Inference via Freezing", HotCloud 2019, arXiv
2002.02645): keep what a layer gave and what the backbone answered; later, let the nearest stored activations answer,
the surer the more of them agree and the closer they are. Against the size of raw activations it names two remedies:
fewer entries (here a balanced choice, or centroids by k-means) and smaller ones (pooled or projected).

Search is exact, by a matrix product: |x - m|^2 = |m|^2 - 2 x m + |x|^2. `torch.cdist` would be one call, but its FLOPs
are not counted and the cache would look free.

Shape suffixes besides the package's: M entries of the store, W numbers in an entry.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.caches.base import Cache
from offramp.caches.reduction import Reduction
from offramp.errors import InputError

log = logging.getLogger("offramp")

SMALL = 1e-8  # votes of a class without any: its score stays finite
FAR = 1e4  # distance, in units of the scale, of a class that the store does not know: its score stays finite too
SHARPNESS = 10.0  # scores per unit of the scale: gaps of a tenth to a half of it become logits of 1 to 5
CLASS_LEVEL = 0.5  # where `ClassThresholds` puts every class's threshold
NEVER = 2.0  # above every confidence

CHUNK = 2**24  # distances that are held at a time
READ_ROWS = 256  # recorded rows that are read at a time
FIT_BYTES = 2**28  # that a sample for the projection, or the points of one k-means, may take
SAMPLE_ROWS = 1024  # for centre and principal directions
SCALE_ROWS = 512  # entries that the scale of distances is taken from
ENTRY_OVERHEAD = 12  # bytes of an entry besides its numbers: squared norm and answer
ROUNDS = 20  # of k-means, at most


@dataclass(frozen=True)
class StoreShape:
    """What a store holds, and how it is asked.

    store: "points", a choice of at most `points` training inputs, about as many per answer; or "centroids", up to
    `centroids` per answer by k-means. feature: "raw", the reduced activation; "pooled", its mean and maximum over
    positions; "projected", its `width` leading principal components, scaled to unit variance if `whiten`.
    score: "vote" of the nearest `neighbours` entries, or "distance" to the nearest entry of each answer.
    max_bytes: limit of all that the cache holds, projection included; a store above it is cut.
    """

    store: Literal["points", "centroids"] = "points"
    feature: Literal["raw", "pooled", "projected"] = "projected"
    score: Literal["vote", "distance"] = "vote"
    neighbours: int = 10
    points: int = 10_000
    centroids: int = 8
    width: int = 64
    whiten: bool = False
    max_bytes: int = 2**24

    def __post_init__(self) -> None:
        known = {
            "store": ("points", "centroids"),
            "feature": ("raw", "pooled", "projected"),
            "score": ("vote", "distance"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(values)}")
        for name in ("neighbours", "points", "centroids", "width", "max_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)!r}; expected a whole number from 1")

    @property
    def label(self) -> str:
        return f"{self.store}-{self.feature}-{self.score}"


# --- confidences ----------------------------------------------------------------------------------


def vote(scores_BC: Tensor) -> Tensor:
    """(B,) votes of the answer out of those of all neighbours, each weighing 1 at no distance and less farther off.

    A function of vote scores; of distance scores it says nothing.
    """
    return (scores_BC.amax(-1).exp() - SMALL).clamp(0, 1)


def distance(scores_BC: Tensor) -> Tensor:
    """(B,) one minus the distance to the nearest entry over that to the nearest of another answer; 0 if both are 0.

    A function of distance scores; of vote scores it says nothing.
    """
    top = -scores_BC.topk(min(2, scores_BC.shape[-1]), dim=-1).values
    nearest_B, other_B = top[:, 0], top[:, -1]
    return (other_B - nearest_B) / other_B.clamp(min=torch.finfo(top.dtype).tiny)


OWN_CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {"vote": vote, "distance": distance}


class ClassThresholds(nn.Module):
    """One threshold per answer as a confidence: the score rescaled so that every answer's own threshold is CLASS_LEVEL.

    A plan has one threshold per cache; some methods have one per cache and predicted class. score >= threshold of its
    answer exactly where the rescaled one is >= CLASS_LEVEL: both sides of the threshold are stretched linearly to half
    of [0, 1], and neither division can round across it. Order within a class stays, so other thresholds than
    CLASS_LEVEL tighten or loosen all classes together.

    threshold_C: per answer a threshold in [0, 1], or anything above 1 (infinity too) for an answer that is never given.
    """

    threshold_C: Tensor

    def __init__(self, score: str, threshold_C: Tensor) -> None:
        super().__init__()
        self.score = score
        self.register_buffer("threshold_C", threshold_C.float().clamp(max=NEVER))

    def forward(self, score_B: Tensor, answer_B: Tensor) -> Tensor:
        """(B,) rescaled score of these answers; NaN stays NaN."""
        threshold_B = self.threshold_C[answer_B]
        tiny = torch.finfo(threshold_B.dtype).tiny
        above_B = CLASS_LEVEL + (1 - CLASS_LEVEL) * (score_B - threshold_B) / (1 - threshold_B).clamp(min=tiny)
        below_B = CLASS_LEVEL * (score_B / threshold_B.clamp(min=tiny))
        return torch.where(score_B >= threshold_B, above_B, below_B)


# --- the cache ------------------------------------------------------------------------------------


class NearestCache(Cache):
    """Answers with the stored activations that are nearest (Euclidean distance) to the one at hand.

    The scores, whose largest is the answer: for "vote" the logarithm of each answer's share of the neighbours' votes,
    an entry at distance d voting with s^2 / (s^2 + d^2); for "distance" minus the distance to each answer's nearest
    entry, in units of s / SHARPNESS. The scale s is the median distance of an entry to the nearest one with another
    answer.

    `seen` is the number of training inputs that the store was filled from, `kept` its number of entries.
    """

    kind = "nearest"

    centre_F: Tensor
    directions_FW: Tensor
    entries_MW: Tensor
    norm_M: Tensor
    answer_M: Tensor
    scale: Tensor

    def __init__(self, name: str, point: str, shape: StoreShape, classes: int, *, reduction: Reduction) -> None:
        self.shape, self.classes, self.seen = shape, classes, 0
        self.class_thresholds: ClassThresholds | None = None
        super().__init__(name, point, reduction)  # last, because it asks for the confidences
        self._allocate(features=0, width=0, entries=0)

    @property
    def kept(self) -> int:
        return len(self.answer_M)

    def _allocate(self, *, features: int, width: int, entries: int) -> None:
        self.register_buffer("centre_F", torch.zeros(features))
        if self.shape.feature == "projected":
            self.register_buffer("directions_FW", torch.zeros(features, width))
        self.register_buffer("entries_MW", torch.zeros(entries, width))
        self.register_buffer("norm_M", torch.zeros(entries))
        self.register_buffer("answer_M", torch.zeros(entries, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(()))

    # -- answering ---------------------------------------------------------------------------------

    def from_feature(self, feature: Tensor, read_BC: Tensor | None = None) -> Tensor:
        """(B, C) scores from reduced activations (B, *shape). Raises InputError while the store is empty."""
        del read_BC
        if not self.kept:
            raise InputError(f"cache {self.name} has an empty store; fill it with `fit` before asking it")
        entry_BW = self._project(self._base(feature))
        scores = self._votes if self.shape.score == "vote" else self._nearness
        return torch.cat([scores(self._squared(part_BW)) for part_BW in entry_BW.split(max(1, CHUNK // self.kept))])

    def _base(self, feature: Tensor) -> Tensor:
        """(B, F) what entries are made of: all numbers of the activation, or its mean and maximum over positions."""
        feature = feature.to(self.entries_MW.dtype)
        if self.shape.feature != "pooled" or feature.ndim == 2:
            return feature.flatten(1)
        positions_BFP = feature.transpose(1, 2) if feature.ndim == 3 else feature.flatten(2)
        return torch.cat([positions_BFP.mean(2), positions_BFP.amax(2)], dim=1)

    def _project(self, base_BF: Tensor) -> Tensor:
        """(B, W). Centred, which changes no distance and keeps the matrix product accurate."""
        centred_BF = base_BF - self.centre_F
        return centred_BF @ self.directions_FW if self.shape.feature == "projected" else centred_BF

    def _squared(self, entry_BW: Tensor) -> Tensor:
        """(B, M) squared distances."""
        product_BM = torch.addmm(self.norm_M, entry_BW, self.entries_MW.T, alpha=-2)
        return product_BM.add_(entry_BW.square().sum(1, keepdim=True)).clamp_(min=0)

    def _votes(self, squared_BM: Tensor) -> Tensor:
        neighbours = min(self.shape.neighbours, self.kept)
        nearest = squared_BM.topk(neighbours, dim=1, largest=False)
        weight_Bk = self.scale.square() / (self.scale.square() + nearest.values)
        votes_BC = squared_BM.new_zeros(len(squared_BM), self.classes)
        votes_BC.scatter_add_(1, self.answer_M[nearest.indices], weight_Bk)
        return (votes_BC / neighbours + SMALL).log()

    def _nearness(self, squared_BM: Tensor) -> Tensor:
        answer_BM = self.answer_M.expand(len(squared_BM), -1)
        far_BC = (FAR * self.scale).square().expand(len(squared_BM), self.classes)
        nearest_BC = far_BC.scatter_reduce(1, answer_BM, squared_BM, "amin")
        return nearest_BC.sqrt() * (-SHARPNESS / self.scale)

    def confidences(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """The fixed scores, the one proper to this cache's answers, and that one with class thresholds once it has
        some."""
        own: dict[str, Callable[[Tensor], Tensor]] = {self.shape.score: OWN_CONFIDENCES[self.shape.score]}
        if self.class_thresholds is not None:
            own[f"{self.class_thresholds.score}_by_class"] = partial(_by_class, self.class_thresholds)
        return {**super().confidences(), **own}

    def use_class_thresholds(self, score: str, threshold_C: Tensor) -> None:
        """Decide from now on by `score` (a name in `confidences()`) against each answer's own threshold, under the
        name `<score>_by_class`: see `ClassThresholds`."""
        if score not in OWN_CONFIDENCES or score not in self.confidences():
            raise InputError(
                f"class thresholds are for the score {self.shape.score!r} of this cache; received {score!r}"
            )
        if threshold_C.shape != (self.classes,):
            raise InputError(f"thresholds of shape {tuple(threshold_C.shape)}; expected one per class, {self.classes}")
        self.class_thresholds = ClassThresholds(score, threshold_C.to(self.scale.device))
        self.use_confidence(f"{score}_by_class")

    # -- filling -----------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, features: NDArray[Any], rows: NDArray[np.intp], answer_N: Tensor, generator: torch.Generator) -> None:
        """Fill the store from recorded features; what it held before is dropped. Works where the cache's buffers are.

        features: (recorded rows, *reduced shape), possibly mapped from a file. rows: the N numbers of the rows to use.
        answer_N: the backbone's answers on these. The same generator state gives the same store (on one device).
        Raises InputError for no rows, for features that are no numbers (token ids), and when `max_bytes` is too
        little for a single entry. A store that is cut to `max_bytes` is logged.
        """
        self._check(features, rows, answer_N)
        read = partial(self._read, features, rows)
        self._fit_projection(read(_balanced(answer_N, self._sample_rows(features), generator), self._base))
        as_entries = partial(read, form=lambda feature: self._project(self._base(feature)))
        chosen = _balanced(answer_N, self._room(), generator, self._quota())
        if self.shape.store == "points":
            self.entries_MW, answer_M = as_entries(chosen), answer_N[chosen]
        else:
            self.entries_MW, answer_M = self._centroids(as_entries, answer_N, answer_N[chosen].bincount(), generator)
        self.answer_M = answer_M.to(self.scale.device)
        self.norm_M = self.entries_MW.square().sum(1)
        self.scale = self._measured_scale(generator)
        self.seen = len(rows)
        self._say_if_cut(answer_N)

    def _check(self, features: NDArray[Any], rows: NDArray[np.intp], answer_N: Tensor) -> None:
        if not np.issubdtype(features.dtype, np.floating):
            raise InputError(
                f"cache {self.name}: distances between {features.dtype} features mean nothing (token ids?); store "
                "activations of a later split point"
            )
        if not len(rows) or answer_N.shape != (len(rows),):
            raise InputError(
                f"cache {self.name}: {len(rows)} rows with answers of shape {tuple(answer_N.shape)}; expected at least "
                "one row and an answer for each"
            )

    def _read(
        self, features: NDArray[Any], rows: NDArray[np.intp], index: Tensor, form: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """(len(index), ...) what `form` makes of these rows, with 0 for NaN, which would spoil all distances."""
        parts = []
        for part in index.split(READ_ROWS):
            recorded = torch.from_numpy(np.array(features[rows[part.numpy()]]))
            parts.append(form(recorded.nan_to_num().to(self.scale.device)))
        return torch.cat(parts)

    def _fit_projection(self, base_NF: Tensor) -> None:
        self.centre_F = base_NF.mean(0)
        if self.shape.feature == "projected":
            self.directions_FW = self._principal(base_NF - self.centre_F)

    def _principal(self, centred_NF: Tensor) -> Tensor:
        """(F, W) leading principal directions; they take at most half of the bytes that the cache may hold."""
        rows, features = centred_NF.shape
        width = max(1, min(self.shape.width, rows, features, self.shape.max_bytes // (8 * features)))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # a few random test vectors, which the result hardly depends on
            _, spread, directions = torch.pca_lowrank(
                centred_NF.cpu(), q=min(width + 8, rows, features), center=False, niter=4
            )
        directions_FW = directions[:, :width]
        if self.shape.whiten:
            deviation_W = spread[:width] / max(rows - 1, 1) ** 0.5
            directions_FW = directions_FW / deviation_W.clamp(min=1e-3 * float(deviation_W[0]) + 1e-12)
        return directions_FW.contiguous().to(self.scale.device)

    def _sample_rows(self, features: NDArray[Any]) -> int:
        return max(2, min(SAMPLE_ROWS, FIT_BYTES // (4 * int(np.prod(features.shape[1:])))))

    def _width(self) -> int:
        return self.directions_FW.shape[1] if self.shape.feature == "projected" else len(self.centre_F)

    def _room(self) -> int:
        """How many entries `max_bytes` leaves room for."""
        projection = self._width() if self.shape.feature == "projected" else 0
        fixed = 4 * (1 + len(self.centre_F) * (1 + projection))
        entry = 4 * self._width() + ENTRY_OVERHEAD
        room = (self.shape.max_bytes - fixed) // entry
        if room < 1:
            raise InputError(
                f"cache {self.name}: max_bytes={self.shape.max_bytes:,} leaves no room for an entry of {entry:,} bytes "
                f"beside {fixed:,} bytes of centre and projection; raise it, or take smaller features"
            )
        return room if self.shape.store == "centroids" else min(room, self.shape.points)

    def _quota(self) -> int | None:
        return self.shape.centroids if self.shape.store == "centroids" else None

    def _say_if_cut(self, answer_N: Tensor) -> None:
        wanted = min(len(answer_N), self.shape.points)
        if self.shape.store == "centroids":
            wanted = int(answer_N.bincount().clamp(max=self.shape.centroids).sum())
        if self.kept < wanted:
            log.info(
                "cache %s: the store is cut from %d to %d entries to stay within max_bytes=%d",
                self.name,
                wanted,
                self.kept,
                self.shape.max_bytes,
            )

    def _centroids(
        self, as_entries: Callable[[Tensor], Tensor], answer_N: Tensor, count_C: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Entries and their answers: count_C[c] centroids of the rows with answer c, by k-means within each answer."""
        most = max(1, FIT_BYTES // (4 * self._width()))
        entries, answers = [], []
        for answer, count in enumerate(count_C.tolist()):
            if not count:
                continue
            members = (answer_N == answer).nonzero().squeeze(1)
            members = members[torch.randperm(len(members), generator=generator)[:most]]
            centroids = kmeans(as_entries(members.sort().values), min(count, len(members)), generator)
            entries.append(centroids)
            answers.append(torch.full((len(centroids),), answer))
        return torch.cat(entries), torch.cat(answers)

    def _measured_scale(self, generator: torch.Generator) -> Tensor:
        """() median distance of an entry to the nearest with another answer; 1 where that is 0 or there is none."""
        some = torch.randperm(self.kept, generator=generator)[:SCALE_ROWS].to(self.scale.device)
        nearest = []
        for part in some.split(max(1, CHUNK // self.kept)):
            same_BM = self.answer_M[part, None] == self.answer_M
            nearest.append(self._squared(self.entries_MW[part]).masked_fill_(same_BM, torch.inf).amin(1))
        squared = torch.cat(nearest)
        finite = squared[squared.isfinite()]
        scale = finite.median().sqrt() if len(finite) else squared.new_zeros(())
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    # -- to disk and back --------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "shape": dataclasses.asdict(self.shape),
            "classes": self.classes,
            "features": len(self.centre_F),
            "width": self.entries_MW.shape[1],
            "entries": self.kept,
            "seen": self.seen,
            "class_thresholds": None if self.class_thresholds is None else self.class_thresholds.score,
        }

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> Self:
        cache = cls(
            description["name"],
            description["point"],
            StoreShape(**description["shape"]),
            description["classes"],
            reduction=Reduction(description["reduction"]),
        )
        cache._allocate(features=description["features"], width=description["width"], entries=description["entries"])
        cache.seen = description["seen"]
        if description["class_thresholds"] is not None:
            cache.use_class_thresholds(description["class_thresholds"], torch.zeros(cache.classes))
        return cache


def _by_class(thresholds: ClassThresholds, scores_BC: Tensor) -> Tensor:
    score_B: Tensor = thresholds(OWN_CONFIDENCES[thresholds.score](scores_BC), scores_BC.argmax(-1))
    return score_B


# --- choosing entries -----------------------------------------------------------------------------


def _balanced(answer_N: Tensor, most: int, generator: torch.Generator, most_per_answer: int | None = None) -> Tensor:
    """Random positions in answer_N, rising, at most `most`, as equal in number per answer as there are rows of each."""
    shuffled = torch.randperm(len(answer_N), generator=generator)
    by_answer = answer_N[shuffled].argsort(stable=True)
    count_C = answer_N.bincount()
    start_C = count_C.cumsum(0) - count_C
    rank_N = torch.empty_like(by_answer)  # number of a row among those with its answer
    rank_N[by_answer] = torch.arange(len(answer_N)) - start_C[answer_N[shuffled][by_answer]]
    chosen = rank_N.argsort(stable=True)[:most]
    if most_per_answer is not None:
        chosen = chosen[rank_N[chosen] < most_per_answer]
    return shuffled[chosen].sort().values  # files are read front to back


def kmeans(points_NW: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, W) centroids by Lloyd's algorithm (1982) from random points; one that loses all its points stays.

    No round raises the sum of squared distances to the nearest centroid. Ends when no point changes its centroid.
    """
    centroids = points_NW[torch.randperm(len(points_NW), generator=generator)[:count].to(points_NW.device)]
    nearest_N = torch.empty(0, dtype=torch.int64, device=points_NW.device)
    for _ in range(ROUNDS):
        previous_N, nearest_N = nearest_N, _nearest_centroid(points_NW, centroids)
        if torch.equal(previous_N, nearest_N):
            break
        # A product, not index_add: on a GPU that adds in no fixed order.
        member_NK = nn.functional.one_hot(nearest_N, count).to(points_NW.dtype)
        size_K = member_NK.sum(0)[:, None]
        centroids = torch.where(size_K > 0, member_NK.T @ points_NW / size_K.clamp(min=1), centroids)
    return centroids


def _nearest_centroid(points_NW: Tensor, centroids: Tensor) -> Tensor:
    """(N,) number of the nearest centroid; |x|^2 is left out, being the same for all of them."""
    norm_K = centroids.square().sum(1)
    parts = points_NW.split(max(1, CHUNK // len(centroids)))
    return torch.cat([torch.addmm(norm_K, part, centroids.T, alpha=-2).argmin(1) for part in parts])
