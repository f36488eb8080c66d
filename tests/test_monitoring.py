"""The statistics of the watch: against slow oracles, and what they promise by repetition."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.stats import kstest

from offramp.calibration import interval
from offramp.errors import InputError
from offramp.monitoring import (
    BINS,
    CacheCounts,
    Detector,
    Drift,
    LatencySketch,
    Monitor,
    bin_of,
    confidence_sequence,
    edge_of,
    merge,
)

TOLERANCE = 0.02
Interval = Callable[[int, int, float], tuple[float, float]]


# --- the confidence sequence ----------------------------------------------------------------------


def mixture(errors: int, n: int, rate: float) -> float:
    """How often its stake a bet on Jeffreys' prior has won against this rate, by numerical integration."""

    def won(other: float) -> float:
        return float(
            (other / rate) ** errors * ((1 - other) / (1 - rate)) ** (n - errors) / math.sqrt(other * (1 - other))
        )

    peak = [errors / n] if 0 < errors < n else []
    return float(quad(won, 0, 1, points=peak, limit=500)[0] / math.pi)


@pytest.mark.parametrize(("errors", "n"), [(0, 1), (1, 1), (3, 40), (20, 500), (100, 5000)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_ends_are_where_the_mixture_has_won_enough(errors: int, n: int, level: float) -> None:
    low, high = confidence_sequence(errors, n, level)
    assert low <= errors / n <= high
    for end in (low, high):
        if 0 < end < 1:
            assert mixture(errors, n, end) == pytest.approx(1 / (1 - level), rel=1e-3)
    assert mixture(errors, n, (low + high) / 2) < 1 / (1 - level)


def test_known_ends() -> None:
    assert confidence_sequence(0, 0, 0.95) == (0, 1)
    assert confidence_sequence(0, 700, 0.95)[0] == 0
    assert confidence_sequence(7, 7, 0.95)[1] == 1


@pytest.mark.parametrize(("errors", "n", "level"), [(2, 1, 0.95), (-1, 1, 0.95), (0, 1, 1.0), (0, 1, 0.0)])
def test_impossible_counts_and_levels_are_refused(errors: int, n: int, level: float) -> None:
    with pytest.raises(InputError, match="expected"):
        confidence_sequence(errors, n, level)


def times_outside(ends: Interval, rate: float, streams: int, n: int, seed: int = 0) -> int:
    """In how many streams the rate is outside at one of some fifty looks or more."""
    looks = np.unique(np.geomspace(1, n, 60).astype(int))
    errors_SN = (np.random.default_rng(seed).random((streams, n)) < rate).cumsum(1)
    known: dict[tuple[int, int], bool] = {}

    def outside(errors: int, look: int) -> bool:
        if (errors, look) not in known:
            low, high = ends(errors, look, 0.95)
            known[errors, look] = not low <= rate <= high
        return known[errors, look]

    return sum(any(outside(int(errors_N[look - 1]), int(look)) for look in looks) for errors_N in errors_SN)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.5])
def test_the_rate_stays_inside_at_all_looks_together(rate: float) -> None:
    assert times_outside(confidence_sequence, rate, 600, 3000) <= 0.05 * 600 + 3 * math.sqrt(600 * 0.05 * 0.95)


@pytest.mark.slow
def test_an_interval_for_one_look_is_caught_when_it_is_looked_at_often() -> None:
    assert times_outside(interval, 0.05, 600, 3000) > 0.05 * 600 + 3 * math.sqrt(600 * 0.05 * 0.95)


# --- the detector ---------------------------------------------------------------------------------


def numbers(rate: float, n: int, seed: int) -> list[float]:
    return [float(x) for x in np.random.default_rng(seed).random(n) < rate]


def first_alarm(detector: Detector | Drift, xs: Iterable[float]) -> int | None:
    return next((at for at, x in enumerate(xs, 1) if detector.observe(x) is not None), None)


