"""The cached model: exact on a miss, right rows in the right order, closed whenever something fails."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from models import (
    ALWAYS,
    NEVER,
    OPEN,
    Counting,
    FixedCache,
    bare,
    cached_model,
    close,
    constant,
    images,
    in_a_dict,
    in_a_tuple,
    learned,
    plain,
    say_class,
    thresholds_at,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from offramp.caches import LearnedCache
from offramp.errors import InputError
from offramp.model import BACKBONE, BROKEN_AFTER, CachedModel, Prediction
from offramp.splitting import SplitModel, split
from offramp.streams import Batch
from offramp.tasks import Classification
from offramp.types import Certificate, Plan


@pytest.fixture(scope="module")
def three(cnn: SplitModel) -> list[LearnedCache]:
    """Caches at the input, in the middle and at the last point; the later two read the first one's logits."""
    torch.manual_seed(1)
    first = learned(cnn.points[0], 5, "student")
    middle, last = cnn.points[2], cnn.points[-1]
    return [first, learned(middle, 5, "mlp", first), learned(last, 5, "linear", first)]


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_without_hits_the_answers_are_the_backbones(cnn: SplitModel, three: list[LearnedCache], rows: int) -> None:
    cached = cached_model(cnn, three, [NEVER] * 3)
    prediction = cached.predict(images(rows))
    close(prediction.output, plain(cached, images(rows)))
    assert prediction.left_at_B.tolist() == [3] * rows
    assert prediction.confidence_B.tolist() == [1.0] * rows


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_is_answered_as_its_rows_are(
    cnn: SplitModel, three: list[LearnedCache], seed: int, *, compaction: bool
) -> None:
    shares = (0.5 * torch.rand(3, generator=torch.Generator().manual_seed(seed))).tolist()
    thresholds = thresholds_at(cnn, three, shares)
    cached = cached_model(cnn, three, thresholds, compaction=compaction)
    left: set[int] = set()
    for rows in (2, 5, 16):
        x = images(rows, seed)
        whole = cached.predict(x)
        single = [cached.predict(x[row : row + 1]) for row in range(rows)]
        close(whole.output, torch.cat([one.output for one in single]))
        close(whole.confidence_B, torch.cat([one.confidence_B for one in single]))
        assert torch.equal(whole.left_at_B, torch.cat([one.left_at_B for one in single]))
        close(cached(x), whole.output)
        left |= set(whole.left_at_B.tolist())
    assert len(left) > 1, "the thresholds should part the rows, or the test shows nothing"


def test_compaction_changes_no_answer(cnn: SplitModel, three: list[LearnedCache]) -> None:
    x = images(20)
    thresholds = thresholds_at(cnn, three, [0.3, 0.4, 0.5])
    on, off = (cached_model(cnn, three, thresholds, compaction=flag).predict(x) for flag in (True, False))
    assert len(on.left_at_B.unique()) == 4
    close(on.output, off.output)
    assert torch.equal(on.left_at_B, off.left_at_B)


def test_rows_that_leave_get_the_caches_logits_and_the_others_the_backbones(
    cnn: SplitModel, three: list[LearnedCache]
) -> None:
    x = images(24)
    cached = cached_model(cnn, three[:1], thresholds_at(cnn, three[:1], [0.5]))
    prediction = cached.predict(x)
    hit = prediction.left_at_B == 0
    assert 0 < int(hit.sum()) < len(x)
    with torch.no_grad():
        logits = three[0](x)
    close(prediction.output[hit], logits[hit])
    close(prediction.confidence_B[hit], three[0].confidence(logits)[hit])
    close(prediction.output[~hit], plain(cached, x)[~hit])
    assert torch.equal(prediction.answer_B, prediction.output.argmax(1))


def test_a_threshold_is_met_when_it_is_equalled(cnn: SplitModel) -> None:
    cache = FixedCache(cnn.points[0], 5, say_class(3), constant(0.5))
    assert cached_model(cnn, [cache], [0.5]).predict(images(3)).left_at_B.tolist() == [0, 0, 0]


