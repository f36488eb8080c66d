"""What every part of a split backbone costs on this machine: FLOPs, bytes, and measured time per batch size.

Machines are noisy and drift, so nothing is measured on its own: a round runs the stages one after the other,
each on the activation that the stage before it has just produced, then the whole backbone; many rounds are
run and each part's median is kept. Whatever slows the machine for a while slows all parts alike, and only
ratios are used later. Between two calls the device is waited for, so a time is what a caller would wait.

FLOPs are those of matrix products, convolutions, attention and recurrent layers, a multiply-add counting 2.
Element-wise work, pooling, normalisation and softmax are not counted: they are small in FLOPs and show in the
measured time.

Shape suffixes: B rows of a batch, C classes, K caches in the order of the table.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from offramp.errors import InputError
from offramp.types import CostTable, FloatArray, PartCost, RoutingCost, Timing
from offramp.unfused import unfused_transformer_layers

if TYPE_CHECKING:
    from offramp.splitting import SplitModel
    from offramp.streams import Batch

T = TypeVar("T")
Progress = Callable[[str], None]

WARM_UP_ROUNDS = 2
LEAST_ROUNDS = 3
MOST_ROUNDS = 50
PAUSE_S = 0.02  # torch's threads stay awake for some 10 ms after a parallel region, those of other runtimes not as long
TURN_CALLS, TURN_MS = 8, 5.0  # timed calls of one turn of a race, and when no other one is begun
ROUTING_ROWS = 8
ROUTING_REPEATS = 30
ROUTING_BUDGET_S = 0.1  # per measured call


@dataclass(frozen=True)
class CompactionRule:
    """When dropping the finished rows of a batch pays at one split point.

    saving_row_ms: what one row fewer saves in all later stages. fixed_ms and row_ms: what compaction costs,
    at all and per kept row.
    """

    saving_row_ms: float
    fixed_ms: float
    row_ms: float

    def pays(self, rows: int, misses: int) -> bool:
        """Whether to go on with only the `misses` of `rows` rows. Nothing to drop, or nothing left: no."""
        dropped = rows - misses
        if dropped <= 0 or misses <= 0:
            return False
        return dropped * self.saving_row_ms > self.fixed_ms + misses * self.row_ms


# --- one call -------------------------------------------------------------------------------------


def count_flops(call: Callable[[], object]) -> float:
    """FLOPs of one call: matrix products, convolutions and attention, a multiply-add counting 2.

    >>> count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
    60.0
    """
    return _counted(call)[0]


def time_call(
    call: Callable[[], object],
    *,
    repeats: int = MOST_ROUNDS,
    budget_s: float = 1.0,
    synchronize: Callable[[], None] | None = None,
) -> Timing:
    """Wall-clock time of one call in milliseconds, after a warm-up, under inference mode.

    Stops after `repeats` calls or, once there are at least three, after `budget_s` seconds. `synchronize`
    waits for the device (see `synchronizer`); None where calls return only when they are done.
    """
    wait = synchronize or _no_wait
    with torch.inference_mode():
        return _alternate(lambda: (_timed(call, wait)[0],), repeats=repeats, budget_s=budget_s)[0]


def race(
    calls: Sequence[Callable[[], object]], *, budget_s: float, synchronize: Callable[[], None]
) -> tuple[Timing, ...]:
    """Wall-clock times of several calls that are made in turn, so that a busy machine is as slow for all of them.

    Each has the machine to itself: a pause lets the threads of the runtime before it go to sleep, and the first call of
    its turn, which finds the memory caches full of other data, is not timed.
    """

    def turn() -> list[float]:
        return [_turn_ms(call, synchronize) for call in calls]

    with torch.inference_mode():
        return _alternate(turn, budget_s=budget_s, warm_up=1)


def _turn_ms(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    """Median of a few calls in a row; of slow ones a single one."""
    time.sleep(PAUSE_S)
    call()
    times_ms: list[float] = []
    while not times_ms or (len(times_ms) < TURN_CALLS and sum(times_ms) < TURN_MS):
        times_ms.append(_timed(call, synchronize)[0])
    return float(np.median(times_ms))


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that returns when all work queued on `device` is done; on the CPU it does nothing."""
    if device.type == "cpu":
        return _no_wait
    return lambda: torch.accelerator.synchronize(device)