@pytest.mark.parametrize("both_ways", [False, True])
def test_the_evidence_is_the_sum_of_bets_begun_at_every_time(both_ways: bool) -> None:
    detector = Detector(0.3, 1e9, both_ways=both_ways)
    xs = np.random.default_rng(0).random(60)
    for n, x in enumerate(xs, 1):
        detector.observe(float(x))
        factors_NJ = 1 + detector._bets_J * (xs[:n, None] - 0.3)
        begun = sum(factors_NJ[start:].prod(0) for start in range(n))
        assert detector.evidence == pytest.approx(float(np.mean(begun)))


def test_no_bet_can_lose_more_than_its_stake() -> None:
    for mean in (1e-4, 0.02, 0.5, 0.98):
        for both_ways in (False, True):
            bets_J = Detector(mean, 100, both_ways=both_ways)._bets_J
            assert (1 + bets_J * (0 - mean) > 0).all()
            assert (1 + bets_J * (1 - mean) > 0).all()


def test_it_begins_anew_after_an_alarm() -> None:
    detector = Detector(TOLERANCE, 1000)
    alarms = [evidence for _ in range(20) if (evidence := detector.observe(1.0)) is not None]
    assert len(alarms) >= 2
    assert min(alarms) >= 1000
    assert detector.evidence < 1000


@pytest.mark.parametrize(
    ("rate", "soonest", "latest"), [(0.05, 100, 500), (0.1, 30, 150), (0.3, 5, 40)], ids=["5 %", "10 %", "30 %"]
)
def test_a_change_is_noticed_within_some_hundred_requests(rate: float, soonest: int, latest: int) -> None:
    delays = []
    for seed in range(60):
        detector = Detector(TOLERANCE, 10_000)
        for x in numbers(0.01, 500, seed):
            detector.observe(x)
        delays.append(first_alarm(detector, numbers(rate, 20_000, 1000 + seed)) or math.inf)
    assert soonest < np.median(delays) < latest


@pytest.mark.parametrize(("mean", "run_length"), [(0.0, 100), (1.0, 100), (0.5, 0.5), (0.5, math.inf), (0.5, math.nan)])
def test_senseless_detectors_are_refused(mean: float, run_length: float) -> None:
    with pytest.raises(InputError, match="expected"):
        Detector(mean, run_length)


def run_lengths(rate: float, run_length: float, streams: int, drifting: bool = False) -> NDArray[np.float64]:
    """How many numbers pass until the first alarm; cut off at twenty times the promise, which can only shorten it."""
    found = []
    for seed in range(streams):
        watch = Drift(run_length, random.Random(seed)) if drifting else Detector(TOLERANCE, run_length)
        n = int(20 * run_length)
        found.append(first_alarm(watch, numbers(rate, n, seed)) or n)
    return np.asarray(found, dtype=np.float64)


def check_run_length(lengths: NDArray[np.float64], promised: float) -> None:
    error = lengths.std() / math.sqrt(len(lengths))
    assert lengths.mean() >= promised - 3 * error, f"{lengths.mean()} requests between false alarms"


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_promised_at_exactly_the_tolerance() -> None:
    check_run_length(run_lengths(TOLERANCE, 300, 400), 300)


@pytest.mark.slow
def test_a_detector_of_a_lower_mean_than_it_is_told_is_caught() -> None:
    with pytest.raises(AssertionError, match="between false alarms"):
        check_run_length(run_lengths(2 * TOLERANCE, 300, 400), 300)


@pytest.mark.slow
def test_detectors_of_two_processes_together_keep_the_promise() -> None:
    lengths = []
    for seed in range(300):
        one, other, n = Detector(TOLERANCE, 300), Detector(TOLERANCE, 300), 0
        for a, b in zip(numbers(TOLERANCE, 3000, seed), numbers(TOLERANCE, 3000, 9000 + seed), strict=True):
            n += 2
            alarmed = [one.observe(a) is not None, other.observe(b) is not None]
            if any(alarmed) or one.merged(other).evidence >= 300:
                break
        lengths.append(n)
    check_run_length(np.asarray(lengths, dtype=np.float64), 300)


