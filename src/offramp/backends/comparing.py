"""How far a part's outputs are from its module's."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offramp.backends.form import Output
from offramp.backends.part import Part
from offramp.errors import InputError
from offramp.precision import rounding


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference, and the largest over the largest value of the tensor that it is in.

    within: every number was within tolerance, and integers, shapes and types were equal.
    """

    absolute: float = 0.0
    relative: float = 0.0
    within: bool = True

    def __or__(self, other: Difference) -> Difference:
        return Difference(
            max(self.absolute, other.absolute), max(self.relative, other.relative), self.within and other.within
        )


@torch.no_grad()
def check(
    part: Part,
    module: nn.Module,
    inputs: Iterable[Sequence[Tensor]],
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> Difference:
    """The part beside the module it was built from, on each of these tuples of inputs.

    A number may differ by rtol of itself, and by atol of the largest of its tensor: sums over many numbers that cancel
    are as exact as these are. The default of both is `precision.rounding`: what taking a sum in another order rounds.
    """
    found = [compare(part(*given), module(*given), rtol=rtol, atol=atol) for given in inputs]
    if not found:
        raise InputError("there are no inputs to compare a part and its module on; pass at least one tuple of tensors")
    return functools.reduce(operator.or_, found)


def compare(received: Output, expected: Output, *, rtol: float | None = None, atol: float | None = None) -> Difference:
    """`check` for outputs that are at hand."""
    pairs = zip(_tuple(received), _tuple(expected), strict=True)
    return functools.reduce(operator.or_, (_difference(*pair, rtol, atol) for pair in pairs), Difference())


def _tuple(output: Output) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


def _difference(received: Tensor, expected: Tensor, rtol: float | None, atol: float | None) -> Difference:
    rtol, atol = (rounding(expected) if given is None else given for given in (rtol, atol))
    if received.shape != expected.shape or received.dtype != expected.dtype:
        return Difference(math.inf, math.inf, within=False)
    if not expected.numel():
        return Difference()
    one, other = received.double(), expected.double()
    same = (one == other) | (one.isnan() & other.isnan())  # infinities too
    apart = torch.where(same, 0.0, one - other).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    usual = other[other.isfinite() & (other.abs() < 1e30)]  # masks hold -inf or the smallest number
    scale = max(float(usual.abs().max()) if usual.numel() else 0.0, 1e-6)
    allowed = rtol * other.abs().nan_to_num(posinf=0.0) + atol * scale
    if not expected.is_floating_point():
        allowed = torch.zeros_like(other)
    largest = float(apart.max())
    return Difference(largest, largest / scale, within=bool((apart <= allowed).all()))
