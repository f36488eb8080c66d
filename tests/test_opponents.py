"""The opponents of benchmarks/opponents and their drivers, on models and records made up here.

What needs a package of the extra `bench` skips where that is missing. Those that export the backbone are `slow`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import MaskedEncoder, ResidualNet
from numpy.typing import NDArray
from torch import Tensor

from offramp.calibration import certify as certify_path
from offramp.calibration import interval, upper_bound
from offramp.cost import measure
from offramp.errors import InputError
from offramp.placement import NEVER, OFF, CacheCosts, expected_cost, outcomes, plan_path
from offramp.recording import record
from offramp.splitting import split
from offramp.streams import Batch
from offramp.tasks import Classification
from offramp.types import Records

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> Any:
    """A module of benchmarks/, which is no package."""
    if sys.path[0] != str(BENCHMARKS):
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


# --- records ------------------------------------------------------------------------------------------------


def records(
    confidence: Sequence[Sequence[float]] | NDArray[np.floating[Any]],
    agreement: Sequence[Sequence[int]] | NDArray[np.bool_],
    reads: Sequence[int] | None = None,
) -> Records:
    confidence_NK, agreement_NK = np.array(confidence, dtype=np.float64), np.array(agreement, dtype=bool)
    nothing = np.zeros(agreement_NK.shape, dtype=np.int64)
    reads_K = tuple(reads or [-1] * agreement_NK.shape[1])
    return Records(confidence_NK, nothing, agreement_NK, nothing[:, 0], reads_K)


def traffic(rows: int, caches: int = 3, seed: int = 0) -> tuple[Records, CacheCosts]:
    """Later caches are better, and all of them tell the truth: they disagree with probability (1 - confidence) / 2."""
    random = np.random.default_rng(seed)
    confidence = random.random((rows, caches)) ** (1 / np.arange(1, caches + 1))
    agreement = random.random((rows, caches)) > (1 - confidence) / 2
    return records(confidence, agreement), CacheCosts(np.linspace(0.1, 0.7, caches), np.full(caches, 0.01))


# --- Apparate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tolerance", [0.005, 0.02, 0.1])
def test_apparate_stays_within_its_budget_on_the_window(seed: int, tolerance: float) -> None:
    window, costs = traffic(600, seed=seed)
    plan = load("opponents.apparate").thresholds(window, costs, tolerance)
    assert outcomes(window, plan)[1].mean() <= tolerance
    assert expected_cost(window, plan, costs) <= 1
    if tolerance > 0.05:
        assert expected_cost(window, plan, costs) < 0.95


def test_apparate_answers_everything_at_the_first_ramp_that_is_always_right() -> None:
    window = records([[0.6, 0.9]] * 20, [[1, 1]] * 20)
    plan = load("opponents.apparate").thresholds(window, CacheCosts(np.array([0.1, 0.5]), np.array([0.01, 0.01])), 0.01)
    assert outcomes(window, plan)[0].tolist() == [0] * 20
    assert plan[1] == OFF, "a ramp that no request reaches has no utility"


def test_apparate_takes_out_ramps_that_are_always_wrong() -> None:
    window = records([[1.0, 0.9]] * 20, [[0, 0]] * 20)
    plan = load("opponents.apparate").thresholds(window, CacheCosts(np.array([0.1, 0.5]), np.array([0.01, 0.01])), 0.01)
    assert plan == (OFF, OFF)


def test_apparate_prefers_the_ramp_that_loses_least_per_saving() -> None:
    """One error is allowed. Either ramp costs one: the first for five early answers, the second for ten later ones."""
    confidence = [[0.99, 0.0]] * 5 + [[0.0, 0.99]] * 10 + [[0.0, 0.0]] * 5
    agreement = [[0, 0]] + [[1, 0]] * 4 + [[0, 0]] + [[0, 1]] * 9 + [[0, 0]] * 5
    window = records(confidence, agreement)
    plan = load("opponents.apparate").thresholds(window, CacheCosts(np.array([0.2, 0.5]), np.zeros(2)), 0.05)
    assert outcomes(window, plan)[0].tolist() == [2] * 5 + [1] * 10 + [2] * 5


def test_apparate_keeps_a_ramp_that_another_one_reads() -> None:
    window = records([[0.2, 0.9]] * 20, [[0, 1]] * 20, reads=[-1, 0])
    plan = load("opponents.apparate").thresholds(window, CacheCosts(np.array([0.1, 0.5]), np.array([0.01, 0.01])), 0.01)
    assert np.isfinite(plan[0])
    assert outcomes(window, plan)[0].tolist() == [1] * 20


def test_a_move_says_what_the_slow_count_says() -> None:
    module = load("opponents.apparate")
    window, costs = traffic(200)
    state = module.Window.of(window, costs, {0, 1, 2})
    errors_K = [0.0, 0.0, 0.0]
    for k, error in [(1, 0.3), (2, 0.4), (0, 0.2), (1, 0.5)]:
        before = [module._threshold(value) for value in errors_K]
        errors_K[k] = error
        after = [module._threshold(value) for value in errors_K]
        saved, lost = state.move(k, error)
        costs_of = [200 * expected_cost(window, plan, costs) for plan in (before, after)]
        wrong = [int(outcomes(window, plan)[1].sum()) for plan in (before, after)]
        assert (saved, lost) == (pytest.approx(costs_of[0] - costs_of[1]), wrong[1] - wrong[0])
        state.take(k, error)
        assert state.errors == wrong[1]


def test_nothing_hits_where_a_climb_begins_not_even_full_confidence() -> None:
    module = load("opponents.apparate")
    assert module._threshold(0.0) == NEVER
    assert 0.875 < module._threshold(0.125) <= np.nextafter(0.875, 1)


# --- other rules --------------------------------------------------------------------------------------------


def test_a_cache_loses_when_look_ups_cost_more_than_hits_save() -> None:
    rules = load("opponents.rules")
    window = records([[0.9, 0.9]] + [[0.1, 0.9]] * 9, [[1, 1]] * 10)
    dear = CacheCosts(np.array([0.0, 0.5]), np.array([0.2, 0.01]))
    assert rules.losing(window, (0.5, 0.5), dear) == {0}  # 9 look-ups of 0.2 for one hit that saves 1
    assert rules.paying(window, (0.5, 0.5), dear) == (OFF, 0.5)
    assert rules.paying(window, (0.5, 0.5), CacheCosts(np.array([0.0, 0.5]), np.array([0.05, 0.01]))) == (0.5, 0.5)
    read = records(window.confidence_NK, window.agreement_NK, reads=[-1, 0])
    assert rules.paying(read, (0.5, 0.5), dear) == (0.5, 0.5)


def test_both_samples_are_joined_in_order() -> None:
    first, second = traffic(5)[0], traffic(7, seed=1)[0]
    both = load("opponents.rules").joined(first, second)
    assert len(both) == 12
    assert (both.rows(np.arange(5)).confidence_NK == first.confidence_NK).all()
    assert (both.rows(np.arange(5, 12)).agreement_NK == second.agreement_NK).all()


def test_caches_tuned_alone_exceed_together_what_each_keeps() -> None:
    """The first cache answers the easy half, one in ten wrong. The second is wrong twice in its own twenty hits, both
    times in the hard half, which is all that reaches it."""
    confidence = [[0.9, 0.9]] * 10 + [[0.1, 0.9]] * 10
    agreement = [[0, 1]] + [[1, 1]] * 9 + [[0, 0]] * 2 + [[0, 1]] * 8
    window, costs = records(confidence, agreement), CacheCosts(np.array([0.1, 0.5]), np.zeros(2))
    plan = load("opponents.per_cache").thresholds(window, costs, 0.1)
    left, differs = outcomes(window, plan)
    assert left.tolist() == [0] * 10 + [1] * 10
    assert differs.mean() == 0.15
    assert load("opponents.per_cache").thresholds(window, costs, 0.05) == (OFF, OFF)


def test_mapie_certifies_plans_that_the_exact_bound_certifies() -> None:
    pytest.importorskip("mapie", reason="mapie is not installed (extra `bench`)")
    rule = load("opponents.mapie").RULE
    tune, costs = traffic(800)
    certify = traffic(1500, seed=1)[0]
    plan = rule.thresholds(tune, certify, costs, 0.05)
    errors = int(outcomes(certify, plan)[1].sum())
    assert np.isfinite(plan).any()
    assert upper_bound(errors, len(certify), 0.95) <= 0.05
    assert len({threshold for threshold in plan if np.isfinite(threshold)}) == 1
    few = certify.rows(np.arange(20))
    assert rule.thresholds(tune, few, costs, 0.01) == (OFF, OFF, OFF)


def test_every_rule_of_the_registry_works_on_the_same_records() -> None:
    pytest.importorskip("mapie", reason="mapie is not installed (extra `bench`)")
    (tune, costs), (certify, _) = traffic(400), traffic(600, seed=1)
    for rule in load("opponents").RULES:
        plan = rule.thresholds(tune, certify, costs, 0.05)
        assert len(plan) == 3
        assert expected_cost(certify, plan, costs) < 1.1, rule.name


# --- measuring ----------------------------------------------------------------------------------------------


class Labelled:
    """A stream that can be read again: batches of images with labels."""

    def __init__(self, images: Tensor, labels: Tensor, size: int = 50) -> None:
        self.batches = list(zip(images.split(size), labels.split(size), strict=True))

    def __iter__(self) -> Any:
        return iter(self.batches)


def images(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Five patterns under noise, from which the toy backbone's answers vary."""
    random = torch.Generator().manual_seed(seed)
    patterns = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(0, 5, (rows,), generator=random)
    return patterns[labels] + torch.randn(rows, 3, 16, 16, generator=random), labels