# --- what is not needed is not run ----------------------------------------------------------------


def test_no_stage_runs_when_the_first_cache_answers_all(cnn: SplitModel) -> None:
    later = FixedCache(cnn.points[2], 5, say_class(1), constant(1.0))
    cached = cached_model(cnn, [FixedCache(cnn.points[0], 5, say_class(3), constant(1.0)), later], [ALWAYS] * 2)
    with Counting(cnn) as rows:
        assert cached(images(6)).argmax(1).tolist() == [3] * 6
    assert rows == [[]] * len(cnn.stages)
    assert later.calls == []


def test_stages_behind_the_last_row_do_not_run(cnn: SplitModel) -> None:
    cached = cached_model(cnn, [FixedCache(cnn.points[2], 5, say_class(3), constant(1.0))], [ALWAYS])
    with Counting(cnn) as rows:
        cached(images(6))
    assert rows == [[6], [6]] + [[]] * (len(cnn.stages) - 2)


def first_rows_sure(x: Tensor) -> Tensor:
    """Sure of rows whose mean is above 0."""
    return (x.flatten(1).mean(1) > 0).float()


@pytest.mark.parametrize("compaction", [True, False])
def test_later_stages_and_caches_see_only_the_missing_rows(cnn: SplitModel, *, compaction: bool) -> None:
    x = torch.ones(8, 3, 16, 16) * torch.tensor([1.0, -1, -1, 1, 1, -1, 1, 1]).view(-1, 1, 1, 1)
    caches = [
        FixedCache(cnn.points[0], 5, say_class(3), first_rows_sure),
        FixedCache(cnn.points[1], 5, say_class(4), constant(0.0)),
    ]
    cached = cached_model(cnn, caches, [0.5, 0.5], compaction=compaction)
    with Counting(cnn) as rows:
        prediction = cached.predict(x)
    seen = 3 if compaction else 8
    assert rows == [[seen]] * len(cnn.stages)
    assert caches[1].calls == [seen]
    assert prediction.left_at_B.tolist() == [0, 2, 2, 0, 0, 2, 0, 0]
    close(prediction.output[[1, 2, 5]], plain(cached, x)[[1, 2, 5]])


def test_a_row_once_answered_is_not_answered_again(cnn: SplitModel) -> None:
    x = torch.cat([torch.ones(2, 3, 16, 16), -torch.ones(2, 3, 16, 16)])
    caches = [
        FixedCache(cnn.points[0], 5, say_class(3), first_rows_sure),
        FixedCache(cnn.points[1], 5, say_class(4), constant(1.0)),
    ]
    prediction = cached_model(cnn, caches, [0.5, 0.5], compaction=False).predict(x)
    assert prediction.left_at_B.tolist() == [0, 0, 1, 1]
    assert prediction.answer_B.tolist() == [3, 3, 4, 4]


def test_two_caches_at_one_point(cnn: SplitModel) -> None:
    x = torch.cat([torch.ones(2, 3, 16, 16), -torch.ones(2, 3, 16, 16)])
    caches = [
        FixedCache(cnn.points[0], 5, say_class(3), first_rows_sure, "one"),
        FixedCache(cnn.points[0], 5, say_class(4), lambda a: 1 - first_rows_sure(a), "two"),
    ]
    for compaction in (True, False):
        caches[1].calls.clear()
        prediction = cached_model(cnn, caches, [0.5, 0.5], compaction=compaction).predict(x)
        assert prediction.answer_B.tolist() == [3, 3, 4, 4]
        assert caches[1].calls == [2 if compaction else 4]


# --- what the device is waited for ----------------------------------------------------------------


