"""A cached model in service: it is watched, and steps back before its promise is broken.

The certificate holds for traffic like the inputs that it was certified on, and traffic changes. So a share of the
requests is sampled, before anything is known about them. A sampled request that no cache answered agrees and costs
nothing; of one that a cache answered the backbone's answer is found out afterwards, on a thread of its own (its
*shadow*). Where more requests disagree than the tolerance allows, caches are taken out of service step by step:

    certified -> tightened -> one cache off -> bypassed

Every rung below the first is the certified model, `restricted`: its caches refuse requests that they would answer under
the plan, and what they refuse is answered by the backbone, not by later caches, which were certified for other
traffic. So what disagrees on a lower rung is a subset of what would disagree under the plan. A rung is immutable and
each call reads it once: steps take effect between two calls.

On a lower rung, sampled requests also tell what the plan would have answered. So the way back up needs no guess: it is
taken when the same detector that raised the alarm, turned around, finds the plan's disagreement below the tolerance.
"""

from __future__ import annotations

import atexit
import copy
import logging
import math
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from offramp.cost import shares
from offramp.errors import InputError
from offramp.model import BACKBONE, RESULT, CachedModel, Prediction, as_call
from offramp.monitoring import Detector, LatencySketch, Monitor
from offramp.reservoir import Reservoir
from offramp.streams import Batch

log = logging.getLogger("offramp")

CERTIFIED, TIGHTENED, ONE_OFF, BYPASSED = "certified", "tightened", "one cache off", "bypassed"
RECENT_DISAGREEMENTS = 32  # among which the worst cache is looked for
KEPT_STEPS = 100
LATENCIES = (0.5, 0.95, 0.99)


def online(
    cached: CachedModel,
    *,
    shadow: float = 0.01,
    run_length: float = 10_000,
    queue_size: int = 64,
    keep_inputs: bool = True,
    reservoir_bytes: int = 64 << 20,
    seed: int | None = None,
) -> OnlineModel:
    """Puts a certified model into service: the same calls and answers, watched, and stepping back when traffic changes.

        with offramp.online(cached, shadow=0.01) as model:
            y = model(x)
            model.report()

    shadow: share of the requests that are sampled; those that a cache answered also run to the end, in the background.
    run_length: how many sampled requests pass between two false alarms, on average and at the least. queue_size: how
    many calls with sampled requests may wait for their shadows; what does not fit is dropped, and counted.
    keep_inputs, reservoir_bytes: whether inputs are kept, and how many bytes of them; with `keep_inputs=False` no input
    outlives its shadow. seed: of all that is random here.

    A plan without caches is served too; it never disagrees. The thread belongs to this process: after a fork, call
    `online` in the child. InputError for arguments that make no sense.
    """
    if not 0 < shadow <= 1:
        raise InputError(f"shadow is {shadow!r}; expected a share of the requests above 0 and at most 1, such as 0.01")
    if queue_size < 1:
        raise InputError(f"queue_size is {queue_size!r}; expected a number of calls, at least 1")
    reservoir = Reservoir(cached.split_model.example, reservoir_bytes, seed=seed) if keep_inputs else None
    return OnlineModel(cached, _Sampler(shadow, seed), run_length, queue_size, reservoir)


@dataclass(frozen=True)
class Rung:
    """What answers now. answers_from: per cache the least confidence that it answers with; infinity: never."""

    name: str
    model: CachedModel
    answers_from: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """A change of rung: when, at which request, between which rungs, why and on what evidence."""

    at: str
    request: int
    before: str
    after: str
    reason: str
    answers_from: Mapping[str, float | None]
    evidence: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Sampled:
    """The sampled rows of one call, with what was answered."""

    rung: Rung
    batch: Batch
    answer_B: Tensor
    left_at_B: Tensor
    confidence_B: Tensor


