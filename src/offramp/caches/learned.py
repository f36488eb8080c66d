"""Learned caches: small networks that imitate the backbone from one of its activations, or from the input itself.

Behind the fixed reduction comes a trained body, from a linear probe up to a student network with its own trunk. It may
also read the logits of one earlier cache, so that what that cache already worked out is not lost on a miss: its own are
then blended with these, both weighed once it is trained.

Early split points need capacity, late ones none (docs/design.md), hence the range of shapes. All shapes are plain
feed-forward modules; batch normalisation is folded into the convolutions once training is over.

The shapes `layers` and `conv1d` are those of the published methods. In one thing they differ from the papers: those
read the raw activation, here every cache reads it as it is recorded, pooled to at most 4,096 numbers (`reduction`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from offramp.blending import ALONE, blended
from offramp.caches.base import Cache
from offramp.caches.reduction import MAX_SEGMENTS, Reduction

Kind = Literal["linear", "mlp", "conv", "student", "transformer", "layers", "conv1d"]

WHITENED = 24  # channels of a student's first layer
HALVINGS = 3  # of a student's resolution; the last scale has most of its weights and costs little


@dataclass(frozen=True)
class CacheShape:
    """What a cache's body looks like. `width` is its number of channels, `depth` its number of extra layers.

    Of "conv1d", `width` is that of the kernel. "layers" is given layer by layer instead: `convolutions` (channels,
    kernel and stride of each), the flattened result averaged to `pooled` numbers (0: as it is), linear layers as wide
    as `hidden` says.
    """

    kind: Kind
    width: int = 0
    depth: int = 1
    convolutions: tuple[tuple[int, int, int], ...] = ()
    pooled: int = 0
    hidden: tuple[int, ...] = ()

    def __post_init__(self) -> None:  # JSON knows no tuples
        convolutions = tuple((channels, kernel, stride) for channels, kernel, stride in self.convolutions)
        object.__setattr__(self, "convolutions", convolutions)
        object.__setattr__(self, "hidden", tuple(self.hidden))

    @property
    def label(self) -> str:
        if self.kind == "layers":
            convolutions = [f"{channels}k{kernel}s{stride}" for channels, kernel, stride in self.convolutions]
            pooled = [f"pool{self.pooled}"] if self.pooled else []
            return "-".join([self.kind, *convolutions, *pooled, *map(str, self.hidden)])
        return self.kind if self.kind == "linear" else f"{self.kind}{self.width}x{self.depth}"


class LearnedCache(Cache):
    """A trained body and a linear head on what it makes of the activation. Where it reads another cache, `blend` holds
    the weights of its own logits and of those that it reads (`offramp.blending`)."""

    kind = "learned"

    def __init__(
        self,
        name: str,
        point: str,
        shape: CacheShape,
        activation_shape: tuple[int, ...],
        classes: int,
        *,
        reduction: Reduction,
        vocabulary: int = 0,
        reads: str | None = None,
    ) -> None:
        super().__init__(name, point, reduction, reads)
        self.shape, self.classes, self.vocabulary = shape, classes, vocabulary
        self.activation_shape = tuple(activation_shape)
        read_shape = self.activation_shape
        if shape.kind in ("layers", "conv1d"):  # these have a weight for every number that they read
            read_shape = _recorded_shape(reduction, self.activation_shape)
        self.body = _BODIES[shape.kind](shape, read_shape, vocabulary)
        features = self.body.features
        assert isinstance(features, int)
        self.head = nn.Linear(features, classes)
        self.blend = ALONE
        self.folded = False

    def from_feature(self, feature: Tensor, read_BC: Tensor | None = None) -> Tensor:
        own_BC = self.from_condensed(self.condense(feature))
        if self.reads is None:
            return own_BC
        if read_BC is None:
            raise ValueError(f"cache {self.name} reads the logits of {self.reads}, which were not given")
        return blended(own_BC, read_BC, self.blend)

    @property
    def condensed_width(self) -> int | None:
        """Numbers per row behind `condense`; None where all of the body is trained."""
        return self.body.condensed_width if isinstance(self.body, _Pooled) else None

    def condense(self, feature: Tensor) -> Tensor:
        """What comes before the first trained weight: the same at every step of a training."""
        if self.vocabulary:
            return feature.long().clamp(max=self.vocabulary - 1)  # above: ids that training never met
        feature = feature.to(self.head.weight.dtype)
        return feature if self.condensed_width is None else _pool(feature)

    def from_condensed(self, condensed: Tensor) -> Tensor:
        """(B, C) its own logits from there: what is trained."""
        logits_BC: Tensor = self.head(self.body(condensed))
        return logits_BC

    def prepare(self, feature: Tensor) -> None:
        """Before training: set what is not trained from some recorded features."""
        if isinstance(self.body, _Student):
            self.body.prepare(feature.to(self.head.weight.dtype))

    def fold(self) -> None:
        """Fold batch normalisation into the convolutions before it: same answers, fewer operations, no way back."""
        if not self.folded:
            _fold_batch_norm(self.body)
            self.folded = True

    def describe(self) -> dict[str, Any]:
        return super().describe() | {
            "shape": dataclasses.asdict(self.shape),
            "activation_shape": list(self.activation_shape),
            "classes": self.classes,
            "vocabulary": self.vocabulary,
            "folded": self.folded,
            "blend": list(self.blend),
        }

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> Self:
        cache = cls(
            description["name"],
            description["point"],
            CacheShape(**description["shape"]),
            tuple(description["activation_shape"]),
            description["classes"],
            reduction=Reduction(description["reduction"]),
            vocabulary=description["vocabulary"],
            reads=description["reads"],
        )
        own, read = description["blend"]
        cache.blend = own, read
        cache.eval()
        if description["folded"]:
            cache.fold()
        return cache


class _Pooled(nn.Module):
    """Mean and, where there is more than one position, maximum over positions; then `depth` hidden layers. Of vectors
    that pooling is left to `LearnedCache.condense`, of token ids their vectors are trained too."""

    def __init__(self, shape: CacheShape, activation_shape: tuple[int, ...], vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.width or 64) if vocabulary else None
        width = (shape.width or 64) if vocabulary else activation_shape[0 if len(activation_shape) != 2 else 1]
        spatial = bool(vocabulary) or len(activation_shape) > 1
        width = 2 * width if spatial else width
        self.condensed_width = width if spatial and not vocabulary else None
        layers: list[nn.Module] = [nn.LayerNorm(width)]
        if shape.kind == "mlp":
            for _ in range(shape.depth):
                layers += [nn.Linear(width, shape.width), nn.GELU()]
                width = shape.width
        self.layers = nn.Sequential(*layers)
        self.features = width

    def forward(self, feature: Tensor) -> Tensor:
        hidden_BF: Tensor = self.layers(feature if self.embedding is None else _pool(self.embedding(feature)))
        return hidden_BF


class _Conv(nn.Module):
    """For feature maps on a small grid: 1x1 convolution to `width`, then `depth` residual blocks."""

    def __init__(self, shape: CacheShape, activation_shape: tuple[int, ...], vocabulary: int) -> None:
        super().__init__()
        del vocabulary
        width = shape.width
        self.trunk = nn.Sequential(
            nn.BatchNorm2d(activation_shape[0]),
            _unit(activation_shape[0], width, kernel=1),
            *(_Residual(width) for _ in range(shape.depth)),
        )
        self.features = 2 * width

    def forward(self, feature: Tensor) -> Tensor:
        return _pool(self.trunk(feature))


class _Student(nn.Module):
    """A small residual network on the raw input: wide and shallow, because narrow deep ones are slow at batch 1.

    Images above 48 pixels enter through a strided patch convolution that brings them to about 32. `width` is the number
    of channels at full resolution; it doubles at each of the halvings. `depth` is the residual blocks per scale.
    The layout follows the fast CIFAR networks of DAWNBench (Page, 2018): convolve, pool, residual block. The first
    layer whitens patches and is not trained (Jordan, "94% on CIFAR-10 in 3.29 seconds", arXiv 2404.00498, section 3.2):
    in short trainings it is worth 2 to 3 points of agreement (docs/experiments.md).
    """

    def __init__(self, shape: CacheShape, activation_shape: tuple[int, ...], vocabulary: int) -> None:
        super().__init__()
        del vocabulary
        channels, side = activation_shape[0], min(activation_shape[1:])
        width, patch = shape.width, max(1, round(side / 32))
        if side < 16:
            scales: list[nn.Module] = [_unit(WHITENED, width), *(_Residual(width) for _ in range(shape.depth))]
            out = width
        else:
            scales = []
            into, out = WHITENED, width
            for _ in range(HALVINGS):
                out *= 2
                scales += [_halving(into, out), *(_Residual(out) for _ in range(shape.depth))]
                into = out
        self.stem = _Whitening(channels, kernel=3 if patch == 1 else patch + patch % 2 + 1, stride=patch)
        self.trunk = nn.Sequential(*scales)
        self.features = 2 * out

    def prepare(self, features: Tensor) -> None:
        self.stem.fit(features)

    def forward(self, feature: Tensor) -> Tensor:
        return _pool(self.trunk(self.stem(feature)))


class _Transformer(nn.Module):
    """For sequences of vectors or of token ids: projection to `width`, `depth` encoder layers, mean and first token."""

    def __init__(self, shape: CacheShape, activation_shape: tuple[int, ...], vocabulary: int) -> None:
        super().__init__()
        width, length = shape.width, activation_shape[0] if vocabulary or len(activation_shape) == 2 else 1
        self.project: nn.Module = (
            nn.Embedding(vocabulary, width) if vocabulary else nn.Linear(activation_shape[-1], width)
        )
        self.position = nn.Parameter(torch.randn(1, max(length, MAX_SEGMENTS + 1), width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 32), 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, shape.depth, enable_nested_tensor=False)
        self.features = 2 * width

    def forward(self, feature: Tensor) -> Tensor:
        hidden_BLD = self.project(feature)
        hidden_BLD = self.layers(hidden_BLD + self.position[:, : hidden_BLD.shape[1]])
        return torch.cat([hidden_BLD[:, 0], hidden_BLD.mean(1)], dim=1)


class _Layers(nn.Module):
    """Convolutions, then linear layers on the flattened result, ReLU behind each: the caches of three papers.

    GATI's FC and Pool (arXiv 2101.07344, predictor networks), all of SelfXit's search space (arXiv 2209.08625, section
    4), the branches of BranchyNet (arXiv 1709.01686, section III). Convolutions run over the positions of maps and
    sequences and are padded, so that any of them fits any grid.
    """

    def __init__(self, shape: CacheShape, recorded_shape: tuple[int, ...], vocabulary: int) -> None:
        super().__init__()
        del vocabulary
        self.sequence = len(recorded_shape) == 2
        channels, *sides = recorded_shape[::-1] if self.sequence else recorded_shape
        if shape.convolutions and not sides:
            raise ValueError(f"{shape.label} has convolutions, and activations of shape {recorded_shape} no positions")
        convolution = nn.Conv1d if self.sequence else nn.Conv2d
        layers: list[nn.Module] = []
        for out, kernel, stride in shape.convolutions:
            layers += [convolution(channels, out, kernel, stride, kernel // 2), nn.ReLU()]
            channels, sides = out, [(side + 2 * (kernel // 2) - kernel) // stride + 1 for side in sides]
        layers.append(nn.Flatten())
        self.features = channels * math.prod(sides)
        if shape.pooled:
            layers.append(nn.AdaptiveAvgPool1d(shape.pooled))  # rows take the place of channels
            self.features = shape.pooled
        for width in shape.hidden:
            layers += [nn.Linear(self.features, width), nn.ReLU()]
            self.features = width
        self.layers = nn.Sequential(*layers)

    def forward(self, feature: Tensor) -> Tensor:
        hidden_BF: Tensor = self.layers(feature.transpose(1, 2) if self.sequence else feature)
        return hidden_BF


class _Conv1d(nn.Module):
    """`depth` 1-D convolutions 1 -> 1 over the flattened activation, ReLU behind each: GATI's Conv, a few weights only
    before the head (arXiv 2101.07344, predictor networks).

    They begin as the identity: with a single channel, weights that happen to be negative let nothing through the ReLU,
    and then nothing is learned.
    """

    def __init__(self, shape: CacheShape, recorded_shape: tuple[int, ...], vocabulary: int) -> None:
        super().__init__()
        del vocabulary
        padding = shape.width // 2
        self.layers = nn.Sequential()
        for _ in range(shape.depth):
            convolution = nn.Conv1d(1, 1, shape.width, padding=padding)
            nn.init.dirac_(convolution.weight)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            self.layers.extend([convolution, nn.ReLU()])
        self.features = math.prod(recorded_shape) + shape.depth * (2 * padding - shape.width + 1)

    def forward(self, feature: Tensor) -> Tensor:
        convolved_BF: Tensor = self.layers(feature.flatten(1).unsqueeze(1)).squeeze(1)
        return convolved_BF


_BODIES: dict[str, Any] = {
    "linear": _Pooled,
    "mlp": _Pooled,
    "conv": _Conv,
    "student": _Student,
    "transformer": _Transformer,
    "layers": _Layers,
    "conv1d": _Conv1d,
}


def _recorded_shape(reduction: Reduction, activation_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a row behind the reduction."""
    return tuple(reduction(torch.empty(1, *activation_shape, device="meta")).shape[1:])


