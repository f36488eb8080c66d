"""Whether what was certified still holds: statistics of sampled requests, in constant memory, valid at any time.

What is promised is a share of all requests, so all requests are sampled, whatever became of them: one that no cache
answered agrees, which is known without running anything, and one that a cache answered agrees if its shadow does. The
mean of these 0s and 1s is the very number of the certificate. Sampling hits alone would need two estimates, the share
of hits and the disagreement among them, for one product; and misses, which are free, would not make it any sharper.

Everything rests on one detector (`Detector`), which bounds how often it alarms without cause and needs no window. It
watches disagreements against the tolerance, agreements when the way back up is sought, and ranks when it is asked
whether hits or confidences change. Counts, sketches and detectors of several processes add up.

Shape suffixes: J bets of a detector, B bins of a histogram.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from offramp.errors import InputError
from offramp.types import FloatArray

ODDS_RATIOS = 2.0 ** (np.arange(1, 13) / 2)  # what bets take the odds to have become: 1.4 to 64 times as much
BINS = 48  # of confidence: each halves the doubt, 1 - confidence, of the one two before it
KEPT_ALARMS = 100


# --- an interval ----------------------------------------------------------------------------------


def confidence_sequence(errors: int, n: int, confidence_level: float) -> tuple[float, float]:
    """An interval for a constant rate after `errors` in `n`, which holds at all times at once however often one looks.

    The rates at which a beta-binomial mixture with Jeffreys' prior has not won 1 / (1 - confidence_level) times its
    stake (Robbins, Ann. Math. Stat. 41, 1970; Howard et al., Ann. Stat. 49, 2021). By Ville's inequality the rate is
    outside, at any time whatever, with probability at most 1 - confidence_level. (0, 1) before the first request.
    """
    from scipy.optimize import brentq

    _check_counts(errors, n)
    if not 0 < confidence_level < 1:
        raise InputError(f"confidence_level is {confidence_level!r}; expected a number above 0 and below 1, like 0.95")
    if n == 0:
        return 0.0, 1.0

    def excess(rate: float) -> float:
        return _log_mixture(errors, n, rate) + math.log1p(-confidence_level)

    middle, edge = errors / n, 1e-15
    low = 0.0 if errors == 0 or excess(edge) <= 0 else brentq(excess, edge, middle)
    high = 1.0 if errors == n or excess(1 - edge) <= 0 else brentq(excess, middle, 1 - edge)
    return float(low), float(high)


def _log_mixture(errors: int, n: int, rate: float) -> float:
    """Log of the likelihood under the prior over that at `rate`. 0 < rate < 1, or a rate that all requests had."""
    from scipy.special import betaln, xlogy

    marginal = betaln(errors + 0.5, n - errors + 0.5) - betaln(0.5, 0.5)
    return float(marginal - xlogy(errors, rate) - xlogy(n - errors, 1 - rate))


# --- the detector ---------------------------------------------------------------------------------


class Detector:
    """Alarms when numbers in [0, 1] are no longer at most `mean` on average; then starts anew.

    An e-detector in its sum form (Shin, Ramdas and Rinaldo, arXiv 2203.03532; Shiryaev 1963, Roberts 1966). For each of
    a fixed set of bets, some of which suits any change,

        value <- (value + 1) (1 + bet (x - mean))

    and the evidence is the mean over the bets. While no number is expected to exceed `mean`, given those before it, the
    evidence minus the count of numbers is a supermartingale; so evidence of at least `run_length` comes, on average,
    no sooner than after `run_length` numbers. That bound holds for every such stream, at every sample size and without
    independence. The evidence adds up what began at any time before, so it is not held back by a long calm.

    both_ways: alarm when the mean is another one, instead of larger.
    """

    def __init__(self, mean: float, run_length: float, *, both_ways: bool = False) -> None:
        if not 0 < mean < 1:
            raise InputError(f"a detector's mean is {mean!r}; expected a number above 0 and below 1")
        if not 1 <= run_length < math.inf:
            raise InputError(
                f"run_length is {run_length!r}; expected how many sampled requests pass between two false alarms, on "
                "average and at the least: a number of at least 1, such as 10,000"
            )
        self.mean, self.run_length, self.both_ways = mean, run_length, both_ways
        self._bets_J = _bets(mean)
        if both_ways:
            self._bets_J = np.concatenate([self._bets_J, -_bets(1 - mean)])
        self._value_J = np.zeros_like(self._bets_J)

    @property
    def evidence(self) -> float:
        """How much speaks for a change, between 0 and `run_length`."""
        return float(self._value_J.mean())

    def observe(self, x: float) -> float | None:
        """The evidence, where this number made it an alarm; the detector then begins anew."""
        self._value_J = (self._value_J + 1) * (1 + self._bets_J * (x - self.mean))
        evidence = self.evidence
        if evidence < self.run_length:
            return None
        self._value_J = np.zeros_like(self._bets_J)
        return evidence

    def merged(self, other: Detector) -> Detector:
        """What both have seen. Evidence adds up, and the bound then counts the numbers of both."""
        made = Detector(self.mean, self.run_length, both_ways=self.both_ways)
        made._value_J = self._value_J + other._value_J
        return made

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "run_length": self.run_length,
            "both_ways": self.both_ways,
            "value_J": self._value_J.tolist(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        made = cls(document["mean"], document["run_length"], both_ways=document["both_ways"])
        made._value_J = np.asarray(document["value_J"], dtype=np.float64)
        return made


def _bets(mean: float) -> FloatArray:
    """(J,) the likelihood ratios of Bernoulli variables with these odds, as bets on a number in [0, 1]."""
    share_J = ODDS_RATIOS * mean / (1 - mean + ODDS_RATIOS * mean)
    return np.asarray((share_J - mean) / (mean * (1 - mean)))


class Drift:
    """Alarms when numbers in [0, 1] change their distribution; then takes what comes as the new normal.

    A number's rank among all before it is uniform while they are exchangeable, however they are distributed, and ranks
    are independent of each other (Vovk et al., "Algorithmic Learning in a Random World", 2005, theorem 8.1). So a
    detector watches whether the mean rank leaves 1/2. Nothing is compared with a reference of unknown error, and all
    that is kept is a histogram. Changes that leave the mean rank where it was are not seen.
    """

    def __init__(self, run_length: float, ties: random.Random) -> None:
        self.run_length, self._ties = run_length, ties
        self._count_B = np.zeros(BINS, dtype=np.int64)
        self._detector = Detector(0.5, run_length, both_ways=True)

    def observe(self, x: float) -> float | None:
        """The evidence, where this number made it an alarm."""
        at = bin_of(x)
        self._count_B[at] += 1
        below = int(self._count_B[:at].sum()) + self._ties.random() * int(self._count_B[at])
        evidence = self._detector.observe(below / int(self._count_B.sum()))
        if evidence is not None:
            self._count_B[:] = 0
        return evidence

    def merged(self, other: Drift) -> Drift:
        """What both have seen, as one."""
        made = Drift(self.run_length, self._ties)
        made._count_B = self._count_B + other._count_B
        made._detector = self._detector.merged(other._detector)
        return made

    def to_json(self) -> dict[str, Any]:
        return {"count_B": self._count_B.tolist(), "detector": self._detector.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], ties: random.Random) -> Self:
        made = cls(document["detector"]["run_length"], ties)
        made._count_B = np.asarray(document["count_B"], dtype=np.int64)
        made._detector = Detector.from_json(document["detector"])
        return made


def bin_of(confidence: float) -> int:
    """The bin of a confidence: evenly spaced in the log of the doubt, because thresholds lie close to 1."""
    if not confidence < 1:  # NaN too
        return BINS - 1
    halvings = -math.log2(1 - max(confidence, 0.0))
    return min(int(2 * halvings + 1e-9), BINS - 1)  # an edge belongs to the bin above it, whatever it was rounded to


def edge_of(position: int) -> float:
    """The least confidence in this bin."""
    return 1 - math.pow(2, -position / 2)


# --- what is known about the requests of one plan -------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """A detector's: what it watches, its evidence against the `run_length` that it reached, and the counts by then."""

    stream: str
    evidence: float
    run_length: float
    sampled: int
    disagreements: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class CacheCounts:
    """Sampled requests that one cache answered: how many, how many of these disagreed, and how sure it was."""

    hits: int = 0
    disagreements: int = 0
    confidence_B: list[int] = field(default_factory=lambda: [0] * BINS)

    def at_least(self, confidence: float) -> int:
        """About how many were as sure as this: bin by bin, those of its own bin included."""
        return sum(self.confidence_B[bin_of(confidence) :])

    def upper_half(self) -> float:
        """A confidence that at most half of the hits reached."""
        above, position = 0, BINS
        while position and above + self.confidence_B[position - 1] <= self.hits / 2:
            position -= 1
            above += self.confidence_B[position]
        return edge_of(position) if position < BINS else math.inf


