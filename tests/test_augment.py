"""Augmentation: what counts as an image, and that copies are mirror images and small shifts, nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from offramp.augment import AUGMENTATIONS, is_image, mirror, shift


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(rows: int, channels: int = 3, height: int = 8, width: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, channels, height, width, generator=seeded(1)).to(dtype)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 8, 8), True),
        ((4, 8, 8), True),
        ((5, 8, 8), False),
        ((3, 7, 8), False),
        ((3, 8, 7), False),
        ((3, 8, 500), True),
        ((8, 8), False),
        ((3,), False),
        ((), False),
        ((1, 3, 8, 8), False),
        ((16, 16, 3), False),
    ],
)
def test_images_have_few_channels_and_sides_of_eight_or_more(shape: tuple[int, ...], expected: bool) -> None:
    assert is_image(shape, floating=True) is expected
    assert is_image(shape, floating=False) is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_shape_and_type_are_kept_and_the_images_left_alone(name: str, dtype: torch.dtype) -> None:
    given = images(6, height=9, width=20, dtype=dtype)
    before = given.clone()
    changed = AUGMENTATIONS[name](given, seeded())
    assert (changed.shape, changed.dtype) == (given.shape, dtype)
    assert torch.equal(given, before)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_generator_decides_and_the_global_random_state_does_not(name: str) -> None:
    given, before = images(50, height=64, width=64), torch.random.get_rng_state()
    ways = [AUGMENTATIONS[name](given, seeded(seed)) for seed in (0, 0, *range(1, 6))]
    assert torch.equal(ways[0], ways[1])
    assert any(not torch.equal(ways[0], other) for other in ways[2:])
    assert torch.equal(before, torch.random.get_rng_state())


# --- mirror images ----------------------------------------------------------------------------------


def test_about_half_of_the_images_are_mirrored_and_each_as_a_whole() -> None:
    given = images(2000)
    changed = mirror(given, seeded())
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(changed, given, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(changed, given, strict=True)]
    assert all(one != other for one, other in zip(flipped, kept, strict=True))
    assert 900 < sum(flipped) < 1100  # 4.5 standard deviations to either side


def test_mirroring_the_same_images_twice_gives_them_back() -> None:
    given = images(40)
    assert torch.equal(mirror(mirror(given, seeded(3)), seeded(3)), given)


# --- shifts -----------------------------------------------------------------------------------------


def moved(image_CHW: Tensor, down: int, right: int) -> Tensor:
    """Each pixel comes from that far away, or from the nearest one there is."""
    _, height, width = image_CHW.shape
    rows = [min(max(row + down, 0), height - 1) for row in range(height)]
    columns = [min(max(column + right, 0), width - 1) for column in range(width)]
    return image_CHW[:, rows][:, :, columns]


@pytest.mark.parametrize(("height", "width", "reach"), [(8, 8, 1), (32, 32, 2), (50, 47, 2), (31, 64, 1)])
def test_the_whole_batch_moves_by_up_to_a_sixteenth_and_the_border_repeats(height: int, width: int, reach: int) -> None:
    """At least by up to one pixel; the smaller side counts for both axes."""
    given = images(2, 1, height, width)
    ways = {
        (down, right): torch.stack([moved(image, down, right) for image in given])
        for down, right in itertools.product(range(-reach, reach + 1), repeat=2)
    }
    seen = set()
    for seed in range(200):
        changed = shift(given, seeded(seed))
        matching = [way for way, expected in ways.items() if torch.equal(changed, expected)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert seen == set(ways), "every shift occurs, and so does none at all"