class OnlineModel:
    """A cached model that is watched while it serves; made by `online`. May be called from many threads.

    `rung` is what answers now, `reservoir` holds recent inputs (None: none are kept). Closing it ends the watch; calls
    go on being answered, from the rung that was reached, and nothing is sampled any more.
    """

    def __init__(
        self, cached: CachedModel, sampler: _Sampler, run_length: float, queue_size: int, reservoir: Reservoir | None
    ) -> None:
        self.reservoir = reservoir
        self._sampler, self._run_length = sampler, run_length
        self._tolerance = cached.certificate.tolerance
        self._level = cached.certificate.confidence_level
        self._top = Rung(CERTIFIED, cached, tuple(planned.threshold for planned in cached.plan.caches))
        self._plan_alone = _without_bypass(cached)
        self._lock = threading.Lock()  # of what calls count: never held for long
        self._watch = threading.RLock()  # of the monitor and the ladder; taken before the other one
        self._requests = self._dropped = self._shadowed = self._failed = 0
        self._latency = LatencySketch()
        self._steps: deque[Step] = deque(maxlen=KEPT_STEPS)
        self._enter(self._top)
        self._closed = False
        self._queue: queue.Queue[_Sampled | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._judge_all, name="offramp-shadow", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that is inside torch when the interpreter goes may take it down

    # -- the call ----------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's: same arguments, same output type. Raises InputError when the arguments do not fit."""
        return self._serve(args, kwargs, plainly=True)

    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """The same, and per row where it left and how sure that cache was."""
        prediction: Prediction = self._serve(args, kwargs, plainly=False)
        return prediction

    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, plainly: bool) -> Any:
        started = time.perf_counter()
        batch = as_call(args, kwargs)
        rung = self._rung  # read once: all rows of a call are answered from one rung
        rows = [] if self._closed else self._sampler.take(len(batch))
        sampled = None
        if rows:
            index = torch.tensor(rows)
            copied = batch.rows(index)  # before the call: a backbone may write into its inputs, and so may the caller
            answer = rung.model.predict(*args, **kwargs)
            told = (column_B[index] for column_B in (answer.answer_B, answer.left_at_B, answer.confidence_B))
            sampled = _Sampled(rung, copied, *told)
            answer = answer.output if plainly else answer
        else:
            answer = rung.model(*args, **kwargs) if plainly else rung.model.predict(*args, **kwargs)
        self._keep(batch)
        with self._lock:
            self._requests += len(batch)
            self._latency.add(time.perf_counter() - started)
            if sampled is not None:
                self._enqueue(sampled)
        return answer

    def _keep(self, batch: Batch) -> None:
        if (reservoir := self.reservoir) is None:
            return
        try:
            reservoir.add(self._top.model.split_model.like_example(batch))
        except Exception:  # no error of ours may reach the caller
            self.reservoir = None
            log.exception("the reservoir failed; no inputs are kept from now on")

    def _enqueue(self, sampled: _Sampled) -> None:
        """Hits and misses alike wait here, so whether there is room has nothing to do with what was answered."""
        try:
            if self._closed:
                raise queue.Full
            self._queue.put_nowait(sampled)
        except queue.Full:
            self._dropped += len(sampled.batch)

    # -- the shadow --------------------------------------------------------------------------------

    def _judge_all(self) -> None:
        while (sampled := self._queue.get()) is not None:
            try:
                self._judge(sampled)
            except Exception:
                log.exception("the watch over a cached model failed on a call; the next ones are watched again")
            finally:
                del sampled  # no input outlives its shadow
                self._queue.task_done()
        self._queue.task_done()

    def _judge(self, sampled: _Sampled) -> None:
        rung, exits = sampled.rung, sampled.rung.model.exits
        if self._closed or rung is not self._rung:
            self._drop(len(sampled.batch))
            return
        caches = [None if exits[at] == BACKBONE else exits[at] for at in sampled.left_at_B.tolist()]
        confidences = sampled.confidence_B.tolist()
        agrees, plan_agrees = self._agreement(sampled, [cache is not None for cache in caches])
        with self._watch:
            for row, cache in enumerate(caches):
                if rung is not self._rung:  # a step was taken: this tells nothing about what answers now
                    self._drop(len(caches) - row)
                    return
                self._heed(cache, confidences[row], agrees=agrees[row], plan_agrees=plan_agrees[row])

    def _drop(self, rows: int) -> None:
        with self._lock:
            self._dropped += rows

    @torch.inference_mode()
    def _agreement(self, sampled: _Sampled, hits: Sequence[bool]) -> tuple[list[bool], list[bool]]:
        """Per sampled row whether what was answered agrees with the backbone, and whether the plan would have.

        A shadow that fails disagrees: leaving it out would make the caches look better than they are.
        """
        model, batch = self._plan_alone, sampled.batch
        plan_answer_B = answer_B = sampled.answer_B
        runs = list(hits)
        try:
            if sampled.rung is not self._top:
                prediction = model.predict(*batch.args, **batch.kwargs)
                plan_answer_B = prediction.answer_B
                plan_hits = (prediction.left_at_B < len(model.plan.caches)).tolist()
                runs = [hit or plan_hit for hit, plan_hit in zip(hits, plan_hits, strict=True)]
            rows = torch.tensor([row for row, run in enumerate(runs) if run], dtype=torch.long, device=answer_B.device)
            agrees_B, plan_agrees_B = torch.ones(2, len(runs), dtype=torch.bool, device=answer_B.device)
            if len(rows):
                logits_BC = model.task.logits(model.split_model.backbone_leaves(batch.rows(rows)))
                truth_B = model.task.answer(logits_BC)
                agrees_B[rows] = model.task.agree(answer_B[rows], truth_B)
                plan_agrees_B[rows] = model.task.agree(plan_answer_B[rows], truth_B)
            agrees = [bool(agrees_B[row]) or not hit for row, hit in enumerate(hits)]
            with self._lock:
                self._shadowed += len(rows)
            return agrees, plan_agrees_B.tolist()
        except Exception:
            log.exception("a shadow failed; its %d requests count as disagreements", sum(runs))
            with self._lock:
                self._failed += sum(runs)
            return [not hit for hit in hits], [False] * len(hits)

    # -- the ladder --------------------------------------------------------------------------------

    def _heed(self, cache: str | None, confidence: float, *, agrees: bool, plan_agrees: bool) -> None:
        """Counts one sampled request, and takes the step that it calls for."""
        if not agrees and cache is not None:
            self._culprits.append(cache)
        alarm = self._monitor.observe(cache, confidence, agrees=agrees)
        if alarm is not None:
            self._descend("more requests disagree than the tolerance allows", alarm.to_json())
        elif self._recovery is not None:
            evidence = self._recovery.observe(float(plan_agrees))
            if evidence is not None:
                self._rise("the plan disagrees less than the tolerance allows", {"evidence": evidence})

    def step_back(self, reason: str = "asked for") -> None:
        """Take the next step down by hand: tighten, then one cache off, then bypass. No effect once bypassed."""
        with self._watch:
            self._descend(reason, {})

    def restore(self, reason: str = "asked for") -> None:
        """Serve the certified plan again, whatever the evidence. No effect where it is served."""
        with self._watch:
            if self._rung is not self._top:
                self._rise(reason, {})

    def _descend(self, reason: str, evidence: dict[str, Any]) -> None:
        if self._rung.name == BYPASSED:
            return
        name, answers_from = BYPASSED, (math.inf,) * len(self._rung.answers_from)
        if self._rung.name == CERTIFIED:
            name, answers_from = TIGHTENED, self._tightened()
        elif self._rung.name == TIGHTENED:
            name, answers_from = ONE_OFF, self._without_worst()
        if not self._pays(answers_from):
            name, answers_from = BYPASSED, (math.inf,) * len(answers_from)
        self._move(Rung(name, self._top.model.restricted(answers_from), answers_from), reason, evidence)

    def _rise(self, reason: str, evidence: dict[str, Any]) -> None:
        self._top = replace(self._top)  # another rung than before: calls sampled there belong to what is over
        self._move(self._top, reason, evidence)

    def _tightened(self) -> tuple[float, ...]:
        """Each cache keeps about the surer half of its hits; one without any keeps half of the doubt."""
        limits = []
        for planned in self._top.model.plan.caches:
            counts = self._monitor.caches[planned.name]
            limit = counts.upper_half() if counts.hits else 1 - (1 - planned.threshold) / 2
            limits.append(max(limit, planned.threshold))
        return tuple(limits)

    def _without_worst(self) -> tuple[float, ...]:
        """The same without the cache that most of the latest disagreements are from; without all if none is known."""
        names = [planned.name for planned in self._top.model.plan.caches]
        found = Counter(name for name in self._culprits if name in names).most_common(1)
        return tuple(
            math.inf if not found or name == found[0][0] else limit
            for name, limit in zip(names, self._rung.answers_from, strict=True)
        )

    def _pays(self, answers_from: Sequence[float]) -> bool:
        """Whether requests like the sampled ones cost less than the full model if caches answered from there on.

        A cache that answers less is looked up as often, up to the last one that answers at all.
        """
        live = 1 + max((k for k, limit in enumerate(answers_from) if limit < math.inf), default=-1)
        routed = self._monitor.sampled - self._monitor.caches[RESULT].hits
        if live == 0 or routed == 0:
            return live > 0
        before_K, cache_K = shares(self._top.model.costs)
        looked_up_K = np.cumsum(cache_K)
        cost, left = 0.0, 1.0
        for k, planned in enumerate(self._top.model.plan.caches[:live]):
            hits = self._monitor.caches[planned.name].at_least(answers_from[k]) if answers_from[k] < math.inf else 0
            share = hits / routed
            cost, left = cost + share * float(before_K[k] + looked_up_K[k]), left - share
        return cost + left * (1 + float(looked_up_K[live - 1])) < 1

    def _move(self, rung: Rung, reason: str, evidence: dict[str, Any]) -> None:
        names = (planned.name for planned in rung.model.plan.caches)
        limits = {n: limit if limit < math.inf else None for n, limit in zip(names, rung.answers_from, strict=True)}
        watched = {"disagreement": self._monitor.disagreement(self._level), **evidence}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        step = Step(now, self._requests, self._rung.name, rung.name, reason, limits, watched)
        self._steps.append(step)
        log.warning("%s -> %s: %s; %s", step.before, step.after, reason, watched)
        self._enter(rung)

    def _enter(self, rung: Rung) -> None:
        """What was seen under another rung says nothing about this one, so the watch begins anew."""
        caches = [planned.name for planned in rung.model.plan.caches]
        self._monitor = Monitor([*caches, RESULT], self._tolerance, self._run_length, seed=self._sampler.seed)
        self._culprits: deque[str] = deque(maxlen=RECENT_DISAGREEMENTS)
        # Agreements against what they have to exceed: it bounds false recoveries as the other bounds false alarms.
        self._recovery = None if rung is self._top else Detector(1 - self._tolerance, self._run_length)
        self._rung = rung

    # -- the rest ----------------------------------------------------------------------------------

    @property
    def rung(self) -> Rung:
        """What answers now."""
        return self._rung

    def monitor(self) -> Monitor:
        """What is known since the last step. `offramp.monitoring.merge` adds up those of several processes."""
        with self._watch:
            return Monitor.from_json(self._monitor.to_json())

    def latency(self) -> LatencySketch:
        """A copy of the durations of all calls: until they returned, without waiting for an accelerator."""
        with self._lock:
            return self._latency.merged(LatencySketch())

    def report(self) -> dict[str, Any]:
        """The state as one JSON document. Hit rates and disagreement are those of the requests sampled since the last
        step; durations are in milliseconds."""
        with self._watch, self._lock:
            monitor = self._monitor
            return {
                "rung": self._rung.name,
                "requests": self._requests,
                "shadow": self._sampler.share,
                "sampled": monitor.sampled,
                "shadowed": self._shadowed,
                "dropped": self._dropped,
                "failed": self._failed,
                "tolerance": self._tolerance,
                "disagreement": monitor.disagreement(self._level),
                "evidence": {"alarm": monitor.evidence, "run_length": self._run_length}
                | ({} if self._recovery is None else {"recovery": self._recovery.evidence}),
                "caches": {
                    name: {
                        "hits": counts.hits,
                        "hit_rate": counts.hits / monitor.sampled if monitor.sampled else None,
                        "disagreements": counts.disagreements,
                    }
                    for name, counts in monitor.caches.items()
                    if name != RESULT or counts.hits
                },
                "alarms": [alarm.to_json() for alarm in monitor.alarms],
                "steps": [step.to_json() for step in self._steps],
                "latency_ms": {f"p{100 * share:g}": _ms(self._latency.quantile(share)) for share in LATENCIES},
                "reservoir": None
                if self.reservoir is None
                else {"rows": len(self.reservoir), "bytes": self.reservoir.bytes, "seen": self.reservoir.seen},
            }

    def settle(self) -> None:
        """Wait until every request that has been sampled is judged."""
        self._queue.join()

    def close(self) -> None:
        """End the watch: the shadow that is running is finished, those that wait are dropped. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._queue.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class _Sampler:
    """Which requests are sampled: each with the same probability, decided by its number alone. Thread-safe."""

    def __init__(self, share: float, seed: int | None) -> None:
        self.share, self.seed = share, seed
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._skip = self._gap()

    def take(self, rows: int) -> list[int]:
        """Which of the next `rows` requests are sampled."""
        taken = []
        with self._lock:
            while self._skip < rows:
                taken.append(self._skip)
                self._skip += 1 + self._gap()
            self._skip -= rows
        return taken

    def _gap(self) -> int:
        """How many requests are passed over before the next sampled one: geometric, so that most calls draw nothing."""
        if self.share == 1:
            return 0
        return int(math.log(1 - self._random.random()) / math.log1p(-self.share))


def _without_bypass(cached: CachedModel) -> CachedModel:
    """The plan as it was certified: bypassed at no batch size, and without stored answers."""
    model = copy.copy(cached)
    model.plan = replace(cached.plan, bypass_batch_sizes=())
    model.result_cache = None
    return model


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
