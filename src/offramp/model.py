"""The cached model: the backbone's call, with caches in the way that answer what they can.

The hot loop is `_route`: look the activation up, let the hits leave, drop them from the batch where that pays, run the
next stage. It reads the plan and knows nothing of training, search or calibration. Whatever goes wrong in a cache is a
miss: the failing cache and all later ones are switched off, which can only remove disagreements, never add any.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.caches import Cache
from offramp.caches.recent import Peeked, RecentCache
from offramp.caches.result import Results
from offramp.cost import compaction_rule
from offramp.errors import InputError
from offramp.flight import Flight
from offramp.splitting import SplitModel
from offramp.streams import Batch
from offramp.tasks import Classification
from offramp.types import Certificate, CostTable, Plan

log = logging.getLogger("offramp")

BACKBONE, RESULT = "backbone", "result"
BROKEN_AFTER = 8  # look-ups of a cache that gave nothing but NaN: one may be a matter of the input

_numbers = itertools.count()  # one per model of this process: whose answers a result cache holds


@dataclass(frozen=True)
class Prediction:
    """What `predict` tells: per row the answer, where it left (index into `CachedModel.exits`) and how sure.

    A row that no cache answered left at the exit "backbone", whose own answer is sure by definition: 1. One that the
    result cache answered left at the exit "result", as sure as when it was answered first. `output` is what a plain
    call returns.
    """

    answer_B: Tensor
    left_at_B: Tensor
    confidence_B: Tensor
    output: Any


class Served(NamedTuple):
    """What a plain call returns, and per row the number of the exit where it left, as in `Prediction`."""

    output: Any
    left_at: Callable[[], Sequence[int]]


class _Routed(NamedTuple):
    logits_BC: Tensor
    left_at_B: Tensor
    confidence_B: Tensor


class CachedModel(nn.Module):
    """A backbone with certified caches. Same call and same output type as the backbone, less work.

    The backbone is not a submodule: its parameters, mode and hooks stay the user's business. Runs where the backbone
    is; caches are moved there.
    """

    def __init__(
        self,
        split: SplitModel,
        caches: Sequence[Cache],
        plan: Plan,
        certificate: Certificate,
        costs: CostTable,
        *,
        task: Classification,
        summary: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.split_model, self.task, self.costs = split, task, costs
        self.plan, self.certificate, self.summary = plan, certificate, dict(summary)
        self.caches = nn.ModuleList(caches).to(split.device)
        self.caches.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # the faster one for small maps
        self.caches.requires_grad_(requires_grad=False)
        super().train(mode=False)
        self._number, self.result_cache = next(_numbers), None
        self._lookups = _lookups(split, caches, plan)
        self._live_lookups = len(plan.caches)  # lookups from this one on are switched off
        self._answers_from = tuple(planned.threshold for planned in plan.caches)
        self._unsure = [0] * len(plan.caches)  # look-ups in a row that gave nothing but NaN
        self._compaction = compaction_rule(costs)
        self._classes, self._dtype = self._output_form()

    # -- the call ----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's: same arguments, same output type. Raises InputError when the arguments do not fit."""
        return self.serve(as_call(args, kwargs)).output

    def serve(self, batch: Batch) -> Served:
        """The same, with where each row left: what a call knows on the host anyway, so nobody waits for it."""
        results = self._result_cache
        if results is not None and results.on:
            routed = self._recall_or_route(batch, results)
            return Served(self.split_model.unflatten((routed.logits_BC,)), routed.left_at_B.tolist)
        if len(batch) and self.bypasses(len(batch)):
            with torch.no_grad():
                return Served(self._full_output(batch), lambda: [len(self.plan.caches)] * len(batch))
        flight = self._route(batch)
        return Served(self.split_model.unflatten((flight.logits(),)), flight.left_at)

    def _full_output(self, batch: Batch) -> Any:
        if self.split_model.optimized:
            return self.split_model.unflatten(self.split_model.full_leaves(batch))
        self.split_model.flatten(batch)  # refuses the same inputs as with caches
        return self.split_model.full(*batch.args, **batch.kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Prediction:
        """The same, and per row where it left and how sure that cache was."""
        batch = as_call(args, kwargs)
        results = self._result_cache
        routed = self._answer(batch) if results is None else self._recall_or_route(batch, results)
        return Prediction(
            self.task.answer(routed.logits_BC),
            routed.left_at_B,
            routed.confidence_B,
            self.split_model.unflatten((routed.logits_BC,)),
        )

    @torch.no_grad()
    def _answer(self, batch: Batch) -> _Routed:
        """By the stages and caches or, where these do not pay, by the full model alone."""
        if not len(batch) or not self.bypasses(len(batch)):
            flight = self._route(batch)
        else:
            flight = Flight(self.split_model.flatten(batch))  # refuses the same inputs as with caches
            self._land(flight, self.split_model.full_leaves(batch))
        return _Routed(flight.logits(), *flight.exits())

    @torch.no_grad()
    def _route(self, batch: Batch) -> Flight:
        flight = self.depart(batch)
        for position in range(len(self.split_model.stages)):
            self.ask_caches(position, flight)
            self.run_stage(position, flight)
        return flight

    # -- the steps of a flight: as long as rows wait, without gradients --------------------------------

    def depart(self, batch: Batch) -> Flight:
        """All rows, at split point 0. Raises InputError when the batch does not fit."""
        flight = Flight(self.split_model.flatten(batch))
        if not flight.waiting:
            self._land(flight, (torch.empty(0, self._classes, device=self.split_model.device),))
        return flight

    def ask_caches(self, position: int, flight: Flight) -> None:
        """Look up the caches at a split point. Rows that they answer leave and, where that pays, are dropped."""
        for slot, cache in self._lookups[position]:
            if not flight.waiting or slot >= self._live_lookups:
                return
            said = self._look_up(slot, cache, self.split_model.activation(position, flight.live), flight.said)
            if said is None:
                return
            logits_LC, confidence_L = said
            hits = flight.hits(confidence_L, self.plan.caches[slot].threshold, self._answers_from[slot])
            if hits:
                flight.answer(hits, logits_LC.to(self._dtype), slot, confidence_L)
                if self._compaction[position].pays(len(flight.rows), len(flight.waiting)):
                    flight.compact()

    def run_stage(self, position: int, flight: Flight) -> None:
        """Run the stage behind a split point. Behind the last, all rows that wait get its answer."""
        if flight.waiting:
            flight.live = self.split_model.stages[position](*flight.live)
            if position == len(self.split_model.stages) - 1:
                self._land(flight, flight.live)

    def _land(self, flight: Flight, leaves: Sequence[Tensor]) -> None:
        flight.land(self.task.logits(leaves).to(self._dtype), len(self.plan.caches))

    def _look_up(
        self, slot: int, cache: Cache, activation: Tensor, said: dict[str, Tensor]
    ) -> tuple[Tensor, list[float]] | None:
        """Logits and confidence of one cache, or None when it failed: then it and all later ones are off."""
        try:
            logits, confidence = cache.look_up(activation, None if cache.reads is None else said[cache.reads])
            rows = activation.shape[0]
            if logits.shape != (rows, self._classes) or confidence.shape != (rows,):
                raise ValueError(f"logits of shape {tuple(logits.shape)}, confidence of {tuple(confidence.shape)}")
            if logits.device != activation.device or confidence.device != activation.device:
                raise ValueError(f"answers on {logits.device} and {confidence.device}, inputs on {activation.device}")
            said[cache.name] = logits
            told: list[float] = confidence.tolist()  # waits for the device: what runs next depends on it
            self._check_sure(slot, activation, told)
            return logits, told
        except Exception:  # fail closed: no error of a cache may reach the caller
            if slot < self._live_lookups:  # the first to notice says it
                self._live_lookups = slot
                log.exception("cache %s failed; it and all later caches are switched off", cache.name)
            return None

    def _check_sure(self, slot: int, activation: Tensor, confidence_L: Sequence[float]) -> None:
        """A cache that is sure of nothing any more, look-up after look-up, though its inputs are finite, is broken."""
        if all(map(math.isnan, confidence_L)) and bool(torch.isfinite(activation).all()):
            self._unsure[slot] += 1
            if self._unsure[slot] >= BROKEN_AFTER:
                raise ValueError(f"it answered NaN alone in {BROKEN_AFTER} look-ups in a row")
        elif self._unsure[slot]:
            self._unsure[slot] = 0

    @torch.no_grad()
    def _recall_or_route(self, batch: Batch, results: Results) -> _Routed:
        """As `_route`, but rows with a stored answer leave before stage 0, and equal rows run once."""
        inputs, context, like = self._asked(batch)
        recalled = results.recall(inputs, context, like)
        rest = batch if recalled is None or len(recalled.run_A) == len(batch) else batch.rows(recalled.run_A)
        routed = self._answer(rest)
        if recalled is None:
            return routed
        results.remember(recalled, routed.logits_BC, routed.confidence_B)
        left_at_H = torch.full((len(recalled.logits_HC),), len(self.plan.caches) + 1, device=like.device)
        known = (recalled.logits_HC, left_at_H, recalled.confidence_H)
        return _Routed(*(torch.cat(parts)[recalled.source_B] for parts in zip(known, routed, strict=True)))

    def peek(self, batch: Batch) -> Peeked | None:
        """What a `RecentCache` would answer to these rows if it might; None where it knows nothing, or there is none.

        Nothing runs and nothing changes: see `RecentCache.peek`. Raises InputError when the batch does not fit.
        """
        results = self._result_cache
        return results.peek(*self._asked(batch)) if isinstance(results, RecentCache) else None

    def _asked(self, batch: Batch) -> tuple[Sequence[Tensor], Hashable, Tensor]:
        """What a result cache is asked with: the inputs, whose answers are wanted, and what these are like."""
        like = torch.empty(0, self._classes, dtype=self._dtype, device=self.split_model.device)
        return self.split_model.flatten(batch), (self._number, self.plan), like

    def restricted(self, answers_from: Sequence[float]) -> CachedModel:
        """The same model and plan, where cache k answers only from confidence `answers_from[k]` on; infinity: never.

        A request that the plan would have answered at a cache that now refuses it gets the backbone's answer, so what
        caches answer is a subset of what they answer under the plan, each with the same answer: so are the
        disagreements. Caches behind the last that may still answer are not looked up. Parts are shared, not copied.
        InputError for a value below the plan's threshold, or NaN.
        """
        thresholds = [planned.threshold for planned in self.plan.caches]
        if len(answers_from) != len(thresholds) or not all(
            least >= threshold for least, threshold in zip(answers_from, thresholds, strict=True)
        ):
            raise InputError(
                f"answers_from is {list(answers_from)}; expected a number for each of the thresholds {thresholds} of "
                "the plan, none below its threshold: caches may be restricted, never loosened"
            )
        model = copy.copy(self)
        model._answers_from = tuple(answers_from)
        finite = [slot for slot, least in enumerate(answers_from) if least < math.inf]
        model._live_lookups = min(self._live_lookups, 1 + max(finite, default=-1))
        return model

    def bypasses(self, batch_size: int) -> bool:
        """Whether a batch of this size runs the backbone alone: no caches, or measured not to pay."""
        if not self.plan.caches or self._live_lookups == 0:
            return True
        if not self.plan.bypass_batch_sizes or batch_size == 0:
            return False
        nearest = min(self.costs.backbone.time_ms, key=lambda size: abs(size - batch_size))
        return nearest in self.plan.bypass_batch_sizes

    def _output_form(self) -> tuple[int, torch.dtype]:
        live = self.split_model.flatten(self.split_model.example)
        with torch.no_grad():
            for stage in self.split_model.stages:
                live = stage(*live)
        logits = self.task.logits(live)
        return logits.shape[1], logits.dtype

    # -- the rest ----------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = next(_numbers)  # a copy is another model: what a result cache holds of the first is not its own

    @property
    def result_cache(self) -> Results | None:
        """Answers given before, asked before stage 0; None, the default, for none. `save` leaves it out."""
        return self._result_cache

    @result_cache.setter
    def result_cache(self, results: Results | None) -> None:
        if not (results is None or isinstance(results, Results)):
            raise InputError(
                f"result_cache is a {type(results).__name__}; expected an offramp.ResultCache, a RecentCache or None"
            )
        self._result_cache = results
        caches = (cache.name for cache in self.plan.caches)
        self.exits = (*caches, BACKBONE) if results is None else (*caches, BACKBONE, RESULT)

    def train(self, mode: bool = True) -> CachedModel:  # noqa: FBT001 - torch's signature
        """Caches only answer; asking for train mode is an error."""
        if mode:
            raise InputError("a cached model only answers: it has no train mode. To learn anew, call offramp.fit().")
        return self

    def report(self) -> dict[str, Any]:
        """Everything known about this model as one JSON document; `offramp.report` draws it."""
        return {**self.summary, "plan": self.plan.to_json(), "certificate": self.certificate.to_json()}


def _lookups(split: SplitModel, caches: Sequence[Cache], plan: Plan) -> list[list[tuple[int, Cache]]]:
    """For each split point the caches that sit there, with their positions in the plan."""
    names = [point.name for point in split.points]
    if [cache.name for cache in caches] != [planned.name for planned in plan.caches]:
        raise InputError(
            f"the caches {[cache.name for cache in caches]} are not those of the plan, "
            f"{[planned.name for planned in plan.caches]}"
        )
    at: list[list[tuple[int, Cache]]] = [[] for _ in names]
    before = 0
    for slot, cache in enumerate(caches):
        if cache.point not in names:
            raise InputError(f"cache {cache.name} sits at split point {cache.point!r}; the backbone has {names}")
        position = names.index(cache.point)
        if position < before:
            raise InputError(f"cache {cache.name} at {cache.point!r} is listed behind a cache that is met after it")
        before = position
        at[position].append((slot, cache))
    return at


def as_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """The arguments of a call as a Batch; None counts as not given. Every tensor must have the same number of rows."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    tensors = (*args, *given.values())
    wrong = [type(value).__name__ for value in tensors if not isinstance(value, Tensor)]
    if wrong or not tensors:
        raise InputError(
            f"a cached model is called with tensors, as its backbone was when it was fitted; received {wrong}"
        )
    if not tensors[0].ndim or any(tensor.shape[:1] != tensors[0].shape[:1] for tensor in tensors[1:]):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise InputError(f"the inputs must share their first dimension, the batch; received shapes {shapes}")
    return Batch(args, given)
