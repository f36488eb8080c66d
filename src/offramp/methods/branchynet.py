"""BranchyNet: a few branches of convolutions, trained on labels, that answer where their entropy is low."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.caches import CacheShape, LearnedCache, Reduction, reduction_for
from offramp.candidates import Candidates
from offramp.distillation import Recipe, labelled
from offramp.errors import InputError, StreamError
from offramp.methods.base import Method
from offramp.methods.published import cheapest
from offramp.placement import CacheCosts, Thresholds
from offramp.progress import bar
from offramp.splitting import SplitModel, SplitPoint, split
from offramp.streams import Batch, read_stream
from offramp.tasks import Classification
from offramp.types import Records

FIRST_WEIGHT, OTHER_WEIGHT = 1.0, 0.3  # of the exits' losses; the paper: about a point better than equal ones


@dataclass(frozen=True, kw_only=True)
class BranchyNet(Method):
    """Branches behind the split points nearest to `depths`, of as many convolutions each as `convolutions` says.

    A branch is so many 3x3 convolutions of `channels` channels with ReLU and a linear layer on the flattened result
    (linear layers as wide in place of the convolutions where activations have no positions). The defaults are the
    paper's for ResNet-110: three convolutions behind its 2nd layer of 110, two behind its 37th. Trained on labels by
    cross-entropy, the backbone staying as it is; `finetune_jointly` is the paper's joint training, on a copy.

    Published rule: a hit is an entropy of the softmax below T, one T per exit from a grid. `grid` holds values of T as
    shares of log C, the largest entropy; all combinations of them and of "off" are evaluated on tune
    (`published.cheapest`: greedily with more than two branches and 16 values, or three). The paper picks the knee of
    the curve of accuracy over time by eye; we have a tolerance, and take the cheapest combination whose disagreement
    is within it.

    What differs from the paper, besides: activations are recorded pooled to at most 4,096 numbers, which takes the
    place of its max pooling around the convolutions; no local response normalisation; AdamW instead of Adam.
    """

    name: ClassVar[str] = "branchynet"
    source: ClassVar[str] = "arXiv 1709.01686, sections III and IV"
    needs_labels: ClassVar[bool] = True

    depths: tuple[float, ...] = (0.02, 0.34)
    convolutions: tuple[int, ...] = (3, 2)
    channels: int = 32
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 2e-3
    grid: tuple[float, ...] = (
        *(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.04, 0.07),
        *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != len(self.convolutions):
            raise InputError(
                f"{len(self.depths)} depths and {len(self.convolutions)} numbers of convolutions; expected one of each "
                "per branch"
            )

    def learn(self, candidates: Candidates, tolerance: float) -> None:
        del tolerance  # decides over thresholds only
        candidates.confidence = "entropy"
        rows = labelled(candidates.recording, candidates.train_rows)
        recipe = Recipe(
            rows=self.epochs * len(rows),
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            alpha=0.0,
            hard="label",
        )
        branches = [candidates.build(point, shape) for point, shape in self.branches(candidates.split)]
        candidates.train_round("branches", branches, lambda _: recipe, candidates.time_left)

    def thresholds(self, records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
        # In single precision, as confidences are: what equals a threshold on tune does so when serving.
        choices = sorted({float(np.float32(1 - share)) for share in self.grid})
        return cheapest(records, costs, [choices] * len(records.reads_K), tolerance)

    def branches(self, split_model: SplitModel) -> list[tuple[SplitPoint, CacheShape]]:
        """Where the branches sit, in the order of the backbone, and what they look like; one at each point at most."""
        points = [point for point in split_model.points[1:] if point.dtype.is_floating_point]
        chosen: dict[int, tuple[SplitPoint, CacheShape]] = {}
        for depth, convolutions in sorted(zip(self.depths, self.convolutions, strict=True)) if points else ():
            point = min(points, key=lambda point: abs(point.depth - depth))
            if len(point.shape) > 1:
                shape = CacheShape("layers", convolutions=((self.channels, 3, 1),) * convolutions)
            else:
                shape = CacheShape("layers", hidden=(self.channels,) * convolutions)
            chosen.setdefault(point.position, (point, shape))
        return list(chosen.values())


def finetune_jointly(
    backbone: nn.Module,
    stream: Iterable[object],
    method: BranchyNet | None = None,
    *,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """A copy of `backbone`, fine-tuned together with branches on labels (section III); pass it to `fit` afterwards.

    stream: batches of (inputs, labels), read once per epoch. method: says where the branches sit and what they look
    like. The loss is the sum of the cross-entropies of all exits, weighted 1.0 at the first and 0.3 at the others, the
    backbone's own included: the weights that served the paper best. The branches are left behind: `fit` trains its own
    on what the copy then says. The copy comes back in eval mode; `backbone` itself is not changed in any bit, and what
    `fit` certifies is agreement with the copy, not with `backbone`.

    The copy is trained as it answers: batch normalisation normalises by its running statistics and keeps them, only
    its scale and shift are trained, and dropout stays off. Statistics of the batch would make the answers of rows
    depend on each other, which no split model may do. Parameters that are frozen in `backbone` are trained as well.
    AdamW without weight decay at a constant rate: the paper's Adam (0.001, betas 0.99 and 0.999, there 100 epochs).

    Raises InputError where labels are missing or wrong or the stream can be read only once, StreamError for a broken or
    empty stream, SplitError where the copy cannot be cut.
    """
    if epochs > 1 and isinstance(stream, Iterator):
        raise InputError(
            f"the stream can be read only once, and {epochs} epochs read it {epochs} times: pass a DataLoader or a list"
        )
    tuned = copy.deepcopy(backbone)
    joint: _Joint | None = None
    with bar("fine-tuning jointly", epochs, show=progress) as running:
        for _ in range(epochs):
            for batch in read_stream(stream, tuned):
                if joint is None:
                    joint = _Joint(tuned, batch, method or BranchyNet(), learning_rate, seed)
                running.note(f"loss {joint.step(batch):.3f}")
            running.advance()
    if joint is None:
        raise StreamError("the stream to fine-tune on is empty: it yielded no inputs")
    joint.close()
    return tuned


class _Unrounded(Reduction):
    """The same pooling in full precision: half would round the gradients that go back into the backbone."""

    def __call__(self, activation: Tensor) -> Tensor:
        return self._pool(activation)


class _Joint:
    """A backbone, branches on it, and the optimizer of both."""

    def __init__(self, backbone: nn.Module, batch: Batch, method: BranchyNet, learning_rate: float, seed: int) -> None:
        self.trained = {value: value.requires_grad for value in backbone.parameters() if value.is_floating_point()}
        if not self.trained:
            raise InputError(f"{type(backbone).__name__} has no parameters: nothing to fine-tune")
        self.device = next(iter(self.trained)).device
        example = batch.rows(slice(0, 4)).to(self.device)
        self.split, self.task = split(backbone, example), Classification()
        with torch.no_grad():
            self.classes = self.task.logits(self._run(example)[1]).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: only its state is put back
            self.branches = {point.position: self._branch(point, shape) for point, shape in method.branches(self.split)}
        if not self.branches:
            raise InputError(f"{type(backbone).__name__} has no split point behind its input: no place for a branch")
        for value in self.trained:
            value.requires_grad_()
        values = [*self.trained, *(value for branch in self.branches.values() for value in branch.parameters())]
        self.optimizer = torch.optim.AdamW(values, lr=learning_rate, betas=(0.99, 0.999), weight_decay=0.0)

    def step(self, batch: Batch) -> float:
        """One step on this batch; its loss."""
        label_B = self._labels(batch).to(self.device)
        activations, leaves = self._run(batch.to(self.device))
        exits = [branch(activations[position]) for position, branch in self.branches.items()]
        losses = [F.cross_entropy(logits_BC, label_B) for logits_BC in (*exits, self.task.logits(leaves))]
        loss = FIRST_WEIGHT * losses[0] + OTHER_WEIGHT * torch.stack(losses[1:]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def close(self) -> None:
        """Leave the backbone without gradients, and frozen where it was."""
        self.optimizer.zero_grad(set_to_none=True)
        for value, trained in self.trained.items():
            value.requires_grad_(trained)

    def _branch(self, point: SplitPoint, shape: CacheShape) -> LearnedCache:
        activation_shape = tuple(point.shape)
        reduction = _Unrounded(reduction_for(activation_shape, is_input=False).grid)
        branch = LearnedCache(shape.label, point.name, shape, activation_shape, self.classes, reduction=reduction)
        return branch.to(self.device)

    def _run(self, batch: Batch) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """What branches read at each split point, and the tensors of the output."""
        live, activations = self.split.flatten(batch), []
        for position, stage in enumerate(self.split.stages):
            activations.append(self.split.activation(position, live))
            live = stage(*live)
        return activations, live

    def _labels(self, batch: Batch) -> Tensor:
        if batch.labels_B is None:
            raise InputError("joint training is on labels, and the stream has none: let it yield (inputs, labels)")
        label_B = batch.labels_B.long()
        if label_B.min() < 0 or label_B.max() >= self.classes:
            raise InputError(
                f"labels go from {label_B.min()} to {label_B.max()}; expected whole numbers from 0 to "
                f"{self.classes - 1}, in the order of the backbone's classes"
            )
        return label_B
