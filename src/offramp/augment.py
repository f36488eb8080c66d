"""Light augmentation of image-like inputs: shifts and mirror images.

Two ways to use it, both label-free. `recording` asks the backbone again about augmented copies while inputs are few:
always correct, costs a forward pass each. `distillation` augments on the fly and keeps the recorded answer: free, but
only sound where the backbone itself hardly changes its answer, which `recording` measures before it allows it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def is_image(shape: tuple[int, ...], *, floating: bool) -> bool:
    """Whether rows of this shape look like images: floats, (channels, height, width) with few channels."""
    return floating and len(shape) == 3 and shape[0] <= 4 and min(shape[1:]) >= 8


def mirror(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability one half."""
    chosen_B = torch.rand(len(images_BCHW), generator=generator) < 0.5
    return torch.where(chosen_B.view(-1, 1, 1, 1).to(images_BCHW.device), images_BCHW.flip(-1), images_BCHW)


def shift(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """The whole batch moved by up to a sixteenth of its side along both axes; the border is repeated."""
    height, width = images_BCHW.shape[-2:]
    reach = max(1, min(height, width) // 16)
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    padded = F.pad(images_BCHW, (reach,) * 4, mode="replicate")
    return padded[..., down : down + height, right : right + width]


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"mirror": mirror, "shift": shift}
