"""How soon a change is noticed, and how often one is seen where there is none: our detector and others, same streams.

Streams of 0s and 1s stand for sampled requests, 1 where the answer disagrees. Calm ones disagree by 1 %, the tolerance
is 2 %. Delays are counted in sampled requests from the change on; at the default share of 1 % each stands for a hundred
requests. Opponents: MAPIE's RiskMonitoring, told the tolerance itself, or with a reference set of 2,000 calm requests
and the other 1 % as its tolerance; and a plain window, such as tuners keep: alarm where more than the tolerance of the
last 500 disagree. Apparate's own rule tunes anew all the time and raises no alarm.

    python benchmarks/detection_delay.py --out benchmarks/results/detection_delay.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray

from offramp.monitoring import Detector

TOLERANCE, CALM_RATE = 0.02, 0.01
CALM, LONGEST = 1000, 20_000  # requests before the change, and after it
RATES = (0.03, 0.05, 0.10, 0.20)
RUN_LENGTHS = (1_000, 10_000, 100_000)
WINDOW = 500
SHOWN = (
    2000  # requests that MAPIE's monitor is shown at first, and then twice as many each time: it reads all of them anew
)
Alarms = Callable[[NDArray[np.bool_]], Iterator[int]]


def ours(run_length: float) -> Alarms:
    def alarms(wrong_N: NDArray[np.bool_]) -> Iterator[int]:
        detector = Detector(TOLERANCE, run_length)
        for at, x in enumerate(wrong_N.astype(float).tolist(), 1):
            if detector.observe(x) is not None:
                yield at

    return alarms


def window(wrong_N: NDArray[np.bool_]) -> Iterator[int]:
    """Alarms where the last `WINDOW` exceed the tolerance; begins with an empty window after each."""
    errors_N = np.concatenate([[0], np.cumsum(wrong_N)])
    over = np.flatnonzero(errors_N[WINDOW:] - errors_N[:-WINDOW] > TOLERANCE * WINDOW) + WINDOW
    begun = 0
    for at in over.tolist():
        if at >= begun + WINDOW:
            begun = at
            yield at


def mapie(*, packaged: bool, tolerance: float = TOLERANCE) -> Alarms:
    """The first request at which its bound is beyond its threshold, had it been asked at each. It ends there."""
    from mapie.exchangeability_testing import RiskMonitoring
    from mapie.risk_control import BinaryRisk

    risk = BinaryRisk(
        risk_occurrence=lambda truth_N, differs_N: differs_N != truth_N,
        risk_condition=lambda truth_N, _differs_N: np.ones(len(truth_N), dtype=bool),
        higher_is_better=False,
    )
    reference_N = np.random.default_rng(10**6).random(2000) < CALM_RATE
    told = (
        {"reference_data": (np.zeros(2000, int), reference_N.astype(int)), "tolerance": tolerance - CALM_RATE}
        if packaged
        else {"threshold": tolerance}
    )

    def alarms(wrong_N: NDArray[np.bool_]) -> Iterator[int]:
        shown = SHOWN
        while True:
            seen_N = wrong_N[:shown].astype(int)
            monitor = RiskMonitoring(risk=risk, warn=False, **told).update(np.zeros(len(seen_N), int), seen_N)
            over = np.flatnonzero(monitor.online_risk_lower_bound_sequence_history > monitor.threshold)
            if len(over) or shown >= len(wrong_N):
                yield from (over[:1] + 1).tolist()
                return
            shown *= 2

    return alarms


def changing(rate: float, seed: int) -> NDArray[np.bool_]:
    rng = np.random.default_rng(seed)
    return np.asarray(np.concatenate([rng.random(CALM) < CALM_RATE, rng.random(LONGEST) < rate]))


def delays(alarms: Alarms, rate: float, streams: int) -> dict[str, Any]:
    """Requests from the change to the first alarm behind it; a stream without one counts as the longest."""
    found = [
        next((at - CALM for at in alarms(changing(rate, seed)) if at > CALM), CALM + LONGEST) for seed in range(streams)
    ]
    median, p90 = np.quantile(found, [0.5, 0.9]).tolist()
    missed = sum(delay > LONGEST for delay in found)
    return {"streams": streams, "median": median, "p90": p90, "mean": float(np.mean(found)), "missed": missed}


def false_alarms(alarms: Alarms, rate: float, requests: int, streams: int = 1) -> dict[str, Any]:
    """Alarms in calm streams that have so many requests together."""
    length = requests // streams
    count = sum(
        len(list(alarms(np.random.default_rng(10_000 + seed).random(length) < rate))) for seed in range(streams)
    )
    return {"rate": rate, "requests": length * streams, "alarms": count}


def row(name: str, promise: str, alarms: Alarms, streams: int, requests: int, pieces: int = 1) -> dict[str, Any]:
    """The measured row of one detector; calm requests come in so many streams."""
    print(name, file=sys.stderr, flush=True)
    return {
        "detector": name,
        "promise": promise,
        "delay": {str(rate): delays(alarms, rate, streams) for rate in RATES},
        "false_alarms": [false_alarms(alarms, rate, requests, pieces) for rate in (CALM_RATE, TOLERANCE)],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows, as docs/results.md shows them."""
    lines = [
        "| detector | promise | "
        + " | ".join(f"1 % to {100 * rate:g} %: median (90 %)" for rate in RATES)
        + " | false alarms per 1 M sampled requests at 1 % | at exactly 2 % |",
        "|---" * (4 + len(RATES)) + "|",
    ]
    for entry in rows:
        cells = [_delay(entry["delay"][str(rate)]) for rate in RATES]
        calm = [_per_million(found) for found in entry["false_alarms"]]
        lines.append(" | ".join([f"| {entry['detector']}", entry["promise"], *cells, *calm]) + " |")
    return "\n".join(lines)


def _delay(found: dict[str, Any]) -> str:
    if found["missed"] > found["streams"] / 2:
        return f"not within {LONGEST:,} in {found['missed']} of {found['streams']}"
    tail = f"over {LONGEST:,}" if found["p90"] > LONGEST else f"{found['p90']:,.0f}"
    return f"{found['median']:,.0f} ({tail})"


def _per_million(found: dict[str, Any]) -> str:
    if found["requests"] >= 10**6:
        return f"{found['alarms'] * 10**6 / found['requests']:,.0f}"
    return f"{found['alarms']} in {found['requests']:,}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--mapie-streams", type=int, default=6)
    parser.add_argument("--requests", type=int, default=1_000_000, help="calm requests, at 1 % and at exactly 2 % each")
    parser.add_argument("--mapie-requests", type=int, default=40_000)
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    rows = [
        row(
            f"offramp, run length {run_length:,}",
            f"at least {run_length:,} requests between false alarms, on average",
            ours(run_length),
            options.streams,
            options.requests,
        )
        for run_length in RUN_LENGTHS
    ]
    rows.append(row(f"window of {WINDOW}", "none", window, options.streams, options.requests))
    for name, packaged in (("MAPIE, told the tolerance", False), ("MAPIE, with a reference set", True)):
        try:
            detector = mapie(packaged=packaged)
        except ImportError:
            print(f"{name}: MAPIE is not installed (extra `bench`)", file=sys.stderr)
            continue
        promise = "a false alarm ever: at most 5 %"
        rows.append(row(name, promise, detector, options.mapie_streams, options.mapie_requests, 2))
    print(table(rows))
    common.finish(common.document("How soon a change of the traffic is noticed", rows), options.out)


if __name__ == "__main__":
    main()
