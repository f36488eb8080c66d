"""What a benchmark measures of one cached model, and the inputs that it measures on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from offramp.cost import flop_shares
from offramp.errors import InputError
from offramp.evaluation import costs_at_exits, evaluate
from offramp.model import CachedModel
from offramp.placement import CacheCosts
from offramp.recording import Recording
from offramp.streams import Batch, read_stream

KEPT, BROKEN, OPEN = "yes", "no", "open"


class HeldOut:
    """A stream less the inputs that were recorded: nothing is evaluated on what was learned, tuned or certified on.

    The full model's answers are worked out once, by the digest of the input. Can be iterated any number of times, if
    the stream can and yields the same inputs each time. Raises InputError when nothing is left of the stream.
    """

    def __init__(self, stream: Iterable[object], full: CachedModel, recording: Recording, *, name: str) -> None:
        self._stream, self._backbone, self._name = stream, full.split_model.backbone, name
        self._recorded = {bytes(key) for key in recording.keys_N}
        self._answers: dict[bytes, int] = {}
        self._length = self.dropped = 0
        for batch in read_stream(stream, self._backbone):
            fresh = self._fresh(batch)
            self.dropped += len(batch) - len(fresh)
            self._length += len(fresh)
            on_device = fresh.to(full.split_model.device)
            answers_B = full.predict(*on_device.args, **on_device.kwargs).answer_B
            self._answers.update(zip(fresh.row_keys(), answers_B.tolist(), strict=True))
        if not self._length:
            raise InputError(
                f"nothing is left to evaluate on: all {self.dropped} inputs of {name} were also learned, tuned or "
                "certified on. Name a source of other inputs in `evaluate`"
            )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[object]:
        """Batches in a form that `evaluate` takes, with labels where there are any."""
        for batch in self.batches():
            labels = {} if batch.labels_B is None else {"labels": batch.labels_B}
            yield (*batch.args, *labels.values()) if batch.args else {**batch.kwargs, **labels}

    def batches(self) -> Iterator[Batch]:
        for batch in read_stream(self._stream, self._backbone):
            fresh = self._fresh(batch)
            if len(fresh):
                yield fresh

    def answers(self, batch: Batch) -> list[int]:
        """The full model's answers to one of the batches."""
        try:
            return [self._answers[key] for key in batch.row_keys()]
        except KeyError:
            raise InputError(
                f"{self._name} gave other inputs than at first; the data to evaluate on must be the same each time, "
                "without augmentation by chance"
            ) from None

    def _fresh(self, batch: Batch) -> Batch:
        return batch.rows(torch.tensor([key not in self._recorded for key in batch.row_keys()]))


def measurements(
    cached: CachedModel,
    held_out: HeldOut,
    *,
    tolerance: float,
    batch_sizes: Sequence[int],
    latency_budget_s: float,
    progress: bool,
) -> dict[str, Any]:
    """The measured part of a line: JSON, with units in its keys. Savings are shares of the full model's FLOPs."""
    result = evaluate(cached, held_out, batch_sizes=batch_sizes, latency_budget_s=latency_budget_s, progress=progress)
    return {
        "evaluation": result.to_json(),
        "within_tolerance": promise_kept(result.interval, tolerance),
        "flops_saved": 1 - result.flops_ratio,
        "oracle_flops_saved": 1 - result.oracle_flops_ratio,
        "classes": saving_by_class(cached, held_out),
        "throughput": [
            {
                "batch_size": ratio.batch_size,
                "cached_rows_per_s": 1000 * ratio.batch_size / ratio.cached_mean_ms,
                "full_rows_per_s": 1000 * ratio.batch_size / ratio.full_mean_ms,
            }
            for ratio in result.latency
        ],
        "cache_bytes": sum(part.parameter_bytes for part in cached.costs.caches),
        "cache_parameters": sum(part.parameters for part in cached.costs.caches),
    }


def promise_kept(interval: Sequence[float], tolerance: float) -> str:
    """Whether the disagreement is within the tolerance, by the interval of what was measured: "yes" or "no" where all
    of it is on one side, else "open"."""
    low, high = interval
    if high <= tolerance:
        return KEPT
    return BROKEN if low > tolerance else OPEN


def saving_by_class(cached: CachedModel, held_out: HeldOut) -> list[dict[str, Any]]:
    """For each answer of the full model: how many inputs have it, the share of them that a cache answered, and the
    share of FLOPs saved on them, caches included. JSON, in rising order of the class."""
    cost_at = costs_at_exits(CacheCosts(*flop_shares(cached.costs)))
    answers, left, costs = [], [], []
    for batch in held_out.batches():
        on_device = batch.to(cached.split_model.device)
        left_B = cached.predict(*on_device.args, **on_device.kwargs).left_at_B.cpu().numpy()
        answers.append(np.array(held_out.answers(batch)))
        left.append(left_B < len(cached.exits) - 1)
        costs.append(np.ones(len(batch)) if cached.bypasses(len(batch)) else cost_at[left_B])
    answer_N, left_N, cost_N = np.concatenate(answers), np.concatenate(left), np.concatenate(costs)
    return [
        {
            "class": int(answer),
            "n": int((answer_N == answer).sum()),
            "hit_rate": float(left_N[answer_N == answer].mean()),
            "flops_saved": float(1 - cost_N[answer_N == answer].mean()),
        }
        for answer in np.unique(answer_N)
    ]
