"""Train one cache to imitate the backbone: self-distillation on recorded activations and recorded answers, no labels.

The loss is the Kullback-Leibler divergence between the softened outputs, T^2 KL(backbone/T || cache/T) (Hinton et al.
2015; SelfXit, arXiv 2209.08625, section 4, uses T = 1). The recipes of others mix in, or put in its place, the
cross-entropy on the backbone's answer (GATI, arXiv 2101.07344) or on the label (BranchyNet, arXiv
1709.01686, section III); everything else, AdamW instead of their optimizers included, is the same for all.

One warm-up-and-decay schedule over a number of rows that is fixed before the first step, so that a run is reproducible
from its seed; a time limit shortens the schedule instead of cutting it off.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.augment import AUGMENTATIONS
from offramp.caches import Cache, LearnedCache
from offramp.errors import InputError
from offramp.mixtures import Mixtures
from offramp.precision import has_fast_bfloat16
from offramp.progress import Bar
from offramp.recording import Recording, unnamed_file, write_all

PREPARE_ROWS = 500  # rows that fixed first layers are computed from
LOOK_UP_ROWS = 256  # at a time, where a trained cache is judged
CONDENSED_LIMIT = 2**29  # bytes of condensed rows that a training keeps in memory


@dataclass(frozen=True)
class Recipe:
    """How to train one cache. `rows` is the number of inputs seen in all, repeats counted.

    The loss is alpha T^2 KL(backbone/T || cache/T) + (1 - alpha) CE(hard, cache), T being the `temperature`; `hard` is
    the backbone's answer or the label. bfloat16: train in it where the hardware multiplies it. mixtures: train on
    these as well (`offramp.mixtures`).
    """

    rows: int
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    temperature: float = 2.0
    warm_up: float = 0.2  # share of the schedule
    alpha: float = 1.0
    hard: Literal["answer", "label"] = "answer"
    bfloat16: bool = True
    mixtures: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha weighs two losses, so it is a share between 0 and 1; received {self.alpha}")

    @property
    def on_labels(self) -> bool:
        return self.hard == "label" and self.alpha < 1

    @property
    def steps(self) -> int:
        return max(1, self.rows // self.batch_size)


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


class Training:
    """The training of `cache`, in place, by a recipe, on the recorded `rows` of split point `position`.

    What a cache reads is no part of it: see `offramp.blending`. mixtures: what it trains on beside the rows; they have
    no labels. InputError where the recipe trains on labels that the recording does not have (`labelled`).
    """

    def __init__(
        self,
        cache: LearnedCache,
        recording: Recording,
        position: int,
        rows: NDArray[np.intp],
        recipe: Recipe,
        *,
        mixtures: Mixtures | None = None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.cache = cache.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        features, self.label_N = recording.features[position], None
        if recipe.on_labels:
            rows = labelled(recording, rows)
            self.label_N = recording.label_N
        cache.prepare(_as_input(features[np.sort(rows[:PREPARE_ROWS])]).to(device))
        self.examples = _Examples(position, recording, mixtures)
        if mixtures is not None:
            rows = np.concatenate([rows, len(recording) + mixtures.numbers])
        self.rows = _Rows(rows, recipe.batch_size, seed)
        self.optimizer = torch.optim.AdamW(_parameter_groups(cache, recipe.weight_decay), lr=recipe.learning_rate)
        augmentations = recording.free_augmentations if position == 0 else ()
        self.inputs = _Inputs(cache, self.examples, rows, augmentations, seed, device)
        self.recipe, self.device, self.fast = recipe, device, recipe.bfloat16 and has_fast_bfloat16(device)

    def run(self, *, time_limit_s: float | None, stop: Stop, progress: Bar) -> TrainingLog:
        """Train to the end; leaves the cache in eval mode, folded. Raises nothing on Ctrl-C: ends early, the schedule
        being cut short."""
        started, losses = time.monotonic(), []
        for step in range(self.recipe.steps):
            done = step / self.recipe.steps
            if time_limit_s is not None:
                done = max(done, (time.monotonic() - started) / time_limit_s)
            if done >= 1 or stop.requested:
                break
            losses.append(self.step(self.rows.next(), done))
            progress.advance(1 / self.recipe.steps)
        self.cache.eval()
        self.cache.fold()
        self.cache.requires_grad_(requires_grad=False)
        tail = losses[-max(1, len(losses) // 10) :]
        return TrainingLog(len(losses), time.monotonic() - started, float(np.mean(tail)) if tail else math.nan)

    def estimated_seconds(self) -> float:
        """Of the whole training, from a few timed steps; later passes over the rows may be faster than the first. The
        steps train: estimate with a copy of the cache."""
        self._timed_step(self.rows.next())
        batches = [self.rows.next() for _ in range(3)]
        first_s, later_s = (statistics.median(map(self._timed_step, batches)) for _ in range(2))
        first_pass = min(self.recipe.steps, len(self.rows.rows) // self.rows.batch_size)
        return first_s * first_pass + later_s * (self.recipe.steps - first_pass)

    def _timed_step(self, index: NDArray[np.intp]) -> float:
        started = time.monotonic()
        self.step(index, 0.0)
        return time.monotonic() - started

    def step(self, index: NDArray[np.intp], done: float) -> float:
        """One step on these examples, at this share of the schedule; its loss."""
        rate = self.recipe.learning_rate * _schedule(done, self.recipe.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        condensed = self.inputs[index]
        target_BC = self.examples.target(index).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            logits_BC = self.cache.from_condensed(condensed)
        loss = recipe_loss(logits_BC.float(), target_BC, self._hard(index, target_BC), self.recipe)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.cache.parameters(), 5.0)
        self.optimizer.step()
        return float(loss.detach())

    def _hard(self, index: NDArray[np.intp], target_BC: Tensor) -> Tensor:
        if self.label_N is None:
            return target_BC.argmax(1)
        return torch.from_numpy(self.label_N[index]).to(self.device)


def recipe_loss(logits_BC: Tensor, target_BC: Tensor, hard_B: Tensor, recipe: Recipe) -> Tensor:
    """Mean over rows of alpha T^2 KL(backbone/T || cache/T) + (1 - alpha) CE(hard, cache), in nats."""
    soft = distillation_loss(logits_BC, target_BC, recipe.temperature)
    if recipe.alpha == 1:
        return soft
    return recipe.alpha * soft + (1 - recipe.alpha) * F.cross_entropy(logits_BC, hard_B)


def distillation_loss(logits_BC: Tensor, target_BC: Tensor, temperature: float) -> Tensor:
    """Mean over rows of T^2 KL(backbone/T || cache/T), in nats."""
    return F.kl_div(
        F.log_softmax(logits_BC / temperature, dim=-1),
        F.log_softmax(target_BC / temperature, dim=-1),
        log_target=True,
        reduction="batchmean",
    ) * (temperature**2)


def labelled(recording: Recording, rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Those of these rows that have a label: augmented copies have none. InputError where that leaves none, or where a
    label is none of the backbone's classes."""
    if recording.label_N is None:
        raise InputError(
            "this trains on labels, and not every recorded input has one: let the stream, and the certification stream "
            "where there is one, yield (inputs, labels) throughout"
        )
    rows = rows[recording.label_N[rows] >= 0]
    classes = recording.logits_NC.shape[1]
    if not len(rows) or recording.label_N[rows].max() >= classes:
        largest = f"; the largest is {recording.label_N[rows].max()}" if len(rows) else ""
        raise InputError(
            f"{len(rows)} training inputs have a label{largest}; expected whole numbers from 0 to {classes - 1}, in "
            "the order of the backbone's classes"
        )
    return rows


