"""What answers at present, and the steps to more and less cautious: evidence in, the model that answers out.

    with recent answers -> certified -> tightened -> one cache off -> bypassed
                                       where more requests disagree than the tolerance allows
    resting                            where caches cost more than they save

A lower rung is the certified model, `restricted`: its caches refuse requests that they would answer under the plan, and
what they refuse is answered by the backbone, not by later caches, which were certified for other traffic. So what
disagrees on a lower rung is a subset of what would disagree under the plan. A rung is immutable and a call reads it
once: steps, and other plans, take effect between two calls.

On a lower rung sampled requests also tell what the plan would have answered. So the way back up needs no guess: it is
taken when the detector that raised the alarm, turned around, finds the plan's disagreement below the tolerance.

The rung above is for what no certificate covers, a `RecentCache`: it answers only there. What it would answer is known
before it may, so the same test leads up, on the disagreement of plan and recent answers together; the first alarm leads
down again.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from offramp.caches.recent import RecentCache
from offramp.cost import shares
from offramp.economy import Economy, Trial
from offramp.model import RESULT, CachedModel
from offramp.monitoring import Detector, Monitor

log = logging.getLogger("offramp")

EXTENDED, CERTIFIED, TIGHTENED, ONE_OFF = "with recent answers", "certified", "tightened", "one cache off"
BYPASSED, RESTING = "bypassed", "resting"
STEPPED_BACK = (TIGHTENED, ONE_OFF, BYPASSED)
ALARM = "more requests disagree than the tolerance allows"
RECENT_SEEN = 100  # recent answers among the sampled requests, without which there is no evidence about them
RECENT_DISAGREEMENTS = 32  # among which the worst cache is looked for
KEPT_STEPS = 100


@dataclass(frozen=True)
class Rung:
    """What answers now. answers_from: per cache the least confidence that it answers with; infinity: never."""

    name: str
    model: CachedModel
    answers_from: tuple[float, ...]

    @classmethod
    def certified(cls, cached: CachedModel) -> Rung:
        return cls(CERTIFIED, cached, tuple(planned.threshold for planned in cached.plan.caches))

    def limits(self) -> dict[str, float | None]:
        """By the name of a cache the confidence that it answers from; None: never."""
        names = (planned.name for planned in self.model.plan.caches)
        return dict(zip(names, finite(self.answers_from), strict=True))


@dataclass(frozen=True)
class Step:
    """A change of what answers: when, at which request, between which rungs, why and on what evidence."""

    at: str
    request: int
    before: str
    after: str
    reason: str
    answers_from: Mapping[str, float | None]
    evidence: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Told(NamedTuple):
    """What is known about one sampled request: which cache answered (None: the backbone), how sure it was, whether
    that agrees, whether the plan's answer would have, where it would have left under the plan, and how sure it is
    there; whether there was a recent answer, and whether what is answered would agree if it were given."""

    cache: str | None
    confidence: float
    agrees: bool
    plan_agrees: bool
    plan_exit: int
    plan_confidence: float
    recent: bool
    extended_agrees: bool


class Ladder:
    """The rungs of one model in service, and of those that take its place. Not thread-safe.

    `requests` is told by its owner. `plan_alone` is the plan as it was certified: bypassed at no batch size, and
    without stored answers.
    """

    def __init__(self, cached: CachedModel, run_length: float, seed: int | None) -> None:
        self.run_length, self._seed = run_length, seed
        self.steps: deque[Step] = deque(maxlen=KEPT_STEPS)
        self.requests = 0
        self._take_over(Rung.certified(cached))

    def _take_over(self, top: Rung) -> None:
        self.top, self.plan_alone = top, _without_bypass(top.model)
        self.tolerance = top.model.certificate.tolerance
        self.confidence_level = top.model.certificate.confidence_level
        self.enter(top)

    def enter(self, rung: Rung) -> None:
        """What was seen under another rung says nothing about this one, so the watch begins anew."""
        caches = [planned.name for planned in rung.model.plan.caches]
        self.monitor = Monitor([*caches, RESULT], self.tolerance, self.run_length, seed=self._seed)
        self.culprits: deque[str] = deque(maxlen=RECENT_DISAGREEMENTS)
        # Agreements against what they have to exceed: it bounds false recoveries as the other bounds false alarms.
        self.recovery = None if rung.name in (CERTIFIED, EXTENDED) else Detector(1 - self.tolerance, self.run_length)
        recents = self.top.model.result_cache
        self.extension, self._recent_seen = None, 0
        if isinstance(recents, RecentCache):
            recents.answering = rung.name == EXTENDED
            self.extension = Detector(1 - self.tolerance, self.run_length) if rung is self.top else None
        self.economy = Economy(cost_by_exit(rung), rung.model.plan.estimated_cost)
        self._trial: Trial | None = None
        self._interrupted: tuple[Rung, Monitor, Detector | None] | None = None
        self.rung = rung

    # -- evidence ----------------------------------------------------------------------------------

    def heed(self, told: Told) -> None:
        """Counts one sampled request, and takes the step that it calls for."""
        if self._trial is not None:
            if self._trial.pays(self._exit_after_rest(told)):
                self._wake()
            return
        if not told.agrees and told.cache is not None:
            self.culprits.append(told.cache)
        alarm = self.monitor.observe(told.cache, told.confidence, agrees=told.agrees)
        if alarm is not None:
            self.step_back(ALARM, alarm.to_json())
        elif self.recovery is not None:
            evidence = self.recovery.observe(float(told.plan_agrees))
            if evidence is not None:
                self.restore("the plan disagrees less than the tolerance allows", {"evidence": evidence})
        elif self.extension is not None:
            evidence = self.extension.observe(float(told.extended_agrees))
            self._recent_seen += told.recent
            if evidence is not None and self._recent_seen >= RECENT_SEEN:
                self._extend({"evidence": evidence, "recent_answers": self._recent_seen})

    def _exit_after_rest(self, told: Told) -> int:
        """Where the request would leave under the rung that was interrupted, which may refuse what the plan answers."""
        assert self._interrupted is not None
        limits, at = self._interrupted[0].answers_from, told.plan_exit
        return at if at >= len(limits) or told.plan_confidence >= limits[at] else len(limits)

    # -- steps -------------------------------------------------------------------------------------

    def step_back(self, reason: str, evidence: Mapping[str, Any] | None = None) -> None:
        """One step down; none once all is bypassed."""
        if self.rung.name == BYPASSED:
            return
        if self.rung.name == EXTENDED:
            self.restore(reason, evidence)
            return
        name, answers_from = BYPASSED, (math.inf,) * len(self.rung.answers_from)
        if self.rung.name == CERTIFIED:
            name, answers_from = TIGHTENED, self._tightened()
        elif self.rung.name == TIGHTENED:
            name, answers_from = ONE_OFF, self._without_worst()
        if not self._pays(answers_from):
            name, answers_from = BYPASSED, (math.inf,) * len(answers_from)
        self._move(self._restricted(name, answers_from), reason, evidence)

    def bypass(self, reason: str) -> None:
        """No cache answers any more."""
        self._move(self._restricted(BYPASSED, (math.inf,) * len(self.rung.answers_from)), reason, {})

    def restore(self, reason: str, evidence: Mapping[str, Any] | None = None) -> None:
        """Serve the certified plan again. No effect where it is served."""
        if self.rung is self.top:
            return
        self.top = replace(self.top)  # another rung than before: calls sampled there belong to what is over
        self._move(self.top, reason, evidence)

    def _extend(self, evidence: Mapping[str, Any]) -> None:
        top = self.top
        reason = "with recent answers too, fewer requests disagree than the tolerance allows"
        self._move(Rung(EXTENDED, top.model, top.answers_from), reason, evidence)

    def adopt(self, cached: CachedModel, reason: str, evidence: Mapping[str, Any] | None = None) -> None:
        """Another certified model takes the place of all of this one's rungs."""
        top = Rung.certified(cached)
        self._log(top, reason, evidence)
        self._take_over(top)

    def rest(self) -> None:
        """Bypass the caches because they cost more than they save; the watch over the rung is interrupted."""
        if self._trial is not None or self.rung.name == BYPASSED:
            return
        interrupted, economy = (self.rung, self.monitor, self.recovery), self.economy
        trial = economy.rest()
        resting = self._restricted(RESTING, (math.inf,) * len(self.rung.answers_from))
        self._move(resting, "caches cost more than they save", {"sampled_before_return": trial.needed})
        self._interrupted, self._trial, self.economy = interrupted, trial, economy

    def _wake(self) -> None:
        assert self._interrupted is not None
        (rung, monitor, recovery), economy = self._interrupted, self.economy
        again = replace(rung)
        if rung is self.top:
            self.top = again
        self._move(again, "caches pay again", {})
        self.monitor, self.recovery, self.economy = monitor, recovery, economy

    def _restricted(self, name: str, answers_from: tuple[float, ...]) -> Rung:
        return Rung(name, self.top.model.restricted(answers_from), answers_from)

    def _move(self, rung: Rung, reason: str, evidence: Mapping[str, Any] | None) -> None:
        self._log(rung, reason, evidence)
        self.enter(rung)

    def _log(self, rung: Rung, reason: str, evidence: Mapping[str, Any] | None) -> None:
        watched = {"disagreement": self.monitor.disagreement(self.confidence_level), **(evidence or {})}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        step = Step(now, self.requests, self.rung.name, rung.name, reason, rung.limits(), watched)
        self.steps.append(step)
        log.warning("%s -> %s: %s; %s", step.before, step.after, reason, watched)

    # -- how far a step goes -----------------------------------------------------------------------

    def _tightened(self) -> tuple[float, ...]:
        """Each cache keeps about the surer half of its hits; one without any keeps half of the doubt."""
        limits = []
        for planned in self.top.model.plan.caches:
            counts = self.monitor.caches[planned.name]
            limit = counts.upper_half() if counts.hits else 1 - (1 - planned.threshold) / 2
            limits.append(max(limit, planned.threshold))
        return tuple(limits)

    def _without_worst(self) -> tuple[float, ...]:
        """The same without the cache that most of the latest disagreements are from; without all if none is known."""
        names = [planned.name for planned in self.top.model.plan.caches]
        found = Counter(name for name in self.culprits if name in names).most_common(1)
        return tuple(
            math.inf if not found or name == found[0][0] else limit
            for name, limit in zip(names, self.rung.answers_from, strict=True)
        )

    def _pays(self, answers_from: Sequence[float]) -> bool:
        """Whether requests like the sampled ones cost less than the full model if caches answered from there on.

        A cache that answers less is looked up as often, up to the last one that answers at all.
        """
        routed = self.monitor.sampled - self.monitor.caches[RESULT].hits
        live = _live(answers_from)
        if live == 0 or routed == 0:
            return live > 0
        cost_E, cost, left = cost_by_exit(Rung("", self.top.model, tuple(answers_from))), 0.0, 1.0
        for k, planned in enumerate(self.top.model.plan.caches[:live]):
            hits = self.monitor.caches[planned.name].at_least(answers_from[k]) if answers_from[k] < math.inf else 0
            cost, left = cost + hits / routed * cost_E[k], left - hits / routed
        return cost + left * cost_E[-1] < 1

    # -- across a restart --------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Rung, evidence and steps; caches that rest do so in this process alone."""
        rung, monitor, recovery = self._interrupted or (self.rung, self.monitor, self.recovery)
        return {
            "rung": CERTIFIED if rung.name == EXTENDED else rung.name,  # recent inputs end with the process
            "answers_from": finite(rung.answers_from),
            "monitor": monitor.to_json(),
            "recovery": None if recovery is None else recovery.to_json(),
            "culprits": list(self.culprits),
            "steps": [step.to_json() for step in self.steps],
        }

    def resume(self, document: Mapping[str, Any]) -> None:
        """Go on where `to_json` was written, with the same model at the top. KeyError, TypeError or ValueError, and
        nothing changed, where it does not belong to that."""
        answers_from = tuple(math.inf if limit is None else limit for limit in document["answers_from"])
        steps = [Step(**step) for step in document["steps"]]
        monitor = Monitor.from_json(document["monitor"], seed=self._seed)
        if list(monitor.caches) != list(self.monitor.caches) or monitor.tolerance != self.tolerance:
            raise ValueError("its evidence is about other caches, or another tolerance")
        on_top = document["rung"] == CERTIFIED
        rung = self.top if on_top else self._restricted(document["rung"], answers_from)
        recovery = None if document["recovery"] is None else Detector.from_json(document["recovery"])
        self.enter(rung)
        self.monitor, self.recovery = monitor, recovery if recovery is not None or on_top else self.recovery
        self.steps.extend(steps)
        self.culprits.extend(document["culprits"])


