"""Cuts a backbone into stages, and proves that the stages give its own answers.

The backbone is traced once: by `torch.export`, or by `torch.fx` where export fails, or, for a plain `nn.Sequential`,
child by child. `graph` finds the places where every live value is a tensor of rows; here they become stages that
share the backbone's parameters. Nothing about the backbone is changed, whether the cut succeeds or not.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from offramp.behaviour import (
    call,
    check_behaviour,
    check_mode,
    difference,
    dtype_name,
    example_batch,
    first_line,
    untouched,
)
from offramp.errors import InputError, SplitError
from offramp.graph import Cut, Graph, Uncuttable, module_cuts, module_spans
from offramp.streams import Batch
from offramp.tracing import Rung, exported_rungs, index_of, named_arguments, rungs, user_line


class _Leaf(Enum):
    """`ROWS` stands for a tensor of rows in the template of the output; as an enum it survives copies."""

    ROWS = auto()


@dataclass(frozen=True)
class SplitPoint:
    """A place where the backbone is cut. Shapes are without the batch dimension, bytes are per row.

    depth: share of the backbone's FLOPs before it. live_shapes: every value that crosses it, the activation included.
    """

    name: str
    position: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    live_shapes: tuple[tuple[int, ...], ...]
    live_bytes: int
    depth: float


class SplitModel:
    """A backbone cut into stages: `stages[k]` maps the live values at `points[k]` to those at the next point.

    The last stage returns the tensors of the output. Parameters and buffers are the backbone's own, never copies.
    """

    def __init__(
        self, backbone: nn.Module, graph: Graph, cuts: Sequence[Cut], method: str, example: Batch, template: _Output
    ) -> None:
        self.backbone = backbone
        self.method = method
        self.example = example
        self.device = example.tensors[0].device
        self.fingerprint = fingerprint(backbone, [str(node.target) for node in graph.nodes if graph.facts[node].data])
        self._template = template
        self._signature = inspect.signature(backbone.forward)
        arguments = named_arguments(self._signature, example)
        # The placeholders, the example's tensors and these names are in one order.
        self._arguments = dict(sorted(arguments.items(), key=lambda item: index_of(item[1], example.tensors)))
        self._call = (len(example.args), *example.kwargs)
        self._rows = [(tensor.shape[1:], tensor.dtype) for tensor in self._arguments.values()]
        self._inputs = [graph.placeholders.index(node) for node in cuts[0].live]
        self._activations = [_input_activation(graph, cuts[0]), *(cut.live.index(cut.node) for cut in cuts[1:])]
        self.points = tuple(
            _point(graph, cut, position, self._activations[position]) for position, cut in enumerate(cuts)
        )
        ends = [*((cut.live, cut.order) for cut in cuts[1:]), (graph.outputs, len(graph.nodes))]
        self._full: nn.Module | None = None  # all stages in a row, where that is not the backbone's own call
        self.stages: tuple[nn.Module, ...] = tuple(
            graph.stage(cut, results, stop) for cut, (results, stop) in zip(cuts, ends, strict=True)
        )

    def __repr__(self) -> str:
        names = ", ".join(point.name for point in self.points)
        return f"SplitModel({type(self.backbone).__name__}, method={self.method!r}, points=[{names}])"

    def flatten(self, batch: Batch) -> tuple[Tensor, ...]:
        """The live values at point 0. Raises InputError when the batch does not fit the example."""
        tensors = self._checked(batch)
        return tuple(tensors[number] for number in self._inputs)

    def like_example(self, batch: Batch) -> Batch:
        """The same inputs, passed by position and by name as the example's are. InputError as in `flatten`."""
        tensors, positional = self._checked(batch), len(self.example.args)
        return Batch(tensors[:positional], dict(zip(self.example.kwargs, tensors[positional:], strict=True)))

    def _checked(self, batch: Batch) -> tuple[Tensor, ...]:
        """The tensors of the batch in the order of the example's."""
        if (len(batch.args), *batch.kwargs) == self._call:
            tensors = batch.tensors
        else:
            arguments = named_arguments(self._signature, batch)
            if arguments.keys() != self._arguments.keys():
                raise InputError(
                    f"the batch gives the arguments {sorted(arguments)}; the model was split with "
                    f"{sorted(self._arguments)}. Pass the same arguments, or split the model again with this form of "
                    "input."
                )
            tensors = tuple(arguments[name] for name in self._arguments)
        for received, (shape, dtype) in zip(tensors, self._rows, strict=True):
            if received.shape[1:] != shape or received.dtype != dtype or received.device != self.device:
                raise self._misfit(tensors)
        return tensors

    def _misfit(self, tensors: Sequence[Tensor]) -> InputError:
        """What is wrong with the first of these arguments that does not fit the example."""
        for received, (name, expected) in zip(tensors, self._arguments.items(), strict=True):
            if received.shape[1:] != expected.shape[1:] or received.dtype != expected.dtype:
                return InputError(
                    f"`{name}` has shape {tuple(received.shape)} and type {dtype_name(received)}; expected "
                    f"{('batch', *expected.shape[1:])} and {dtype_name(expected)}, as in the example. "
                    "Resize, pad or convert the input, or split the model again for this shape."
                )
            if received.device != self.device:
                return InputError(
                    f"`{name}` is on {received.device}, the model on {self.device}; move it with "
                    f"`.to({str(self.device)!r})`"
                )
        raise AssertionError("all arguments fit")

    def activation(self, position: int, live: Sequence[Tensor]) -> Tensor:
        """What caches read at a split point, among its live values."""
        return live[self._activations[position]]

    def unflatten(self, leaves: Sequence[Tensor]) -> Any:
        """The tensors that the last stage returned, in the backbone's own output type."""
        return self._template.restore(leaves)

    @property
    def optimized(self) -> bool:
        """Whether the stages run elsewhere than in the backbone's own modules."""
        return self._full is not None

    def full(self, *args: Any, **kwargs: Any) -> Any:
        """The full model's own call, without caches."""
        if self._full is None:
            return self.backbone(*args, **kwargs)
        return self.unflatten(self.full_leaves(Batch(args, kwargs)))

    def full_leaves(self, batch: Batch) -> Sequence[Tensor]:
        """The tensors of the full model's output."""
        if self._full is None:
            return self.backbone_leaves(batch)
        leaves: Sequence[Tensor] = self._full(*self.flatten(batch))
        return leaves

    def backbone_leaves(self, batch: Batch) -> Sequence[Tensor]:
        """The tensors of the output of the backbone itself, wherever the stages run."""
        return self._template.rows_of(self.backbone(*batch.args, **batch.kwargs))

    def merged(self, points: Collection[str]) -> SplitModel:
        """The same backbone, cut at the input and at these of its points only: fewer, longer stages."""
        kept = [0, *(point.position for point in self.points[1:] if point.name in points)]
        ends = [*kept[1:], len(self.stages)]
        model = copy.copy(self)
        model.points = tuple(dataclasses.replace(self.points[k], position=i) for i, k in enumerate(kept))
        model._activations = [self._activations[k] for k in kept]
        model.stages = tuple(in_a_row(self.stages[k:end]) for k, end in zip(kept, ends, strict=True))
        return model

    def running_on(self, stages: Sequence[nn.Module], full: nn.Module) -> SplitModel:
        """The same cuts with other modules for the same stages, and for all of them in a row."""
        model = copy.copy(self)
        model.stages, model._full = tuple(stages), full
        return model

    def run(self, batch: Batch) -> Any:
        """The backbone's output, by running all stages in a row."""
        live = self.flatten(batch)
        for stage in self.stages:
            live = stage(*live)
        return self.unflatten(live)


