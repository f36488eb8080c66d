"""A cached model in service: it is watched, steps back before its promise is broken, and learns from its traffic.

The certificate holds for traffic like the inputs that it was certified on, and traffic changes. So a share of the
requests is sampled, before anything is known about them. A sampled request that no cache answered agrees and costs
nothing; of one that a cache answered the backbone's answer is found out afterwards, on a thread of its own (its
*shadow*). What is found goes to the ladder (`offramp.ladder`), which decides what answers. With a `Refresh` another
process learns from recent inputs (`offramp.refresh`), and what it has certified takes the place of what serves. With a
state folder all of that outlives this process (`offramp.state`).

A call reads what answers once, so steps and new plans take effect between two calls.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import queue
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from offramp.artifact import is_saved_in, load_onto, save
from offramp.caches.recent import Peeked
from offramp.errors import InputError, OfframpError
from offramp.ladder import CERTIFIED, EXTENDED, Ladder, Rung, Told, cost_by_exit
from offramp.model import BACKBONE, RESULT, CachedModel, Prediction, as_call
from offramp.monitoring import LatencySketch, Monitor
from offramp.observing import Observer, logits_of
from offramp.rebuilding import OptimizedModel
from offramp.refresh import Candidate, Refresh, Refresher
from offramp.reservoir import Reservoir
from offramp.state import StateFolder
from offramp.streams import Batch

log = logging.getLogger("offramp")

KEEPS = ("inputs", "activations", "nothing")
LATENCIES = (0.5, 0.95, 0.99)
UPKEEP_S = 0.2  # how often it is looked whether something is due
SAVED_S = 0.8  # how old the state on disk may become


def online(
    cached: CachedModel,
    *,
    shadow: float = 0.01,
    run_length: float = 10_000,
    queue_size: int = 64,
    keep: Literal["inputs", "activations", "nothing"] = "inputs",
    reservoir_bytes: int = 64 << 20,
    seed: int | None = None,
    refresh: Refresh | None = None,
    state: str | os.PathLike[str] | None = None,
) -> OnlineModel:
    """Puts a certified model into service: the same calls and answers, watched, and stepping back when traffic changes.

        with offramp.online(cached, shadow=0.01) as model:
            y = model(x)
            model.report()

    shadow: share of the requests that are sampled; those that a cache answered also run to the end, in the background.
    run_length: how many sampled requests pass between two false alarms, on average and at the least. queue_size: how
    many calls with sampled requests may wait for their shadows; what does not fit is dropped, and counted.
    keep, reservoir_bytes: of recent requests what is kept, and how many bytes of it. With "activations" or "nothing" no
    input outlives its shadow. Activations (and logits) are those of the sampled requests alone, which then all run to
    the end in the background; caches on the raw input are not learned from them. seed: of all that is random here.

    refresh: learn from the traffic too, see `Refresh`; to begin without caches pass `offramp.uncached(backbone, x)`.
    All certifications of the model's life share what they may fail with: 1 minus its confidence level, beside that of
    the certificate that it came with.

    state: a folder that keeps counts, evidence, plans, inputs and budget; call again with the same folder to go on,
    after a crash too. The plan that served last then serves, whatever the plan of `cached`, whose backbone must be the
    same.

    A plan without caches is served too; it never disagrees. Threads belong to this process: after a fork, call `online`
    in the child. InputError for arguments that make no sense; StorageError or ArtifactError for a state folder that
    cannot be used.
    """
    if not 0 < shadow <= 1:
        raise InputError(f"shadow is {shadow!r}; expected a share of the requests above 0 and at most 1, such as 0.01")
    if queue_size < 1:
        raise InputError(f"queue_size is {queue_size!r}; expected a number of calls, at least 1")
    if keep not in KEEPS:
        raise InputError(f"keep is {keep!r}; expected one of {', '.join(map(repr, KEEPS))}")
    if refresh is not None and keep == "nothing":
        raise InputError("refresh learns from recent requests, and keep='nothing'; keep 'activations', or leave it out")
    if refresh is not None and isinstance(cached, OptimizedModel):
        raise InputError(
            "an optimized model is not refreshed yet; serve the model that it was made from, `cached.origin.base`"
        )
    ladder, sampler = Ladder(cached, run_length, seed), _Sampler(shadow, seed)
    folder = None if state is None else StateFolder(state)
    try:
        return OnlineModel(ladder, sampler, queue_size, keep, reservoir_bytes, refresh=refresh, folder=folder)
    except BaseException:
        if folder is not None:
            folder.close()
        raise


@dataclass(frozen=True)
class _Sampled:
    """The sampled rows of one call, with what was answered."""

    rung: Rung
    batch: Batch
    answer_B: Tensor
    left_at_B: Tensor
    confidence_B: Tensor
    recent_B: Tensor  # where a RecentCache would have given an answer
    extended_answer_B: Tensor  # with that in place of what was answered


@dataclass
class _Counts:
    """Of requests, since the life of the model began."""

    requests: int = 0
    dropped: int = 0
    shadowed: int = 0
    failed: int = 0


class OnlineModel:
    """A cached model that is watched while it serves; made by `online`. May be called from many threads.

    `rung` is what answers now. `reservoir` holds recent inputs or what was observed of them (`offramp.observing`), and
    is None where nothing is kept. Closing it ends the watch; calls go on being answered, from the rung that was
    reached, and nothing is sampled any more.
    """

    def __init__(
        self,
        ladder: Ladder,
        sampler: _Sampler,
        queue_size: int,
        keep: str,
        reservoir_bytes: int,
        *,
        refresh: Refresh | None,
        folder: StateFolder | None,
    ) -> None:
        self._ladder, self._sampler, self._folder = ladder, sampler, folder
        self._lock = threading.Lock()  # of what calls count: never held for long
        self._watch = threading.RLock()  # of the ladder and the plans; taken before the other one
        self._counts, self._latency = _Counts(), LatencySketch()
        self._closed = self._unsaved = False
        cached = ladder.top.model
        document = None if folder is None else folder.read()
        if document is not None:  # before anything in the folder changes
            _check_backbone(document["backbone"], cached)
        seed, seen = sampler.seed, 0 if document is None else document["seen"]
        example, self._observer = cached.split_model.example, None
        if keep == "activations":
            self._observer = Observer(cached.split_model, cached.task)
            example = self._observer(example, torch.zeros(len(example)))
        kept = None if folder is None else folder.kept(keep)
        self.reservoir = (
            None if keep == "nothing" else Reservoir(example, reservoir_bytes, seed=seed, folder=kept, seen=seen)
        )
        self._scratch = None if folder is not None or refresh is None else Path(tempfile.mkdtemp(prefix="offramp-"))
        self._refresher = None
        if refresh is not None and self.reservoir is not None:
            job = folder.refit if folder is not None else self._scratch
            assert job is not None
            observed = self._observer is not None
            self._refresher = Refresher(refresh, cached, self.reservoir, job, self._save_state, observed=observed)
        self._keep_plans = 0 if refresh is None else refresh.keep
        self._earlier: list[tuple[int, CachedModel]] = []  # plans that can be returned to, the latest last
        self._number = 0  # of the plan that serves
        if document is not None:
            self._resume(document)
        elif folder is not None:
            self._keep_plan(self._number, cached)
            self._save_state()
        self._queue: queue.Queue[_Sampled | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._judge_all, name="offramp-shadow", daemon=True)
        self._thread.start()
        self._stop = threading.Event()
        self._upkeep: threading.Thread | None = None
        if self._refresher is not None or folder is not None:
            self._upkeep = threading.Thread(target=self._keep_up, name="offramp-upkeep", daemon=True)
            self._upkeep.start()
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
        rung = self._ladder.rung  # read once: all rows of a call are answered from one rung
        model = rung.model
        rows = [] if self._closed else self._sampler.take(len(batch))
        sampled, left_at = None, list[int]()
        if rows or not plainly:
            copied = batch.rows(torch.tensor(rows)) if rows else None  # before the call: a backbone may write into its
            recent = model.peek(batch) if rows else None  # inputs, and so may the caller
            prediction = model.predict(*args, **kwargs)
            answer, left_at = prediction.output if plainly else prediction, prediction.left_at_B.tolist()
            if copied is not None:
                index = torch.tensor(rows)
                told = (
                    prediction.answer_B,
                    prediction.left_at_B,
                    prediction.confidence_B,
                    *_extended(model, prediction.answer_B, recent),
                )
                sampled = _Sampled(rung, copied, *(column_B[index] for column_B in told))
        else:
            served = model.serve(batch)
            answer, left_at = served.output, list(served.left_at())
        if self._observer is None:
            self._keep(batch)
        asked = bool(model.plan.caches) and not model.bypasses(len(batch))
        with self._lock:
            self._counts.requests += len(batch)
            self._latency.add(time.perf_counter() - started)
            if sampled is not None:
                self._enqueue(sampled)
            tired = asked and rung is self._ladder.rung and self._ladder.economy.must_rest(_routed(left_at, model))
        if tired and not self._closed:
            self._rest(rung)
        return answer

    def _keep(self, batch: Batch) -> None:
        """batch: inputs of a call, or observed requests."""
        if (reservoir := self.reservoir) is None:
            return
        try:
            kept = batch if self._observer else self._ladder.top.model.split_model.like_example(batch)
            reservoir.add(kept)
            if self._refresher is not None:
                self._refresher.add(kept)
        except Exception:  # no error of ours may reach the caller
            self.reservoir = None
            log.exception("the reservoir failed; nothing is kept from now on")

    def _enqueue(self, sampled: _Sampled) -> None:
        """Hits and misses alike wait here, so whether there is room has nothing to do with what was answered."""
        try:
            if self._closed:
                raise queue.Full
            self._queue.put_nowait(sampled)
        except queue.Full:
            self._counts.dropped += len(sampled.batch)

    def _rest(self, rung: Rung) -> None:
        with self._watch:
            if self._ladder.rung is rung:  # nobody else was faster
                self._tell_requests()
                self._ladder.rest()

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
        if self._closed or rung is not self._ladder.rung:
            self._drop(len(sampled.batch))
            return
        caches = [None if exits[at] == BACKBONE else exits[at] for at in sampled.left_at_B.tolist()]
        known = self._compare(sampled, caches)
        with self._watch:
            for row, told in enumerate(known):
                if rung is not self._ladder.rung:  # a step was taken: this tells nothing about what answers now
                    self._drop(len(known) - row)
                    return
                self._heed(told)

    def _heed(self, told: Told) -> None:
        self._tell_requests()
        self._ladder.heed(told)

    def _tell_requests(self) -> None:
        self._ladder.requests = self._counts.requests

    def _drop(self, rows: int) -> None:
        with self._lock:
            self._counts.dropped += rows

    @torch.inference_mode()
    def _compare(self, sampled: _Sampled, caches: Sequence[str | None]) -> list[Told]:
        """What becomes known of each sampled row, which these caches answered. A shadow that fails disagrees: leaving
        it out would make the caches look better than they are."""
        model, batch, answer_B = self._ladder.plan_alone, sampled.batch, sampled.answer_B
        hits = [cache is not None for cache in caches]
        plan_answer_B, plan_exits, runs = answer_B, sampled.left_at_B.tolist(), hits
        plan_sure = confidences = sampled.confidence_B.tolist()
        try:
            if sampled.rung.name not in (CERTIFIED, EXTENDED):
                prediction = model.predict(*batch.args, **batch.kwargs)
                plan_answer_B, plan_exits = prediction.answer_B, prediction.left_at_B.tolist()
                plan_sure = prediction.confidence_B.tolist()
                runs = [hit or at < len(model.plan.caches) for hit, at in zip(hits, plan_exits, strict=True)]
            truth_B = answer_B.clone()  # of a row that no cache answered it is the backbone's own
            rows = torch.tensor([row for row, run in enumerate(runs) if run], dtype=torch.long, device=answer_B.device)
            if self._observer is not None:
                observed = self._observer(batch, _flops(sampled))
                self._keep(observed)
                truth_B[rows] = model.task.answer(logits_of(observed).to(rows.device)[rows])
            elif len(rows):
                logits_BC = model.task.logits(model.split_model.backbone_leaves(batch.rows(rows)))
                truth_B[rows] = model.task.answer(logits_BC)
            answers = (answer_B, plan_answer_B, sampled.extended_answer_B)
            agrees, plan_agrees, extended_agrees = (model.task.agree(one, truth_B).tolist() for one in answers)
            recent = sampled.recent_B.tolist()
            with self._lock:
                self._counts.shadowed += len(rows)
            return [
                Told(
                    caches[row],
                    confidences[row],
                    agrees[row] or not hit,
                    plan_agrees[row] or not runs[row],
                    plan_exits[row],
                    plan_sure[row],
                    recent[row],
                    extended_agrees[row],
                )
                for row, hit in enumerate(hits)
            ]
        except Exception:
            log.exception("a shadow failed; its %d requests count as disagreements", sum(runs))
            with self._lock:
                self._counts.failed += sum(runs)
            return [
                Told(cache, confidences[row], cache is None, False, plan_exits[row], plan_sure[row], False, False)
                for row, cache in enumerate(caches)
            ]

    # -- steps by hand -----------------------------------------------------------------------------

    def step_back(self, reason: str = "asked for") -> None:
        """Take the next step down by hand: tighten, then one cache off, then bypass. No effect once bypassed."""
        with self._watch:
            self._tell_requests()
            self._ladder.step_back(reason)

    def restore(self, reason: str = "asked for") -> None:
        """Serve the certified plan again, whatever the evidence. No effect where it is served."""
        with self._watch:
            self._tell_requests()
            self._ladder.restore(reason)

    def refresh(self, reason: str = "asked for") -> bool:
        """Learn from recent traffic now; whether that begins. No, where it is under way. InputError without a `Refresh`
        policy."""
        if self._refresher is None:
            raise InputError(
                "this model does not learn: it was put into service without `refresh=offramp.Refresh(...)`"
            )
        return self._refresher.want(reason)

    def roll_back(self, reason: str = "asked for") -> bool:
        """Serve the plan before this one again, under its own certificate; whether there is one."""
        with self._watch:
            if not self._earlier:
                return False
            number, cached = self._earlier.pop()
            self._tell_requests()
            self._ladder.adopt(cached, f"back to plan {number}: {reason}")
            self._number = number
        return True

    # -- plans and state ---------------------------------------------------------------------------

    def _keep_up(self) -> None:
        """What is due besides answering: learning, and writing down what was counted."""
        written = time.monotonic()
        while not self._stop.wait(UPKEEP_S):
            if self._refresher is not None and self.reservoir is not None:
                candidate = self._refresher.tick(self._ladder.rung)
                if candidate is not None:
                    self._adopt(candidate)
            if self._folder is not None and time.monotonic() - written >= SAVED_S:
                self._try_to_save()
                written = time.monotonic()

    def _adopt(self, candidate: Candidate) -> None:
        """The plan is on disk before it answers, and before the state names it."""
        number = max([self._number, *(number for number, _ in self._earlier)]) + 1
        try:
            self._keep_plan(number, candidate.cached)
        except OfframpError as error:
            log.warning("a new plan could not be kept, so it is not taken into service: %s", error)
            return
        with self._watch:
            before = self._number, self._ladder.top.model
            candidate.cached.result_cache = before[1].result_cache
            self._earlier = [*self._earlier, before][-self._keep_plans :] if self._keep_plans else []
            self._tell_requests()
            self._ladder.adopt(candidate.cached, candidate.reason, candidate.evidence)
            self._number = number
        self._try_to_save()
        self._forget_plans()

    def _keep_plan(self, number: int, cached: CachedModel) -> None:
        if self._folder is not None:
            save(cached, self._folder.plan(number))

    def _forget_plans(self) -> None:
        if self._folder is None:
            return
        kept = {self._folder.plan(number) for number in (self._number, *(number for number, _ in self._earlier))}
        for path in self._folder.plans.iterdir():
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _try_to_save(self) -> None:
        try:
            self._save_state()
            self._unsaved = False
        except (OfframpError, OSError) as error:
            if not self._unsaved:
                log.warning("what was counted cannot be written down; answering goes on: %s", error)
            self._unsaved = True

    def _save_state(self) -> None:
        if self._folder is None:
            return
        with self._lock:
            counted = {"counts": dict(vars(self._counts)), "latency": self._latency.to_json()}
        with self._watch:
            decided = {
                "backbone": self._ladder.top.model.split_model.fingerprint,
                "plan": self._number,
                "earlier": [number for number, _ in self._earlier],
                "seen": 0 if self.reservoir is None else self.reservoir.seen,
                "ladder": self._ladder.to_json(),
                "refresh": None if self._refresher is None else self._refresher.to_json(),
            }
        self._folder.write(counted | decided)

    def _resume(self, document: Mapping[str, Any]) -> None:
        """Go on where another process has ended."""
        self._counts, self._latency = _Counts(**document["counts"]), LatencySketch.from_json(document["latency"])
        if self._refresher is not None and document["refresh"] is not None:
            self._refresher.resume(document["refresh"])
        for number in document["earlier"]:
            if (cached := self._plan_again(number)) is not None:
                self._earlier.append((number, cached))
        self._number = document["plan"]
        cached = self._plan_again(self._number)
        if cached is not None:
            self._ladder.adopt(cached, "the process was started again")
            self._ladder.steps.clear()
            try:
                self._ladder.resume(document["ladder"])
            except (KeyError, TypeError, ValueError) as error:
                log.warning("what was known about the plan cannot be used, so the watch begins anew: %s", error)
        elif self._earlier:
            self._number, cached = self._earlier.pop()
            self._ladder.adopt(cached, "the plan that served cannot be read: back to the one before")
        else:
            self._ladder.bypass("the plan that served cannot be read")

    def _plan_again(self, number: int) -> CachedModel | None:
        assert self._folder is not None
        given = self._ladder.top.model
        try:
            if is_saved_in(given, self._folder.plan(number)):
                return given
            return load_onto(self._folder.plan(number), given.split_model)
        except OfframpError as error:
            log.warning("plan %d cannot be served again: %s", number, error)
            return None

    # -- the rest ----------------------------------------------------------------------------------

    @property
    def rung(self) -> Rung:
        """What answers now."""
        return self._ladder.rung

    def monitor(self) -> Monitor:
        """What is known since the last step. `offramp.monitoring.merge` adds up those of several processes."""
        with self._watch:
            return Monitor.from_json(self._ladder.monitor.to_json())

    def latency(self) -> LatencySketch:
        """A copy of the durations of all calls: until they returned, without waiting for an accelerator."""
        with self._lock:
            return self._latency.merged(LatencySketch())

    def report(self) -> dict[str, Any]:
        """The state as one JSON document. Hit rates and disagreement are those of the requests sampled since the last
        step; durations are in milliseconds, costs in units of the backbone's."""
        with self._watch, self._lock:
            ladder, monitor = self._ladder, self._ladder.monitor
            return {
                "rung": ladder.rung.name,
                "plan": self._number,
                "earlier_plans": [number for number, _ in self._earlier],
                **vars(self._counts),
                "shadow": self._sampler.share,
                "sampled": monitor.sampled,
                "tolerance": ladder.tolerance,
                "disagreement": monitor.disagreement(ladder.confidence_level),
                "evidence": {"alarm": monitor.evidence, "run_length": ladder.run_length}
                | ({} if ladder.recovery is None else {"recovery": ladder.recovery.evidence})
                | ({} if ladder.extension is None else {"recent answers": ladder.extension.evidence}),
                "economy": ladder.economy.to_json(),
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
                "steps": [step.to_json() for step in ladder.steps],
                "latency_ms": {f"p{100 * share:g}": _ms(self._latency.quantile(share)) for share in LATENCIES},
                "reservoir": None
                if self.reservoir is None
                else {"rows": len(self.reservoir), "bytes": self.reservoir.bytes, "seen": self.reservoir.seen},
                "refresh": None if self._refresher is None else self._refresher.report(),
            }

    def settle(self) -> None:
        """Wait until every request that has been sampled is judged."""
        self._queue.join()

    def close(self) -> None:
        """End the watch: the shadow that is running is finished, those that wait are dropped, a refit is ended, and
        what was counted is written down. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._stop.set()
        if self._upkeep is not None:
            self._upkeep.join()
        if self._refresher is not None:
            self._refresher.close()
        if self._folder is not None:
            self._try_to_save()
            self._folder.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
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


def _check_backbone(of_state: str, cached: CachedModel) -> None:
    fingerprint = cached.split_model.fingerprint
    if of_state != fingerprint:
        raise InputError(
            f"the state is that of another backbone ({of_state[:12]}, this one is {fingerprint[:12]}); begin a new "
            "life in another folder"
        )


def _flops(sampled: _Sampled) -> Tensor:
    """(B,) FLOPs of these requests as they were served, in units of the backbone's."""
    rung, caches = sampled.rung, len(sampled.rung.model.plan.caches)
    cost_E = [1.0] * (caches + 1) if rung.model.bypasses(1) else cost_by_exit(rung, weight_flops=1.0)
    cost_E += [0.0] * (len(rung.model.exits) - len(cost_E))  # of answers that were stored
    return torch.tensor(cost_E)[sampled.left_at_B.cpu()]


def _routed(left_at: Sequence[int], model: CachedModel) -> list[int]:
    """Those of the exits whose requests had no stored answer."""
    return [at for at in left_at if at <= len(model.plan.caches)]


def _extended(model: CachedModel, answer_B: Tensor, recent: Peeked | None) -> tuple[Tensor, Tensor]:
    """Where a RecentCache would have given an answer, and the answers with that in their place."""
    recent_B = torch.zeros(len(answer_B), dtype=torch.bool, device=answer_B.device)
    if recent is None or not len(recent.row_H):
        return recent_B, answer_B
    recent_B[recent.row_H] = True
    return recent_B, answer_B.index_put((recent.row_H,), model.task.answer(recent.logits_HC))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