def checked_sizes(batch_sizes: Iterable[int]) -> list[int]:
    """These batch sizes, rising and each once. Raises InputError for what is none."""
    sizes = list(batch_sizes) if isinstance(batch_sizes, Iterable) else []
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise InputError(f"batch sizes must be whole numbers from 1, at least one of them; received {batch_sizes!r}")
    return sorted(set(sizes))


# --- the tables -----------------------------------------------------------------------------------


def measure(
    split: SplitModel,
    *,
    batch_sizes: Iterable[int] = (1, 8, 32),
    budget_s: float = 20.0,
    progress: Progress | None = None,
) -> CostTable:
    """Cost of each stage, of the backbone and of the routing at each split point; `caches` is left empty.

    The inputs are the rows of `split.example`, repeated up to each batch size. `budget_s` (seconds) is kept
    roughly: every part is called at least a few times, whatever it takes.
    """
    sizes = checked_sizes(batch_sizes)
    with torch.inference_mode(), _evaluating(split.backbone, *split.stages):
        flops = _flops_per_row(split)
        times: dict[int, tuple[Timing, ...]] = {}
        for size in sizes:
            _tell(progress, f"measuring the stages at batch size {size}")
            times[size] = _alternate(_stage_round(split, size), budget_s=budget_s / len(sizes))
        _tell(progress, "measuring lookup and compaction")
        routing = _measure_routing(split, rows=max(ROUTING_ROWS, *sizes))
    names = [*(point.name for point in split.points), "backbone"]
    modules: list[nn.Module] = [*split.stages, split.backbone]
    parts = [
        _part(name, module, flops[index], {size: times[size][index] for size in sizes})
        for index, (name, module) in enumerate(zip(names, modules, strict=True))
    ]
    threads = torch.get_num_threads()
    return CostTable(str(split.device), threads, parts[-1], tuple(parts[:-1]), routing)


def measure_caches(
    table: CostTable,
    split: SplitModel,
    caches: Iterable[nn.Module],
    *,
    budget_s: float = 10.0,
    progress: Progress | None = None,
) -> CostTable:
    """The table with the cost of these caches, in the given order; caches it had before are dropped.

    A cache's cost is its forward and its confidence, on the activation at its split point; one that reads
    another cache's logits gets the backbone's, which have the same shape. The stages run in every round and
    are timed too: when the machine is faster or slower now than it was for the table, the caches' times are
    scaled back to the table's.
    """
    chosen = list(caches)
    names = [point.name for point in split.points]
    positions = tuple(_position(cache, names) for cache in chosen)
    if not chosen:
        return dataclasses.replace(table, caches=(), cache_points=())
    lookups = list(zip(chosen, positions, strict=True))
    sizes = sorted(table.backbone.time_ms)
    times: dict[int, list[Timing]] = {}
    with torch.inference_mode(), _evaluating(split.backbone, *split.stages, *chosen):
        flops = _cache_flops_per_row(split, lookups)
        for size in sizes:
            _tell(progress, f"measuring {len(chosen)} caches at batch size {size}")
            measured = _alternate(_cache_round(split, lookups, size), budget_s=budget_s / len(sizes))
            drift = sum(timing.median_ms for timing in measured[len(chosen) :]) / table.stages_ms(size)
            times[size] = [_scaled(timing, 1 / drift) for timing in measured[: len(chosen)]]
    parts = tuple(
        _part(str(cache.name), cache, flops[index], {size: times[size][index] for size in sizes})
        for index, cache in enumerate(chosen)
    )
    return dataclasses.replace(table, caches=parts, cache_points=positions)


# --- what the rest of the package asks the table --------------------------------------------------


def shares(
    table: CostTable, batch_sizes: Iterable[int] | None = None, *, weight_flops: float = 0.0
) -> tuple[FloatArray, FloatArray]:
    """(before_K, cache_K): the stages before each cache, and each lookup, in units of the backbone's cost.

    The unit is measured time: at each batch size, over the time of all stages; then the mean over
    `batch_sizes` (default: all that were measured). A lookup is the cache, its confidence and the wait for
    the decision. `weight_flops` in [0, 1] mixes in the same shares in FLOPs.
    """
    if not 0 <= weight_flops <= 1:
        raise InputError(f"weight_flops is a share between 0 and 1; received {weight_flops}")
    sizes = sorted(table.backbone.time_ms) if batch_sizes is None else checked_sizes(batch_sizes)
    missing = [size for size in sizes if size not in table.backbone.time_ms]
    if missing:
        raise InputError(f"batch sizes {missing} were not measured; the table has {sorted(table.backbone.time_ms)}")
    before_K, cache_K = np.mean([_time_shares(table, size) for size in sizes], axis=0)
    if weight_flops:
        before_flops_K, cache_flops_K = flop_shares(table)
        before_K = (1 - weight_flops) * before_K + weight_flops * before_flops_K
        cache_K = (1 - weight_flops) * cache_K + weight_flops * cache_flops_K
    return before_K, cache_K


