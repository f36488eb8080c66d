"""PyTorch itself: the module as it is, or under autocast to bfloat16 with its weights cast once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from offramp.backends.base import Backend, Job
from offramp.backends.exporting import Core, replica, tensor_bytes
from offramp.backends.part import Program


class Eager(Backend):
    """The module's own call. float32 stands for the module as it is, with its own weights, not a copy.

    bfloat16 is what torch.autocast makes of it: products in bfloat16, everything else as torch finds it safe, outputs
    in the module's own types. On a CPU without bfloat16 instructions that is slow.
    """

    name = "eager"
    precisions = ("float32", "bfloat16")

    def missing(self) -> None:
        return None

    def program(self, job: Job) -> Program:
        if job.precision == "bfloat16":
            return _Autocast(_half_cast(job), job)
        return _AsItIs(job.module, job)


class _AsItIs:
    def __init__(self, module: nn.Module, job: Job) -> None:
        self._module, self._computed = module, job.form.computed
        self.stored_bytes = tensor_bytes(module)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        output = self._module(*inputs)
        return (output,) if isinstance(output, Tensor) else [output[number] for number in self._computed]


class _Autocast:
    def __init__(self, module: nn.Module, job: Job) -> None:
        self._core, self._device = Core(module, job.form), job.form.device.type
        self.stored_bytes = tensor_bytes(module)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.autocast(self._device, torch.bfloat16):
            outputs: Sequence[Tensor] = self._core(*inputs)
        return outputs


def _half_cast(job: Job) -> nn.Module:
    """A copy of the module with those parameters in bfloat16 that autocast would cast at each call, and uses only so.

    Its answers are those of autocast, bit by bit.
    """
    watched = _Casts()
    with torch.autocast(job.form.device.type, torch.bfloat16, cache_enabled=False), watched:
        job.module(*(tensor.clone() for tensor in job.example))
    known = [parameter for parameter in job.module.parameters() if id(parameter) in watched.cast - watched.used]
    return replica(job.module, {parameter: parameter.detach().bfloat16() for parameter in known})


class _Casts(TorchDispatchMode):
    """Notes which tensors are cast to bfloat16, and which are used as they are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cast: set[int] = set()
        self.used: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        casts = function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        (self.cast if casts else self.used).update(id(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        return function(*args, **(kwargs or {}))