def classifier() -> ResidualNet:
    """A random residual net whose head tells the patterns apart: the nearest class mean of its features."""
    torch.manual_seed(0)
    net = ResidualNet(width=16).eval()
    x, labels = images(300, seed=9)
    with torch.no_grad():
        features = net.layers(net.stem(x)).mean((2, 3))
        scale = features.std(0) + 1e-6
        means = torch.stack([features[labels == label].mean(0) for label in range(5)])
        net.head.weight.copy_(means / scale**2)
        net.head.bias.copy_(-((means / scale) ** 2).sum(1) / 2)
    return net


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small residual net, recorded."""
    base = load("opponents.base")
    backbone = classifier()
    train, certify, held_out = (Labelled(*images(rows, seed)) for seed, rows in enumerate((300, 400, 120)))
    split_model = split(backbone, train.batches[0][0][:4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offramp.recording.ASKED_ROWS", 0)  # no augmented copies: they only take time
        recording = record(split_model, Classification(), train, certify, seed=0)
    return base.Case(
        split_model=split_model,
        task=Classification(),
        recording=recording,
        costs=measure(split_model, batch_sizes=(1, 8, 32), budget_s=0.3),
        train=train,
        held_out=held_out,
        folder=tmp_path_factory.mktemp("opponents"),
        time_budget_s=2.0,
        latency_budget_s=0.01,
        confidence_level=0.95,
        our_flops={0.01: 0.6},  # the narrowest student has 0.55 of them
    )


def built(case: Any, name: str, tolerance: float | None = None) -> Any:
    opponent = next(one for one in load("opponents").OPPONENTS if one.name == name)
    return opponent.build(case, tolerance)


def test_the_full_model_disagrees_with_itself_nowhere_and_takes_its_own_time(case: Any) -> None:
    row = load("opponents.base").measured(built(case, "full model, eager"), case)
    assert (row["n"], row["disagreements"], row["flops_ratio"]) == (120, 0, 1.0)
    assert len(set(case.full_answers_N)) == 5
    assert row["interval"] == interval(0, 120, 0.95)
    assert row["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in case.backbone.state_dict().values())
    assert [ratio["batch_size"] for ratio in row["latency"]] == [1, 32]
    assert all(0.2 < ratio["p50"] < 5 for ratio in row["latency"])
    label_N = torch.cat([labels for _, labels in case.held_out.batches]).numpy()
    assert row["accuracy"] == pytest.approx((case.full_answers_N == label_N).mean())
    json.dumps(row)


def test_disagreements_are_counted_row_by_row_at_any_batch_size(case: Any) -> None:
    base = load("opponents.base")

    def off_by_one(inputs: Tensor) -> Tensor:
        """Another answer wherever the first pixel is bright."""
        logits: Tensor = case.backbone(inputs)
        return torch.where(inputs[:, :1, 0, 0] > 0.5, logits.roll(1, dims=1), logits)

    changed = sum(int((inputs[:, 0, 0, 0] > 0.5).sum()) for inputs, _ in case.held_out.batches)
    assert changed
    for rows in (1, 7, 100):
        assert (case.answers(off_by_one, rows) != case.full_answers_N).sum() == changed
    row = base.measured(base.Built(off_by_one, 1, 0.0), case)
    assert (row["disagreements"], row["interval"]) == (changed, interval(changed, 120, 0.95))


def test_calibration_rows_are_the_first_training_rows(case: Any) -> None:
    assert len(case.calibration) == 200
    assert torch.equal(case.calibration.tensors[0][:50], case.train.batches[0][0])


def test_the_student_costs_at_most_what_our_plan_does(case: Any) -> None:
    made = built(case, "distilled student of our plan's cost")
    assert 0 < made.flops_ratio <= 0.6
    assert made.details["steps"] > 0
    assert made.call(torch.zeros(3, 3, 16, 16)).shape == (3, 5)
    again = built(case, "distilled student of our plan's cost")
    assert again.build_s == made.build_s, "the second one comes from the folder"
    x = case.sample.tensors[0][:9]
    assert torch.allclose(again.call(x), made.call(x), atol=1e-4)
    with pytest.raises(InputError, match="saves nothing"):
        built(dataclasses.replace(case, our_flops={0.01: 1.0}), "distilled student of our plan's cost")


def test_a_smaller_model_is_the_one_that_the_case_has(case: Any) -> None:
    with pytest.raises(InputError, match="no smaller model"):
        built(case, "smaller static model")
    case.smaller = ("half", ResidualNet(width=8).eval())
    try:
        made = built(case, "smaller static model")
    finally:
        case.smaller = None
    assert 0.2 < made.flops_ratio < 0.4
    assert made.details["model"] == "half"


# --- packages of the extra ----------------------------------------------------------------------------------


def test_earlyon_exits_where_the_split_points_are_and_leaves_the_backbone_alone(case: Any) -> None:
    pytest.importorskip("earlyon", reason="earlyon is not installed (extra `bench`)")
    module = load("opponents.earlyon")
    before = {name: value.clone() for name, value in case.backbone.state_dict().items()}
    made = built(case, "earlyon 0.3", 0.2)
    assert made.rows_at_once == 1
    assert 0 < made.flops_ratio < 1.5
    assert made.call(case.sample.tensors[0][:1]).shape == (1, 5)
    assert made.call(case.sample.tensors[0][:6]).shape == (6, 5)
    assert all(parameter.requires_grad for parameter in case.backbone.parameters())
    assert not any(part._forward_hooks for part in case.backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in case.backbone.state_dict().items())

    wrapped = module.with_heads(case)
    seen: dict[str, Tensor] = {}
    hooks = [
        case.backbone.get_submodule(point.name).register_forward_hook(
            lambda _module, _args, output, name=point.name: seen.update({name: output})
        )
        for point in wrapped.points
    ]
    x = case.sample.tensors[0][:2]
    case.backbone(x)
    for hook in hooks:
        hook.remove()
    live = case.split_model.flatten(Batch((x,)))
    for position, stage in enumerate(case.split_model.stages):
        name = case.split_model.points[position].name
        if name in seen:
            assert torch.allclose(case.split_model.activation(position, live), seen[name], atol=1e-6)
        live = stage(*live)
    assert len(seen) == len(wrapped.points)


def test_earlyon_flops_count_its_heads_and_where_inputs_leave(case: Any) -> None:
    pytest.importorskip("earlyon", reason="earlyon is not installed (extra `bench`)")
    module = load("opponents.earlyon")
    wrapped = module.with_heads(case)
    config = wrapped.model.config
    kept = list(config.enabled_exits), list(config.confidence_thresholds)
    try:
        config.enabled_exits = [False] * len(wrapped.points)
        assert module.flops_share(case, wrapped) == pytest.approx(1.0)
        config.enabled_exits = [True] * len(wrapped.points)
        config.confidence_thresholds = [0.0] * len(wrapped.points)
        first = wrapped.points[0]
        assert first.depth < module.flops_share(case, wrapped) < first.depth + 0.05
    finally:
        config.enabled_exits, config.confidence_thresholds = kept


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "package", "agree"),
    [
        ("ONNX Runtime float32", "onnxruntime", 1.0),
        ("ONNX Runtime INT8", "onnxruntime", 0.5),
        ("OpenVINO float32", "openvino", 1.0),
        ("OpenVINO bfloat16", "openvino", 0.9),
        ("OpenVINO INT8 (NNCF)", "nncf", 0.5),
    ],
)
def test_a_runtime_answers_like_the_backbone(case: Any, name: str, package: str, agree: float) -> None:
    for needed in ("onnx", "onnxscript", package):
        pytest.importorskip(needed, reason=f"{needed} is not installed (extra `bench`)")
    made = built(case, name)
    row = load("opponents.base").measured(made, case)
    assert 1 - row["disagreement"] >= agree
    assert 0 < made.parameter_bytes < 5 * built(case, "full model, eager").parameter_bytes
    assert made.build_s > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_transformer_is_exported_with_its_named_inputs_and_quantised_dynamically(tmp_path: Path) -> None:
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed (extra `bench`)")
    exporting, runtime = load("opponents.exporting"), load("opponents.onnxruntime")
    torch.manual_seed(0)
    backbone = MaskedEncoder().eval()

    def batch(rows: int) -> Batch:
        kwargs = {"input_ids": torch.randint(0, 50, (rows, 8)), "attention_mask": torch.ones(rows, 8, dtype=torch.long)}
        return Batch((), kwargs)

    file = exporting.export(backbone, batch(4), tmp_path / "encoder.onnx")
    split_model = split(backbone, batch(4))
    quantised, scheme = runtime.quantise(argparse.Namespace(split_model=split_model), file)
    assert scheme.startswith("dynamic")
    assert quantised.stat().st_size < file.stat().st_size
    rows = batch(40)
    full = backbone(**rows.kwargs).detach()
    assert torch.allclose(runtime.Session(file)(**rows.kwargs), full, atol=1e-5)
    assert (runtime.Session(quantised)(**rows.kwargs).argmax(1) == full.argmax(1)).double().mean() > 0.8


# --- the drivers --------------------------------------------------------------------------------------------


def needs_pillow() -> None:
    """The drivers' common part reads pictures."""
    pytest.importorskip("PIL", reason="pillow is not installed (extra `data`)")


