"""Train one cache to imitate the backbone: self-distillation on recorded activations and recorded answers, no labels.

The loss is the Kullback-Leibler divergence between the softened outputs, T^2 KL(backbone/T || cache/T) (Hinton et al.
2015; SelfXit, arXiv 2209.08625, section 4, uses T = 1). One warm-up-and-decay schedule over a number of rows that is
fixed before the first step, so that a run is reproducible from its seed; a time limit shortens the schedule instead of
cutting it off.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.augment import AUGMENTATIONS
from offramp.caches import LearnedCache
from offramp.progress import Bar
from offramp.recording import Recording

PREPARE_ROWS = 500  # rows that fixed first layers are computed from


@dataclass(frozen=True)
class Recipe:
    """How to train one cache. `rows` is the number of inputs seen in all, repeats counted."""

    rows: int
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    temperature: float = 2.0
    warm_up: float = 0.2  # share of the schedule


@dataclass(frozen=True)
class TrainingLog:
    """What one training did: steps taken, seconds, the mean loss over the last tenth."""

    steps: int
    seconds: float
    final_loss: float


class Stop:
    """Whether the user asked, with Ctrl-C, to end the learning early and go on with what there is."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Within: the first Ctrl-C only sets `requested`, a second one raises KeyboardInterrupt. Main thread only."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def train(
    cache: LearnedCache,
    recording: Recording,
    position: int,
    rows: NDArray[np.intp],
    read_NC: Tensor | None,
    recipe: Recipe,
    *,
    seed: int,
    time_limit_s: float | None,
    device: torch.device,
    stop: Stop,
    progress: Bar,
) -> TrainingLog:
    """Train `cache` on the recorded `rows` of split point `position`, in place; leaves it in eval mode, folded.

    read_NC: logits of the cache it reads, for every recorded row, or None. Raises nothing on Ctrl-C: ends early, the
    schedule being cut short.
    """
    cache.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    cache.prepare(_as_input(recording.features[position][np.sort(rows[:PREPARE_ROWS])]).to(device))
    rows_seen = _Rows(rows, recipe.batch_size, seed)
    total = max(1, recipe.rows // recipe.batch_size)
    optimizer = torch.optim.AdamW(_parameter_groups(cache, recipe.weight_decay), lr=recipe.learning_rate)
    free = recording.free_augmentations if position == 0 else ()
    generator = torch.Generator().manual_seed(seed)
    started, losses = time.monotonic(), []
    for step in range(total):
        done = step / total
        if time_limit_s is not None:
            done = max(done, (time.monotonic() - started) / time_limit_s)
        if done >= 1 or stop.requested:
            break
        rate = recipe.learning_rate * _schedule(done, recipe.warm_up)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = rows_seen.next()
        feature = _as_input(recording.features[position][index]).to(device)
        for name in free:
            feature = AUGMENTATIONS[name](feature, generator)
        target_BC = torch.from_numpy(recording.logits_NC[index]).to(device)
        logits_BC = cache.from_feature(feature, None if read_NC is None else read_NC[index].to(device))
        loss = distillation_loss(logits_BC, target_BC, recipe.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(cache.parameters(), 5.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        progress.advance(1 / total)
    cache.eval()
    cache.fold()
    cache.requires_grad_(requires_grad=False)
    tail = losses[-max(1, len(losses) // 10) :]
    return TrainingLog(len(losses), time.monotonic() - started, float(np.mean(tail)) if tail else math.nan)


def distillation_loss(logits_BC: Tensor, target_BC: Tensor, temperature: float) -> Tensor:
    """Mean over rows of T^2 KL(backbone/T || cache/T), in nats."""
    return F.kl_div(
        F.log_softmax(logits_BC / temperature, dim=-1),
        F.log_softmax(target_BC / temperature, dim=-1),
        log_target=True,
        reduction="batchmean",
    ) * (temperature**2)


def cache_logits(
    cache: LearnedCache,
    recording: Recording,
    position: int,
    rows: NDArray[np.intp],
    read_NC: Tensor | None,
    device: torch.device,
) -> Tensor:
    """(len(rows), C) logits of a trained cache on recorded rows, on the CPU; read_NC: what it reads, on these rows."""
    out = []
    with torch.no_grad():
        for start in range(0, len(rows), 256):
            chunk = slice(start, start + 256)
            feature = _as_input(recording.features[position][rows[chunk]]).to(device)
            out.append(cache.from_feature(feature, None if read_NC is None else read_NC[chunk].to(device)).cpu())
    return torch.cat(out)


class _Rows:
    """Endless batches of row numbers, reshuffled at each pass."""

    def __init__(self, rows: NDArray[np.intp], batch_size: int, seed: int) -> None:
        self.rows, self.batch_size = rows, min(batch_size, len(rows))
        self.random = np.random.default_rng(seed)
        self.order, self.position = self.random.permutation(rows), 0

    def next(self) -> NDArray[np.intp]:
        if self.position + self.batch_size > len(self.order):
            self.order, self.position = self.random.permutation(self.rows), 0
        index = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return np.sort(index)  # the file is read front to back


def _schedule(done: float, warm_up: float) -> float:
    """Learning rate factor: linear up, then half a cosine down."""
    if done < warm_up:
        return 0.05 + 0.95 * done / warm_up
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def _parameter_groups(cache: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels only, as is usual: not for biases and normalisation."""
    decayed = [p for p in cache.parameters() if p.ndim > 1]
    plain = [p for p in cache.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _as_input(feature: NDArray[np.generic]) -> Tensor:
    tensor = torch.from_numpy(np.array(feature))
    if not tensor.is_floating_point():
        return tensor.long()
    return tensor.float().contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor.float()