def _unit(c_in: int, c_out: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class _Whitening(nn.Module):
    """A fixed convolution with the leading principal directions of the patches, each scaled to unit variance and taken
    with both signs, then ReLU; only the bias is trained."""

    weight: Tensor

    def __init__(self, channels: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride, self.kernel = stride, kernel
        self.register_buffer("weight", nn.init.kaiming_normal_(torch.empty(WHITENED, channels, kernel, kernel)))
        self.bias = nn.Parameter(torch.zeros(WHITENED))

    def forward(self, images: Tensor) -> Tensor:
        return F.relu_(F.conv2d(images, self.weight, self.bias, self.stride, self.kernel // 2))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        patches = F.unfold(images, self.kernel, stride=self.kernel).transpose(1, 2).flatten(0, 1).double()
        values, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        leading = min(WHITENED // 2, len(values))
        values, directions = values.flip(0)[:leading], directions.flip(1).T[:leading]
        filters = directions / (values + 5e-3 * values.mean()).sqrt()[:, None]
        signed = torch.cat([filters, -filters]).reshape(2 * leading, *self.weight.shape[1:])
        self.weight[: 2 * leading].copy_(signed)


def _halving(c_in: int, c_out: int) -> nn.Sequential:
    """Convolution, then 2x2 maximum: normalisation and activation run on the small map."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(_unit(width, width), _unit(width, width))

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.block(x)
        return x + residual


def _pool(feature: Tensor) -> Tensor:
    """Mean and maximum over the positions of a map (B, F, H, W), a video or a sequence (B, L, F): (B, 2 F)."""
    positions_BFP = feature.flatten(2) if feature.ndim > 3 else feature.transpose(1, 2)
    return torch.cat([positions_BFP.mean(2), positions_BFP.amax(2)], dim=1)


def _fold_batch_norm(module: nn.Module) -> None:
    """Fold every BatchNorm2d that directly follows a Conv2d in an nn.Sequential into it (needs eval mode)."""
    for child in module.children():
        _fold_batch_norm(child)
    if not isinstance(module, nn.Sequential):
        return
    kept: list[nn.Module] = []
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d) and kept and isinstance(kept[-1], nn.Conv2d):
            kept[-1] = fuse_conv_bn_eval(kept[-1], layer)
        else:
            kept.append(layer)
    del module[:]
    module.extend(kept)
