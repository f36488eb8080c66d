"""Costs: what is counted, what is measured, and what placement and the hot loop read from it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from offramp import cost
from offramp.caches import CacheShape, LearnedCache, Reduction
from offramp.cost import (
    CompactionRule,
    compaction_rule,
    cost_from_json,
    cost_to_json,
    count_flops,
    flop_shares,
    measure,
    measure_caches,
    race,
    shares,
    synchronizer,
    time_call,
)
from offramp.errors import InputError
from offramp.splitting import split
from offramp.streams import Batch
from offramp.types import CostTable, PartCost, RoutingCost, Timing

CLASSES = 5


class Stage(nn.Module):
    """Live values in, live values out, as the stages of a split model have them."""

    def __init__(self, layer: nn.Module, log: list[str], name: str) -> None:
        super().__init__()
        self.layer, self.log, self.name = layer, log, name

    def forward(self, hidden: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        self.log.append(self.name)
        return (self.layer(hidden), *carried)


@dataclass
class FakeSplit:
    """A hand-made split of a chain of layers; `log` notes every call in order."""

    backbone: nn.Sequential
    example: Batch
    log: list[str]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        names = ["input", *(str(number) for number in range(len(self.backbone) - 1))]
        self.points = tuple(SimpleNamespace(name=name) for name in names)
        self.stages = tuple(Stage(layer, self.log, name) for name, layer in zip(names, self.backbone, strict=True))

    def flatten(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch.args

    def activation(self, position: int, live: tuple[Tensor, ...]) -> Tensor:
        return live[0]

    def full(self, x: Tensor) -> Tensor:
        answer: Tensor = self.backbone(x)
        return answer


class Cache(nn.Module):
    def __init__(self, name: str, point: str, features: int, log: list[str], reads: str | None = None) -> None:
        super().__init__()
        self.name, self.point, self.reads, self.log = name, point, reads, log
        self.head = nn.Linear(features, CLASSES)

    def forward(self, activation: Tensor, read_logits: Tensor | None) -> Tensor:
        self.log.append(self.name)
        logits: Tensor = self.head(activation)
        return logits if read_logits is None else logits + read_logits

    def confidence(self, logits: Tensor, read_logits: Tensor | None) -> Tensor:
        return logits.softmax(-1).amax(-1)

    def look_up(self, activation: Tensor, read_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self(activation, read_logits)
        return logits, self.confidence(logits, read_logits)


def make_split(*widths: int, rows: int = 3) -> Any:
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return FakeSplit(nn.Sequential(*layers), Batch((torch.randn(rows, widths[0]),)), [])


def timing(ms: float) -> Timing:
    return Timing(ms, ms, ms)


def part(name: str, flops: float, times: dict[int, float]) -> PartCost:
    return PartCost(name, flops, 10, 40, {size: timing(ms) for size, ms in times.items()})


@pytest.fixture
def table() -> CostTable:
    """Three stages of 1 + b, 2 + 2b and 1 + b milliseconds at batch size b, and two caches."""
    stages = tuple(part(f"s{k}", 100.0 * f, {b: f * (1 + b) for b in (1, 4, 9)}) for k, f in enumerate((1, 2, 1)))
    routing = tuple(RoutingCost(0.5, 3.0, 0.25) for _ in stages)
    backbone = part("backbone", 400.0, {b: 4.0 * (1 + b) for b in (1, 4, 9)})
    caches = (
        part("early", 20.0, dict.fromkeys((1, 4, 9), 0.5)),
        part("late", 4.0, dict.fromkeys((1, 4, 9), 0.1)),
    )
    return CostTable("cpu", 2, backbone, stages, routing, caches, (0, 2))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: torch.ones(2, 3) @ torch.ones(3, 5), 2 * 2 * 3 * 5),
        (lambda: nn.Linear(7, 4)(torch.ones(6, 7)), 2 * 6 * 7 * 4),
        (lambda: nn.Conv2d(3, 8, 3, padding=1)(torch.ones(2, 3, 5, 5)), 2 * 2 * 5 * 5 * 8 * 3 * 9),
        (lambda: torch.ones(1000).exp().softmax(0), 0),
    ],
)
def test_a_multiply_add_counts_two(call: Callable[[], object], expected: int) -> None:
    assert count_flops(call) == expected
    with torch.inference_mode():
        assert count_flops(call) == expected


def test_attention_on_the_cpu_is_counted_like_its_matrix_products() -> None:
    query, key, value = (torch.randn(2, 4, length, 16) for length in (10, 12, 12))

    def attend() -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value)

    with sdpa_kernel(SDPBackend.MATH):
        expected = count_flops(attend)
    assert expected == 2 * (2 * 4 * 10 * 12 * 16) * 2
    assert count_flops(attend) == expected
    with torch.inference_mode():
        assert count_flops(attend) == expected


def test_without_our_entry_attention_on_the_cpu_would_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_MORE_FLOPS", {})
    query = torch.randn(2, 4, 10, 16)
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(query, query, query)) == 0


def test_fused_layers_of_torch_are_counted() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    lstm, x_BLD = (
        nn.LSTM(16, 8, num_layers=2, bidirectional=True, batch_first=True).eval(),
        torch.randn(3, 10, 16),
    )
    per_token = 2 * (4 * 16 * 16 + 2 * 16 * 32)
    with torch.inference_mode():
        assert count_flops(lambda: layer(x_BLD)) == 3 * 10 * per_token + 2 * (2 * 3 * 10 * 10 * 16)
        assert torch.backends.mha.get_fastpath_enabled()
        assert count_flops(lambda: lstm(x_BLD)) == 3 * 10 * 2 * 2 * (32 * 16 + 32 * 8) * 2
    weights = [tuple(weight.shape) for weight in lstm.parameters()]
    assert cost._cudnn_rnn_flops((3, 10, 16), weights) == 3 * 10 * 2 * 2 * (32 * 16 + 32 * 8) * 2


def test_time_call_warms_up_synchronises_and_orders_its_percentiles() -> None:
    calls, waits = [], []

    def call() -> None:
        assert torch.is_inference_mode_enabled()
        calls.append(0)

    result = time_call(call, repeats=5, budget_s=10, synchronize=lambda: waits.append(0))
    assert len(calls) == 5 + cost.WARM_UP_ROUNDS
    assert len(waits) == 2 * len(calls)
    assert 0 <= result.p10_ms <= result.median_ms <= result.p90_ms


def test_time_call_stops_at_its_budget_but_not_before_three_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    calls: list[int] = []
    result = time_call(lambda: calls.append(0), repeats=1000, budget_s=1.5)
    assert len(calls) == cost.WARM_UP_ROUNDS + cost.LEAST_ROUNDS
    assert result == timing(1000.0)  # the clock advances one second from one reading to the next


@pytest.mark.parametrize(("call_s", "calls"), [(1e-4, 1 + cost.TURN_CALLS), (1.1e-3, 1 + 5), (0.2, 1 + 1)])
def test_in_a_race_each_pauses_then_makes_some_calls_of_which_the_first_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, call_s: float, calls: int
) -> None:
    """A call on a cold memory cache takes ten times as long here."""
    log: list[str] = []
    clock = Clock(log)
    monkeypatch.setattr(cost, "time", clock)

    def racer(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            cold = log[-1] != name
            log.append(name)
            clock.now += seconds * (10 if cold else 1)

        return call

    first, second = race([racer("a", call_s), racer("b", 2 * call_s)], budget_s=0.0, synchronize=lambda: None)
    assert (first.median_ms, second.median_ms) == pytest.approx((1e3 * call_s, 2e3 * call_s))
    turns = [list(turn) for _, turn in groupby(log)]
    assert [turn[0] for turn in turns[:4]] == ["pause", "a", "pause", "b"]
    assert all(len(turn) == calls for turn in turns if turn[0] == "a")


@dataclass
class Clock:
    """Time that passes only when told to."""

    log: list[str]
    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.log.append("pause")
        self.now += seconds


def test_the_cpu_needs_no_waiting() -> None:
    synchronizer(torch.device("cpu"))()


def test_measure_fills_the_table() -> None:
    split = make_split(6, 8, 7, CLASSES)
    table = measure(split, batch_sizes=(2, 1, 2), budget_s=0.2)
    assert [stage.name for stage in table.stages] == ["input", "0", "1"]
    assert [stage.flops for stage in table.stages] == [2 * 6 * 8, 2 * 8 * 7, 2 * 7 * CLASSES]
    assert table.backbone.flops == sum(stage.flops for stage in table.stages)
    assert table.stages[0].parameters == 6 * 8 + 8
    assert table.stages[0].parameter_bytes == 4 * (6 * 8 + 8)
    assert table.backbone.parameters == sum(stage.parameters for stage in table.stages)
    assert list(table.backbone.time_ms) == [1, 2]
    assert len(table.routing) == 3
    assert all(r.lookup_ms > 0 and r.compaction_ms >= 0 and r.compaction_row_ms >= 0 for r in table.routing)
    assert (table.device, table.threads, table.caches) == ("cpu", torch.get_num_threads(), ())


def test_the_parts_are_measured_in_turn() -> None:
    split = make_split(4, 4, 4, CLASSES)
    hook = split.backbone.register_forward_hook(lambda *_: split.log.append("backbone"))
    measure(split, batch_sizes=(1,), budget_s=0)
    hook.remove()
    one_round = ["input", "0", "1", "backbone"]
    rounds = cost.WARM_UP_ROUNDS + cost.LEAST_ROUNDS
    assert split.log[: 4 * (1 + rounds)] == one_round * (1 + rounds)  # once for the FLOPs, then the rounds


def test_measure_repeats_the_example_up_to_the_batch_size_and_feeds_real_activations() -> None:
    split = make_split(4, 4, CLASSES, rows=3)
    seen = []
    split.stages[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    measure(split, batch_sizes=(7,), budget_s=0)
    with torch.inference_mode():
        expected = split.backbone[0](split.example.args[0][torch.arange(7) % 3])
    assert [len(activation) for activation in seen].count(7) == cost.WARM_UP_ROUNDS + cost.LEAST_ROUNDS
    torch.testing.assert_close(next(activation for activation in seen if len(activation) == 7), expected)


def test_tied_weights_count_once_per_part_and_buffers_count_as_bytes() -> None:
    split = make_split(4, 4, 4)
    split.backbone[1].weight = split.backbone[0].weight
    split.backbone[1].register_buffer("table", torch.zeros(3, dtype=torch.float64))
    split.backbone[1].register_buffer("same_memory", split.backbone[0].weight.detach())
    table = measure(split, batch_sizes=(1,), budget_s=0)
    assert table.backbone.parameters == 16 + 4 + 4
    assert table.backbone.parameter_bytes == 4 * (16 + 4 + 4) + 8 * 3
    assert [stage.parameters for stage in table.stages] == [20, 20]


def test_measuring_leaves_the_backbone_as_it_was() -> None:
    split = make_split(4, 4, 4)
    split.backbone.insert(1, nn.BatchNorm1d(4))
    split.__post_init__()
    split.backbone.train()
    split.backbone[0].eval()
    before = {key: value.clone() for key, value in split.backbone.state_dict().items()}
    measure(split, batch_sizes=(1, 2), budget_s=0)
    after = split.backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [module.training for module in split.backbone.modules()] == [True, False, True, True]
    assert [hooks for m in split.backbone.modules() for hooks in m._forward_hooks] == []


@pytest.mark.parametrize("sizes", [(), (0,), (-1, 2), (1.5,), (True,), ("8",), 8])
def test_nonsense_batch_sizes_are_refused(sizes: Any) -> None:
    with pytest.raises(InputError, match="batch sizes must be whole numbers from 1, at least one of them; received"):
        measure(make_split(4, 4), batch_sizes=sizes)


def test_progress_says_what_is_measured() -> None:
    said: list[str] = []
    measure(make_split(4, 4), batch_sizes=(1, 2), budget_s=0, progress=said.append)
    assert said == [
        "measuring the stages at batch size 1",
        "measuring the stages at batch size 2",
        "measuring lookup and compaction",
    ]


def test_measure_caches_fills_in_order_and_runs_each_cache_where_it_sits() -> None:
    split = make_split(6, 8, 7, CLASSES)
    table = measure(split, batch_sizes=(1, 4), budget_s=0)
    caches = [Cache("late", "1", 7, split.log, reads="early"), Cache("early", "input", 6, split.log)]
    split.log.clear()
    said: list[str] = []
    filled = measure_caches(table, split, caches, budget_s=0, progress=said.append)
    assert dataclasses.replace(filled, caches=(), cache_points=()) == table
    assert [cache.name for cache in filled.caches] == ["late", "early"]
    assert filled.cache_points == (2, 0)
    assert [cache.flops for cache in filled.caches] == [2 * 7 * CLASSES, 2 * 6 * CLASSES]
    assert filled.caches[0].parameters == 7 * CLASSES + CLASSES
    assert [list(cache.time_ms) for cache in filled.caches] == [[1, 4], [1, 4]]
    assert split.log[-5:] == ["early", "input", "0", "late", "1"]
    assert said == ["measuring 2 caches at batch size 1", "measuring 2 caches at batch size 4"]
    again = measure_caches(filled, split, caches[1:], budget_s=0)
    assert [cache.name for cache in again.caches] == ["early"]
    assert measure_caches(filled, split, []) == table


def test_a_cache_pays_for_its_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    split = make_split(4, CLASSES)
    cache = Cache("c", "input", 4, split.log)
    weight = torch.ones(CLASSES, 1)
    monkeypatch.setattr(cache, "confidence", lambda logits, _: (logits @ weight).squeeze(1))
    table = measure_caches(measure(split, batch_sizes=(1,), budget_s=0), split, [cache], budget_s=0)
    assert table.caches[0].flops == 2 * 4 * CLASSES + 2 * CLASSES


def test_times_of_caches_are_scaled_to_the_speed_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this clock every call takes a second; a table of 0.5 s per stage was made at twice the speed."""
    split = make_split(4, 4, CLASSES)
    table = measure(split, batch_sizes=(1,), budget_s=0)
    stages = tuple(dataclasses.replace(stage, time_ms={1: timing(500.0)}) for stage in table.stages)
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    slower = measure_caches(
        dataclasses.replace(table, stages=stages), split, [Cache("c", "0", 4, split.log)], budget_s=0
    )
    assert slower.caches[0].time_ms[1] == timing(500.0)


