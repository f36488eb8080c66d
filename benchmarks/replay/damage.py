"""What happens to pictures on their way: blur, noise, JPEG compression, brightness. On uint8 NCHW arrays.

The strengths are such that the full model itself is often wrong: what is milder makes caches less sure before it makes
them wrong, so that they answer less and no promise is in danger."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

Bytes = NDArray[np.uint8]
Damage = Callable[[Image.Image, np.random.Generator], Image.Image]


def blurred(picture: Image.Image, _rng: np.random.Generator, *, radius: float = 1.6) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius))


def noisy(picture: Image.Image, rng: np.random.Generator, *, deviation: float = 40.0) -> Image.Image:
    pixels = np.asarray(picture, dtype=np.float64)
    pixels = pixels + rng.normal(0.0, deviation, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def compressed(picture: Image.Image, _rng: np.random.Generator, *, quality: int = 8) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def darkened(picture: Image.Image, _rng: np.random.Generator, *, factor: float = 0.35) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(factor)


DAMAGES: dict[str, Damage] = {"blur": blurred, "noise": noisy, "jpeg": compressed, "brightness": darkened}


def damaged(image_P: Bytes, damage: Damage, rng: np.random.Generator) -> Bytes:
    """The pictures as they arrive."""
    arrived = np.empty_like(image_P)
    for row, image in enumerate(image_P):
        picture = damage(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), rng)
        arrived[row] = np.asarray(picture).transpose(2, 0, 1)
    return arrived
