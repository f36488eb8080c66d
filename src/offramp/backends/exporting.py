"""A module as the graph that other runtimes are built from, and silence while they build."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from offramp.backends.form import Form
from offramp.unfused import unfused_transformer_layers

# These speak of operators of torchvision that no model here has, of caches on disk that are not used, and, the root
# logger, of what is done anyway.
_TALKATIVE = ("", "torch.onnx._internal.exporter._registration", "torch._inductor.standalone_compile")


class Core(nn.Module):
    """What has to be computed of a module, as a tuple in the module's own types."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__()
        self.module = module
        self._computed = [(number, form.outputs[number].dtype) for number in form.computed]
        self.training = False

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output = self.module(*inputs)
        outputs = (output,) if isinstance(output, Tensor) else output
        return tuple(outputs[number].to(dtype) for number, dtype in self._computed)


def replica(module: nn.Module, replaced: Mapping[Tensor, Tensor] | None = None) -> nn.Module:
    """A copy that shares the memory of all parameters and buffers but those `replaced`, and needs no gradients."""
    memo: dict[int, object] = {id(buffer): buffer.detach() for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter((replaced or {}).get(parameter, parameter.detach()), requires_grad=False)
    return copy.deepcopy(module, memo)


def exported(module: nn.Module, form: Form, inputs: Sequence[Tensor], *, any_rows: bool) -> ExportedProgram:
    """`Core` of the module as one graph, for as many rows as `inputs` have or for any number from 2."""
    core = Core(replica(module), form)
    rows = torch.export.Dim("rows")
    shapes = (tuple({0: rows} for _ in inputs),) if any_rows else None
    with unfused_transformer_layers():
        program = torch.export.export(core, tuple(inputs), dynamic_shapes=shapes, strict=False)
    for node in list(program.graph.nodes):
        # Checks of the exporter's on its own trace; under autocast the types are others.
        if "_assert_tensor_metadata" in str(node.target):
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def attends(program: ExportedProgram) -> bool:
    """Whether the graph is one of a transformer: it takes whole numbers, or has attention in it."""
    values = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    names = [str(node.target) for node in program.graph.nodes]
    whole = any(not value.is_floating_point() and value.dtype is not torch.bool for value in values)
    return whole or any("scaled_dot_product" in name or name.startswith("aten.softmax") for name in names)


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, those under two names once."""
    tensors = {(t.data_ptr() or id(t), t.numel()): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Inside, libraries do not warn, and neither `loggers` nor the talkative ones log anything but errors."""
    root, nothing = logging.getLogger(), logging.NullHandler()
    root.addHandler(nothing)  # with a handler there, `logging.warning` does not install one for good
    chosen = [logging.getLogger(name) for name in (*_TALKATIVE, *loggers)]
    for logger in chosen:
        logger.addFilter(_is_error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in chosen:
            logger.removeFilter(_is_error)
        root.removeHandler(nothing)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