def test_a_row_that_fails_says_why_and_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_pillow()
    methods, calls = load("methods"), []

    def broken() -> dict[str, Any]:
        calls.append("broken")
        raise RuntimeError("no luck | today")

    book = methods.Book(tmp_path / "rows.jsonl", {"case": "a"})
    book.attempt("x", "published", 0.01, "none", broken)
    again = methods.Book(tmp_path / "rows.jsonl", {"case": "a"})
    assert again.rows[0]["error"] == "RuntimeError: no luck | today"
    assert "no luck / today" in load("comparison").tables(again.rows)
    again.attempt("x", "published", 0.01, "none", broken)
    assert calls == ["broken"] * 2
    assert len(again.rows) == 1
    assert "no luck" in capsys.readouterr().err


def test_a_finished_row_is_not_made_again(tmp_path: Path, case: Any) -> None:
    needs_pillow()
    methods, base = load("methods"), load("opponents.base")
    row = base.measured(built(case, "full model, eager"), case)
    methods.Book(tmp_path / "rows.jsonl", {"case": "a"}).attempt("full", None, None, "It is.", lambda: row)
    book = methods.Book(tmp_path / "rows.jsonl", {"case": "a"})
    book.attempt("full", None, None, "It is.", lambda: pytest.fail("made again"))
    assert book.done("full", None, None)
    assert not book.done("full", None, 0.01)
    text = load("comparison").tables(book.rows)
    assert "| full | - | 0 % [0.00, " in text
    assert text.endswith("- full: It is.")
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    with pytest.raises(SystemExit, match="take another --workdir"):
        methods.Book(tmp_path / "rows.jsonl", {"case": "b"})