class _InARow(nn.Module):
    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.training = self.stages.training = False  # its own mode only: those of the stages are the backbone's

    def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
        for stage in self.stages:
            live = stage(*live)
        return live


def in_a_row(stages: Sequence[nn.Module]) -> nn.Module:
    """Several stages as one."""
    return stages[0] if len(stages) == 1 else _InARow(stages)


@dataclass(frozen=True)
class _Output:
    """The form of the backbone's output: where its tensors go, and everything else as it is."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]  # `_Leaf.ROWS`, or a constant
    bare: bool  # one tensor, in nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> _Output:
        return self  # immutable; and copying a TreeSpec calls what torch has deprecated

    def restore(self, rows: Sequence[Tensor]) -> Any:
        if self.bare:
            return rows[0]
        values = iter(rows)
        return pytree.tree_unflatten([next(values) if leaf is _Leaf.ROWS else leaf for leaf in self.leaves], self.spec)

    def rows_of(self, output: Any) -> list[Tensor]:
        pairs = zip(self.leaves, pytree.tree_leaves(output), strict=True)
        return [value for leaf, value in pairs if leaf is _Leaf.ROWS]


def split(
    backbone: nn.Module | ExportedProgram,
    example_inputs: object,
    *,
    min_share: float = 0.02,
    points: Sequence[str] | None = None,
) -> SplitModel:
    """Cuts `backbone` where every value that crosses is a tensor of rows, and proves the result on the example.

    example_inputs: a Batch or anything a stream may yield; a few rows are enough. min_share: least share of the FLOPs
    between two split points. points: dotted names of modules behind which to cut, instead of finding them; with them,
    modules that cannot be traced inside are taken as they are.

    Raises InputError when the example does not fit the model, and SplitError, with the reason, when the model is in
    train mode, answers at random, looks at other rows of the batch, or cannot be traced.
    """
    if not 0 <= min_share < 1:
        raise InputError(f"min_share is {min_share}; expected a share of the FLOPs, at least 0 and below 1")
    _check_backbone(backbone)
    module = _as_module(backbone)
    check_mode(module)
    ladder = exported_rungs(backbone) if isinstance(backbone, ExportedProgram) else rungs(module, points)
    with torch.inference_mode(mode=False), torch.no_grad():  # tracing needs tensors that count their changes
        example = example_batch(example_inputs, module)
        devices = sorted({tensor.device.index or 0 for tensor in example.tensors if tensor.is_cuda})
        with untouched(module), torch.random.fork_rng(devices=devices):
            output = check_behaviour(module, example)
            return _climb(module, example, output, ladder, min_share, points)


def prove(split_model: SplitModel) -> None:
    """Shows on the example that the stages give the backbone's answers, also for fewer rows. Raises SplitError.

    At every split point the rows are compacted to every second one and to a single one: the next stage must give the
    same rows of what it gave for all of them. Step by step this covers leaving at any point.
    """
    backbone, example = split_model.backbone, split_model.example
    with torch.no_grad():
        expected = split_model._template.rows_of(call(backbone, example))
        live = split_model.flatten(example)
        for point, stage in zip(split_model.points, split_model.stages, strict=True):
            following = stage(*live)
            for rows in (torch.arange(0, len(example), 2), torch.tensor([len(example) - 1])):
                index = rows.to(split_model.device)
                fewer = stage(*(value.index_select(0, index) for value in live))
                problem = difference(fewer, [value.index_select(0, index) for value in following])
                if problem:
                    raise SplitError(
                        f"the stage behind `{point.name}` answers differently for {len(rows)} of {len(example)} rows: "
                        f"{problem}. The model's answers may depend on the other rows of the batch."
                    )
            live = following
        problem = difference(live, expected)
        if problem:
            raise SplitError(f"the stages in a row do not give the model's own answer: {problem}")


def fingerprint(backbone: nn.Module, operations: Sequence[str] = ()) -> str:
    """SHA-256 of the weights, the class and the sequence of traced operations, in hexadecimal."""
    digest = hashlib.sha256(f"{type(backbone).__module__}.{type(backbone).__qualname__}".encode())
    for name, value in sorted(backbone.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            if len(flat):
                digest.update(flat.view(torch.uint8).numpy().data)
    digest.update("\n".join(operations).encode())
    return digest.hexdigest()


# --- the backbone and its example ------------------------------------------------------------------------------


def _check_backbone(backbone: object) -> None:
    if not isinstance(backbone, (nn.Module, ExportedProgram)):
        raise InputError(
            f"the backbone is a {type(backbone).__name__}; expected a torch.nn.Module or a "
            "torch.export.ExportedProgram (load a .pt2 file with `torch.export.load`)"
        )


def _as_module(backbone: nn.Module | ExportedProgram) -> nn.Module:
    if not isinstance(backbone, ExportedProgram):
        return backbone
    module = backbone.module(check_guards=False)
    for part in module.modules():
        part.training = False  # its mode is written into its operations; `check_behaviour` finds active dropout there
    return module


# --- tracing ---------------------------------------------------------------------------------------------------


def _climb(
    module: nn.Module,
    example: Batch,
    output: Any,
    ladder: Sequence[Rung],
    min_share: float,
    points: Sequence[str] | None,
) -> SplitModel:
    """The first way of tracing whose result can be cut and proved."""
    failures: list[tuple[str, Exception]] = []
    for rung in ladder:
        try:
            traced = rung.trace(module, example)
            graph = Graph(traced, example.tensors, example.rows(slice(0, len(example) - 1)).tensors)
            template = _output_template(graph, output)
            cuts = [graph.input_cut(), *_choose(graph, min_share, points)]
            model = SplitModel(module, graph, cuts, rung.method, example, template)
            prove(model)
        except InputError:
            raise
        except Exception as error:  # whatever a tracer raises on a model of the user's is a reason to try the next
            failures.append((rung.method, error))
        else:
            return model
    raise _explain(module, failures) from failures[0][1]


def _choose(graph: Graph, min_share: float, points: Sequence[str] | None) -> list[Cut]:
    if points is None:
        return module_cuts(graph, min_share)
    ends = module_spans(graph)
    cuts = []
    for name in points:
        if name not in ends:
            known = ", ".join(ends) or "none"
            raise InputError(f"no module named {name!r} was run behind which to cut; known: {known}")
        try:
            cuts.append(graph.cut_behind(ends[name].last, name))
        except Uncuttable as error:
            raise Uncuttable(f"cannot cut behind `{name}`: {error}") from error
    return sorted(cuts, key=lambda cut: cut.order)


def _output_template(graph: Graph, output: Any) -> _Output:
    """Where the graph's output values go in the backbone's own output type."""
    leaves, spec = pytree.tree_flatten(output)
    if len(leaves) != len(graph.output_leaves):
        raise Uncuttable(f"the traced graph returns {len(graph.output_leaves)} values, the model {len(leaves)}")
    template: list[Any] = []
    for leaf, value in zip(graph.output_leaves, leaves, strict=True):
        fact = graph.facts[leaf] if isinstance(leaf, fx.Node) else None
        if fact is None or (isinstance(value, Tensor) and not fact.data and not fact.rows):
            template.append(value)  # a constant
        elif fact.rows:
            template.append(_Leaf.ROWS)
        else:
            raise Uncuttable(f"an output of the model is not one answer per row: it is {value!r:.80}")
    return _Output(spec, tuple(template), bare=isinstance(output, Tensor) and template == [_Leaf.ROWS])


# --- explaining ------------------------------------------------------------------------------------------------


def _explain(module: nn.Module, failures: Sequence[tuple[str, Exception]]) -> SplitError:
    """One error for all ways that failed: it names the user's own line, and what can be done."""
    first = failures[0][1]
    if isinstance(first, (SplitError, Uncuttable)):
        return SplitError(f"{type(module).__name__} cannot be split: {first}")
    place = next(filter(None, (user_line(error) for _, error in failures)), "")
    tried = "; ".join(f"{method}: {type(error).__name__}: {first_line(error)}" for method, error in failures)
    return SplitError(
        f"{type(module).__name__} cannot be traced, so it cannot be split{place}. Replace what depends on the values "
        "of the inputs (if, while, .item(), int(), numpy) by tensor operations, or pass `points=[...]`, names of "
        f"modules that are called one after the other. Tried {tried}"
    )


# --- small things ----------------------------------------------------------------------------------------------


def _point(graph: Graph, cut: Cut, position: int, activation: int) -> SplitPoint:
    facts = [graph.facts[node] for node in cut.live]
    read = facts[activation]
    assert read.dtype is not None  # every live value is a tensor: `cut_behind` checked it
    return SplitPoint(
        cut.name,
        position,
        read.shape,
        read.dtype,
        tuple(f.shape for f in facts),
        sum(f.row_bytes for f in facts),
        cut.depth,
    )


def _input_activation(graph: Graph, cut: Cut) -> int:
    """The input that a cache at the very beginning reads: the first image-like one, or else the first."""
    facts = [graph.facts[node] for node in cut.live]
    images = (i for i, f in enumerate(facts) if f.dtype is not None and f.dtype.is_floating_point and len(f.shape) > 1)
    return next(images, 0)