def test_a_cache_at_an_unknown_point_is_refused() -> None:
    split = make_split(4, CLASSES)
    table = measure(split, batch_sizes=(1,), budget_s=0)
    with pytest.raises(InputError, match=r"cache 'c' sits at 'layers.9'; this backbone has the points \['input'\]"):
        measure_caches(table, split, [Cache("c", "layers.9", 4, split.log)])


def test_shares_in_time(table: CostTable) -> None:
    before_K, cache_K = shares(table, [1])
    np.testing.assert_allclose(before_K, [0, 3 / 4])
    np.testing.assert_allclose(cache_K, [(0.5 + 0.5) / 8, (0.1 + 0.5) / 8])
    before_K, cache_K = shares(table)
    np.testing.assert_allclose(before_K, [0, 3 / 4])
    np.testing.assert_allclose(cache_K[0], np.mean([1 / 8, 1 / 20, 1 / 40]))


def test_shares_in_flops_and_mixed(table: CostTable) -> None:
    before_K, cache_K = flop_shares(table)
    np.testing.assert_allclose(before_K, [0, 3 / 4])
    np.testing.assert_allclose(cache_K, [0.05, 0.01])
    _, mixed_K = shares(table, [1], weight_flops=0.25)
    np.testing.assert_allclose(mixed_K[0], 0.75 * 1 / 8 + 0.25 * 0.05)