def flop_shares(table: CostTable) -> tuple[FloatArray, FloatArray]:
    """(before_K, cache_K) as in `shares`, counted in FLOPs; the wait for a decision has none."""
    flops = np.array([stage.flops for stage in table.stages])
    if flops.sum() <= 0:
        raise InputError("the backbone has no countable FLOPs (element-wise work is not counted): use measured time")
    before_K = np.array([flops[:position].sum() for position in table.cache_points])
    cache_K = np.array([cache.flops for cache in table.caches])
    return before_K / flops.sum(), cache_K / flops.sum()


def compaction_rule(table: CostTable) -> tuple[CompactionRule, ...]:
    """One rule per split point. A table with one batch size cannot tell what a row saves: none pays."""
    sizes = sorted(table.backbone.time_ms)
    rules = []
    for position, routing in enumerate(table.routing):
        later_ms = [table.stages_ms(size, position) for size in sizes]
        saving_row_ms = _line(sizes, later_ms)[1]
        rules.append(CompactionRule(saving_row_ms, routing.compaction_ms, routing.compaction_row_ms))
    return tuple(rules)


def cost_to_json(table: CostTable) -> dict[str, Any]:
    """The table as plain dicts, lists, strings and numbers; `cost_from_json` reads it back unchanged."""
    document = dataclasses.asdict(table)
    for part in (document["backbone"], *document["stages"], *document["caches"]):
        part["time_ms"] = {str(size): timing for size, timing in part["time_ms"].items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in document.items()}


def cost_from_json(document: Mapping[str, Any]) -> CostTable:
    """The table that `cost_to_json` wrote."""
    return CostTable(
        device=document["device"],
        threads=document["threads"],
        backbone=_part_from_json(document["backbone"]),
        stages=tuple(_part_from_json(part) for part in document["stages"]),
        routing=tuple(RoutingCost(**routing) for routing in document["routing"]),
        caches=tuple(_part_from_json(part) for part in document["caches"]),
        cache_points=tuple(document["cache_points"]),
    )


# --- rounds: one pass over all parts, giving the milliseconds of each -----------------------------


def _stage_round(split: SplitModel, size: int) -> Callable[[], tuple[float, ...]]:
    """A round over the stages in order, then the backbone."""
    batch = _repeated(split.example, size)
    wait = synchronizer(split.device)

    def run() -> tuple[float, ...]:
        times_ms = []
        live = split.flatten(batch)
        for stage in split.stages:
            stage_ms, live = _timed(partial(stage, *live), wait)
            times_ms.append(stage_ms)
        full_ms, _ = _timed(lambda: split.full(*batch.args, **batch.kwargs), wait)
        return (*times_ms, full_ms)

    return run


def _cache_round(
    split: SplitModel, lookups: Sequence[tuple[nn.Module, int]], size: int
) -> Callable[[], tuple[float, ...]]:
    """A round over the stages, each cache right where it sits; gives the caches' times, then the stages'."""
    batch = _repeated(split.example, size)
    wait = synchronizer(split.device)
    read_BC = _last_leaf(split, batch)

    def run() -> tuple[float, ...]:
        caches_ms, stages_ms = [0.0] * len(lookups), []
        live = split.flatten(batch)
        for position, stage in enumerate(split.stages):
            for index, (cache, at) in enumerate(lookups):
                if at == position:
                    activation = split.activation(position, live)
                    caches_ms[index], _ = _timed(_lookup(cache, activation, read_BC), wait)
            stage_ms, live = _timed(partial(stage, *live), wait)
            stages_ms.append(stage_ms)
        return (*caches_ms, *stages_ms)

    return run


