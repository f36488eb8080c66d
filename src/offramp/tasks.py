"""What an answer is, and when two answers agree. One task so far: classification.

A task looks at model outputs as lists of tensor leaves, so that it works alike for a bare tensor, a tuple and a
`ModelOutput`; `SplitModel.unflatten` puts leaves back into the backbone's own output type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.errors import InputError


@dataclass(frozen=True)
class Classification:
    """The answer is the index of the largest logit; two answers agree when the indices are equal."""

    name: str = "classification"

    def logits(self, leaves: Sequence[Tensor]) -> Tensor:
        """The (B, C) logits among the tensors of an output. Raises InputError when it is not exactly that."""
        if len(leaves) != 1 or leaves[0].ndim != 2 or not leaves[0].is_floating_point():
            shapes = [tuple(leaf.shape) for leaf in leaves]
            raise InputError(
                f"the backbone returns tensors of shapes {shapes}; classification needs exactly one, logits of shape "
                "(batch, classes). Wrap the backbone in a module that returns only its logits."
            )
        return leaves[0]

    def answer(self, logits_BC: Tensor) -> Tensor:
        """(B,) int64 answers."""
        return logits_BC.argmax(-1)

    def agree(self, answer_B: Tensor, other_B: Tensor) -> Tensor:
        """(B,) bool: which of the answers are the same."""
        return torch.eq(answer_B, other_B)


TASKS: dict[str, Classification] = {"classification": Classification()}


def task_named(name: str) -> Classification:
    """The task of that name; an InputError lists the known ones."""
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; known: {', '.join(sorted(TASKS))}")
    return TASKS[name]