# --- drift ----------------------------------------------------------------------------------------


def test_bins_and_their_edges() -> None:
    assert [bin_of(x) for x in (-1.0, 0.0, 0.2, 0.5, 0.75, 1 - 2.0**-10)] == [0, 0, 0, 2, 4, 20]
    assert [bin_of(x) for x in (1.0, 1 - 1e-12, math.nan)] == [BINS - 1] * 3
    assert [bin_of(edge_of(position)) for position in range(BINS)] == list(range(BINS))


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.7), (0.5, 0.3), (0.9, 0.6)])
def test_a_change_of_the_hit_rate_is_noticed_both_ways(before: float, after: float) -> None:
    drift = Drift(100_000, random.Random(0))
    assert first_alarm(drift, numbers(before, 2000, 0)) is None
    delay = first_alarm(drift, numbers(after, 2000, 1))
    assert delay is not None
    assert delay < 500
    assert first_alarm(drift, numbers(after, 2000, 2)) is None, "it is the new normal"


def test_a_change_of_confidences_far_up_is_noticed() -> None:
    rng = np.random.default_rng(0)
    drift = Drift(100_000, random.Random(0))
    assert first_alarm(drift, 1 - 10 ** -rng.uniform(3, 5, 2000)) is None
    assert first_alarm(drift, 1 - 10 ** -rng.uniform(2.5, 4.5, 2000)) is not None


@pytest.mark.slow
def test_false_alarms_about_drift_are_as_rare_as_promised() -> None:
    check_run_length(run_lengths(0.4, 200, 300, drifting=True), 200)


@pytest.mark.slow
def test_ranks_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[float] = []
    monkeypatch.setattr(Detector, "observe", lambda _self, x: ranks.append(x))
    drift = Drift(10_000, random.Random(1))
    for x in np.random.default_rng(2).beta(8, 1, 5000):
        drift.observe(float(x))
    assert kstest(ranks, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(ranks[:-1], ranks[1:])[0, 1]) < 0.05


# --- the monitor ----------------------------------------------------------------------------------


def watched(n: int, seed: int, *, rate: float = 0.01, run_length: float = 10_000) -> Monitor:
    """Two caches that answer half and a quarter of the requests, with a share `rate` of all that disagree."""
    rng = np.random.default_rng(seed)
    monitor = Monitor(["a", "b"], TOLERANCE, run_length, seed=seed)
    for _ in range(n):
        cache = ("a", "a", "b", None)[rng.integers(4)]
        confidence = 1.0 if cache is None else float(rng.beta(20, 1))
        monitor.observe(cache, confidence, agrees=cache is None or rng.random() >= rate / 0.75)
    return monitor


def test_counts_and_interval() -> None:
    monitor = Monitor(["a", "b"], TOLERANCE)
    assert monitor.disagreement()["share"] is None
    for cache, agrees in (("a", True), ("a", False), ("b", True), (None, True)):
        assert monitor.observe(cache, 0.9, agrees=agrees) is None
    said = monitor.disagreement(0.9)
    assert (said["share"], said["disagreements"], said["sampled"]) == (0.25, 1, 4)
    assert said["interval"] == confidence_sequence(1, 4, 0.9)
    assert [(c.hits, c.disagreements) for c in monitor.caches.values()] == [(2, 1), (1, 0)]


def test_an_alarm_comes_with_its_evidence() -> None:
    monitor = Monitor(["a"], TOLERANCE, 1000)
    alarm = next(alarm for _ in range(100) if (alarm := monitor.observe("a", 0.9, agrees=False)) is not None)
    assert (alarm.stream, alarm.run_length) == ("disagreement", 1000)
    assert alarm.evidence >= 1000
    assert alarm.sampled == alarm.disagreements == monitor.sampled
    assert alarm in monitor.alarms


def test_drift_is_told_but_raises_no_alarm_of_the_promise() -> None:
    monitor = Monitor(["a"], TOLERANCE, 20_000, seed=0)
    for _ in range(500):
        assert monitor.observe(None) is None
    assert not monitor.alarms
    for _ in range(300):
        assert monitor.observe("a", 0.9) is None
    assert {alarm.stream for alarm in monitor.alarms} == {"hits of a"}


