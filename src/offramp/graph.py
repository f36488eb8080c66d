"""What `split` needs to know about a traced graph: what each node gives, what is live after it, how to cut it.

Three kinds of nodes matter. A *data* node depends on the inputs: it must cross a cut when it is used behind it. A
*free* node depends on parameters, constants and the batch size only: it is computed again in every stage that uses
it. A *size* node reads a shape: it is derived again from a live tensor of its own stage, because an earlier stage may
have worked on more rows.

Shapes are found by running the graph at two batch sizes, so that one way serves every tracer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Argument, Node
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# Recomputing a chain of more operations than this costs more than carrying its result, row by row, across the cut.
LONGEST_RECOMPUTED_CHAIN = 8
# Within a block of less than this share of the FLOPs, its end is near enough to be preferred.
SMALL_BLOCK = 0.1

_ASSERTIONS = ("_assert", "sym_constrain_range", "_guards_fn")
_SIZE_FUNCTIONS = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)
_SIZE_METHODS = ("size", "dim", "numel", "ndimension")
_SIZE_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda")


class Uncuttable(Exception):
    """The graph cannot be cut as asked; the message says why. `split` turns it into an error of offramp."""


@dataclass(frozen=True)
class _Rows:
    """An integer that is `times` the number of rows of the batch."""

    times: int


@dataclass
class Fact:
    """What one node gave. `shape` is without the batch dimension where `rows` is true.

    rows: one tensor whose first dimension, and no other, is the batch. same_rows: all its rows are equal.
    root: the earliest node whose memory it shares. writes: the nodes whose memory it changes.
    size: what a size node reads, with `_Rows` for the batch; None for every other node.
    """

    order: int
    rows: bool
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    flops: float
    root: Node
    writes: tuple[Node, ...]
    same_rows: bool
    size: Any = None
    data: bool = False
    crosses: bool = False

    @property
    def row_bytes(self) -> int:
        return 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Cut:
    """A cut behind `node`; `live` are the nodes whose values cross it.

    depth: share of the FLOPs before it. paths: the modules that end here. block: one of them has modules of its own.
    """

    name: str
    node: Node
    order: int
    live: tuple[Node, ...]
    depth: float
    paths: tuple[str, ...] = ()
    block: bool = False


def _sdpa_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _rnn_flops(inputs: Any, weight: Any, recurrent: Any, *_: Any, **__: Any) -> int:
    return int(2 * inputs[0] * inputs[1] * (math.prod(weight) + math.prod(recurrent)))


# torch has no formulas for these and would count attention and LSTMs on a CPU as free. They are given shapes.
FLOP_FORMULAS = {
    torch.ops.aten.mkldnn_rnn_layer: _rnn_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
    torch.ops.aten.scaled_dot_product_attention: _sdpa_flops,
}


class _Observer(fx.Interpreter):
    """Runs the graph and notes, node by node, shape, FLOPs, shared and changed memory."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
        self.values: dict[Node, Any] = {}  # shapes of tensors, values of everything else
        self.facts: dict[Node, Fact] = {}

    def run_node(self, node: Node) -> Any:
        inputs = {argument: self.env[argument] for argument in node.all_input_nodes}
        versions = {argument: _versions(value) for argument, value in inputs.items()}
        flops_before = self.counter.get_total_flops()
        result = super().run_node(node)
        memory = _memory(result)
        shared = (argument for argument, value in inputs.items() if memory & _memory(value))
        root = next((self.facts[argument].root for argument in shared), node)
        writes = tuple(a for a, before in versions.items() if _versions(inputs[a]) != before)
        tensor = result if isinstance(result, Tensor) else None
        self.values[node] = pytree.tree_map(lambda leaf: leaf.shape if isinstance(leaf, Tensor) else leaf, result)
        self.facts[node] = Fact(
            order=len(self.facts),
            rows=False,
            shape=() if tensor is None else tuple(tensor.shape),
            dtype=None if tensor is None else tensor.dtype,
            flops=float(self.counter.get_total_flops() - flops_before),
            root=root,
            writes=writes,
            same_rows=tensor is not None and tensor.ndim > 0 and bool((tensor == tensor[:1]).all()),
        )
        return result

    def observe(self, inputs: Sequence[Tensor]) -> Any:
        with torch.no_grad(), self.counter:
            return self.run(*inputs, enable_io_processing=False)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place. Tensors made in inference mode do not know."""
    return 0 if tensor.is_inference() else tensor._version


def _versions(value: Any) -> list[int]:
    return [version(tensor) for tensor in _tensors(value)]


def _memory(value: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(value)} - {0}


def node_flops(module: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[Node, float]:
    """FLOPs of each node on `inputs` (a multiply-add counts 2)."""
    observer = _Observer(module)
    observer.observe(inputs)
    return {node: fact.flops for node, fact in observer.facts.items()}


class Graph:
    """A traced backbone with everything known about its nodes.

    `module` is a graph whose placeholders take `inputs` in order; `fewer` are the same inputs with fewer rows.
    Raises Uncuttable when the graph changes its own parameters or buffers, or has outputs that are not rows.
    """

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor], fewer: Sequence[Tensor]) -> None:
        _drop_assertions(module.graph)
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        many, few = _Observer(module), _Observer(module)
        result = many.observe(inputs)
        few.observe(fewer)
        self.facts = many.facts
        for node, fact in self.facts.items():
            _compare(node, fact, many.values[node], few.values[node], len(inputs[0]), len(fewer[0]))
        self.after_write = self._writes_seen()
        self._mark_data()
        self._mark_crossing()
        self.output_leaves: list[Argument] = pytree.tree_leaves(
            self.nodes[-1].args[0], is_leaf=lambda leaf: leaf is None or isinstance(leaf, Node)
        )
        self.output_values = pytree.tree_leaves(result)
        # A model without counted operations is measured by the number of its nodes.
        self._counted = any(fact.flops for fact in self.facts.values())
        self._worked: set[Node] = set()
        for node in self.nodes:
            # Looking an embedding up counts no FLOPs, and yet its result is the activation of what follows.
            begins = self.work(node) or "embedding" in node.name
            if begins or not self._worked.isdisjoint(node.all_input_nodes):
                self._worked.add(node)
        done = list(itertools.accumulate((self.work(node) for node in self.nodes), initial=0.0))
        self._share = [flops / done[-1] for flops in done]

    def work(self, node: Node) -> float:
        """What a node counts in shares of the backbone."""
        fact = self.facts[node]
        if not fact.data or node.op in ("placeholder", "output"):
            return 0.0
        return fact.flops if self._counted else 1.0

    def _writes_seen(self) -> dict[Node, list[Node]]:
        """For each node, the last earlier nodes that changed memory it reads: it depends on them unseen."""
        last: dict[Node, Node] = {}
        seen: dict[Node, list[Node]] = {}
        for node in self.nodes:
            roots = [self.facts[argument].root for argument in node.all_input_nodes]
            seen[node] = [last[root] for root in roots if root in last]
            for written in self.facts[node].writes:
                root = self.facts[written].root
                if root.op == "get_attr":
                    raise Uncuttable(f"the model changes its own parameter or buffer `{root.target}` when it is called")
                last[root] = node
        return seen

    def _mark_data(self) -> None:
        """Everything that depends on the inputs, also by memory that was changed."""
        tainted: set[Node] = set()
        while True:
            before = len(tainted)
            for node in self.nodes:
                fact = self.facts[node]
                fact.data = node.op == "placeholder" or fact.root in tainted
                fact.data |= any(self.facts[argument].data for argument in node.all_input_nodes)
                fact.data &= fact.size is None
                if fact.data:
                    tainted.update(self.facts[written].root for written in fact.writes)
            if len(tainted) == before:
                return

    def _mark_crossing(self) -> None:
        """Data nodes cross a cut; so do free nodes that are long to compute and safe to compact."""
        for node in self.nodes:
            fact = self.facts[node]
            feeds_data = any(self.facts[user].data for user in node.users)
            long = not fact.data and fact.rows and fact.same_rows and feeds_data and self._is_long(node)
            fact.crosses = fact.data or long

    def _is_long(self, node: Node) -> bool:
        computed = [n for n in self._needed([node], -1)[0] if n.op not in ("get_attr", "placeholder")]
        return len(computed) > LONGEST_RECOMPUTED_CHAIN

    def _needed(self, roots: Iterable[Node], order: int) -> tuple[list[Node], list[Node]]:
        """Nodes to compute for `roots` in a stage that starts behind `order`, and the live values it needs."""
        needed: set[Node] = set()
        live: set[Node] = set()
        waiting = list(roots)
        while waiting:
            node = waiting.pop()
            fact = self.facts[node]
            if node in needed or node in live or fact.size is not None:
                continue
            if self._done(node, order):
                live.add(node)
                continue
            needed.add(node)
            waiting.extend(node.all_input_nodes)
            waiting.extend(write for write in self.after_write[node] if not self._done(write, order))
        return self._in_order(needed), self._in_order(live)

    def _done(self, node: Node, order: int) -> bool:
        return self.facts[node].crosses and self.facts[node].order <= order

    def _in_order(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=lambda node: self.facts[node].order)

    @property
    def used(self) -> list[Node]:
        """The nodes on which the output depends, in order."""
        return self._needed(self.outputs, -1)[0]

    @property
    def outputs(self) -> list[Node]:
        """The nodes of the output that are rows, in order; an input or a value may occur more than once."""
        return [leaf for leaf in self.output_leaves if isinstance(leaf, Node) and self.facts[leaf].rows]

    def cut_behind(self, node: Node, name: str) -> Cut:
        """The cut behind a node. Raises Uncuttable when a value that crosses it is not a tensor of rows."""
        order = self.facts[node].order
        _, live = self._needed(self.outputs, order)
        for value in live:
            if not self.facts[value].rows:
                shape = self.facts[value].shape
                raise Uncuttable(
                    f"the value `{value.name}` of shape {shape} is needed behind it, and its rows are not the "
                    f"batch's{where(value)}"
                )
        if node not in live and node.op != "placeholder":
            raise Uncuttable("its result is not used behind it")
        self._check_shared(live, order)
        return Cut(name, node, order, tuple(live), self._share[order + 1])

    def live_before(self, node: Node) -> list[Node]:
        """The values that are needed from before a node."""
        return self._needed(self.outputs, self.facts[node].order - 1)[1]

    def worked(self, live: Sequence[Node]) -> int:
        """How many of the values are results of counted work. Masks and positions are not: they are small beside."""
        return sum(node in self._worked for node in live)

    def share_before(self, node: Node) -> float:
        """Share of the FLOPs before a node."""
        return self._share[self.facts[node].order]

    def _check_shared(self, live: Sequence[Node], order: int) -> None:
        """Two live values that share memory which is changed later cannot be compacted apart."""
        changed = self._roots_written(order, len(self.nodes))
        roots = [self.facts[value].root for value in live]
        if any(root in changed and roots.count(root) > 1 for root in roots):
            raise Uncuttable("two values that are needed behind it share memory that is changed in place later")

    def _roots_written(self, start: int, stop: int) -> set[Node]:
        nodes = self.nodes[start + 1 : stop]
        return {self.facts[written].root for node in nodes for written in self.facts[node].writes}

    def input_cut(self) -> Cut:
        return self.cut_behind(self.placeholders[-1], "input")

    def stage(self, cut: Cut, results: Sequence[Node], stop: int) -> fx.GraphModule:
        """The part of the graph behind `cut` that computes `results`, up to node number `stop`.

        It takes the live values of the cut and returns a tuple; parameters are shared with the backbone.
        """
        roots = {self.facts[node].root for node in results}
        between = self.nodes[cut.order + 1 : stop + 1]
        writes = [node for node in between if any(self.facts[w].root in roots for w in self.facts[node].writes)]
        needed, _ = self._needed([*results, *writes], cut.order)
        graph = fx.Graph()
        env: dict[Node, Argument] = {}
        inputs = [graph.placeholder(node.name) for node in cut.live]
        changed = self._roots_written(cut.order, stop + 1)
        for node, value in zip(cut.live, inputs, strict=True):
            shared = self.facts[node].root in changed
            # In-place work on a live value would change what the caller, or a cache, still holds.
            env[node] = graph.call_function(torch.ops.aten.clone.default, (value,)) if shared else value
        batch: list[Node] = []

        def rows(times: int) -> Argument:
            if not batch:
                batch.append(graph.call_function(torch.ops.aten.sym_size.int, (inputs[0], 0)))
            return batch[0] if times == 1 else graph.call_function(operator.mul, (batch[0], times))

        def transform(node: Node) -> Argument:
            size = self.facts[node].size
            return env[node] if size is None else _size_argument(size, rows)

        for node in needed:
            if node not in env:
                env[node] = _copy(graph, node, transform)
        graph.output(tuple(transform(node) for node in results))
        stage = fx.GraphModule(self.module, graph)
        stage.training = False
        return stage


def _copy(graph: fx.Graph, node: Node, transform: Any) -> Node:
    copied = graph.node_copy(node, transform)
    copied.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    if copied.target is torch.ops.aten.view.default:
        # The tracer may have turned a reshape into a view because its example was contiguous; later inputs may not be.
        copied.target = torch.ops.aten.reshape.default
    return copied


def _size_argument(size: Any, rows: Any) -> Any:
    if isinstance(size, _Rows):
        return rows(size.times)
    if isinstance(size, tuple):
        return tuple(_size_argument(part, rows) for part in size)
    return size


def _drop_assertions(graph: fx.Graph) -> None:
    """Checks written by the tracer: they hold for the example, and `flatten` checks what users pass."""
    for node in reversed(list(graph.nodes)):
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        dropped = node.op in ("call_function", "call_module") and target.removeprefix("aten.").startswith(_ASSERTIONS)
        if dropped and not node.users:
            graph.erase_node(node)


def _compare(node: Node, fact: Fact, many: Any, few: Any, rows_many: int, rows_few: int) -> None:
    """Completes a fact from what the node gave for two numbers of rows."""
    if fact.dtype is not None:
        fact.rows = len(many) > 0 and (many[0], few[0]) == (rows_many, rows_few) and many[1:] == few[1:]
        fact.shape = tuple(many[1:]) if fact.rows else tuple(many)
    elif _reads_size(node):
        fact.size = _size(many, few, rows_many, rows_few)


def _reads_size(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op != "call_function":
        return False
    return node.target in _SIZE_FUNCTIONS or (node.target is getattr and node.args[1] in _SIZE_ATTRIBUTES)


def _size(many: Any, few: Any, rows_many: int, rows_few: int) -> Any:
    """What a size node reads, with `_Rows` for multiples of the batch; None when it is neither fixed nor that."""
    if isinstance(many, tuple):
        parts = tuple(_size(a, b, rows_many, rows_few) for a, b in zip(many, few, strict=True))
        return None if None in parts else parts
    if many == few:
        return many
    if isinstance(many, int) and many % rows_many == 0 and few == many // rows_many * rows_few:
        return _Rows(many // rows_many)
    return None


def where(node: Node) -> str:
    """The user's own source line of a node, as the end of a message."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    places = [index for index, line in enumerate(lines) if line.startswith("File ")]
    return f" ({' '.join(lines[places[-1] :][:2])})" if places else ""