class Waits(TorchFunctionMode):
    """Notes what would make a caller wait for a GPU: values that are read, and tensors whose size depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READ or (name in INDEXED and any(_is_mask(key) for key in pytree.tree_leaves(args[1]))):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


READ = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose"}
READ |= {"nonzero", "argwhere", "masked_select", "unique", "bincount", "repeat_interleave"}
INDEXED = {"__getitem__", "__setitem__"}


def _is_mask(key: object) -> bool:
    return isinstance(key, Tensor) and key.dtype is torch.bool


def test_waits_are_seen() -> None:
    x = torch.tensor([1.0, -1.0])
    with Waits() as waits:
        int((x > 0).sum())
        float(x[0])
        bool(x.any())
        x.tolist()
        x[x > 0]
        x[x < 0] = 2.0
        x.nonzero()
        x[torch.tensor([0])]
    assert waits.seen == ["__int__", "__float__", "__bool__", "tolist", "__getitem__", "__setitem__", "nonzero"]


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize("rows", [1, 16])
def test_the_device_is_waited_for_once_per_enabled_cache(
    cnn: SplitModel, three: list[LearnedCache], rows: int, *, compaction: bool
) -> None:
    cached = cached_model(cnn, three, thresholds_at(cnn, three, [0.3] * 3), compaction=compaction)
    exits: set[int] = set()
    for seed in range(5):
        x = images(rows, seed)
        with Waits() as waits:
            cached(x)
        left_at = cached.predict(x).left_at_B.tolist()
        assert waits.seen == ["tolist"] * min(max(left_at) + 1, len(three)), "none behind the last row"
        exits |= set(left_at)
    assert len(exits) > 1, "some rows should hit and some miss, or the test shows nothing"


# --- what goes in and what comes out --------------------------------------------------------------


def test_empty_batch(cnn: SplitModel, three: list[LearnedCache]) -> None:
    for cached in (
        cached_model(cnn, three, [0.5] * 3),
        cached_model(cnn),
        cached_model(cnn, three, [0.5] * 3, bypass=(1,)),
    ):
        assert cached(images(4)[:0]).shape == (0, 5)
        prediction = cached.predict(images(4)[:0])
        assert (len(prediction.answer_B), len(prediction.left_at_B), len(prediction.confidence_B)) == (0, 0, 0)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=["channels-last", "strided", "transposed"],
)
def test_memory_layout_does_not_matter(
    cnn: SplitModel, three: list[LearnedCache], form: Callable[[Tensor], Tensor]
) -> None:
    cached = cached_model(cnn, three, thresholds_at(cnn, three, [0.3] * 3))
    x = images(9)
    one, other = cached.predict(x), cached.predict(form(x))
    close(one.output, other.output)
    assert torch.equal(one.left_at_B, other.left_at_B)


def test_under_inference_mode_and_with_gradients_on(cnn: SplitModel, three: list[LearnedCache]) -> None:
    cached = cached_model(cnn, three, [0.7] * 3)
    x = images(5)
    expected = cached(x)
    with torch.inference_mode():
        close(cached(x), expected)
    with torch.enable_grad():
        assert not cached(x.clone().requires_grad_()).requires_grad
    assert not expected.requires_grad


@pytest.mark.parametrize("form", [bare, in_a_tuple, in_a_dict])
@pytest.mark.parametrize("threshold", [ALWAYS, NEVER])
def test_the_output_has_the_backbones_type(form: Callable[[Tensor, Tensor], object], threshold: float) -> None:
    torch.manual_seed(0)
    backbone = models.Wrapped(form).eval()
    x = torch.randn(5, 6)
    split_model = split(backbone, x)
    cached = cached_model(split_model, [learned(split_model.points[0], 3)], [threshold])
    output, expected = cached(x), backbone(x)
    assert type(output) is type(expected)
    leaves, expected_leaves = pytree.tree_leaves(output), pytree.tree_leaves(expected)
    assert [type(leaf) for leaf in leaves] == [type(leaf) for leaf in expected_leaves]
    if threshold == NEVER:
        close(leaves[0], expected_leaves[0])


def test_a_model_of_transformers_keeps_its_output_type() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `hf`)")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    backbone = transformers.BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(1, 40, (6, 7)), "attention_mask": torch.ones(6, 7, dtype=torch.long)}
    inputs["attention_mask"][::2, 4:] = 0
    split_model = split(backbone, inputs)
    middle = split_model.points[1]
    for threshold in (NEVER, 0.5):
        cached = cached_model(split_model, [learned(middle, 3, "mlp")], [threshold])
        output = cached(**inputs, token_type_ids=None)
        with torch.no_grad():
            expected = backbone(**inputs)
        assert type(output) is type(expected)
        miss = cached.predict(**inputs).left_at_B == 1
        assert bool(miss.all()) == (threshold == NEVER)
        close(output.logits[miss], expected.logits[miss])


def test_half_precision_backbone_gets_answers_of_its_own_type() -> None:
    torch.manual_seed(0)
    backbone = models.mlp().to(torch.bfloat16).eval()
    x = torch.randn(6, 6).bfloat16()
    split_model = split(backbone, x)
    cached = cached_model(split_model, [learned(split_model.points[0], 3)], [0.6])
    prediction = cached.predict(x)
    assert prediction.output.dtype == torch.bfloat16
    assert prediction.confidence_B.dtype == torch.float32


def test_several_inputs_by_position_or_by_name() -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 50, (6, 9)), torch.ones(6, 9, dtype=torch.long)
    mask[::2, 5:] = 0
    split_model = split(models.MaskedEncoder().eval(), (ids, mask))
    cache = learned(split_model.points[2], 4, "mlp")
    cached = cached_model(split_model, [cache], [0.6])
    expected = cached.predict(ids, mask)
    for other in (cached.predict(ids, attention_mask=mask), cached.predict(attention_mask=mask, input_ids=ids)):
        close(other.output, expected.output)
        assert torch.equal(other.left_at_B, expected.left_at_B)


# --- mistakes of the caller -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "called with tensors"),
        (([1.0, 2.0],), "called with tensors.*list"),
        ((torch.zeros(2, 3, 8, 8),), r"`x` has shape \(2, 3, 8, 8\).*expected"),
        ((torch.zeros(2, 3, 16, 16, dtype=torch.float64),), "float64.*expected"),
        ((torch.tensor(1.0),), r"share their first dimension.*\(\)"),
        ((torch.zeros(2, 3, 16, 16), torch.zeros(2)), "cannot be called with 2 positional"),
        ((torch.zeros(2, 3, 16, 16), torch.zeros(3)), "share their first dimension"),
    ],
)
@pytest.mark.parametrize("bypass", [(), (1, 8, 32)], ids=["caches", "bypass"])
def test_wrong_input_is_explained(
    cnn: SplitModel, three: list[LearnedCache], arguments: tuple[Any, ...], message: str, bypass: tuple[int, ...]
) -> None:
    cached = cached_model(cnn, three, [0.7] * 3, bypass=bypass)
    for call in (cached, cached.predict):
        with pytest.raises(InputError, match=message):
            call(*arguments)


def test_there_is_no_train_mode(cnn: SplitModel, three: list[LearnedCache]) -> None:
    cached = cached_model(cnn, three, [0.7] * 3)
    with pytest.raises(InputError, match="no train mode"):
        cached.train()
    assert cached.eval() is cached
    assert not any(module.training for module in cached.modules())


def test_caches_that_do_not_fit_the_plan_or_the_backbone_are_refused(
    cnn: SplitModel, three: list[LearnedCache]
) -> None:
    cached = cached_model(cnn, three, [0.7] * 3)
    table, task = cached.costs, Classification()
    with pytest.raises(InputError, match="not those of the plan"):
        CachedModel(cnn, three[:1], cached.plan, OPEN, table, task=task, summary={})
    elsewhere = copy.deepcopy(three[0])
    elsewhere.point = "nowhere"
    with pytest.raises(InputError, match="sits at split point 'nowhere'"):
        cached_model(cnn, [elsewhere], [0.7])
    with pytest.raises(InputError, match="met after it"):
        cached_model(cnn, [three[1], three[0]], [0.7, 0.7])


def test_an_output_that_is_no_classification_is_refused() -> None:
    split_model = split(models.Wrapped(lambda logits, features: (logits, features)).eval(), torch.randn(4, 6))
    with pytest.raises(InputError, match="returns only its logits"):
        cached_model(split_model)


# --- fail closed ----------------------------------------------------------------------------------


def fails(_x: Tensor) -> Tensor:
    raise RuntimeError("broken cache")


BROKEN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "raises": (fails, constant(1.0)),
    "raises in confidence": (say_class(0), fails),
    "one row for all": (lambda _: torch.zeros(1, 5), lambda _: torch.ones(1)),
    "too few classes": (lambda x: torch.zeros(len(x), 4), constant(1.0)),
    "one class too many": (say_class(0, 6), constant(1.0)),
    "too few rows": (lambda x: torch.zeros(len(x) - 1, 5), lambda x: torch.ones(len(x) - 1)),
    "confidence per class": (say_class(0), lambda x: torch.ones(len(x), 5)),
    "one confidence": (say_class(0), lambda _: torch.tensor(1.0)),
    "no tensor": (lambda _: None, constant(1.0)),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_cache_is_a_miss_and_ends_caching(
    cnn: SplitModel, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    logits, confidence = BROKEN[kind]
    broken = FixedCache(cnn.points[1], 5, logits, confidence)
    later = FixedCache(cnn.points[2], 5, say_class(1), constant(1.0))
    cached = cached_model(cnn, [broken, later], [0.5, 0.5])
    x = images(6)
    with caplog.at_level(logging.ERROR, logger="offramp"):
        for _ in range(3):
            prediction = cached.predict(x)
            close(prediction.output, plain(cached, x))
            assert prediction.left_at_B.tolist() == [2] * 6
            close(cached(x), plain(cached, x))
    assert [record.message for record in caplog.records] == [
        f"cache {broken.name} failed; it and all later caches are switched off"
    ]
    assert later.calls == []


def test_caches_before_a_broken_one_go_on(cnn: SplitModel, caplog: pytest.LogCaptureFixture) -> None:
    good = FixedCache(cnn.points[0], 5, say_class(3), first_rows_sure)
    cached = cached_model(cnn, [good, FixedCache(cnn.points[1], 5, fails, fails)], [0.5, 0.5])
    x = torch.cat([torch.ones(2, 3, 16, 16), -torch.ones(2, 3, 16, 16)])
    with caplog.at_level(logging.CRITICAL, logger="offramp"):
        for _ in range(2):
            assert cached.predict(x).left_at_B.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize("compaction", [True, False])
def test_nan_is_a_miss_also_for_the_caches_behind(cnn: SplitModel, *, compaction: bool) -> None:
    x = images(6)

    def nan_for_some(a: Tensor) -> Tensor:
        return torch.tensor([1.0, torch.nan, 0.0, torch.nan, 1.0, 0.0])[: len(a)]

    caches = [
        FixedCache(cnn.points[0], 5, say_class(3), nan_for_some),
        FixedCache(cnn.points[2], 5, say_class(4), constant(1.0)),
    ]
    prediction = (cached := cached_model(cnn, caches, [0.5, 0.5], compaction=compaction)).predict(x)
    assert prediction.left_at_B.tolist() == [0, 2, 1, 2, 0, 1]
    close(prediction.output[[1, 3]], plain(cached, x)[[1, 3]])
    assert not prediction.confidence_B.isnan().any()


def test_weights_that_became_nan_are_a_miss(cnn: SplitModel, three: list[LearnedCache]) -> None:
    caches = copy.deepcopy(three)
    with torch.no_grad():
        caches[0].head.weight.fill_(torch.nan)
    cached = cached_model(cnn, caches, [ALWAYS] * 3)
    prediction = cached.predict(images(7))
    assert prediction.left_at_B.tolist() == [3] * 7
    close(prediction.output, plain(cached, images(7)))


# --- restricted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_what_a_restricted_cache_refuses_goes_to_the_backbone(
    cnn: SplitModel, three: list[LearnedCache], seed: int, *, compaction: bool
) -> None:
    x = images(40, seed)
    thresholds = thresholds_at(cnn, three, [0.4, 0.5, 0.6])
    plan = cached_model(cnn, three, thresholds, compaction=compaction)
    before = plan.predict(x)
    draw = torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()
    limits = [math.inf if u > 0.7 else t + (1 - t) * u for t, u in zip(thresholds, draw, strict=True)]
    after = plan.restricted(limits).predict(x)
    least_B = torch.tensor([*limits, 0.0])[before.left_at_B]
    kept = before.confidence_B >= least_B
    assert 0 < int(kept.sum()) < len(x)
    assert torch.equal(after.left_at_B, torch.where(kept, before.left_at_B, 3))
    close(after.output[kept], before.output[kept])
    close(after.output[~kept], plain(plan, x)[~kept])
    close(plan.predict(x).output, before.output)


def test_nothing_is_looked_up_behind_the_last_cache_that_may_answer(cnn: SplitModel) -> None:
    caches = [FixedCache(cnn.points[at], 5, say_class(at), constant(0.6)) for at in range(3)]
    cached = cached_model(cnn, caches, [0.5, 0.7, 0.5])
    assert cached.restricted([math.inf, 0.7, math.inf]).predict(images(4)).left_at_B.tolist() == [3] * 4
    assert [cache.calls for cache in caches] == [[4], [4], []]
    nothing = cached.restricted([math.inf] * 3)
    assert nothing.bypasses(1)
    assert torch.equal(nothing(images(4)), plain(cached, images(4)))
    assert [cache.calls for cache in caches] == [[4], [4], []]


# --- caches that read -----------------------------------------------------------------------------


class Listening(FixedCache):
    """Keeps the logits that it was given to read."""

    heard: Tensor | None = None

    def forward(self, activation: Tensor, read_BC: Tensor | None = None) -> Tensor:
        self.heard = read_BC
        return super().forward(activation)


@pytest.mark.parametrize("compaction", [True, False])
def test_a_cache_reads_the_logits_of_its_own_rows(cnn: SplitModel, *, compaction: bool) -> None:
    x = torch.tensor([1.0, -1, -2, 2, -3]).view(-1, 1, 1, 1).expand(5, 3, 16, 16)
    said = x[:, 0, 0, :5].clone()
    first = FixedCache(cnn.points[0], 5, lambda a: a[:, 0, 0, :5], first_rows_sure)
    second = Listening(cnn.points[3], 5, say_class(1), constant(0.0))
    second.reads = first.name
    cached_model(cnn, [first, second], [0.5, 0.5], compaction=compaction)(x)
    assert second.heard is not None
    assert torch.equal(second.heard, said[[1, 2, 4]] if compaction else said)


# --- the backbone stays as it was -----------------------------------------------------------------


def test_the_backbone_is_untouched(three: list[LearnedCache]) -> None:
    torch.manual_seed(0)
    backbone = models.ResidualNet().eval()
    backbone.layers[0].train()  # a mode of the user's own making
    backbone.layers[0].eval()
    handle = backbone.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    split_model = split(backbone, images(4))
    cached = cached_model(split_model, copy.deepcopy(three), [0.6] * 3, bypass=(32,))
    for rows in (1, 6, 32, 0):
        cached(images(rows))
        cached.predict(images(rows))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in backbone.parameters())
    assert [module.training for module in backbone.modules()] == modes
    assert list(backbone._forward_hooks) == [handle.id]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in list(backbone.modules())[1:])
    assert not set(map(id, cached.parameters())) & set(map(id, backbone.parameters())), "the caches' only"
    assert all(name.startswith("caches.") for name in cached.state_dict())


# --- bypass ---------------------------------------------------------------------------------------


def test_batch_sizes_that_do_not_pay_run_the_backbone_alone(cnn: SplitModel) -> None:
    cache = FixedCache(cnn.points[0], 5, say_class(3), constant(1.0))
    cached = cached_model(cnn, [cache], [0.5], bypass=(8,))
    answered = {
        rows: cached.predict(images(rows)).left_at_B.tolist() == [0] * rows for rows in (1, 4, 6, 8, 19, 25, 50)
    }
    assert answered == {1: True, 4: True, 6: False, 8: False, 19: False, 25: True, 50: True}
    assert cached.bypasses(8)
    assert not cached.bypasses(32)
    with Counting(cnn) as rows:
        torch.testing.assert_close(cached(images(8)), plain(cached, images(8)), rtol=0, atol=0)
    assert rows == [[]] * len(cnn.stages), "the backbone itself runs, not its stages"
    assert cache.calls == [1, 4, 25, 50]


def test_a_plan_without_caches_is_the_backbone(cnn: SplitModel) -> None:
    cached = cached_model(cnn)
    x = images(5)
    assert torch.equal(cached(x), plain(cached, x))
    prediction = cached.predict(x)
    assert cached.exits == (BACKBONE,)
    assert prediction.left_at_B.tolist() == [0] * 5
    close(prediction.output, plain(cached, x))


# --- the rest -------------------------------------------------------------------------------------


def test_concurrent_calls_get_their_own_answers(cnn: SplitModel, three: list[LearnedCache]) -> None:
    cached = cached_model(cnn, three, thresholds_at(cnn, three, [0.3] * 3))
    inputs = [images(1 + seed % 5, seed) for seed in range(40)]
    expected = [cached.predict(x) for x in inputs]

    def ask(x: Tensor) -> Prediction:
        return cached.predict(x)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, inputs))
    for one, other in zip(answers, expected, strict=True):
        assert torch.equal(one.output, other.output)
        assert torch.equal(one.left_at_B, other.left_at_B)


def test_report_holds_the_summary_the_plan_and_the_certificate(cnn: SplitModel, three: list[LearnedCache]) -> None:
    made = cached_model(cnn, three, [0.7] * 3)
    cached = CachedModel(
        cnn, three, replace(made.plan, reason="why"), OPEN, made.costs, task=Classification(), summary={"offramp": "1"}
    )
    report = cached.report()
    assert (report["offramp"], report["plan"]["reason"]) == ("1", "why")
    assert Certificate.from_json(report["certificate"]) == OPEN
    assert Plan.from_json(report["plan"]) == cached.plan


def test_rows_of_the_example_are_answered(cnn: SplitModel, three: list[LearnedCache]) -> None:
    example: Batch = cnn.example
    assert cached_model(cnn, three, [0.7] * 3)(*example.args).shape == (len(example), 5)


def test_a_cache_that_says_nothing_but_nan_is_switched_off(
    cnn: SplitModel, three: list[LearnedCache], caplog: pytest.LogCaptureFixture
) -> None:
    cached = models.cached_model(cnn, three, [0.5] * len(three))
    with torch.no_grad():
        three[0].head.weight.fill_(torch.nan)
    for _ in range(BROKEN_AFTER - 1):
        cached(images(2))
    assert not caplog.records
    cached(images(2))
    assert [record.message for record in caplog.records] == [
        f"cache {three[0].name} failed; it and all later caches are switched off"
    ]
    assert cached.bypasses(1)


def test_inputs_that_are_nan_themselves_break_no_cache(cnn: SplitModel, three: list[LearnedCache]) -> None:
    cached = models.cached_model(cnn, three, [0.5] * len(three))
    for _ in range(2 * BROKEN_AFTER):
        cached(torch.full((2, 3, 16, 16), torch.nan))
    assert not cached.bypasses(1)


def test_where_rows_left_is_told_beside_the_output(cnn: SplitModel, three: list[LearnedCache]) -> None:
    cached = models.cached_model(cnn, three, models.thresholds_at(cnn, three, [0.5] * len(three)))
    for rows in (0, 1, 7):
        x = images(rows)
        served, prediction = cached.serve(Batch((x,))), cached.predict(x)
        assert torch.equal(served.output, prediction.output)
        assert list(served.left_at()) == prediction.left_at_B.tolist()
    bypassed = models.cached_model(cnn, three, [0.5] * len(three), bypass=(1, 8, 32))
    assert list(bypassed.serve(Batch((images(3),))).left_at()) == [len(three)] * 3
