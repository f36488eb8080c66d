"""What an opponent is, what it is built from, and how it is measured beside the full model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from offramp.calibration import interval
from offramp.evaluation import KEPT_ROWS, compare_latency
from offramp.model import CachedModel
from offramp.recording import Recording
from offramp.splitting import SplitModel
from offramp.streams import Batch, concatenated, read_stream
from offramp.tasks import Classification
from offramp.types import CostTable

BATCH_SIZES = (1, 32)
CALIBRATION_ROWS = 200
ROWS_AT_ONCE = 100


@dataclass(eq=False)
class Case:
    """A backbone with its traffic, as every opponent gets it.

    recording: the pass that our own fit learned from. train: the stream behind its train rows. held_out: a stream that
    can be read again and again, of inputs that nothing was trained, tuned or certified on. folder: for files.
    our_flops: FLOPs over the backbone's of our certified plan, by tolerance, once it is measured. smaller: a static
    model of the same task and input, and its name.
    """

    split_model: SplitModel
    task: Classification
    recording: Recording
    costs: CostTable
    train: Iterable[object]
    held_out: Iterable[object]
    folder: Path
    time_budget_s: float
    latency_budget_s: float
    confidence_level: float
    seed: int = 0
    our_flops: dict[float, float] = field(default_factory=dict)
    smaller: tuple[str, nn.Module] | None = None

    @property
    def backbone(self) -> nn.Module:
        return self.split_model.backbone

    @cached_property
    def calibration(self) -> Batch:
        """The first CALIBRATION_ROWS training inputs."""
        kept: list[Batch] = []
        for batch in read_stream(self.train, self.backbone):
            kept.append(batch)
            if sum(map(len, kept)) >= CALIBRATION_ROWS:
                break
        return concatenated(kept).rows(slice(0, CALIBRATION_ROWS))

    @cached_property
    def sample(self) -> Batch:
        """The held-out inputs that latency is measured on, as many as `offramp.evaluation.evaluate` takes."""
        kept: list[Batch] = []
        for batch in read_stream(self.held_out, self.backbone):
            if sum(map(len, kept)) >= KEPT_ROWS:
                break
            kept.append(batch)
        return concatenated(kept)

    @cached_property
    def full_answers_N(self) -> NDArray[np.int64]:
        """What the eager float32 backbone answers to the held-out inputs."""
        return self.answers(self.backbone, ROWS_AT_ONCE)

    @cached_property
    def labels_N(self) -> NDArray[np.int64] | None:
        labels = [batch.labels_B for batch in read_stream(self.held_out, self.backbone)]
        known = [label_B for label_B in labels if label_B is not None]
        return torch.cat(known).numpy() if len(known) == len(labels) else None

    @cached_property
    def onnx(self) -> tuple[Path, float]:
        """The backbone as an ONNX file with a free batch size, and the seconds that the export took."""
        from opponents.exporting import export

        started = time.monotonic()
        file = self.folder / f"{self.split_model.fingerprint[:16]}.onnx"
        return export(self.backbone, self.split_model.example, file), time.monotonic() - started

    @torch.inference_mode()
    def answers(self, call: Callable[..., object], rows_at_once: int) -> NDArray[np.int64]:
        """(N,) answers of any model to the held-out inputs."""
        found = []
        for batch in read_stream(self.held_out, self.backbone):
            for start in range(0, len(batch), rows_at_once):
                rows = batch.rows(slice(start, start + rows_at_once))
                leaves = [leaf for leaf in tree_leaves(call(*rows.args, **rows.kwargs)) if isinstance(leaf, Tensor)]
                found.append(self.task.answer(self.task.logits(leaves)).numpy().copy())
        return np.concatenate(found)


@dataclass(frozen=True)
class Built:
    """A model ready to serve. `call` takes the backbone's arguments and returns logits, or the backbone's output.

    parameter_bytes: stored size of its weights. flops_ratio: over the backbone's, None where the operations are as
    many but cheaper. rows_at_once: batch size of its answers, where they depend on it.
    """

    call: Callable[..., object]
    parameter_bytes: int
    build_s: float
    flops_ratio: float | None = None
    rows_at_once: int = ROWS_AT_ONCE
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opponent:
    """`build` makes one model; where `per_tolerance`, one for the tolerance that it is given.

    guarantee: a sentence on what a user is promised about answers that differ from the full model's.
    """

    name: str
    guarantee: str
    build: Callable[[Case, float | None], Built]
    per_tolerance: bool = False


@dataclass(frozen=True)
class Beside:
    """Lets `compare_latency` time any model against the full one, exactly as it times a cached one."""

    split_model: SplitModel
    call: Callable[..., object]

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> object:
        return self.call(*args, **kwargs)


def measured(built: Built, case: Case) -> dict[str, Any]:
    """Disagreement with the full model, time beside it, size: what a row of the results says."""
    answer_N = case.answers(built.call, built.rows_at_once)
    beside = cast(CachedModel, Beside(case.split_model, built.call))
    latency = compare_latency(beside, case.sample, BATCH_SIZES, case.latency_budget_s)
    return compared(answer_N, case) | {
        "latency": [asdict(ratio) for ratio in latency],
        "flops_ratio": built.flops_ratio,
        "bytes": built.parameter_bytes,
        "build_s": built.build_s,
        "details": dict(built.details),
    }


def compared(answer_N: NDArray[np.int64], case: Case) -> dict[str, Any]:
    """These answers to the held-out inputs beside the full model's, and beside the labels where there are any."""
    n, errors = len(answer_N), int((answer_N != case.full_answers_N).sum())
    return {
        "n": n,
        "disagreements": errors,
        "disagreement": errors / n,
        "interval": interval(errors, n, case.confidence_level),
        "accuracy": None if case.labels_N is None else float((answer_N == case.labels_N).mean()),
    }


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def numpy_inputs(args: Sequence[Tensor], kwargs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """The tensors of a call by the input names of an exported model: positional ones in order, others by name."""
    positional = dict(zip(names, (tensor.numpy() for tensor in args), strict=False))
    return positional | {name: tensor.numpy() for name, tensor in kwargs.items()}
