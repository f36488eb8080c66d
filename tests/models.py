"""Small models for tests: backbones of each kind that offramp must be able to cut, or must refuse, and cached models
made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.caches import CacheShape, LearnedCache, reduction_for
from offramp.model import BACKBONE, CachedModel
from offramp.splitting import SplitModel, SplitPoint
from offramp.streams import Batch
from offramp.tasks import Classification
from offramp.types import Certificate, CostTable, PartCost, Plan, PlannedCache, RoutingCost, Timing


class PlainCNN(nn.Module):
    """Four convolutions in a row on (B, 3, 16, 16) images; activations in place."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(16 * 4 * 4, classes)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(images)
        logits: Tensor = self.head(self.dropout(features.flatten(1)))
        return logits


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride) if (stride, width_in) != (1, width) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class ResidualNet(nn.Module):
    """Four residual blocks with batch normalisation on (B, 3, 16, 16) images."""

    def __init__(self, classes: int = 5, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.layers = nn.Sequential(
            ResidualBlock(width, width),
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 2 * width),
        )
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.stem(x)).mean((2, 3)))
        return logits


def mlp(features: int = 6, classes: int = 3, width: int = 32) -> nn.Sequential:
    """A plain `nn.Sequential` on (B, features) vectors."""
    return nn.Sequential(
        nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


class AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.project(attended.transpose(1, 2).reshape(rows, length, width))
        added: Tensor = x + self.feed_forward(self.norm2(x))
        return added


class MaskedEncoder(nn.Module):
    """A tiny transformer on (B, L) token ids; builds a (B, 1, L, L) mask and uses the batch size throughout."""

    def __init__(self, vocabulary: int = 50, width: int = 16, depth: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList(AttentionBlock(width, heads=2) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        rows, length = input_ids.shape
        positions = torch.arange(length, device=input_ids.device).expand(rows, -1)
        x = self.tokens(input_ids) + self.positions(positions)
        x = torch.cat([self.cls.expand(rows, -1, -1), x], dim=1)
        keep = torch.cat([attention_mask.new_ones(rows, 1), attention_mask], dim=1).bool()
        mask = keep[:, None, None, :].expand(rows, 1, length + 1, length + 1)
        for layer in self.layers:
            x = layer(x, mask)
        logits: Tensor = self.head(x[:, 0])
        return logits


class MixesRows(nn.Module):
    """Its answers depend on the other rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layers(x), dim=0)


class Branches(nn.Module):
    """Control flow that depends on the values: no tracer can follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.abs().max() > 1e9:
            x = x / 2
        logits: Tensor = self.second(x)
        return logits


class BranchesInside(nn.Module):
    """Modules in a row of which one cannot be traced: they can be cut apart by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(6, 6), Branches(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self.stem(x)))
        return logits


class WritesInPlace(nn.Module):
    """Changes activations in place: through a view, behind a block, and its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        for block in self.blocks:
            x = block(x)
            x[:, 0] = x[:, 1] + 1
            x.add_(0.25)
        return x


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


class Wrapped(nn.Module):
    """A backbone whose output is `form(logits, features)`."""

    def __init__(self, form: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 3)
        self.form = form

    def forward(self, x: Tensor) -> object:
        features = self.body(x)
        return self.form(self.head(features), features)


class NoisyDropout(nn.Module):
    """Functional dropout that stays active in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = F.dropout(self.layer(x), 0.5, training=True)
        return logits


class CountsCalls(nn.Module):
    """Changes its own buffer at each call."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.layer(x)
        return logits


# --- cached models by hand ------------------------------------------------------------------------

NEVER = 2.0  # a threshold that no confidence reaches
ALWAYS = 0.0
OPEN = Certificate(0.01, 0.95, 100, 0, 0.01, "by hand", 1, "", "", "2026-01-01")


class FixedCache(LearnedCache):
    """Says what it is told: logits and confidence by functions of the activation."""

    def __init__(
        self,
        point: SplitPoint,
        classes: int,
        logits: Callable[[Tensor], Tensor],
        confidence: Callable[[Tensor], Tensor],
        name: str = "",
    ) -> None:
        super().__init__(
            name or f"{point.name}/fixed",
            point.name,
            CacheShape("linear"),
            point.shape,
            classes,
            reduction=reduction_for(point.shape, is_input=point.position == 0),
        )
        self.say, self.sure = logits, confidence
        self.calls: list[int] = []

    def forward(self, activation: Tensor, read_BC: Tensor | None = None) -> Tensor:
        del read_BC
        self.calls.append(len(activation))
        self.seen = activation
        return self.say(activation)

    def confidence(self, logits_BC: Tensor, read_BC: Tensor | None = None) -> Tensor:
        del logits_BC, read_BC
        return self.sure(self.seen)


def learned(
    point: SplitPoint, classes: int, kind: Any = "linear", reads: LearnedCache | None = None, **more: Any
) -> LearnedCache:
    """A cache with random weights large enough that its confidences differ."""
    cache = LearnedCache(
        f"{point.name}/{kind}",
        point.name,
        CacheShape(kind, 8),
        point.shape,
        classes,
        reduction=reduction_for(point.shape, is_input=point.position == 0),
        reads=None if reads is None else reads.name,
        **more,
    )
    nn.init.normal_(cache.head.weight, std=0.7)
    cache.blend = (0.8, 0.6)
    return cache.eval()


def part(name: str, ms: float) -> PartCost:
    times = {size: Timing(ms * size, ms * size, ms * size) for size in (1, 8, 32)}
    return PartCost(name, 100.0, 10, 40, times)


def costs(stages: int, *, compaction: bool) -> CostTable:
    """Every row saved pays at once, or dropping rows never pays."""
    routing = RoutingCost(0.0, 0.0 if compaction else 1e9, 0.0)
    parts = tuple(part(f"s{k}", 1.0) for k in range(stages))
    return CostTable("cpu", 1, part(BACKBONE, float(stages)), parts, (routing,) * stages)


def cached_model(
    split_model: SplitModel,
    caches: Sequence[LearnedCache] = (),
    thresholds: Sequence[float] = (),
    *,
    compaction: bool = True,
    bypass: tuple[int, ...] = (),
) -> CachedModel:
    planned = tuple(
        PlannedCache(cache.name, cache.point, threshold, cache.confidence_name, 0.1)
        for cache, threshold in zip(caches, thresholds, strict=True)
    )
    table = costs(len(split_model.stages), compaction=compaction)
    plan = Plan(planned, bypass_batch_sizes=bypass)
    return CachedModel(split_model, caches, plan, OPEN, table, task=Classification(), summary={})


def images(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def say_class(number: int, classes: int = 5) -> Callable[[Tensor], Tensor]:
    """Logits that always name one class, and that the backbone would never give."""
    return lambda x: F.one_hot(torch.full((len(x),), number), classes) * 1000.0


def constant(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.full((len(x),), value)


@torch.no_grad()
def thresholds_at(split_model: SplitModel, caches: Sequence[LearnedCache], shares: Sequence[float]) -> list[float]:
    """Thresholds that about these shares of random images reach, cache by cache."""
    live = split_model.flatten(Batch((images(64, 9),)))
    said: dict[str, Tensor] = {}
    found = []
    for position, stage in enumerate(split_model.stages):
        for cache, share in zip(caches, shares, strict=True):
            if cache.point == split_model.points[position].name:
                read = None if cache.reads is None else said[cache.reads]
                said[cache.name] = cache(split_model.activation(position, live), read)
                found.append(float(cache.confidence(said[cache.name], read).quantile(1 - share)))
        live = stage(*live)
    return found


def plain(cached: CachedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = cached.split_model.backbone(x)
    return answer


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class Counting:
    """Counts the rows that every stage of a split model is called with."""

    def __init__(self, split_model: SplitModel) -> None:
        self.rows: list[list[int]] = [[] for _ in split_model.stages]
        self.handles = [
            stage.register_forward_pre_hook(lambda _module, args, at=at: self.rows[at].append(len(args[0])))
            for at, stage in enumerate(split_model.stages)
        ]

    def __enter__(self) -> list[list[int]]:
        return self.rows

    def __exit__(self, *_error: object) -> None:
        for handle in self.handles:
            handle.remove()


def in_a_tuple(logits: Tensor, _features: Tensor) -> object:
    return (logits,)


def in_a_dict(logits: Tensor, _features: Tensor) -> object:
    return {"logits": logits, "loss": None}


def bare(logits: Tensor, _features: Tensor) -> object:
    return logits
