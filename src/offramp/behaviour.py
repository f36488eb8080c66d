"""What a backbone must do before it is cut: answer the same way each time, row by row, and change nothing.

Also the comparison that every proof of `split` rests on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.errors import InputError, SplitError
from offramp.graph import version
from offramp.precision import rounding
from offramp.streams import Batch, as_batch

EXAMPLE_ROWS = 4


def check_mode(module: nn.Module) -> None:
    """Raises SplitError when any part of the model is in train mode."""
    training = [name or "the model itself" for name, part in module.named_modules() if part.training]
    if training:
        shown = ", ".join(training[:5]) + (", ..." if len(training) > 5 else "")
        raise SplitError(
            f"the model is in train mode ({shown}); its answers would depend on dropout and on the other rows of the "
            "batch. Call `model.eval()` first."
        )


def example_batch(raw: object, module: nn.Module) -> Batch:
    """A few rows, all different, on the backbone's device. Missing rows are rolled copies of those given."""
    given = raw if isinstance(raw, Batch) else as_batch(raw, module)
    if not len(given):
        raise InputError("the example has no rows; pass at least one example input")
    first = next(chain(module.parameters(), module.buffers()), given.tensors[0])
    given = given.rows(slice(0, EXAMPLE_ROWS)).to(first.device)
    arguments = tuple(_fill(tensor) for tensor in given.args)
    return Batch(arguments, {name: _fill(tensor) for name, tensor in given.kwargs.items()})


def _fill(tensor: Tensor) -> Tensor:
    """EXAMPLE_ROWS rows: those of `tensor`, then the same rolled along their last dimension."""
    rows = [tensor]
    while sum(map(len, rows)) < EXAMPLE_ROWS:
        rows.append(rows[-1].roll(1, -1) if tensor.ndim > 1 else rows[-1])
    filled = torch.cat(rows)[:EXAMPLE_ROWS].clone()
    if filled.is_floating_point() and filled.ndim > 1 and bool((filled == filled[:1]).all()):
        # Equal rows would hide that a model mixes them.
        generator = torch.Generator().manual_seed(0)
        filled += torch.randn(filled.shape, generator=generator).to(filled)
    return filled


def call(module: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch, of which it gets copies: it may work in place on its own inputs."""
    return module(*(tensor.clone() for tensor in batch.args), **{k: v.clone() for k, v in batch.kwargs.items()})


def check_behaviour(module: nn.Module, example: Batch) -> Any:
    """The output for the example. Raises when it fails, is drawn at random, or depends on the other rows."""
    try:
        output = call(module, example)
    except Exception as error:
        forms = [f"{tuple(tensor.shape)} {dtype_name(tensor)}" for tensor in example.tensors]
        names = [""] * len(example.args) + [f" as `{name}`" for name in example.kwargs]
        received = ", ".join(form + name for form, name in zip(forms, names, strict=True))
        raise InputError(
            f"the model does not accept the example inputs, {received}: {type(error).__name__}: {first_line(error)}. "
            "Pass inputs in the form in which the model is called."
        ) from error
    leaves = pytree.tree_leaves(output)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise SplitError(
            f"the model returns a {type(output).__name__} in which no tensors were found; expected a tensor, a tuple, "
            "list or dict of tensors, or a ModelOutput. Wrap the model so that it returns one of these."
        )
    again = pytree.tree_leaves(call(module, example))
    if difference(_only_tensors(again), _only_tensors(leaves)):
        raise SplitError(
            "the model answered the same inputs differently when it was called twice: dropout or another random "
            "operation is active. Switch it off (`model.eval()`, or `training=False` in functional dropout)."
        )
    _check_rows(module, example, leaves)
    return output


def _check_rows(module: nn.Module, example: Batch, leaves: Sequence[Any]) -> None:
    """A row must get the same answer whatever stands beside it."""
    rows = torch.arange(1, len(example), 2, device=example.tensors[0].device)
    try:
        fewer = pytree.tree_leaves(call(module, example.rows(rows)))
    except Exception as error:
        raise SplitError(
            f"the model fails on {len(rows)} of the {len(example)} example rows although it accepts all of them: "
            f"{first_line(error)}. It must take any number of rows."
        ) from error
    for number, (leaf, part) in enumerate(zip(leaves, fewer, strict=False)):
        if not isinstance(leaf, Tensor) or not isinstance(part, Tensor):
            continue
        if leaf.shape == part.shape and not difference([part], [leaf]):
            continue  # does not depend on the inputs: a constant
        if not leaf.ndim or len(leaf) != len(example) or len(part) != len(rows):
            raise SplitError(
                f"output {number} has shape {tuple(leaf.shape)} for {len(example)} rows and {tuple(part.shape)} for "
                f"{len(rows)}; expected one answer per row, so that rows can leave early. Wrap the model so that it "
                "returns only outputs whose first dimension is the batch."
            )
        problem = difference([part], [leaf.index_select(0, rows)])
        if problem:
            raise SplitError(
                f"the model's answers depend on the other rows of the batch: output {number} of {len(rows)} rows is "
                f"not the same alone as among {len(example)} ({problem}). Such a model cannot let rows leave early; "
                "look for normalisation, softmax or sorting over dimension 0."
            )


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Puts mode and buffers back as they were, and refuses a model that changes its own parameters or buffers."""
    modes = [(part, part.training) for part in module.modules()]
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    versions = {name: version(tensor) for name, tensor in tensors.items()}
    copies = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        changed = [name for name, tensor in tensors.items() if version(tensor) != versions[name]]
        for name in changed:
            if name in copies:
                tensors[name].data.copy_(copies[name])
    if changed:
        raise SplitError(
            f"the model changes its own buffers when it is called ({', '.join(changed[:3])}): its answers depend on "
            "the requests before. Switch that off; a request must not change the next one's answer."
        )


def _only_tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def difference(received: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """How two lists of tensors differ beyond rounding; empty when they do not."""
    if len(received) != len(expected):
        return f"{len(received)} tensors instead of {len(expected)}"
    for number, (one, other) in enumerate(zip(received, expected, strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            found, wanted = (f"{tuple(tensor.shape)} {dtype_name(tensor)}" for tensor in (one, other))
            return f"tensor {number} is {found} instead of {wanted}"
        if not other.is_floating_point():
            if not torch.equal(one, other):
                return f"tensor {number} differs in {int((one != other).sum())} of {one.numel()} whole numbers"
            continue
        tolerance = rounding(other)
        usual = other[other.isfinite() & (other.abs() < 1e30)]  # masks hold -inf or the smallest number
        scale = float(usual.abs().max()) if usual.numel() else 0.0
        if not torch.allclose(one, other, rtol=tolerance, atol=tolerance * max(scale, 1e-6), equal_nan=True):
            worst = float((one - other).abs().nan_to_num().max())
            return f"tensor {number} differs by up to {worst:.3g} where its values reach {scale:.3g}"
    return ""
