"""The immutable values that pass between the rooms, and their JSON form.

Shape suffixes: N recorded inputs, K candidate caches, B rows of a batch, C classes.
Nothing here needs torch: the statistical half of the package works on numpy arrays alone.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]


def version() -> str:
    """The installed version of offramp; "unknown" when it runs from a source tree."""
    try:
        return importlib.metadata.version("offramp")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Records:
    """What K candidate caches said about N recorded inputs: all that the statistical half ever sees.

    Caches are in the order in which a request meets them. A cache that reads another one's answer names it by
    position in `reads_K` (-1: reads none); it can only be enabled together with that one.
    """

    confidence_NK: FloatArray
    answer_NK: IntArray
    agreement_NK: BoolArray
    backbone_answer_N: IntArray
    reads_K: tuple[int, ...]
    label_N: IntArray | None = None

    def __post_init__(self) -> None:
        shape = self.confidence_NK.shape
        if not (shape == self.answer_NK.shape == self.agreement_NK.shape):
            raise ValueError(f"records disagree in shape: {shape}, {self.answer_NK.shape}, {self.agreement_NK.shape}")
        if len(self.backbone_answer_N) != shape[0] or len(self.reads_K) != shape[1]:
            raise ValueError(f"records of shape {shape} need {shape[0]} answers and {shape[1]} `reads`")

    def __len__(self) -> int:
        return len(self.backbone_answer_N)

    def rows(self, index: IntArray | BoolArray) -> Records:
        """The same caches on a subset of the inputs."""
        return dataclasses.replace(
            self,
            confidence_NK=self.confidence_NK[index],
            answer_NK=self.answer_NK[index],
            agreement_NK=self.agreement_NK[index],
            backbone_answer_N=self.backbone_answer_N[index],
            label_N=None if self.label_N is None else self.label_N[index],
        )


@dataclass(frozen=True)
class Timing:
    """Wall-clock time of one call in milliseconds: median and the 10th and 90th percentile."""

    median_ms: float
    p10_ms: float
    p90_ms: float


@dataclass(frozen=True)
class PartCost:
    """What one stage, one cache or the whole backbone costs. FLOPs are per row (a multiply-add counts 2)."""

    name: str
    flops: float
    parameters: int
    parameter_bytes: int
    time_ms: Mapping[int, Timing]  # batch size -> time of one call on a batch of that size


@dataclass(frozen=True)
class RoutingCost:
    """Measured time of what lies between stages, at one split point.

    lookup_ms: comparison with the threshold and the wait for its result, once per enabled cache.
    compaction_ms, compaction_row_ms: dropping finished rows from the live values: fixed part and part per kept row.
    """

    lookup_ms: float
    compaction_ms: float
    compaction_row_ms: float


@dataclass(frozen=True)
class CostTable:
    """Cost of every part, measured on one device. `stages[k]` follows split point k; `routing[k]` is at it."""

    device: str
    threads: int
    backbone: PartCost
    stages: tuple[PartCost, ...]
    routing: tuple[RoutingCost, ...]
    caches: tuple[PartCost, ...] = ()
    cache_points: tuple[int, ...] = ()  # position of the split point that each cache reads

    def of(self, names: Collection[str]) -> CostTable:
        """The same with these of its caches only."""
        kept = [k for k, cache in enumerate(self.caches) if cache.name in names]
        return dataclasses.replace(
            self,
            caches=tuple(self.caches[k] for k in kept),
            cache_points=tuple(self.cache_points[k] for k in kept),
        )

    def stages_ms(self, size: int, start: int = 0) -> float:
        """Median time of a batch of `size` rows in all stages from this one on, in milliseconds."""
        return sum(stage.time_ms[size].median_ms for stage in self.stages[start:])


@dataclass(frozen=True)
class PlannedCache:
    """One enabled cache of a plan. `hit_rate` is the expected share of all requests that leave here."""

    name: str
    point: str
    threshold: float
    confidence: str
    hit_rate: float


@dataclass(frozen=True)
class Plan:
    """Which caches are on and when they answer: everything decided before serving. No caches is a legal plan.

    estimated_disagreement and estimated_cost (share of the backbone's cost) are read off the tuning inputs.
    bypass_batch_sizes: batch sizes at which the plan was measured not to pay; such a batch runs the backbone alone.
    reason: why there are no caches; empty otherwise.
    """

    caches: tuple[PlannedCache, ...] = ()
    estimated_disagreement: float = 0.0
    estimated_cost: float = 1.0
    bypass_batch_sizes: tuple[int, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        fields = dict(document)
        fields["caches"] = tuple(PlannedCache(**cache) for cache in fields["caches"])
        fields["bypass_batch_sizes"] = tuple(fields["bypass_batch_sizes"])
        return cls(**fields)


@dataclass(frozen=True)
class Certificate:
    """What was shown about a plan, and on what evidence.

    With probability `confidence_level` over the draw of the `n` certification inputs, the share of answers that
    differ from the backbone's is at most `bound` on traffic like those inputs. `errors` of the `n` differed. The
    bound is at most the `tolerance`, except where a method's own rule set the thresholds: then `procedure` says
    "measured only", and `within_tolerance` whether it is. A plan without caches needs no evidence: its bound is 0.
    """

    tolerance: float
    confidence_level: float
    n: int
    errors: int
    bound: float
    procedure: str
    candidates_tested: int
    backbone_fingerprint: str
    data_fingerprint: str
    created: str
    advice: str = ""

    @property
    def within_tolerance(self) -> bool:
        return self.bound <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        return cls(**document)


@dataclass(frozen=True)
class LatencyRatio:
    """Time of the cached model over time of the full model, measured alternately in one run (below 1 is faster)."""

    batch_size: int
    mean: float
    p50: float
    p95: float
    full_mean_ms: float
    cached_mean_ms: float


@dataclass(frozen=True)
class Evaluation:
    """How a cached model did on inputs that neither training, tuning nor certification has seen.

    interval: exact two-sided Clopper-Pearson interval of the disagreement at the certificate's confidence level.
    hit_rates: share of all requests per enabled cache. flops_ratio: FLOPs run, caches included, over the backbone's.
    oracle_flops_ratio: the limit, where each request leaves at the first enabled cache that agrees.
    """

    n: int
    disagreements: int
    disagreement: float
    interval: tuple[float, float]
    hit_rates: Mapping[str, float]
    flops_ratio: float
    oracle_flops_ratio: float
    latency: tuple[LatencyRatio, ...] = ()
    accuracy: float | None = None
    backbone_accuracy: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