def test_shares_of_no_caches_are_empty(table: CostTable) -> None:
    none = dataclasses.replace(table, caches=(), cache_points=())
    assert [len(column) for column in (*shares(none), *flop_shares(none))] == [0, 0, 0, 0]


def test_shares_refuse_what_they_cannot_answer(table: CostTable) -> None:
    with pytest.raises(InputError, match=r"batch sizes \[7\] were not measured; the table has \[1, 4, 9\]"):
        shares(table, [1, 7])
    with pytest.raises(InputError, match="weight_flops is a share between 0 and 1; received 2"):
        shares(table, weight_flops=2)
    idle = tuple(dataclasses.replace(stage, flops=0.0) for stage in table.stages)
    with pytest.raises(InputError, match="no countable FLOPs"):
        flop_shares(dataclasses.replace(table, stages=idle))


def test_compaction_rules_come_from_the_slope_of_the_later_stages(table: CostTable) -> None:
    rules = compaction_rule(table)
    np.testing.assert_allclose([rule.saving_row_ms for rule in rules], [4, 3, 1])
    assert {(rule.fixed_ms, rule.row_ms) for rule in rules} == {(3.0, 0.25)}


def test_a_rule_compares_saving_with_cost() -> None:
    rule = CompactionRule(saving_row_ms=1.0, fixed_ms=3.0, row_ms=0.25)
    rows = 8
    expected = [0 < m < rows and (rows - m) * 1.0 > 3.0 + m * 0.25 for m in range(rows + 1)]
    assert [rule.pays(rows, m) for m in range(rows + 1)] == expected
    assert expected == [False, True, True, True, False, False, False, False, False]