def _alternate(
    run: Callable[[], Sequence[float]], *, repeats: int = MOST_ROUNDS, budget_s: float, warm_up: int = WARM_UP_ROUNDS
) -> tuple[Timing, ...]:
    """Median and percentiles per part over up to `repeats` rounds; the warm-up counts against the budget."""
    deadline = time.perf_counter() + budget_s
    for _ in range(warm_up):
        run()
    rounds: list[Sequence[float]] = []
    while len(rounds) < repeats and (len(rounds) < LEAST_ROUNDS or time.perf_counter() < deadline):
        rounds.append(run())
    low, middle, high = np.percentile(np.array(rounds), (10, 50, 90), axis=0)
    return tuple(Timing(float(m), float(a), float(b)) for m, a, b in zip(middle, low, high, strict=True))


def _timed(call: Callable[[], T], wait: Callable[[], None]) -> tuple[float, T]:
    wait()  # what was queued before must not be charged to this call
    start = time.perf_counter()
    result = call()
    wait()  # the call is over when the device is done, not when it has been told
    return (time.perf_counter() - start) * 1e3, result


def _no_wait() -> None:
    return None


# --- routing --------------------------------------------------------------------------------------


def _measure_routing(split: SplitModel, rows: int) -> tuple[RoutingCost, ...]:
    """Lookup and compaction at every split point; the row counts of the fit go up to `rows`."""
    batch = _repeated(split.example, rows)
    wait = synchronizer(split.device)
    lookup_ms = _measure_lookup(split.device, wait)
    costs = []
    live = split.flatten(batch)
    for stage in split.stages:
        costs.append(RoutingCost(lookup_ms, *_measure_compaction(live, rows, wait)))
        live = stage(*live)
    return tuple(costs)


def _measure_lookup(device: torch.device, wait: Callable[[], None]) -> float:
    """Milliseconds of waiting for the confidences of 8 rows and comparing them with a threshold."""
    confidence_B = torch.linspace(0, 1, ROUTING_ROWS, device=device)

    def look() -> object:
        return [row for row, confidence in enumerate(confidence_B.tolist()) if confidence >= 0.5]

    return time_call(look, repeats=ROUTING_REPEATS, budget_s=ROUTING_BUDGET_S, synchronize=wait).median_ms


