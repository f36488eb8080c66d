"""How a cached model does on fresh inputs, and how fast it is beside the full model in the same run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from offramp.caches import Cache
from offramp.calibration import interval
from offramp.cost import flop_shares, synchronizer
from offramp.errors import StreamError
from offramp.model import CachedModel
from offramp.placement import CacheCosts, oracle_cost
from offramp.progress import bar
from offramp.splitting import SplitModel
from offramp.streams import Batch, concatenated, read_stream
from offramp.tasks import Classification
from offramp.types import Evaluation, LatencyRatio

KEPT_ROWS = 512  # rows that latency is measured on, cycled through


def evaluate(
    cached: CachedModel,
    stream: Iterable[object],
    *,
    batch_sizes: Sequence[int] = (1, 32),
    latency_budget_s: float = 10.0,
    progress: bool = False,
) -> Evaluation:
    """Run the cached and the full model over `stream` and compare them; accuracy where the stream has labels.

    The stream must be inputs that the fit has not seen. Latency is measured per batch size, alternately, around the
    whole call, for `latency_budget_s` seconds each; an empty `batch_sizes` leaves it out. Batches of a size that the
    plan bypasses run the backbone alone, as they would for a caller. A result cache is left out of it: what repeats in
    the stream would flatter the plan. Raises StreamError when the stream is empty.
    """
    cached = _without_result_cache(cached)
    tally = _Tally(cached)
    with bar("evaluating", None, show=progress) as running, torch.inference_mode():
        for batch in read_stream(stream, cached.split_model.backbone):
            tally.add(batch.to(cached.split_model.device))
            running.advance(len(batch))
        if not tally.n:
            raise StreamError("the stream to evaluate on is empty: it yielded no inputs")
        latency = compare_latency(cached, concatenated(tally.kept), batch_sizes, latency_budget_s)
        return tally.evaluation(latency)


def _without_result_cache(cached: CachedModel) -> CachedModel:
    """The same model without its result cache; the one that was passed may be serving and is left alone."""
    if cached.result_cache is None:
        return cached
    alone = copy.copy(cached)
    alone.result_cache = None
    return alone


def compare_latency(
    cached: CachedModel, sample: Batch, batch_sizes: Sequence[int], budget_s: float
) -> tuple[LatencyRatio, ...]:
    """Cached against full model on real rows, call by call in turn, the device synchronised around every call. The full
    model runs on the back end that `optimize` found best for it, where that was called."""
    wait = synchronizer(cached.split_model.device)
    with torch.inference_mode():  # otherwise the full model alone would record for gradients
        return tuple(_compare_at(cached, sample, size, budget_s, wait) for size in batch_sizes)


def _compare_at(
    cached: CachedModel, sample: Batch, size: int, budget_s: float, wait: Callable[[], None]
) -> LatencyRatio:
    full = cached.split_model.full
    cached_ms: list[float] = []
    full_ms: list[float] = []
    started, turn = time.perf_counter(), -3  # three rounds of warm-up
    while turn < 20 or time.perf_counter() - started < budget_s:
        first = (max(turn, 0) * size) % max(1, len(sample) - size + 1)
        batch = rows_from(sample, first, size)
        calls: list[tuple[Callable[..., Any], list[float]]] = [(cached, cached_ms), (full, full_ms)]
        for call, times in calls if turn % 2 else reversed(calls):  # neither always follows the other
            elapsed = _time_ms(call, batch, wait)
            if turn >= 0:
                times.append(elapsed)
        turn += 1
    p50, p95 = (float(np.percentile(cached_ms, q) / np.percentile(full_ms, q)) for q in (50, 95))
    mean_full_ms, mean_cached_ms = float(np.mean(full_ms)), float(np.mean(cached_ms))
    return LatencyRatio(size, mean_cached_ms / mean_full_ms, p50, p95, mean_full_ms, mean_cached_ms)


def rows_from(sample: Batch, first: int, size: int) -> Batch:
    """A batch of `size` rows beginning with row `first`; a sample that is smaller is repeated instead."""
    if len(sample) >= size:
        return sample.rows(slice(first, first + size))
    return sample.rows(torch.arange(size) % len(sample))


def _time_ms(call: Callable[..., Any], batch: Batch, wait: Callable[[], None]) -> float:
    wait()
    started = time.perf_counter()
    call(*batch.args, **batch.kwargs)
    wait()
    return (time.perf_counter() - started) * 1000


class _Tally:
    """Counts what the cached model and the backbone say, batch by batch."""

    def __init__(self, cached: CachedModel) -> None:
        self.cached = cached
        self.left: list[Tensor] = []
        self.answer: list[Tensor] = []
        self.full: list[Tensor] = []
        self.cache_agrees: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.kept: list[Batch] = []
        self.n = self.bypassed = 0

    def add(self, batch: Batch) -> None:
        cached = self.cached
        prediction = cached.predict(*batch.args, **batch.kwargs)
        full_B, agrees_BK = _full_answers(cached, batch)
        self.left.append(prediction.left_at_B.cpu())
        self.answer.append(prediction.answer_B.cpu())
        self.full.append(full_B)
        self.cache_agrees.append(agrees_BK)
        if batch.labels_B is not None:
            self.labels.append(batch.labels_B.cpu())
        if self.n < KEPT_ROWS:
            self.kept.append(batch)
        self.n += len(batch)
        self.bypassed += len(batch) if cached.bypasses(len(batch)) else 0

    def evaluation(self, latency: tuple[LatencyRatio, ...]) -> Evaluation:
        cached, task = self.cached, self.cached.task
        left, answer, full = torch.cat(self.left), torch.cat(self.answer), torch.cat(self.full)
        errors = int((~task.agree(answer, full)).sum())
        labels = torch.cat(self.labels) if sum(map(len, self.labels)) == self.n else None
        costs = CacheCosts(*flop_shares(cached.costs))
        hit_rates, flops_ratio = shares_and_flops(cached, left.numpy(), self.bypassed)
        return Evaluation(
            n=self.n,
            disagreements=errors,
            disagreement=errors / self.n,
            interval=interval(errors, self.n, cached.certificate.confidence_level),
            hit_rates=hit_rates,
            flops_ratio=flops_ratio,
            oracle_flops_ratio=oracle_cost(torch.cat(self.cache_agrees).numpy(), costs),
            latency=latency,
            accuracy=None if labels is None else float(torch.eq(answer, labels).double().mean()),
            backbone_accuracy=None if labels is None else float(torch.eq(full, labels).double().mean()),
        )


def shares_and_flops(
    cached: CachedModel, left_at_N: np.ndarray[Any, np.dtype[np.int64]], bypassed: int
) -> tuple[dict[str, float], float]:
    """The share of requests that each cache answered, and the mean FLOPs of all of them over the full model's.

    left_at_N: their exits, as `predict` gives them. bypassed: how many came in batches that ran the backbone alone.
    """
    shares = np.bincount(left_at_N, minlength=len(cached.exits)) / len(left_at_N)
    cost_at = costs_at_exits(CacheCosts(*flop_shares(cached.costs)))
    unasked = bypassed / len(left_at_N) * float(cost_at[-1] - 1)  # a bypassing batch pays for no cache
    return dict(zip(cached.exits[:-1], shares.tolist(), strict=False)), float(shares @ cost_at) - unasked


def costs_at_exits(costs: CacheCosts) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(K + 1,) cost of a request that leaves at each enabled cache or, last, at the backbone."""
    looked_up = np.cumsum(costs.cache_K)
    backbone = 1.0 + (looked_up[-1] if len(looked_up) else 0.0)
    return np.append(np.asarray(costs.before_K) + looked_up, backbone)


