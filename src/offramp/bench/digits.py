"""scikit-learn's handwritten digits as the model and data of a suite (examples/bench_digits.toml), to try one on.

The parts are those of `offramp.demo`: disjoint real images.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor

from offramp.demo import Digits, DigitsNet, load_digits, train_backbone

EPOCHS = 8  # enough for a model worth caching, in a few seconds
BATCH = 64

Batches = list[tuple[Tensor, Tensor]]


def model() -> DigitsNet:
    """The full model, trained now."""
    return train_backbone(_digits().backbone, epochs=EPOCHS, seed=0)


def traffic() -> Batches:
    """Images to learn from: those of the full model's training, and others. Labels are for methods that need them."""
    return _batches(_digits().backbone) + _batches(_digits().traffic)


def certify() -> Batches:
    """Images to tune and certify on."""
    return _batches(_digits().certify)


def evaluate() -> Batches:
    """Images to evaluate on."""
    return _batches(_digits().evaluate)


def _batches(part: tuple[Tensor, Tensor]) -> Batches:
    images, labels = part
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


@cache
def _digits() -> Digits:
    return load_digits(seed=0)
