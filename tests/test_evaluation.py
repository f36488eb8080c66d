"""Evaluation against a slow loop that counts row by row."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

from offramp.caches import CacheShape, LearnedCache, Reduction
from offramp.caches.result import ResultCache
from offramp.calibration import interval
from offramp.errors import StreamError
from offramp.evaluation import compare_latency, evaluate
from offramp.model import CachedModel
from offramp.splitting import SplitModel, split
from offramp.streams import Batch
from offramp.tasks import Classification
from offramp.types import Certificate, CostTable, PartCost, Plan, PlannedCache, RoutingCost, Timing

FEATURES, CLASSES = 6, 3
STAGE_FLOPS, CACHE_FLOPS = 100.0, 10.0
CERTIFICATE = Certificate(0.1, 0.9, 100, 0, 0.05, "by hand", 1, "", "", "2026-01-01")


def part(name: str, flops: float) -> PartCost:
    return PartCost(name, flops, 1, 4, {size: Timing(1.0, 1.0, 1.0) for size in (1, 32)})


def cache_at(split_model: SplitModel, position: int, reads: str | None = None) -> LearnedCache:
    point = split_model.points[position]
    shape, name = CacheShape("linear"), f"cache{position}"
    cache = LearnedCache(name, point.name, shape, point.shape, CLASSES, reduction=Reduction(), reads=reads).eval()
    nn.init.normal_(cache.head.weight)
    return cache


def make(*, positions: tuple[int, ...] = (0, 1), threshold: float = 0.75, bypass: tuple[int, ...] = ()) -> CachedModel:
    torch.manual_seed(0)
    split_model = split(models.mlp().eval(), torch.randn(4, FEATURES), points=["1", "3"])
    caches = [cache_at(split_model, position, "cache0" if position else None) for position in positions]
    planned = tuple(PlannedCache(cache.name, cache.point, threshold, "max_softmax", 0.1) for cache in caches)
    stages = len(split_model.stages)
    costs = CostTable(
        "cpu",
        1,
        part("backbone", stages * STAGE_FLOPS),
        tuple(part(f"s{k}", STAGE_FLOPS) for k in range(stages)),
        (RoutingCost(0.0, 0.0, 0.0),) * stages,
        tuple(part(cache.name, CACHE_FLOPS) for cache in caches),
        positions,
    )
    plan = Plan(planned, bypass_batch_sizes=bypass)
    return CachedModel(split_model, caches, plan, CERTIFICATE, costs, task=Classification(), summary={})


def data(rows: int = 60) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    return torch.randn(rows, FEATURES, generator=random), torch.randint(0, CLASSES, (rows,), generator=random)


def answers_of_all(cached: CachedModel, x: Tensor) -> tuple[list[int], int]:
    """What every cache says about one row, and the backbone."""
    split_model = cached.split_model
    live, answers = split_model.flatten(Batch((x,))), []
    said: dict[str, Tensor] = {}
    for position, stage in enumerate(split_model.stages):
        for cache in cached.caches:
            assert isinstance(cache, LearnedCache)
            if cache.point == split_model.points[position].name:
                said[cache.name] = cache(split_model.activation(position, live), said.get(str(cache.reads)))
                answers.append(int(said[cache.name].argmax()))
        live = stage(*live)
    return answers, int(live[0].argmax())


def slow(cached: CachedModel, x_NF: Tensor, labels_N: Tensor) -> dict[str, Any]:
    """The same numbers, one row at a time."""
    stages = len(cached.split_model.stages)
    enabled = len(cached.plan.caches)
    wrong = right = backbone_right = 0
    left = [0] * (enabled + 1)
    flops = oracle = 0.0
    for x, label in zip(x_NF.split(1), labels_N.tolist(), strict=True):
        prediction = cached.predict(x)
        exit_number, answer = int(prediction.left_at_B), int(prediction.answer_B)
        answers, full = answers_of_all(cached, x)
        wrong += answer != full
        right += answer == label
        backbone_right += full == label
        left[exit_number] += 1
        first = next((k for k, said in enumerate(answers) if said == full), enabled)
        for leaves, counts in ((exit_number, "flops"), (first, "oracle")):
            run = cached.costs.cache_points[leaves] if leaves < enabled else stages
            spent = run * STAGE_FLOPS + min(leaves + 1, enabled) * CACHE_FLOPS
            flops += spent if counts == "flops" else 0
            oracle += spent if counts == "oracle" else 0
    n, unit = len(x_NF), stages * STAGE_FLOPS
    return {
        "disagreements": wrong,
        "shares": [count / n for count in left],
        "flops": flops / n / unit,
        "oracle": oracle / n / unit,
        "accuracy": right / n,
        "backbone_accuracy": backbone_right / n,
    }


def test_evaluation_counts_what_a_slow_loop_counts() -> None:
    cached = make()
    x, labels = data()
    expected = slow(cached, x, labels)
    found = evaluate(cached, list(zip(x.split(25), labels.split(25), strict=True)), batch_sizes=())
    assert found.n == 60
    assert found.disagreements == expected["disagreements"] > 0, "some answers should differ, or little is shown"
    assert found.disagreement == pytest.approx(found.disagreements / 60)
    assert found.interval == interval(found.disagreements, 60, CERTIFICATE.confidence_level)
    assert found.interval[0] < found.disagreement < found.interval[1]
    assert dict(found.hit_rates) == pytest.approx(dict(zip(cached.exits[:-1], expected["shares"][:-1], strict=True)))
    assert all(0 < share < 1 for share in expected["shares"])
    assert found.flops_ratio == pytest.approx(expected["flops"])
    assert found.oracle_flops_ratio == pytest.approx(expected["oracle"])
    assert found.accuracy == pytest.approx(expected["accuracy"])
    assert found.backbone_accuracy == pytest.approx(expected["backbone_accuracy"])
    assert found.latency == ()


def test_no_plan_without_disagreement_beats_the_oracle() -> None:
    cached = make(threshold=2.0)
    found = evaluate(cached, [data()[0]], batch_sizes=())
    assert found.disagreements == 0
    assert found.interval[0] == 0
    assert found.oracle_flops_ratio <= found.flops_ratio
    assert found.flops_ratio == pytest.approx(1 + 2 * CACHE_FLOPS / (3 * STAGE_FLOPS))


def test_a_plan_without_caches_costs_what_the_backbone_costs() -> None:
    found = evaluate(make(positions=()), [data()[0]], batch_sizes=())
    assert (found.disagreements, found.flops_ratio, found.oracle_flops_ratio, dict(found.hit_rates)) == (0, 1, 1, {})


def test_bypassed_batches_pay_for_no_cache() -> None:
    found = evaluate(make(bypass=(32,)), [data()[0]], batch_sizes=())
    assert found.disagreements == 0
    assert found.flops_ratio == pytest.approx(1.0)
    assert set(found.hit_rates.values()) == {0.0}


def test_labels_as_a_key_or_as_the_last_of_a_tuple() -> None:
    cached = make()
    x, labels = data()
    as_tuple = evaluate(cached, [(x, labels)], batch_sizes=())
    as_key = evaluate(cached, [{"input": x, "labels": labels}], batch_sizes=())
    assert as_tuple == as_key
    assert as_tuple.accuracy is not None


def test_without_labels_there_is_no_accuracy() -> None:
    cached = make()
    x, labels = data()
    for stream in ([x], [(x[:30], labels[:30]), (x[30:],)]):
        found = evaluate(cached, stream, batch_sizes=())
        assert (found.accuracy, found.backbone_accuracy) == (None, None)


@pytest.mark.parametrize("stream", [[], [torch.zeros(0, FEATURES)]], ids=["no batch", "no rows"])
def test_an_empty_stream_is_an_error(stream: list[Tensor]) -> None:
    with pytest.raises(StreamError, match="empty"):
        evaluate(make(), stream)


@pytest.mark.parametrize("rows", [5, 60])
def test_latency_is_compared_at_every_batch_size(rows: int) -> None:
    cached = make()
    found = compare_latency(cached, Batch((data(rows)[0],)), (1, 8), budget_s=0.0)
    assert [ratio.batch_size for ratio in found] == [1, 8]
    for ratio in found:
        assert ratio.mean == pytest.approx(ratio.cached_mean_ms / ratio.full_mean_ms)
        assert min(ratio.mean, ratio.p50, ratio.p95) > 0


def test_latency_compares_calls_that_both_record_no_gradients() -> None:
    cached = make()
    recorded: list[bool] = []
    handle = cached.split_model.backbone.register_forward_hook(
        lambda _module, _args, output: recorded.append(output.requires_grad)
    )
    compare_latency(cached, Batch((data(4)[0],)), (1,), budget_s=0.0)
    handle.remove()
    assert recorded
    assert not any(recorded)


def test_evaluate_measures_latency_on_rows_of_the_stream() -> None:
    found = evaluate(make(), data()[0].split(20), batch_sizes=(2,), latency_budget_s=0.0)
    assert [ratio.batch_size for ratio in found.latency] == [2]
    assert found.to_json()["latency"][0]["batch_size"] == 2


def test_a_result_cache_is_left_out_and_put_back() -> None:
    cached, (x, _) = make(), data()
    cached.result_cache = results = ResultCache(1 << 20)
    evaluation = evaluate(cached, [x, x], batch_sizes=())
    assert evaluation.n == 2 * len(x)
    assert cached.result_cache is results
    assert results.totals().rows == 0