def test_rules_never_pay_where_rows_save_nothing(table: CostTable) -> None:
    falling = {1: timing(9.0), 4: timing(5.0), 9: timing(1.0)}
    odd = tuple(dataclasses.replace(stage, time_ms=falling) for stage in table.stages)
    assert {rule.saving_row_ms for rule in compaction_rule(dataclasses.replace(table, stages=odd))} == {0.0}

    def only_4(cost: PartCost) -> PartCost:
        return dataclasses.replace(cost, time_ms={4: cost.time_ms[4]})

    one_size = dataclasses.replace(table, backbone=only_4(table.backbone), stages=tuple(map(only_4, table.stages)))
    assert not any(rule.pays(4, 1) for rule in compaction_rule(one_size))


@pytest.mark.parametrize(
    ("y", "expected"),
    [([3, 5, 7], (1, 2)), ([7, 5, 3], (5, 0)), ([0, 4, 8], (0, 32 / 14)), ([2], (2, 0))],
)
def test_lines_have_no_negative_part(y: list[float], expected: tuple[float, float]) -> None:
    x = [1, 2, 3][: len(y)]
    intercept, slope = cost._line(x, y)
    assert (intercept, slope) == pytest.approx(expected)


def test_a_table_survives_json(table: CostTable) -> None:
    document = cost_to_json(table)
    assert cost_from_json(json.loads(json.dumps(document))) == table
    assert cost_from_json(document) == table
    assert json.loads(json.dumps(document)) == document