@dataclass
class Span:
    """The first and the last node of a module that depend on the inputs."""

    first: Node
    last: Node


def module_spans(graph: Graph) -> dict[str, Span]:
    """Where every module begins and ends in the graph, by its dotted path."""
    spans: dict[str, Span] = {}
    for node in graph.used:
        if graph.facts[node].data and node.op != "placeholder":
            for path in module_paths(node):
                span = spans.setdefault(path, Span(node, node))
                span.last = node
    return spans


def module_paths(node: Node) -> list[str]:
    """Dotted paths of the modules that a node belongs to, outermost first; the root is left out."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    # A module that is called again carries its number behind an `@`.
    paths = [str(entry[0] if isinstance(entry, tuple) else entry).split("@")[0] for entry in stack]
    return [path for path in dict.fromkeys(paths) if path]


def friendly_name(paths: Sequence[str], blocks: Collection[str], lists: Collection[str]) -> str:
    """The name a person knows among the modules that end at one node: `encoder.layer.2`, not `encoder`.

    blocks: the modules that have modules of their own. lists: those of which several parts are split points.
    """
    ordered = sorted(paths, key=lambda path: path.count("."))
    name = ordered[0]
    for path in ordered[1:]:
        parent = path.rpartition(".")[0]
        numbered = path.rpartition(".")[2].isdigit()
        # `encoder.layer` in `encoder.layer.2` is a list of modules: it is never called itself.
        inside = parent == name or (parent.rpartition(".")[0] == name and parent not in paths)
        if numbered and inside and (path in blocks or parent in lists):
            name = path
    return name


def module_cuts(graph: Graph, min_share: float) -> list[Cut]:
    """The split points found automatically, in order, by the names of the modules that end there."""
    spans = module_spans(graph)
    blocks = {path.rpartition(".")[0] for path in spans}
    return _spaced(_candidates(graph, spans, blocks), min_share, blocks)


def _candidates(graph: Graph, spans: Mapping[str, Span], blocks: Collection[str]) -> list[Cut]:
    """Every legal cut at the end of a module, in order, less those inside a block that its own ends serve better."""
    by_node: dict[Node, list[str]] = {}
    for path, span in spans.items():
        by_node.setdefault(span.last, []).append(path)
    cuts: dict[Node, Cut] = {}
    for node, paths in by_node.items():
        fact = graph.facts[node]
        if fact.rows and fact.dtype is not None and fact.dtype.is_floating_point:
            try:
                cut = graph.cut_behind(node, paths[0])
            except Uncuttable:
                continue  # not a place to cut: there are others
            cuts[node] = dataclasses.replace(cut, paths=tuple(paths), block=any(path in blocks for path in paths))
    around = [_Block(graph, span, cuts[span.last]) for span in spans.values() if span.last in cuts]
    kept = [cut for cut in cuts.values() if not any(block.serves(graph, cut) for block in around)]
    return sorted(kept, key=lambda cut: cut.order)


class _Block:
    """A module at whose end one can cut."""

    def __init__(self, graph: Graph, span: Span, end: Cut) -> None:
        self.first = graph.facts[span.first].order
        self.end = end
        self.share = end.depth - graph.share_before(span.first)
        self.row_bytes = graph.facts[end.node].row_bytes
        self.worked = max(graph.worked(graph.live_before(span.first)), graph.worked(end.live))

    def serves(self, graph: Graph, cut: Cut) -> bool:
        """Whether its ends are better than a cut inside it: fewer live values, or less to compact and near enough."""
        if not self.first <= cut.order < self.end.order:
            return False
        if graph.worked(cut.live) > self.worked:
            return True
        return self.share < SMALL_BLOCK and graph.facts[cut.node].row_bytes > self.row_bytes


def _spaced(cuts: Sequence[Cut], min_share: float, blocks: Collection[str]) -> list[Cut]:
    """The cuts that have at least `min_share` of the FLOPs before, between and behind them, with their names.

    Of cuts with nothing to compute between them the last one stays that ends a block, or else the last one: it is
    behind the activation and the pooling.
    """
    best: dict[float, Cut] = {}
    for cut in cuts:
        if cut.depth not in best or cut.block or not best[cut.depth].block:
            best[cut.depth] = cut
    # The ends of outer modules come first, from the last to the first; inner ones fill the gaps.
    by_rank = sorted(best.values(), key=lambda cut: (min(path.count(".") for path in cut.paths), -cut.order))
    kept: list[Cut] = []
    for cut in by_rank:
        if all(abs(cut.depth - other) >= min_share for other in (0.0, 1.0, *(k.depth for k in kept))):
            kept.append(cut)
    kept.sort(key=lambda cut: cut.order)
    parents = [parent for cut in kept for parent in {path.rpartition(".")[0] for path in cut.paths}]
    lists = {parent for parent in parents if parents.count(parent) > 1}
    names = [friendly_name(cut.paths, blocks, lists) for cut in kept]
    return [
        dataclasses.replace(cut, name=name if names.count(name) == 1 else f"{name}@{names[:index].count(name)}")
        for index, (cut, name) in enumerate(zip(kept, names, strict=True))
    ]
