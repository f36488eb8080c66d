"""Error-controlled approximate-key caching (Finamore et al., INFOCOM 2022, arXiv 2112.06671): a table from coarse keys
of the input to the model's answers, in front of the model. Its authors made it for network traffic, with a prefix of a
flow's packets as the key; it pays where traffic is skewed.

Two forms. `ApproximateKey` fills frozen tables from the train rows, which can be certified, also together with caches
behind them. `AutoRefresh` is the paper's own: a table that is filled and corrected while it serves. What it answers
changes with the traffic, so no certificate covers it; its audits say how often it errs.

Shape suffixes: N requests or recorded inputs, K candidate caches.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.caches.result import KeyCache
from offramp.candidates import Candidates
from offramp.distillation import TrainingLog
from offramp.errors import InputError
from offramp.methods.base import Method
from offramp.methods.published import cheapest
from offramp.placement import CacheCosts, Thresholds
from offramp.splitting import SplitPoint
from offramp.types import Records

MATCH = 1e-6  # below the confidence of every stored key, above that of a miss


@dataclass(frozen=True, kw_only=True)
class ApproximateKey(Method):
    """Frozen tables of a few key resolutions; its published rule serves every match of the one that pays most.

    grids: (grid, levels) of the keys of images. prefixes: how many of the first numbers make up the key of any other
    input, in `prefix_levels` levels each, token ids as they are. max_bytes: limit of each table. behind: a method whose
    caches come behind the tables, under the same tolerance and certificate.

    Deviations: the paper refreshes its table while it serves, here it is frozen (see `AutoRefresh`); the paper's keys
    are prefixes of packet series, and images have no prefix.
    """

    name: ClassVar[str] = "approximate_key"
    source: ClassVar[str] = "arXiv 2112.06671"

    grids: tuple[tuple[int, int], ...] = ((8, 4), (4, 4), (4, 2), (2, 4))
    prefixes: tuple[int, ...] = (32, 16, 8, 4)
    prefix_levels: int = 8
    max_bytes: int = 4 << 20
    behind: Method | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_levels < 2:
            raise InputError(f"prefix_levels is {self.prefix_levels}; expected at least 2 levels to tell numbers apart")
        if self.behind is None:
            return
        if self.rule == "published":
            raise InputError("the published rule of approximate_key knows keys alone; take rule='certificate'")
        if self.behind.needs_labels:
            raise InputError(f"approximate_key learns without labels, {self.behind.name} behind it does not")

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        if self.behind is not None:
            self.behind.learn(candidates, tolerance)
        others = list(candidates.trained)
        if not candidates.recording.has_inputs:  # keys are made of them
            return
        rows = candidates.train_rows
        rows = rows[candidates.recording.copy_N[rows] == 0]  # agreement is counted as in traffic, not among copies
        answer_N = candidates.answer_N[rows].numpy()
        for cache in self._caches(candidates.split.points[0], candidates.classes):
            if candidates.stop.requested:
                break
            started = time.monotonic()
            cache.fill(candidates.recording.features[0], rows, answer_N, self.max_bytes)
            candidates.add(cache.to(candidates.split.device), TrainingLog(0, time.monotonic() - started, math.nan))
        candidates.trained = candidates.trained[len(others) :] + others  # a request meets the tables first

    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        """Exact key match at one resolution: the cheapest whose disagreement on tune is at most the tolerance."""
        caches = len(records.reads_K)
        return cheapest(records, costs, [[MATCH]] * caches, tolerance, layer_K=[0] * caches)

    def _caches(self, point: SplitPoint, classes: int) -> Iterable[KeyCache]:
        shape = tuple(point.shape)
        if len(shape) == 3:
            resolutions = list(self.grids)
        else:
            lengths = sorted({min(prefix, math.prod(shape)) for prefix in self.prefixes}, reverse=True)
            resolutions = [(length, self.prefix_levels if point.dtype.is_floating_point else 0) for length in lengths]
        for grid, levels in resolutions:
            name = f"{point.name}/key{grid}x{levels}"
            yield KeyCache(name, point.name, shape, classes, grid=grid, levels=levels)


# --- the dynamic form -----------------------------------------------------------------------------


@dataclass(slots=True)
class _Entry:
    answer: int
    gap: float = 1.0


class AutoRefresh:
    """Approximate keys that are filled and corrected while they serve (paper's auto-refresh), with LRU replacement.

    A new key runs the model and stores its answer with gap 1. A hit is audited with probability 1/gap: the model runs,
    its answer is given, and if it agrees with the stored one the gap grows by the factor `beta`; otherwise the answer
    is replaced and the gap is 1 again. Keys with a stable answer become almost free, others are checked often.

    Deviation: in the paper a counter decides, every gap-th hit is audited. Then whether a hit is audited is no matter
    of chance, and audits cannot speak for the hits between them: answers that change in step with the audits stay
    unnoticed. With an audit by chance every hit has a known probability p = 1/gap of being audited, so that the
    audits, each weighted by its inverse probability (Horvitz and Thompson, 1952), estimate the error without bias,
    whatever the traffic. The counter falls away.

    capacity: stored keys. beta: above 1; the paper tries 1.5 and 2. max_gap: bounds the gap, and with it the expected
    number of hits until a stale answer is noticed and the weight of one audit; the paper has none. Not thread-safe.
    """

    def __init__(self, *, capacity: int, beta: float = 1.5, max_gap: float = math.inf, seed: int = 0) -> None:
        if capacity < 1 or not 1 < beta < math.inf or not max_gap >= 1:
            raise InputError(
                f"received capacity {capacity!r}, beta {beta!r} and max_gap {max_gap!r}; expected room for at least "
                "one key, a finite factor above 1 and a gap of at least 1"
            )
        self.capacity, self.beta, self.max_gap = capacity, beta, max_gap
        self.requests = self.hits = self.audits = self.disagreements = 0
        self._random = np.random.default_rng(seed)
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # least recently used first
        self._errors = self._variance = 0.0

    def answer(self, key: Hashable, model: Callable[[], int]) -> int:
        """The answer to a request with this key; `model` runs the model on the request itself."""
        self.requests += 1
        entry = self._entries.get(key)
        if entry is None:
            return self._stored(key, model())
        self._entries.move_to_end(key)
        self.hits += 1
        if self._random.random() * entry.gap >= 1:
            return entry.answer
        return self._audited(entry, model())

    @property
    def error(self) -> float:
        """Unbiased estimate of the share of all requests that got an answer other than the model's.

        An audited hit gets the model's answer, so what is estimated are the disagreements of the hits that were not
        audited. One audit that disagrees stands for 1/p hits, itself among them: it counts 1/p - 1 = gap - 1.
        """
        return self._errors / max(self.requests, 1)

    @property
    def standard_error(self) -> float:
        """Standard error of `error`, from the same audits.

        Estimate less truth is a martingale over the requests. A hit that disagrees adds the variance (1 - p) / p,
        which is estimated by the audits, each of them weighted by 1/p once more: gap (gap - 1). It is 0, and means
        nothing, while no audit with a gap above 1 has disagreed.
        """
        return math.sqrt(self._variance) / max(self.requests, 1)

    def _stored(self, key: Hashable, answer: int) -> int:
        if len(self._entries) >= self.capacity:
            self._entries.popitem(last=False)
        self._entries[key] = _Entry(answer)
        return answer

    def _audited(self, entry: _Entry, answer: int) -> int:
        self.audits += 1
        if answer == entry.answer:
            entry.gap = min(entry.gap * self.beta, self.max_gap)
            return answer
        self.disagreements += 1
        self._errors += entry.gap - 1
        self._variance += entry.gap * (entry.gap - 1)
        entry.answer, entry.gap = answer, 1.0
        return answer


@dataclass(frozen=True)
class Replay:
    """What AutoRefresh did on a recorded stream; shares of all requests.

    hit_rate: answered without the model. audit_rate: key known, the model ran all the same. estimated_error, with its
    standard error, is what the audits say; true_error is what the recorded answers say.
    """

    requests: int
    hit_rate: float
    audit_rate: float
    estimated_error: float
    standard_error: float
    true_error: float


def replay(key_N: ArrayLike, answer_N: ArrayLike, refresh: AutoRefresh) -> Replay:
    """Send a recorded stream through `refresh`, fresh, in its order.

    key_N: approximate keys of the requests, such as `KeyCache.keys` gives. answer_N: the model's answers to them.
    Raises InputError for lists of different lengths, none at all, or a `refresh` that has served before.
    """
    keys: NDArray[np.int64] = np.asarray(key_N)
    answers: NDArray[np.int64] = np.asarray(answer_N)
    if keys.shape != answers.shape or keys.ndim != 1 or not len(keys) or refresh.requests:
        raise InputError(
            f"received keys of shape {keys.shape}, answers of shape {answers.shape} and an AutoRefresh with "
            f"{refresh.requests} requests behind it; expected one key and one answer per request, and a fresh one"
        )
    wrong = 0
    for key, answer in zip(keys.tolist(), answers.tolist(), strict=True):
        wrong += refresh.answer(key, lambda answer=answer: answer) != answer  # type: ignore[misc]
    n = len(keys)
    return Replay(
        requests=n,
        hit_rate=(refresh.hits - refresh.audits) / n,
        audit_rate=refresh.audits / n,
        estimated_error=refresh.error,
        standard_error=refresh.standard_error,
        true_error=wrong / n,
    )
