"""earlyon 0.3 (MIT): exit heads on hooks, trained and calibrated with labels, which here are the backbone's answers.

Its own defaults, but for the count of epochs (that of its published runs) and for a temperature per head, which it
offers. The wrapper is put together as its `custom_ee` does, whose module cannot be imported without torchvision.
Batch 1 routes each input; a larger batch leaves early only as a whole.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from offramp.cost import count_flops
from offramp.errors import InputError
from offramp.recording import CERTIFY, TRAIN, TUNE, Recording
from offramp.splitting import SplitPoint
from opponents.base import Built, Case, Opponent, tensor_bytes

EXITS = 3
EPOCHS = 4
TRAIN_BATCH = 64
TIMED_BATCHES = 3


@dataclass(frozen=True)
class Wrapped:
    """The wrapper with trained heads, and the split points that they sit at."""

    model: Any
    points: list[SplitPoint]
    train_s: float
    inputs: int


class Recorded(Dataset[tuple[Tensor, Tensor]]):
    """Recorded inputs with the backbone's answers as labels."""

    def __init__(self, recording: Recording, rows: NDArray[np.intp]) -> None:
        self._inputs, self._rows = recording.features[0], rows
        self._answers = recording.logits_NC[rows].argmax(1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = torch.from_numpy(np.array(self._inputs[self._rows[index]])).float()
        return row, torch.tensor(int(self._answers[index]))


def build(case: Case, tolerance: float | None) -> Built:
    from earlyon.core.thresholds import calibrate_thresholds

    assert tolerance is not None
    wrapped = with_heads(case)
    started = time.monotonic()
    tune, certify = (
        DataLoader(Recorded(case.recording, case.recording.index(part)), batch_size=128) for part in (TUNE, CERTIFY)
    )
    model = wrapped.model  # calibrated in place: an earlier model of this function answers anew after this
    with quiet():
        result = calibrate_thresholds(
            model, certify, target_accuracy_drop=tolerance, fit_temperature=True, temperature_loader=tune
        )
    build_s = wrapped.train_s + time.monotonic() - started

    def call(inputs: Tensor) -> Tensor:
        if len(inputs) == 1:
            alone: Tensor = model(inputs).prediction
            return alone
        together: Tensor = model.forward_inference_batched(inputs).predictions
        return together

    return Built(
        call,
        tensor_bytes(model),
        build_s,
        flops_ratio=flops_share(case, wrapped),
        rows_at_once=1,
        details={
            "exits": [point.name for point in wrapped.points],
            "enabled": result.enabled_exits,
            "thresholds": result.thresholds,
            "training_inputs": wrapped.inputs,
            "epochs": EPOCHS,
        },
    )


@functools.lru_cache(maxsize=1)
def with_heads(case: Case) -> Wrapped:
    """The backbone with heads trained on as many of the train rows as fit the time of one of our fits."""
    from earlyon.training.two_stage_trainer import stage2_train_exits

    point = case.split_model.points[0]
    if len(case.split_model.example.tensors) != 1 or not point.dtype.is_floating_point:
        raise InputError("earlyon calls the backbone with a single tensor of numbers")
    started = time.monotonic()
    points = exit_points(case.backbone, list(case.split_model.points))
    model = wrapper(case, points)
    every = Recorded(case.recording, case.recording.index(TRAIN))
    row_s = seconds_per_row(model, every)
    count = min(len(every), max(TRAIN_BATCH, int(case.time_budget_s / (EPOCHS * row_s))))
    rows = np.random.default_rng(case.seed).permutation(len(every))[:count].tolist()
    loader = DataLoader(Subset(every, rows), batch_size=TRAIN_BATCH, shuffle=True)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(case.seed)
        stage2_train_exits(model, loader, epochs=EPOCHS, on_epoch_end=lambda _log: None)
    model.eval()
    return Wrapped(model, points, time.monotonic() - started, count)


def exit_points(backbone: nn.Module, points: list[SplitPoint]) -> list[SplitPoint]:
    """Evenly spread split points after the input whose activation is the output of the submodule of that name."""
    modules = dict(backbone.named_modules())
    usable = [point for point in points[1:] if point.name in modules and 1 <= len(point.shape) <= 3]
    if not usable:
        raise InputError("no split point of this backbone is the output of a submodule, which earlyon needs")
    wanted = [math.ceil(k * len(usable) / (EXITS + 1)) for k in range(1, EXITS + 1)]
    return [usable[i] for i in sorted({min(i, len(usable) - 1) for i in wanted})]


def wrapper(case: Case, points: list[SplitPoint]) -> Any:
    from earlyon import EarlyExitConfig, EarlyExitHead, EarlyExitWrapper, ExitPoint

    classes = case.recording.logits_NC.shape[1]
    exits = [
        ExitPoint(f"e{i}", point.name, point.shape[0] if len(point.shape) == 3 else point.shape[-1])
        for i, point in enumerate(points)
    ]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(case.seed)
        heads: dict[str, nn.Module] = {
            exit_.name: EarlyExitHead(exit_.in_channels, classes, pool_tokens="mean") for exit_ in exits
        }
        config = EarlyExitConfig(backbone="custom", num_classes=classes, exit_points=exits)
        backbone = copy.deepcopy(case.backbone)  # it freezes the parameters and leaves hooks behind
        model = EarlyExitWrapper(
            backbone, heads, nn.Identity(), config, input_shape=(1, *case.split_model.points[0].shape)
        )
        _ = model.flops_estimate  # otherwise worked out in the first answer
    return model


def seconds_per_row(model: Any, rows: Recorded) -> float:
    """Time of one row in training; nearly all of it is the backbone's forward pass."""
    batches = iter(DataLoader(rows, batch_size=TRAIN_BATCH))
    seen, started = 0, time.monotonic()
    with torch.no_grad():
        for _ in range(TIMED_BATCHES):
            inputs, _answers = next(batches, (None, None))
            if inputs is None:
                break
            model(inputs, mode="training")
            seen += len(inputs)
    return (time.monotonic() - started) / max(seen, 1)


def flops_share(case: Case, wrapped: Wrapped) -> float:
    """Mean FLOPs at batch 1 over the backbone's, heads included (its own estimate leaves them out)."""
    model, positions = wrapped.model, [point.position for point in wrapped.points]
    stages = np.array([stage.flops for stage in case.costs.stages])
    before = [float(stages[:position].sum()) for position in positions]
    enabled = model.config.enabled_exits
    heads = [
        count_flops(functools.partial(head, torch.zeros(1, *point.shape))) * on
        for head, point, on in zip(model.exit_heads.values(), wrapped.points, enabled, strict=True)
    ]
    met = np.cumsum(heads)
    cost_at = np.append(np.array(before) + met, stages.sum() + met[-1])
    rows = case.sample.tensors[0]
    left = [model(rows[i : i + 1]).exit_taken for i in range(len(rows))]  # -1: the full network
    return float(cost_at[left].mean() / stages.sum())


@contextmanager
def quiet() -> Iterator[None]:
    """Within: neither warnings nor log lines from the FLOPs counter that it uses."""
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


OPPONENTS = (
    Opponent(
        "earlyon 0.3",
        "A drop of accuracy within the tolerance on its calibration inputs, as measured; no bound.",
        build,
        per_tolerance=True,
    ),
)
