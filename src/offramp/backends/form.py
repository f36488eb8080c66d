"""What a part takes and gives: the shapes, types and layouts that every runtime has to keep to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from offramp.errors import InputError

Output = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Slot:
    """One tensor that is taken or given. Its shape is without the batch dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        plain = tensor.ndim != 4 or tensor.is_contiguous()
        last = not plain and tensor.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        return cls(tuple(tensor.shape[1:]), tensor.dtype, layout)

    def fits(self, tensor: Tensor) -> bool:
        return tensor.dtype == self.dtype and tensor.ndim == len(self.shape) + 1 and tensor.shape[1:] == self.shape

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The tensor in this layout: a copy only where it is in another one."""
        return tensor.contiguous(memory_format=self.layout)

    def __str__(self) -> str:
        return f"{('batch', *self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Form:
    """The call of a module: tensors in, one tensor or a tuple of tensors out, the batch first in each.

    sources: where each output comes from: the number of a computed tensor, or ~i for input i handed through.
    """

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    sources: tuple[int, ...]
    single: bool
    device: torch.device

    @classmethod
    def of(cls, module: nn.Module, example: Sequence[Tensor]) -> Self:
        """Found by a call on copies of `example`. Raises InputError when the call is not of this form."""
        given = [tensor.clone() for tensor in example]
        versions = [tensor._version for tensor in given]
        output = module(*given)
        outputs = (output,) if isinstance(output, Tensor) else output
        if not isinstance(outputs, tuple) or not all(isinstance(tensor, Tensor) for tensor in outputs):
            raise InputError(f"the part returns a {type(output).__name__}; expected a tensor or a tuple of tensors")
        shapes = [tuple(tensor.shape) for tensor in outputs]
        if any(shape[:1] != (len(example[0]),) for shape in shapes):
            raise InputError(
                f"the part returns tensors of shapes {shapes} for {len(example[0])} rows; expected the batch as the "
                "first dimension of each"
            )
        if versions != [tensor._version for tensor in given]:
            raise InputError(
                "the part changes its inputs in place, which other runtimes cannot; let it work on a clone"
            )
        return cls(
            tuple(map(Slot.of, example)),
            tuple(map(Slot.of, outputs)),
            _sources(given, outputs),
            isinstance(output, Tensor),
            example[0].device,
        )

    @property
    def computed(self) -> tuple[int, ...]:
        """The numbers of the outputs that have to be computed: no inputs handed through, and nothing twice."""
        return tuple(self.sources.index(number) for number in range(max(self.sources, default=-1) + 1))

    def rows(self, tensors: Sequence[Tensor]) -> int:
        """How many rows these inputs have. Raises InputError when they do not fit."""
        if len(tensors) == len(self.inputs):
            fits = all(slot.fits(tensor) for slot, tensor in zip(self.inputs, tensors, strict=True))
            if fits and all(t.device == self.device and t.shape[0] == tensors[0].shape[0] for t in tensors):
                return tensors[0].shape[0]
        received = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in tensors]
        raise InputError(
            f"the part was built for {', '.join(map(str, self.inputs))} on {self.device}; received "
            f"{', '.join(received) or 'nothing'}. Pass inputs of that form, or build it again for these."
        )

    def restore(self, inputs: Sequence[Tensor], computed: Sequence[Tensor]) -> Output:
        """The output of the module from what was computed, and from its inputs."""
        outputs = tuple(inputs[~source] if source < 0 else computed[source] for source in self.sources)
        return outputs[0] if self.single else outputs

    def empty(self) -> list[Tensor]:
        """What is computed from no rows."""
        slots = [self.outputs[number] for number in self.computed]
        return [torch.empty(0, *slot.shape, dtype=slot.dtype, device=self.device) for slot in slots]


def _sources(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[int, ...]:
    known = {id(tensor): ~number for number, tensor in enumerate(inputs)}
    computed = 0
    for tensor in outputs:
        if id(tensor) not in known:
            known[id(tensor)] = computed
            computed += 1
    return tuple(known[id(tensor)] for tensor in outputs)
