"""The fixed first step of every cache: pool the activation to a small grid and round it to half precision.

All that is recorded is the reduced activation, so that training many caches needs one pass of the backbone and little
disk, and caches see at run time exactly what was recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_LIMIT = 4096  # recorded numbers per input and split point; raw inputs are exempt
MAX_GRID = 8
MAX_SEGMENTS = 8
HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Reduction:
    """Fixed pooling of an activation, and rounding to half precision: at run time caches see exactly what was recorded.

    `grid` is the side of a feature map, or the number of segments of a sequence; 0 keeps all. Integers stay.
    """

    grid: int = 0

    def __call__(self, activation: Tensor) -> Tensor:
        pooled = self._pool(activation)
        if not pooled.is_floating_point():
            return pooled
        return pooled.clamp(-HALF_MAX, HALF_MAX).half()

    def _pool(self, activation: Tensor) -> Tensor:
        if self.grid and activation.ndim == 4:
            return _pool_map(activation, self.grid)
        if self.grid and activation.ndim == 5:
            return F.adaptive_avg_pool3d(activation, self.grid)
        if self.grid and activation.ndim == 3:
            # The first token is kept apart: in most encoders it is the one that the head reads.
            pooled = F.adaptive_avg_pool1d(activation.transpose(1, 2), self.grid).transpose(1, 2)
            return torch.cat([activation[:, :1], pooled], dim=1)
        return activation


def _pool_map(map_BFHW: Tensor, grid: int) -> Tensor:
    """(B, F, grid, grid) means, by adding slices. Torch's own pooling wakes all of its threads however small the map
    is, and they keep the cores busy for milliseconds afterwards, when another runtime may be next; its means over
    reshaped maps take several times as long (docs/experiments.md)."""
    height, width = map_BFHW.shape[-2:]
    if height % grid or width % grid:
        return F.adaptive_avg_pool2d(map_BFHW, grid)
    high, wide = height // grid, width // grid
    exact = map_BFHW.to(torch.promote_types(map_BFHW.dtype, torch.float32))  # sums in half precision would be rounded
    rows = _sum(exact[..., row::high, :] for row in range(high))
    return _sum(rows[..., column::wide] for column in range(wide)) / (high * wide)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def reduction_for(shape: tuple[int, ...], *, is_input: bool) -> Reduction:
    """The reduction for activations of this shape (without batch): raw inputs and small activations are kept whole."""
    if is_input or len(shape) < 2:
        return Reduction()
    if len(shape) in (3, 4):  # channels, and height and width, of a video before them its frames
        channels, *sides = shape
        grids = (g for g in (MAX_GRID, 4, 2) if g <= min(sides) and channels * g ** len(sides) <= FEATURE_LIMIT)
        grid = next(grids, 1)
        return Reduction(0 if all(side == grid for side in sides) else grid)
    length, width = shape[0], shape[1]
    segments = next((g for g in (MAX_SEGMENTS, 4, 2) if (g + 1) * width <= FEATURE_LIMIT), 1)
    return Reduction(0 if length <= segments + 1 else segments)