def finite(answers_from: Sequence[float]) -> list[float | None]:
    """As JSON has them: None for infinity."""
    return [limit if limit < math.inf else None for limit in answers_from]


def _live(answers_from: Sequence[float]) -> int:
    """How many caches are looked up: all up to the last one that answers at all."""
    return 1 + max((k for k, limit in enumerate(answers_from) if limit < math.inf), default=-1)


def cost_by_exit(rung: Rung, *, weight_flops: float = 0.0) -> list[float]:
    """What a request costs that leaves at each cache, and at the end, in units of the backbone's cost: measured time,
    FLOPs or a mixture (`offramp.cost.shares`)."""
    caches = len(rung.model.plan.caches)
    if len(rung.model.costs.caches) != caches:  # look-ups were not measured: as if they were free
        return [1.0] * (caches + 1)
    before_K, cache_K = shares(rung.model.costs, weight_flops=weight_flops)
    looked_up_K = np.cumsum(cache_K)
    live = _live(rung.answers_from)
    return [*(before_K + looked_up_K).tolist(), 1.0 + float(looked_up_K[live - 1] if live else 0.0)]


def _without_bypass(cached: CachedModel) -> CachedModel:
    """The plan as it was certified: bypassed at no batch size, and without stored answers."""
    model = copy.copy(cached)
    model.plan = replace(cached.plan, bypass_batch_sizes=())
    model.result_cache = None
    return model
