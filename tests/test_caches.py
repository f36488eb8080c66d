"""Learned caches: every shape on every kind of activation, folding, and the way to disk and back."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.caches import CacheShape, LearnedCache, build_cache, reduction_for
from offramp.caches.reduction import FEATURE_LIMIT, HALF_MAX, Reduction
from offramp.confidence import Selector

CLASSES, VOCABULARY = 5, 30
ACTIVATIONS: dict[str, tuple[int, ...]] = {
    "map": (8, 12, 12),
    "image": (3, 32, 32),
    "large image": (3, 70, 70),
    "sequence": (20, 16),
    "vector": (16,),
    "tokens": (14,),
}
KINDS: dict[str, tuple[str, ...]] = {
    "map": ("linear", "mlp", "conv", "student"),
    "image": ("linear", "mlp", "conv", "student"),
    "large image": ("student",),
    "sequence": ("linear", "mlp", "transformer"),
    "vector": ("linear", "mlp"),
    "tokens": ("linear", "mlp", "transformer"),
}
PAIRS = [(activation, kind) for activation, kinds in KINDS.items() for kind in kinds]


def make(activation: str, kind: Any, *, reads: str | None = None, depth: int = 1) -> LearnedCache:
    """With batch statistics that are not the initial ones, so that folding has something to do."""
    torch.manual_seed(0)
    shape = ACTIVATIONS[activation]
    cache = LearnedCache(
        f"p/{kind}",
        "p",
        CacheShape(kind, 0 if kind == "linear" else 32, depth),
        shape,
        CLASSES,
        reduction=reduction_for(shape, is_input=kind == "student" or activation == "tokens"),
        vocabulary=VOCABULARY if activation == "tokens" else 0,
        reads=reads,
    )
    for module in cache.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 2)
    cache.blend = (0.8, 0.6)
    return cache.eval()


def rows(activation: str, count: int = 6) -> Tensor:
    random = torch.Generator().manual_seed(count)
    shape = (count, *ACTIVATIONS[activation])
    if activation == "tokens":
        return torch.randint(0, VOCABULARY, shape, generator=random)
    return torch.randn(shape, generator=random)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "kind"), PAIRS)
@torch.no_grad()
def test_every_shape_answers_every_kind_of_activation(activation: str, kind: str) -> None:
    cache, x = make(activation, kind), rows(activation)
    logits = cache(x)
    assert logits.shape == (6, CLASSES)
    assert bool(logits.isfinite().all())
    confidence = cache.confidence(logits)
    assert confidence.shape == (6,)
    assert bool(((confidence >= 0) & (confidence <= 1)).all())
    close(cache.from_feature(cache.reduction(x)), logits)
    close(cache(x[2:3]), logits[2:3])
    close(cache(x[[4, 0]]), logits[[4, 0]])


@pytest.mark.parametrize(("activation", "kind"), PAIRS)
@torch.no_grad()
def test_described_and_built_again_it_is_the_same(activation: str, kind: str) -> None:
    for folded, selector in itertools.product((False, True), repeat=2):
        cache, x, read = make(activation, kind, reads="other", depth=2), rows(activation), torch.randn(6, CLASSES)
        if folded:
            cache.fold()
        if selector:
            fitted = Selector(7)
            fitted.weight.copy_(torch.arange(7.0) / 7)
            cache.use_confidence("selector", fitted)
        built = build_cache(json.loads(json.dumps(cache.describe())))
        built.load_state_dict(cache.state_dict())
        assert built.describe() == cache.describe()
        assert not any(module.training for module in built.modules())
        logits = cache(x, read)
        torch.testing.assert_close(built(x, read), logits, rtol=0, atol=0)
        torch.testing.assert_close(built.confidence(logits, read), cache.confidence(logits, read), rtol=0, atol=0)


@pytest.mark.parametrize(("activation", "kind"), [pair for pair in PAIRS if pair[1] in ("conv", "student")])
@torch.no_grad()
def test_folding_keeps_the_answers_with_fewer_operations(activation: str, kind: str) -> None:
    cache, x = make(activation, kind, depth=2), rows(activation)
    before = cache(x)
    cache.fold()
    close(cache(x), before)
    left = [module for module in cache.modules() if isinstance(module, nn.BatchNorm2d)]
    pools = [module for module in cache.modules() if isinstance(module, nn.MaxPool2d)]
    assert len(left) == len(pools) + (kind == "conv"), "those behind a pool or before the first convolution stay"
    names = list(cache.state_dict())
    cache.fold()
    assert list(cache.state_dict()) == names, "folding twice changes nothing"


@torch.no_grad()
def test_a_reading_cache_needs_and_uses_what_it_reads() -> None:
    cache, x = make("vector", "mlp", reads="first"), rows("vector")
    with pytest.raises(ValueError, match="reads the logits of first, which were not given"):
        cache(x)
    read = 5 * torch.randn(6, CLASSES)
    own = make("vector", "mlp")(x)
    close(cache(x, read), 0.8 * own + 0.6 * read.log_softmax(1).clamp(min=-10))
    very_sure = torch.full((6, CLASSES), -1e30)
    very_sure[:, 0] = 1e30
    assert bool(cache(x, very_sure).isfinite().all())


@torch.no_grad()
def test_token_ids_that_training_never_met_are_no_error() -> None:
    for kind in KINDS["tokens"]:
        assert make("tokens", kind)(rows("tokens") + 1000).shape == (6, CLASSES)


@torch.no_grad()
def test_memory_layout_and_half_precision_do_not_matter() -> None:
    cache, x = make("map", "conv"), rows("map")
    close(cache(x.to(memory_format=torch.channels_last)), cache(x))
    torch.testing.assert_close(cache(x.half()), cache(x.half().float()), rtol=0.02, atol=0.02)
    assert cache(x.bfloat16()).dtype == torch.float32


# --- reductions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "is_input", "expected"),
    [
        ((3, 32, 32), True, (3, 32, 32)),
        ((16, 8, 8), False, (16, 8, 8)),
        ((16, 32, 32), False, (16, 8, 8)),
        ((64, 12, 20), False, (64, 8, 8)),
        ((256, 8, 8), False, (256, 4, 4)),
        ((512, 4, 4), False, (512, 2, 2)),
        ((4096, 7, 7), False, (4096, 1, 1)),
        ((8, 1, 1), False, (8, 1, 1)),
        ((197, 192), False, (9, 192)),
        ((128, 768), False, (5, 768)),
        ((9, 16), False, (9, 16)),
        ((64,), False, (64,)),
    ],
)
def test_reductions_keep_what_fits_in_half_precision(
    shape: tuple[int, ...], expected: tuple[int, ...], *, is_input: bool
) -> None:
    reduced = reduction_for(shape, is_input=is_input)(torch.randn(2, *shape))
    assert tuple(reduced.shape[1:]) == expected
    assert reduced.dtype == torch.float16
    assert is_input or len(shape) < 2 or reduced[0].numel() <= FEATURE_LIMIT or expected[1:] == (1, 1)


def test_reducing_pools_and_keeps_the_first_token_apart() -> None:
    x = torch.arange(2 * 16 * 4.0).reshape(2, 16, 4) / 128
    reduced = Reduction(2)(x).float()
    torch.testing.assert_close(reduced[:, 0], x[:, 0])
    torch.testing.assert_close(reduced[:, 1], x[:, :8].mean(1))
    torch.testing.assert_close(reduced[:, 2], x[:, 8:].mean(1))
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Reduction(2)(image).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


def test_large_values_are_clamped_and_integers_stay() -> None:
    assert Reduction()(torch.tensor([[1e9, -1e9, 1.0]])).tolist() == [[HALF_MAX, -HALF_MAX, 1.0]]
    ids = torch.tensor([[1, 70_000]])
    assert torch.equal(Reduction()(ids), ids)
    assert bool(Reduction()(torch.tensor([[float("nan")]])).isnan().all()), "NaN must stay visible: it is a miss"


def test_labels_name_the_shape() -> None:
    assert [CacheShape("linear").label, CacheShape("mlp", 64, 2).label] == ["linear", "mlp64x2"]


# --- the published shapes -------------------------------------------------------------------------

PUBLISHED = [
    CacheShape("layers"),
    CacheShape("layers", hidden=(1024,)),
    CacheShape("layers", pooled=64, hidden=(32,)),
    CacheShape("layers", convolutions=((32, 3, 1), (64, 5, 2)), hidden=(64, 32)),
    CacheShape("conv1d", 3),
    CacheShape("conv1d", 4, 2),
]
PUBLISHED_PAIRS = [
    (activation, shape)
    for activation in ("map", "sequence", "vector")
    for shape in PUBLISHED
    if activation != "vector" or not shape.convolutions
]


def published(activation: str, shape: CacheShape) -> LearnedCache:
    torch.manual_seed(0)
    activation_shape = ACTIVATIONS[activation]
    reduction = reduction_for(activation_shape, is_input=False)
    return LearnedCache("p/c", "p", shape, activation_shape, CLASSES, reduction=reduction).eval()


@pytest.mark.parametrize(("activation", "shape"), PUBLISHED_PAIRS, ids=lambda value: getattr(value, "label", value))
@torch.no_grad()
def test_published_shapes_answer_row_by_row_and_can_be_built_again(activation: str, shape: CacheShape) -> None:
    cache, x = published(activation, shape), rows(activation)
    logits = cache(x)
    assert logits.shape == (6, CLASSES)
    close(cache.from_feature(cache.reduction(x)), logits)
    close(cache(x[[4, 0]]), logits[[4, 0]])
    close(cache(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x), logits)
    cache.fold()
    close(cache(x), logits)
    built = build_cache(json.loads(json.dumps(cache.describe())))
    built.load_state_dict(cache.state_dict())
    assert built.describe() == cache.describe()
    torch.testing.assert_close(built(x), cache(x), rtol=0, atol=0)


@torch.no_grad()
def test_layers_by_hand() -> None:
    """GATI's FC and Pool, and a branch of BranchyNet, on a map that the reduction leaves as it is."""
    x = torch.randn(3, 4, 6, 6).half().float()
    for shape in (
        CacheShape("layers", hidden=(10,)),
        CacheShape("layers", pooled=36, hidden=(10,)),
        CacheShape("layers", convolutions=((7, 3, 1), (5, 3, 2))),
    ):
        cache = LearnedCache("c", "p", shape, (4, 6, 6), CLASSES, reduction=Reduction()).eval()
        weights = list(cache.body.parameters())
        if shape.convolutions:
            hidden = nn.functional.conv2d(x, weights[0], weights[1], padding=1).relu()
            hidden = nn.functional.conv2d(hidden, weights[2], weights[3], stride=2, padding=1).relu().flatten(1)
            assert hidden.shape == (3, 5 * 3 * 3)
        else:
            flat = x.reshape(3, 36, 4).mean(2) if shape.pooled else x.reshape(3, 144)
            hidden = (flat @ weights[0].T + weights[1]).relu()
        close(cache(x), hidden @ cache.head.weight.T + cache.head.bias)