def compared_row(name: str, disagreement: float, flops: float | None, mean: float, **details: Any) -> dict[str, Any]:
    latency = [{"batch_size": size, "mean": mean, "p50": mean, "p95": mean, "cached_mean_ms": mean} for size in (1, 32)]
    return {
        "name": name, "rule": None, "tolerance": 0.01, "guarantee": "None.", "n": 1000,
        "disagreements": round(1000 * disagreement), "disagreement": disagreement, "flops_ratio": flops,
        "interval": (disagreement / 2, 2 * disagreement), "latency": latency, "bytes": 2**20, "build_s": 1.0,
        "accuracy": None, "details": details,
    }  # fmt: skip


def test_ours_at_a_disagreement_lies_between_our_rows_and_the_full_model() -> None:
    comparison = load("comparison")
    rows = [compared_row("offramp", 0.01, 0.5, 0.6), compared_row("offramp", 0.03, 0.3, 0.4)]
    beaten = compared_row("offramp", 0.02, 0.9, 0.9)
    for disagreement, expected in ((0.0, 1.0), (0.005, 0.75), (0.01, 0.5), (0.02, 0.4), (0.03, 0.3), (0.5, 0.3)):
        assert comparison.ours_at(disagreement, [*rows, beaten], comparison.flops_ratio) == pytest.approx(expected)


