"""The ways to trace a backbone into a graph, and what to say when none of them works."""

from __future__ import annotations

import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from offramp.errors import InputError, SplitError
from offramp.graph import Uncuttable
from offramp.streams import Batch


@dataclass(frozen=True)
class Rung:
    """One way to trace a backbone; `trace` gives a graph whose placeholders are the example's tensors in order."""

    method: str
    trace: Callable[[nn.Module, Batch], fx.GraphModule]


def rungs(module: nn.Module, points: Sequence[str] | None) -> list[Rung]:
    """The ways to try, in order. At the last, modules named in `points` or in a plain `nn.Sequential` stay closed."""
    leaves: list[str] = list(points or ())
    if isinstance(module, nn.Sequential):
        leaves += [name for name, part in module.named_modules() if name and not isinstance(part, nn.Sequential)]
    ladder = [
        Rung("export", lambda module, example: _export(module, example, strict=False)),
        Rung("export-strict", lambda module, example: _export(module, example, strict=True)),
        Rung("fx", lambda module, example: _symbolic(module, example, ())),
    ]
    if leaves:
        ladder.append(Rung("sequential", lambda module, example: _symbolic(module, example, leaves)))
    return ladder


def _export(module: nn.Module, example: Batch, *, strict: bool) -> fx.GraphModule:
    bound = inspect.signature(module.forward).bind(*example.args, **example.kwargs).arguments
    batch = Dim("batch", min=1)
    shapes = pytree.tree_map_only(Tensor, lambda _: {0: batch}, dict(bound))
    with _quiet():
        program = torch.export.export(module, example.args, dict(example.kwargs), dynamic_shapes=shapes, strict=strict)
        return _program_graph(program)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: not a word of torch's about its own ways, nor the graphs it prints when it gives up: they mean nothing to
    a user, who gets one error in the end that says where tracing stopped."""
    talkative = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = talkative.level
    talkative.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        talkative.setLevel(level)


def _program_graph(program: ExportedProgram) -> fx.GraphModule:
    sizes = [
        node.meta["val"].shape[0] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    ]
    if any(isinstance(size, int) for size in sizes):
        raise Uncuttable("the number of rows was fixed while the model was exported")
    graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    return graph


def exported_rungs(program: ExportedProgram) -> list[Rung]:
    """The one way for a program that is exported already. Raises SplitError when its batch is not dynamic."""
    try:
        graph = _program_graph(program)
    except (Uncuttable, AttributeError, IndexError) as error:
        raise SplitError(
            "the exported program takes only batches of the size it was exported with. Export it again with a dynamic "
            'first dimension: torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)), '
            "with an example x of at least 2 rows."
        ) from error
    return [Rung("export", lambda _module, _example: graph)]


class _LeafTracer(fx.Tracer):
    def __init__(self, leaves: Sequence[str]) -> None:
        super().__init__()
        self.leaves = frozenset(leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)


def _symbolic(module: nn.Module, example: Batch, leaves: Sequence[str]) -> fx.GraphModule:
    """The graph of `torch.fx` tracing; the modules named in `leaves` are not looked into."""
    signature = inspect.signature(module.forward)
    given = named_arguments(signature, example)
    parameters = signature.parameters
    fixed = {name: p.default for name, p in parameters.items() if name not in given and p.default is not p.empty}
    graph = _LeafTracer(leaves).trace(module, concrete_args=fixed or None)
    by_name = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    missing = sorted(given.keys() - by_name.keys())
    if missing:
        raise Uncuttable(f"the arguments {missing} were not found in the traced graph")
    for node in [node for node in graph.nodes if getattr(node.target, "__name__", "").startswith("_assert")]:
        graph.erase_node(node)
    for name in by_name.keys() - given.keys():
        if by_name[name].users:
            raise Uncuttable(f"the argument `{name}` is used but was not given")
        graph.erase_node(by_name[name])
    behind = next(node for node in graph.nodes if node.op != "placeholder")
    for name in sorted(given, key=lambda name: index_of(given[name], example.tensors)):
        behind.prepend(by_name[name])  # in the order of the example's tensors
    return fx.GraphModule(module, graph)


def named_arguments(signature: inspect.Signature, batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by the name of the argument they are for, however they are passed."""
    try:
        bound = signature.bind(*batch.args, **batch.kwargs).arguments
    except TypeError as error:
        raise InputError(
            f"the model cannot be called with {len(batch.args)} positional and the named arguments "
            f"{sorted(batch.kwargs)}: {error}"
        ) from error
    named: dict[str, Tensor] = {}
    for name, value in bound.items():
        if isinstance(value, Tensor):
            named[name] = value
        elif isinstance(value, Mapping):
            named.update(value)
        else:
            named.update({f"{name}[{index}]": part for index, part in enumerate(value)})
    return named


def index_of(tensor: Tensor, tensors: Sequence[Tensor]) -> int:
    """The position of this very tensor."""
    return next(index for index, other in enumerate(tensors) if other is tensor)


def user_line(error: BaseException) -> str:
    """The innermost line of the user's code in a traceback: where tracing stopped."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    libraries = ("/contextlib.py", "/inspect.py", "/functools.py")
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith(own) and not f.filename.endswith(libraries)]
    if not users:
        return ""
    frame = users[-1]
    return f": tracing stopped at {frame.filename}:{frame.lineno}, `{frame.line}` in {frame.name}"
