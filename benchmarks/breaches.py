"""How often each rule breaks its promise: recorded caches, dealt anew many times.

    python benchmarks/breaches.py tests/data/resnet18_cifar10_records.npz --out benchmarks/results/breaches.json

Each draw deals the recorded inputs to three parts. A rule sets thresholds on the first two: ours searches on tune and
certifies on certify, MAPIE likewise, the others get both as one sample to tune on (with `--see tune` the methods'
published rules get the first part only, as in `fit`). The third part shows the disagreement. It is finite, so a breach
is counted twice: where its share of disagreements is above the tolerance, and where an exact binomial test at 5 % says
that the true one is. A rule that keeps a promise at 95 % confidence may break it in 5 % of the draws by the truth, so
by the share in somewhat more, and by the test in hardly any. Draws share inputs; the intervals ignore it.

Every rule is tried on whatever caches a file holds, its own method's or not; with `--own` only on those of its own
method, by the file's name. Files are those of `cifar10.py --records`, or of the folder `records` in a --workdir of
`methods.py`. Ctrl-C ends with the draws so far.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray
from opponents import RULES
from opponents.rules import Rule, joined
from scipy.stats import binom

from offramp.calibration import fixed_sequence, interval
from offramp.choosing import PATH_REACH
from offramp.methods import METHODS, method_named
from offramp.placement import OFF, CacheCosts, Thresholds, expected_cost, outcomes, plan_path
from offramp.tail import steady_path
from offramp.types import Records

RECORDS = common.ROOT / "tests" / "data" / "resnet18_cifar10_records.npz"
SHARES = (0.25, 0.35)  # tune, certify; the rest is evaluated on
TEST_LEVEL = 0.05
INTERVAL_LEVEL = 0.95
TELL_EVERY_S = 10.0


def load(file: Path) -> tuple[Records, CacheCosts]:
    """The records of a file. One without answers serves rules that look at confidence and agreement only."""
    with np.load(file) as stored:
        agreement = stored["agreement"].astype(bool)
        nothing = np.zeros(agreement.shape, dtype=np.int64)
        answer, backbone_answer = stored.get("answer", nothing), stored.get("backbone_answer", nothing[:, 0])
        reads_K = tuple(stored["reads"].tolist())
        records = Records(stored["confidence"], answer, agreement, backbone_answer, reads_K)
        return records, CacheCosts(stored["before"], stored["cache"])


# -- the rules -------------------------------------------------------------------------------------


def certified(tune: Records, certify: Records, costs: CacheCosts, tolerance: float, **options: Any) -> Thresholds:
    """Our path of plans on tune and the fixed sequence on certify, as `offramp.choosing` has it, but for these options
    of `plan_path`."""
    path, miss_price = steady_path(tune, costs, PATH_REACH * tolerance, tolerance)
    if options:
        path = plan_path(tune, costs, PATH_REACH * tolerance, **{"miss_price": miss_price, **options})
    return last_certified([candidate.thresholds_K for candidate in path], certify, tolerance)


def last_certified(path: Sequence[Thresholds], certify: Records, tolerance: float) -> Thresholds:
    """The last of these plans before the first that fails; no cache where the first one fails."""
    passed: Thresholds = (OFF,) * len(certify.reads_K)
    for thresholds_K in path:
        errors = int(outcomes(certify, thresholds_K)[1].sum())
        if fixed_sequence([errors], len(certify), tolerance, common.LEVEL) < 0:
            break
        passed = thresholds_K
    return passed


def published(name: str, see: str) -> Rule:
    """The published rule of a method of offramp."""
    method = method_named(name)

    def thresholds(tune: Records, certify: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        return method.thresholds(tune if see == "tune" else joined(tune, certify), costs, tolerance)

    return Rule(f"{name}, published rule", "As measured on the inputs that it was tuned on.", thresholds)


def rules(see: str) -> list[Rule]:
    ours = Rule("offramp, certified", f"With {100 * common.LEVEL:g} % confidence within the tolerance.", certified)
    return [ours, *RULES, *(published(name, see) for name in METHODS)]


# -- the draws -------------------------------------------------------------------------------------


@dataclass
class Count:
    """What one rule did at one tolerance, draw by draw, on the part that it had not seen."""

    rule: Rule
    tolerance: float
    errors: list[int] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    idle: int = 0  # draws without any cache
    seconds: float = 0.0
    error: str = ""

    def draw(self, parts: tuple[Records, Records, Records], costs: CacheCosts) -> None:
        if self.error:
            return
        started = time.perf_counter()
        tune, certify, fresh = parts
        try:
            thresholds_K = self.rule.thresholds(tune, certify, costs, self.tolerance)
        except Exception as error:  # a rule that does not fit these records; the rest goes on
            self.error = f"{type(error).__name__}: {error}"
            return
        self.seconds += time.perf_counter() - started
        self.errors.append(int(outcomes(fresh, thresholds_K)[1].sum()))
        self.cost.append(expected_cost(fresh, thresholds_K, costs))
        self.idle += not np.isfinite(thresholds_K).any()

    def row(self, file: str, n: int) -> dict[str, Any]:
        said = {"file": file, "rule": self.rule.name, "guarantee": self.rule.guarantee, "tolerance": self.tolerance}
        if self.error or not self.errors:
            return said | {"error": self.error or "no draw"}
        draws, errors = len(self.errors), np.array(self.errors)
        shares = errors / n
        by_share, by_test = int((shares > self.tolerance).sum()), int(surely_above(errors, n, self.tolerance).sum())
        return said | {
            "draws": draws,
            "evaluated_on": n,
            "breaches_by_share": by_share / draws,
            "breaches_by_share_interval": interval(by_share, draws, INTERVAL_LEVEL),
            "breaches_by_test": by_test / draws,
            "breaches_by_test_interval": interval(by_test, draws, INTERVAL_LEVEL),
            "disagreement_mean": float(shares.mean()),
            "disagreement_worst": float(shares.max()),
            "cost_mean": float(np.mean(self.cost)),
            "draws_without_caches": self.idle,
            "seconds_per_draw": self.seconds / draws,
        }


def surely_above(errors: NDArray[np.int64], n: int, tolerance: float) -> NDArray[np.bool_]:
    """Where so many errors in n, or more, have a probability of at most TEST_LEVEL if the rate is the tolerance."""
    return np.asarray(binom.sf(errors - 1, n, tolerance) <= TEST_LEVEL)


def dealt(records: Records, draws: int, seed: int) -> Iterator[tuple[Records, Records, Records]]:
    """Tune, certify and fresh records of each draw."""
    rng = np.random.default_rng(seed)
    first, second = (round(share * len(records)) for share in np.cumsum(SHARES))
    for _ in range(draws):
        order = rng.permutation(len(records))
        yield records.rows(order[:first]), records.rows(order[first:second]), records.rows(order[second:])


def counted(
    records: Records,
    costs: CacheCosts,
    chosen: list[Rule],
    options: argparse.Namespace,
    tell: Callable[[str], None],
) -> tuple[list[Count], int]:
    """All counts, and how many inputs each draw was evaluated on."""
    counts = [Count(rule, tolerance) for tolerance in options.tolerances for rule in chosen]
    started = told = time.monotonic()
    fresh = 0
    try:
        for done, parts in enumerate(dealt(records, options.draws, options.seed), start=1):
            fresh = len(parts[2])
            for count in counts:
                count.draw(parts, costs)
            now = time.monotonic()
            if now - told > TELL_EVERY_S or done in (1, options.draws):
                told, each = now, (now - started) / done
                tell(f"draw {done} of {options.draws}, {each:.1f} s each, {each * (options.draws - done):.0f} s left")
    except KeyboardInterrupt:
        tell("interrupted: here is what there is")
    return counts, fresh


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| rule | tolerance | draws above it [95 % interval] | surely above it (exact test) | mean disagreement "
        "| worst | mean cost | s per draw |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        what = f"| {row['rule']} | {100 * row['tolerance']:g} % |"
        if "error" in row:
            message = row["error"].splitlines()[0].replace("|", "/")
            lines.append(f"{what} failed: {message} |" + " - |" * 5)
            continue
        low, high = (100 * edge for edge in row["breaches_by_share_interval"])
        lines.append(
            f"{what} {100 * row['breaches_by_share']:.1f} % [{low:.1f}, {high:.1f}] | "
            f"{100 * row['breaches_by_test']:.1f} % | {100 * row['disagreement_mean']:.2f} % | "
            f"{100 * row['disagreement_worst']:.2f} % | {row['cost_mean']:.3f} | {row['seconds_per_draw']:.2f} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="*", default=[RECORDS], help=".npz files (default: the tests' own)")
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.01, 0.02])
    parser.add_argument("--rules", nargs="+", metavar="NAME", help="(default: all) beginnings of names")
    parser.add_argument("--own", action="store_true", help="on each file only the rules of its own method")
    parser.add_argument("--see", choices=("all", "tune"), default="all", help="what published rules are tuned on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    chosen = rules(options.see)
    if options.rules:
        chosen = [rule for rule in chosen if rule.name.startswith(tuple(options.rules))]
    rows = []
    for file in options.records:
        records, costs = load(file)
        print(f"{file}: {len(records)} inputs, {len(records.reads_K)} caches", file=sys.stderr, flush=True)
        tried = [rule for rule in chosen if not options.own or rule.name.startswith(file.stem.split("-")[0] + ",")]
        counts, n = counted(records, costs, tried, options, lambda text: print(text, file=sys.stderr, flush=True))
        rows += [count.row(file.name, n) for count in counts]
    print(table(rows))
    caches = ", on its own method's caches" if options.own else ""
    common.finish(common.document(f"How often each rule breaks its promise{caches}", rows), options.out)


if __name__ == "__main__":
    main()