def test_its_size_does_not_grow() -> None:
    def numbers_kept(monitor: Monitor) -> int:
        return json.dumps(monitor.to_json()).count(",")

    monitor = watched(3000, 0, rate=0.2, run_length=5)
    assert len(monitor.alarms) == 100
    assert numbers_kept(monitor) < numbers_kept(watched(10, 0)) + 5 * 100


def test_the_json_form_goes_on_like_the_original() -> None:
    monitor = watched(700, 3, rate=0.04, run_length=50)
    assert monitor.alarms
    document = json.loads(json.dumps(monitor.to_json()))
    again = Monitor.from_json(document, seed=3)
    assert again.to_json() == monitor.to_json()
    for one in (monitor, again):
        one._ties.seed(5)
        for _ in range(50):
            one.observe("a", 0.97, agrees=False)
    assert again.to_json() == monitor.to_json()


def test_what_two_processes_saw_adds_up() -> None:
    one, other = watched(400, 1), watched(900, 2, rate=0.05)
    both, swapped = merge(one, other), merge(other, one)
    assert (both.sampled, both.disagreements) == (1300, one.disagreements + other.disagreements)
    assert both.disagreement()["interval"] == confidence_sequence(both.disagreements, 1300, 0.95)
    assert both.evidence == pytest.approx(one.evidence + other.evidence)
    for name, counts in both.caches.items():
        assert counts.hits == one.caches[name].hits + other.caches[name].hits
        assert sum(counts.confidence_B) == counts.hits
    document, back = both.to_json(), swapped.to_json()
    assert (document["caches"], document["drifts"]) == (back["caches"], back["drifts"])
    assert one.sampled == 400, "merging changes neither"
    assert merge(both, Monitor(["a", "b"], TOLERANCE)).to_json() == document


def test_monitors_of_different_plans_are_not_merged() -> None:
    for other in (Monitor(["a"], TOLERANCE), Monitor(["a", "b"], 0.01), Monitor(["a", "b"], TOLERANCE, 10)):
        with pytest.raises(InputError, match="different plans"):
            merge(watched(5, 0), other)


def test_the_upper_half_of_the_hits() -> None:
    counts = CacheCounts()
    for confidence in (0.6, 0.8, 0.9, 0.95):
        counts.hits += 1
        counts.confidence_B[bin_of(confidence)] += 1
    limit = counts.upper_half()
    assert 0.8 < limit <= 0.9
    assert counts.at_least(limit) == 2
    alike = CacheCounts(3, 0, [3 * (position == 7) for position in range(BINS)])
    assert alike.at_least(alike.upper_half()) == 0, "they cannot be told apart, so none is surer than the others"
    assert CacheCounts(1, 0, [0] * (BINS - 1) + [1]).upper_half() == math.inf


# --- latency --------------------------------------------------------------------------------------


def test_quantiles_of_latency_are_within_one_per_cent() -> None:
    seconds = np.random.default_rng(0).lognormal(-6, 1.5, 20_000)
    one, other = LatencySketch(), LatencySketch()
    assert one.quantile(0.5) is None
    for at, value in enumerate(seconds):
        (one if at % 3 else other).add(float(value))
    both = LatencySketch.from_json(json.loads(json.dumps(one.merged(other).to_json())))
    for share in (0.01, 0.5, 0.95, 0.999):
        expected = np.quantile(seconds, share, method="inverted_cdf")
        assert both.quantile(share) == pytest.approx(expected, rel=0.0101)


def test_latency_takes_no_more_room_than_its_range() -> None:
    sketch = LatencySketch()
    for value in (0.0, 1e-9, 1e9, *np.geomspace(1e-7, 1e5, 30_000).tolist()):
        sketch.add(value)
    assert len(sketch.to_json()) <= 1115
    assert sketch.quantile(1.0) == pytest.approx(3600, rel=0.01)