def test_the_real_table_survives_json() -> None:
    split = make_split(4, CLASSES)
    table = measure(split, batch_sizes=(1,), budget_s=0)
    filled = measure_caches(table, split, [Cache("c", "input", 4, split.log)], budget_s=0)
    assert cost_from_json(json.loads(json.dumps(cost_to_json(filled)))) == filled


def test_measured_stages_add_up_to_about_the_backbone() -> None:
    """Compared on one thread and by the 10th percentiles, which a busy machine disturbs least."""
    split, threads = make_split(512, 512, 512, 512), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        table = measure(split, batch_sizes=(32,), budget_s=1)
    finally:
        torch.set_num_threads(threads)
    total = sum(stage.time_ms[32].p10_ms for stage in table.stages)
    assert 0.2 < total / table.backbone.time_ms[32].p10_ms < 5


def test_a_real_split_and_real_caches_can_be_measured() -> None:
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES)]
    split_model = split(nn.Sequential(*layers).eval(), torch.randn(4, 6))
    point, shape = split_model.points[1], CacheShape("linear")
    first = LearnedCache("a", "input", shape, (6,), CLASSES, reduction=Reduction())
    second = LearnedCache("b", point.name, shape, point.shape, CLASSES, reduction=Reduction(), reads="a")
    table = measure(split_model, batch_sizes=(1, 8), budget_s=0)
    table = measure_caches(table, split_model, [first, second], budget_s=0)
    assert [cache.flops for cache in table.caches] == [2 * 6 * CLASSES, 2 * point.shape[0] * CLASSES]
    assert table.backbone.flops == sum(stage.flops for stage in table.stages) == 2 * (6 * 16 + 16 * 16 + 16 * 5)
    assert table.backbone.parameters == sum(stage.parameters for stage in table.stages)
    before_K, cache_K = shares(table)
    assert before_K[0] == 0 < before_K[1] < 1
    assert (cache_K > 0).all()
    assert first.training  # as it was given
    assert not split_model.example.tensors[0].is_inference()


def test_the_clock_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    device = cast(torch.device, SimpleNamespace(type="cuda"))
    synchronizer(device)()
    assert waited == [device]