def test_who_is_ahead_of_ours_is_named() -> None:
    comparison = load("comparison")
    ours = compared_row("offramp", 0.01, 0.5, 0.6)
    worse = compared_row("worse", 0.01, 0.55, 0.65)
    cheaper = compared_row("cheaper", 0.005, 0.7, 0.9)  # ours there: 0.75 of the FLOPs, 0.8 of the time
    fast = compared_row("int8", 0.01, None, 0.3)
    idle = compared_row("idle", 0.0, 1.0, 0.97, hit_rates={})  # the full model, as the clock has it
    failed = {"name": "failed", "rule": None, "tolerance": 0.01, "guarantee": "None.", "error": "E"}
    rows = [ours, worse, cheaper, fast, idle, failed]
    assert [row["name"] for row, _ in comparison.ahead(rows, comparison.flops_ratio)] == ["cheaper"]
    assert [row["name"] for row, _ in comparison.ahead(rows, comparison.batch_1_mean)] == ["int8"]
    text = comparison.tables(rows)
    assert "- cheaper, 1 %: FLOPs 0.70, ours 0.75" in text
    assert "- int8, 1 %: batch 1 mean time 0.30, ours 0.60" in text
    assert "nothing here is ahead" in comparison.tables([ours, worse])


def test_published_rows_stand_beside_what_was_measured(tmp_path: Path) -> None:
    needs_pillow()
    replication = load("replication")
    (tmp_path / "records").mkdir()
    agreement = np.zeros((10, 3), dtype=bool)
    agreement[:6, 0] = agreement[:9, 2] = True  # 60 % after block 1, 90 % after block 7, nothing at the input
    said = {"name": ["layers.0/fc", "input/mlp", "layers.6/fc"], "depth": [0.1, 0.0, 0.8], "bytes": [10, 20, 3_000_000]}
    for method in ("gati", "freeze", "offramp"):
        columns: dict[str, Any] = {name: np.array(values) for name, values in said.items()}
        columns["agreement"] = agreement
        np.savez(tmp_path / "records" / f"{method}.npz", **columns)
    certified = compared_row("offramp", 0.01, 0.5, 0.6, hit_rates={"layers.0/fc": 0.3, "layers.6/fc": 0.2})
    branches = compared_row("branchynet", 0.02, 0.75, 0.8, hit_rates={"a": 0.25, "b": 0.125})
    rows = [certified | {"rule": "certificate"}, branches | {"rule": "published"}]
    found = {(one.source, one.what): one.ours for one in replication.gati(tmp_path)}
    assert found["GATI", "agreement after block 1, %"] == "ours: fc 60.00; offramp: fc 60.00"
    assert "fc 3.00 MB at 90.00 %" in found["GATI", "size of a cache after block 7"]
    frozen = [one.ours for one in replication.freeze(tmp_path, rows)]
    assert frozen == ["freeze 60.0 %, offramp 60.0 %", "no row", "30.0 % at 1 %"]
    assert [one.ours for one in replication.branchynet(rows)] == [
        "no row",
        "at 1 %: 25.0 % fewer FLOPs, 20.0 % lower latency, 2.00 % differ, exits 25.0 / 12.5 / 62.5",
    ]
    assert [one.ours for one in replication.earlyon(rows)] == ["no row"]