@torch.no_grad()
def test_convolution_over_the_flattened_activation_by_hand() -> None:
    """It begins as the identity; then with weights at random."""
    x = torch.randn(3, 2, 4, 4).half().float()
    cache = LearnedCache("c", "p", CacheShape("conv1d", 3), (2, 4, 4), CLASSES, reduction=Reduction()).eval()
    close(cache(x), cache.head(x.flatten(1).relu()))
    weight, bias = (nn.init.normal_(value).flatten() for value in cache.body.parameters())
    padded = nn.functional.pad(x.flatten(1), (1, 1))
    hidden = torch.stack([padded[:, i : i + 3] @ weight + bias for i in range(32)], dim=1).squeeze(-1).relu()
    close(cache(x), hidden @ cache.head.weight.T + cache.head.bias)
    assert sum(value.numel() for value in cache.body.parameters()) == 4


def test_published_shapes_have_a_weight_for_every_number_that_is_recorded() -> None:
    """4,096 of 65,536, as in GATI's Pool(4096)."""
    cache = LearnedCache(
        "c",
        "p",
        CacheShape("layers", hidden=(1024,)),
        (64, 32, 32),
        10,
        reduction=reduction_for((64, 32, 32), is_input=False),
    )
    assert sum(value.numel() for value in cache.body.parameters()) == 4096 * 1024 + 1024
    assert cache.head.in_features == 1024