class Said(NamedTuple):
    """What the caches and the end say of a batch when nothing leaves early."""

    confidence_BK: Tensor
    answer_BK: Tensor
    end_B: Tensor


def say_all(split: SplitModel, caches: Sequence[Cache], task: Classification, batch: Batch) -> Said:
    """Run every stage and every cache, these in the order in which a request meets them, on every row."""
    live, logits = split.flatten(batch), dict[str, Tensor]()
    confidences, answers = [], []
    for position, stage in enumerate(split.stages):
        for cache in (cache for cache in caches if cache.point == split.points[position].name):
            read = None if cache.reads is None else logits[cache.reads]
            logits[cache.name], confidence_B = cache.look_up(split.activation(position, live), read)
            confidences.append(confidence_B)
            answers.append(task.answer(logits[cache.name]))
        live = stage(*live)
    end_B = task.answer(task.logits(live))
    if not answers:
        return Said(torch.empty(len(batch), 0), end_B.new_empty(len(batch), 0), end_B)
    return Said(torch.stack(confidences, 1), torch.stack(answers, 1), end_B)


def _full_answers(cached: CachedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B,) the backbone's answers and (B, K) whether each cache agrees."""
    split, task = cached.split_model, cached.task
    said = say_all(split, [cast(Cache, cache) for cache in cached.caches], task, batch)
    full_B = task.answer(task.logits(split.backbone_leaves(batch))) if split.optimized else said.end_B
    return full_B.cpu(), task.agree(said.answer_BK, full_B[:, None]).cpu()