def test_a_fit_that_fails_is_not_tried_for_every_row() -> None:
    needs_pillow()
    calls = []

    def make() -> None:
        calls.append(1)
        raise ValueError("after an hour")

    fitted = load("methods").once(make)
    for _ in range(3):
        with pytest.raises(ValueError, match="after an hour"):
            fitted()
    assert calls == [1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_from_images_to_rows_and_a_second_one_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_pillow()
    methods, common = load("methods"), load("common")

    def stream(rows: int, seed: int) -> Any:
        pixels, labels = images(rows, seed)
        return common.Images((32 * pixels + 128).clamp(0, 255).byte().numpy(), labels.numpy(), lambda x: x / 32 - 4)

    monkeypatch.setattr("offramp.recording.ASKED_ROWS", 0)  # no augmented copies: they only take time
    setup = methods.Setup("toy", classifier(), stream(500, 0), stream(900, 1), stream(150, 2))
    options = argparse.Namespace(
        tolerances=[0.1],
        methods=["freeze", "offramp"],
        opponents=["full model, eager", "every cache tuned alone", "Apparate's tuner"],
        time_budget=60.0,
        latency_budget=0.05,
    )

    def run() -> Any:
        book = methods.Book(tmp_path / "rows.jsonl", {})
        methods.run(setup, options, book, tmp_path)
        return book

    rows = run().rows
    assert [(row["name"], row["rule"]) for row in rows if row["tolerance"] not in methods.OUR_ENDS[:2]] == [
        ("offramp", "certificate"),
        ("offramp", "published"),
        ("freeze", "certificate"),
        ("freeze", "published"),
        ("Apparate's tuner", "on our caches"),
        ("every cache tuned alone", "on our caches"),
        ("full model, eager", None),
    ]
    for row in rows:
        assert "error" not in row, row
        assert row["n"] == 150
    size = (tmp_path / "rows.jsonl").stat().st_size
    assert run().rows == json.loads(json.dumps(rows))
    assert (tmp_path / "rows.jsonl").stat().st_size == size
    breaches = load("breaches")
    recorded, costs = breaches.load(tmp_path / "records" / "freeze-0.1.npz")
    assert recorded.confidence_NK.shape == recorded.answer_NK.shape
    assert ((recorded.answer_NK == recorded.backbone_answer_N[:, None]) == recorded.agreement_NK).all()
    assert len(costs.before_K) == recorded.confidence_NK.shape[1]


def test_surely_above_is_the_exact_binomial_tail() -> None:
    needs_pillow()
    breaches = load("breaches")
    n, tolerance = 300, 0.02
    tail = [
        sum(math.comb(n, k) * tolerance**k * (1 - tolerance) ** (n - k) for k in range(errors, n + 1))
        for errors in range(20)
    ]
    found = breaches.surely_above(np.arange(20), n, tolerance)
    assert found.tolist() == [probability <= 0.05 for probability in tail]
    assert not found[int(n * tolerance) + 1], "a share just above the tolerance proves nothing"


def test_our_rule_is_what_choose_certifies() -> None:
    needs_pillow()
    breaches = load("breaches")
    (tune, costs), (certify, _) = traffic(300), traffic(700, seed=1)
    for tolerance in (0.004, 0.03):
        path = plan_path(tune, costs, 3 * tolerance)
        errors = [int(outcomes(certify, candidate.thresholds_K)[1].sum()) for candidate in path]
        verdict = certify_path(errors, len(certify), tolerance, 0.95)
        expected = path[verdict.index].thresholds_K if verdict.index >= 0 else (OFF,) * 3
        assert breaches.certified(tune, certify, costs, tolerance) == expected


def test_breaches_are_counted_on_inputs_that_no_rule_saw(tmp_path: Path) -> None:
    needs_pillow()
    breaches, rules = load("breaches"), load("opponents.rules")
    everything = records(np.full((200, 1), 0.9), np.arange(200)[:, None] >= 20)  # one answer in ten differs
    file = tmp_path / "records.npz"
    np.savez(
        file,
        confidence=everything.confidence_NK,
        agreement=everything.agreement_NK,
        reads=np.array([-1]),
        before=np.array([0.2]),
        cache=np.array([0.01]),
    )
    loaded, costs = breaches.load(file)

    def broken(*_: Any) -> Any:
        raise RuntimeError("does not fit")

    chosen = [
        rules.Rule("always", "none", lambda *_: (0.5,)),
        rules.Rule("never", "none", lambda *_: (OFF,)),
        rules.Rule("broken", "none", broken),
    ]
    told: list[str] = []
    options = argparse.Namespace(draws=5, seed=0, tolerances=[0.01, 0.5])
    counts, n = breaches.counted(loaded, costs, chosen, options, told.append)
    assert n == 200 - round(0.6 * 200)
    rows = {(row["rule"], row["tolerance"]): row for row in (count.row("made up", n) for count in counts)}
    assert rows["always", 0.01]["breaches_by_share"] == rows["always", 0.01]["breaches_by_test"] == 1.0
    assert rows["always", 0.5]["breaches_by_share"] == 0.0
    assert rows["always", 0.01]["cost_mean"] == pytest.approx(0.21)
    assert rows["never", 0.01]["draws_without_caches"] == 5
    assert rows["broken", 0.01]["error"] == "RuntimeError: does not fit"
    assert told[-1].startswith("draw 5 of 5")
    text = breaches.table(list(rows.values()))
    assert "| broken | 1 % | failed: RuntimeError: does not fit |" in text
    assert {line.count("|") for line in text.splitlines()} == {9}
    json.dumps(list(rows.values()))


def test_published_rules_see_all_that_is_held_out_or_tune_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_pillow()
    breaches = load("breaches")
    (tune, costs), (certify, _) = traffic(30), traffic(50, seed=1)
    seen: list[int] = []

    class Fake:
        def thresholds(self, given: Records, _costs: CacheCosts, _tolerance: float) -> tuple[float, ...]:
            seen.append(len(given))
            return (OFF,) * 3

    monkeypatch.setattr(breaches, "method_named", lambda _name: Fake())
    for see in ("all", "tune"):
        breaches.published("fake", see).thresholds(tune, certify, costs, 0.01)
    assert seen == [80, 30]


def test_modules_of_opponents_import_without_the_packages_that_they_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino", "nncf", "earlyon", "mapie", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.split(".")[0] == "opponents"]:
        monkeypatch.delitem(sys.modules, name)
    package = load("opponents")
    names = [one.name for one in (*package.OPPONENTS, *package.RULES)]
    assert len(set(names)) == len(names) == 12
    assert all(one.guarantee.endswith(".") for one in (*package.OPPONENTS, *package.RULES))