def cache_logits(
    cache: Cache,
    recording: Recording,
    position: int,
    rows: NDArray[np.intp],
    read: Callable[[NDArray[np.intp]], Tensor] | None,
    device: torch.device,
    folder: Path | None = None,
) -> Tensor:
    """(len(rows), C) logits of a trained cache on these recorded rows, on the CPU; read: those of the cache it reads,
    for some of these rows.

    They are mapped from a file without a name in `folder` (None: where the system has such files), because with many
    classes they need not fit into memory. StorageError where the disk is full.
    """
    features = recording.features[position]
    with torch.no_grad(), unnamed_file("what a cache says", folder) as file:
        for start in range(0, len(rows), LOOK_UP_ROWS):
            chunk = rows[start : start + LOOK_UP_ROWS]
            read_BC = None if read is None else read(chunk).to(device)
            logits_BC = cache.from_feature(_as_input(features[chunk]).to(device), read_BC)
            write_all(file, logits_BC.float().cpu().numpy().tobytes())
        shape = (len(rows), logits_BC.shape[1])
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))  # torch takes no read-only maps


class _Examples:
    """What there is to learn from, by number: the recorded rows, behind them the mixtures. On the CPU."""

    def __init__(self, position: int, recording: Recording, mixtures: Mixtures | None) -> None:
        self._position, self._mixtures = position, mixtures
        self._features, self._logits_NC = recording.features[position], recording.logits_NC

    def feature(self, index: NDArray[np.intp]) -> Tensor:
        recorded, mixed = self._parted(index)
        feature = _as_input(self._features[recorded])
        if self._mixtures is None:
            return feature
        joined = torch.cat([feature, self._mixtures.at(self._position, mixed)])
        return joined.contiguous(memory_format=torch.channels_last)  # of images and maps alone there are mixtures

    def target(self, index: NDArray[np.intp]) -> Tensor:
        """(B, C) what the backbone says."""
        recorded, mixed = self._parted(index)
        logits_BC = torch.from_numpy(self._logits_NC[recorded])
        return logits_BC if self._mixtures is None else torch.cat([logits_BC, self._mixtures.logits_MC[mixed]])

    def _parted(self, index: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows and mixtures of these numbers, which rise."""
        count = len(self._logits_NC)
        recorded = int(np.searchsorted(index, count))
        return index[:recorded], index[recorded:] - count


class _Inputs:
    """What the trained part of a cache reads, by example: each condensed once where that fits into memory."""

    def __init__(
        self,
        cache: LearnedCache,
        examples: _Examples,
        rows: NDArray[np.intp],
        augmentations: tuple[str, ...],
        seed: int,
        device: torch.device,
    ) -> None:
        self.cache, self.examples, self.augmentations, self.device = cache, examples, augmentations, device
        self.generator = torch.Generator().manual_seed(seed)
        self.sorted_rows, self.table = np.sort(rows), None
        width = cache.condensed_width
        if width is not None and not augmentations and 4 * width * len(rows) <= CONDENSED_LIMIT:
            self.table = torch.empty(len(rows), width, device=device)
            self.known = np.zeros(len(rows), dtype=np.bool_)

    def __getitem__(self, index: NDArray[np.intp]) -> Tensor:
        if self.table is None:
            return self._condensed(index)
        slots = np.searchsorted(self.sorted_rows, index)
        unknown = ~self.known[slots]
        if unknown.any():
            self.table[slots[unknown]] = self._condensed(index[unknown])
            self.known[slots] = True
        return self.table[slots]

    @torch.no_grad()
    def _condensed(self, index: NDArray[np.intp]) -> Tensor:
        feature = self.examples.feature(index).to(self.device)
        for name in self.augmentations:
            feature = AUGMENTATIONS[name](feature, self.generator)
        return self.cache.condense(feature)


class _Rows:
    """Endless batches of numbers, rising in each, reshuffled at each pass."""

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