def test_convolutions_need_positions() -> None:
    with pytest.raises(
        ValueError, match=r"layers-8k3s1 has convolutions, and activations of shape \(16,\) no positions"
    ):
        published("vector", CacheShape("layers", convolutions=((8, 3, 1),)))


def test_labels_of_published_shapes_tell_them_apart() -> None:
    expected = ["layers", "layers-1024", "layers-pool64-32", "layers-32k3s1-64k5s2-64-32", "conv1d3x1", "conv1d4x2"]
    assert [shape.label for shape in PUBLISHED] == expected


@pytest.mark.parametrize("sides", [(8, 8), (6, 12), (7, 7), (6, 9)])
def test_a_map_is_pooled_to_the_means_of_its_cells(sides: tuple[int, int]) -> None:
    x = torch.randn(2, 600, *sides)
    for layout in (torch.contiguous_format, torch.channels_last):
        pooled = Reduction(2)(x.to(memory_format=layout))
        torch.testing.assert_close(pooled.float(), F.adaptive_avg_pool2d(x, 2), rtol=1e-3, atol=1e-3)


def test_the_means_of_a_map_in_bfloat16_are_not_rounded_on_the_way() -> None:
    x = torch.randn(2, 600, 32, 32).bfloat16()
    assert torch.equal(Reduction(4)(x), Reduction(4)(x.float()))