def _measure_compaction(live: tuple[Tensor, ...], rows: int, wait: Callable[[], None]) -> tuple[float, float]:
    """(fixed ms, ms per kept row) of keeping some rows of all live values."""
    kept_counts = sorted({1, rows // 4, rows // 2, 3 * rows // 4})

    def keep(kept: Sequence[int]) -> object:
        index = torch.tensor(kept).to(live[0].device, non_blocking=True)
        return [value.index_select(0, index) for value in live]

    def run() -> list[float]:
        return [_timed(partial(keep, kept), wait)[0] for kept in spread]

    # Evenly over the batch.
    spread = [[row for row in range(rows) if row * count % rows < count] for count in kept_counts]
    timings = _alternate(run, repeats=ROUTING_REPEATS, budget_s=ROUTING_BUDGET_S * len(spread))
    return _line(kept_counts, [timing.median_ms for timing in timings])


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(intercept, slope) of the least-squares line, neither of them below 0; a single point gives slope 0."""
    x_mean, y_mean = float(np.mean(x)), float(np.mean(y))
    spread = sum((value - x_mean) ** 2 for value in x)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    slope = max(covariance / spread, 0.0) if spread else 0.0
    intercept = y_mean - slope * x_mean
    if intercept >= 0:
        return intercept, slope
    return 0.0, sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)


# --- FLOPs and bytes ------------------------------------------------------------------------------


Shape = tuple[int, ...]


def _attention_flops(query: Shape, key: Shape, value: Shape, *_args: object, **_kwargs: object) -> int:
    count: Callable[..., int] = sdpa_flop_count
    return count(query, key, value)


def _lstm_flops(sequence: Shape, from_input: Shape, from_hidden: Shape, *_args: object, **_kwargs: object) -> int:
    """One layer in one direction: every step is multiplied with both weight matrices."""
    steps = math.prod(sequence[:-1])
    return 2 * steps * (math.prod(from_input) + math.prod(from_hidden))


def _cudnn_rnn_flops(sequence: Shape, weights: Sequence[Shape], *_args: object, **_kwargs: object) -> int:
    """All layers and directions at once; weights with one dimension are biases."""
    steps = math.prod(sequence[:-1])
    return 2 * steps * sum(math.prod(weight) for weight in weights if len(weight) == 2)


# Fused kernels that torch's own table lacks.
_MORE_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: _lstm_flops,
    torch.ops.aten._cudnn_rnn: _cudnn_rnn_flops,
}


def _counted(call: Callable[[], T]) -> tuple[float, T]:
    counter = FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS)
    with unfused_transformer_layers(), counter:
        result = call()
    return float(counter.get_total_flops()), result


def _flops_per_row(split: SplitModel) -> list[float]:
    """FLOPs per row of each stage, then of the backbone."""
    batch = _repeated(split.example, len(split.example))
    flops = []
    live = split.flatten(batch)
    for stage in split.stages:
        stage_flops, live = _counted(partial(stage, *live))
        flops.append(stage_flops / len(batch))
    return [*flops, count_flops(lambda: split.backbone(*batch.args, **batch.kwargs)) / len(batch)]


def _cache_flops_per_row(split: SplitModel, lookups: Sequence[tuple[nn.Module, int]]) -> list[float]:
    batch = _repeated(split.example, len(split.example))
    read_BC = _last_leaf(split, batch)
    flops = [0.0] * len(lookups)
    live = split.flatten(batch)
    for position, stage in enumerate(split.stages):
        for index, (cache, at) in enumerate(lookups):
            if at == position:
                call = _lookup(cache, split.activation(position, live), read_BC)
                flops[index] = count_flops(call) / len(batch)
        live = stage(*live)
    return flops


def _part(name: str, module: nn.Module, flops: float, time_ms: Mapping[int, Timing]) -> PartCost:
    parameters = _distinct(module.parameters())
    tensors = _distinct([*parameters, *module.buffers()])
    return PartCost(
        name=name,
        flops=flops,
        parameters=sum(tensor.numel() for tensor in parameters),
        parameter_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        time_ms=dict(time_ms),
    )


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Without those that are the same memory under a second name (tied weights)."""
    return list({(tensor.data_ptr() or id(tensor), tensor.numel()): tensor for tensor in tensors}.values())


# --- small helpers --------------------------------------------------------------------------------


def _lookup(cache: nn.Module, activation: Tensor, read_BC: Tensor) -> Callable[[], object]:
    """One call of a cache with its confidence."""
    read = read_BC if cache.reads is not None else None
    look_up: Any = cache.look_up
    return lambda: look_up(activation, read)


def _last_leaf(split: SplitModel, batch: Batch) -> Tensor:
    """The backbone's first output tensor for the batch: its logits."""
    live = split.flatten(batch)
    for stage in split.stages:
        live = stage(*live)
    return live[0]


def _repeated(batch: Batch, size: int) -> Batch:
    """A batch of `size` rows, repeating those given; a copy, as a backbone may write into its input."""
    return batch.rows(torch.arange(size, device=batch.tensors[0].device) % len(batch))


def _time_shares(table: CostTable, size: int) -> tuple[FloatArray, FloatArray]:
    stage_ms = np.array([stage.time_ms[size].median_ms for stage in table.stages])
    lookup_ms = [table.routing[position].lookup_ms for position in table.cache_points]
    cache_ms = [cache.time_ms[size].median_ms for cache in table.caches]
    before_K = np.array([stage_ms[:position].sum() for position in table.cache_points])
    return before_K / stage_ms.sum(), (np.array(cache_ms) + np.array(lookup_ms)) / stage_ms.sum()


def _scaled(timing: Timing, factor: float) -> Timing:
    return Timing(timing.median_ms * factor, timing.p10_ms * factor, timing.p90_ms * factor)


def _position(cache: nn.Module, names: Sequence[str]) -> int:
    if cache.point not in names:
        raise InputError(f"cache {cache.name!r} sits at {cache.point!r}; this backbone has the points {list(names)}")
    return names.index(str(cache.point))


def _tell(progress: Progress | None, text: str) -> None:
    if progress is not None:
        progress(text)


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is in the mode that it was in."""
    modes = [(module, module.training) for root in modules for module in root.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _part_from_json(document: Mapping[str, Any]) -> PartCost:
    times = {int(size): Timing(**timing) for size, timing in document["time_ms"].items()}
    return PartCost(**{**document, "time_ms": times})