class Monitor:
    """Sampled requests that were answered under one plan: counts, an interval, and detectors that alarm.

    tolerance: highest share of requests whose answer may disagree. run_length: how many sampled requests pass between
    two false alarms about it, on average and at the least; and between two about hits and confidences. caches: names
    of what may answer in place of the backbone. Of constant size, not thread-safe. Two processes that serve one plan
    are reported as one by `merge`.
    """

    def __init__(
        self, caches: Iterable[str], tolerance: float, run_length: float = 10_000, *, seed: int | None = None
    ) -> None:
        self._ties = random.Random(seed)
        self.tolerance, self.run_length = tolerance, run_length
        self.sampled = self.disagreements = 0
        self.alarms: deque[Alarm] = deque(maxlen=KEPT_ALARMS)
        self.caches = {name: CacheCounts() for name in caches}
        self._detector = Detector(tolerance, run_length)
        drifts = [f"{what} of {name}" for name in self.caches for what in ("hits", "confidence")]
        # The more of them there are, the rarer each may cry wolf: together as rarely as the one above.
        self._drifts = {name: Drift(run_length * len(drifts), self._ties) for name in drifts}

    @property
    def evidence(self) -> float:
        """How much speaks for more disagreements than the tolerance, between 0 and `run_length`."""
        return self._detector.evidence

    def observe(self, cache: str | None, confidence: float = 1.0, *, agrees: bool = True) -> Alarm | None:
        """One sampled request: which cache answered (None: the backbone), how sure it was, and whether it agreed.

        Returns an alarm when more requests disagree than the tolerance allows. Alarms about hits and confidences,
        which break no promise, are only added to `alarms`.
        """
        self.sampled += 1
        self.disagreements += not agrees
        if cache is not None:
            counts = self.caches[cache]
            counts.hits += 1
            counts.disagreements += not agrees
            counts.confidence_B[bin_of(confidence)] += 1
            self._notice(f"confidence of {cache}", confidence)
        for name in self.caches:
            self._notice(f"hits of {name}", float(name == cache))
        return self._tell("disagreement", self.run_length, self._detector.observe(float(not agrees)))

    def disagreement(self, confidence_level: float = 0.95) -> dict[str, Any]:
        """Share of the sampled requests that disagreed, with its confidence sequence. The share is None before any."""
        return {
            "share": self.disagreements / self.sampled if self.sampled else None,
            "interval": confidence_sequence(self.disagreements, self.sampled, confidence_level),
            "confidence_level": confidence_level,
            "disagreements": self.disagreements,
            "sampled": self.sampled,
        }

    def to_json(self) -> dict[str, Any]:
        """All of it but the state of the generator that breaks ties."""
        return {
            "tolerance": self.tolerance,
            "run_length": self.run_length,
            "sampled": self.sampled,
            "disagreements": self.disagreements,
            "alarms": [alarm.to_json() for alarm in self.alarms],
            "caches": {name: asdict(counts) for name, counts in self.caches.items()},
            "detector": self._detector.to_json(),
            "drifts": {name: drift.to_json() for name, drift in self._drifts.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, seed: int | None = None) -> Self:
        made = cls(document["caches"], document["tolerance"], document["run_length"], seed=seed)
        made.sampled, made.disagreements = document["sampled"], document["disagreements"]
        made.alarms.extend(Alarm(**alarm) for alarm in document["alarms"])
        made.caches = {name: CacheCounts(**counts) for name, counts in document["caches"].items()}
        made._detector = Detector.from_json(document["detector"])
        made._drifts = {name: Drift.from_json(drift, made._ties) for name, drift in document["drifts"].items()}
        return made

    def _notice(self, stream: str, x: float) -> None:
        drift = self._drifts[stream]
        self._tell(stream, drift.run_length, drift.observe(x))

    def _tell(self, stream: str, run_length: float, evidence: float | None) -> Alarm | None:
        if evidence is None:
            return None
        alarm = Alarm(stream, evidence, run_length, self.sampled, self.disagreements)
        self.alarms.append(alarm)
        return alarm


def merge(one: Monitor, other: Monitor) -> Monitor:
    """What two processes saw of one plan, as if one had seen it: counts add up, and so does evidence.

    The bound on false alarms then counts the requests of both. Evidence that adds up is weaker than that of one
    process that saw all of it, so each process should also heed its own alarms. InputError when they watch different
    things.
    """
    watched = [(list(m.caches), m.tolerance, m.run_length) for m in (one, other)]
    if watched[0] != watched[1]:
        raise InputError(
            f"monitors of different plans cannot be merged; caches, tolerance and run length are {watched[0]} and "
            f"{watched[1]}"
        )
    made = Monitor(one.caches, one.tolerance, one.run_length)
    made.sampled, made.disagreements = one.sampled + other.sampled, one.disagreements + other.disagreements
    made.alarms.extend([*one.alarms, *other.alarms])
    for name, mine in one.caches.items():
        theirs = other.caches[name]
        counted = [a + b for a, b in zip(mine.confidence_B, theirs.confidence_B, strict=True)]
        made.caches[name] = CacheCounts(mine.hits + theirs.hits, mine.disagreements + theirs.disagreements, counted)
    made._detector = one._detector.merged(other._detector)
    made._drifts = {name: drift.merged(other._drifts[name]) for name, drift in one._drifts.items()}
    return made


# --- latency --------------------------------------------------------------------------------------


class LatencySketch:
    """Quantiles of durations to within 1 %, in constant memory (DDSketch, Masson et al., VLDB 2019).

    Counts in bins that grow by 2 % each, from a microsecond to an hour; what lies beyond counts as the nearest.
    """

    _LOG_GROWTH = math.log(1.02)
    _LEAST_S, _MOST_S = 1e-6, 3600.0

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self._counts = Counter(counts)

    def add(self, seconds: float) -> None:
        clipped = min(max(seconds, self._LEAST_S), self._MOST_S)
        self._counts[round(math.log(clipped / self._LEAST_S) / self._LOG_GROWTH)] += 1

    def quantile(self, share: float) -> float | None:
        """In seconds; None before the first duration."""
        seen, total = 0, self._counts.total()
        for at in sorted(self._counts):
            seen += self._counts[at]
            if seen >= share * total:
                return self._LEAST_S * math.exp(at * self._LOG_GROWTH)
        return None

    def merged(self, other: LatencySketch) -> LatencySketch:
        return LatencySketch(self._counts + other._counts)

    def to_json(self) -> dict[str, int]:
        return {str(at): count for at, count in sorted(self._counts.items())}

    @classmethod
    def from_json(cls, document: Mapping[str, int]) -> Self:
        return cls({int(at): count for at, count in document.items()})


def _check_counts(errors: int, n: int) -> None:
    if not 0 <= errors <= n:
        raise InputError(f"{errors} errors among {n} requests; expected 0 <= errors <= requests")
