"""Makes torchvision, and timm which needs it, importable beside a torch built without CUDA.

torchvision's default wheel is built against CUDA. Beside a CPU build of torch its compiled part does not load, and the
import fails on the missing operator `torchvision::nms`. Only detectors use that operator, so it is defined here, in
plain torch, and the import is tried again. Where torchvision imports as it is, nothing is done.

Not repaired: `torchvision.io.decode_image`, `deform_conv2d` and the `ps_roi_*` operators. A private function of
torchvision is replaced, and the log says so: meant for development and CI machines; install a matching pair elsewhere.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

import torch
from torch import Tensor

from offramp.errors import MissingExtraError

logger = logging.getLogger(__name__)

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []  # an operator lives as long as its library


def import_torchvision() -> ModuleType:
    """torchvision, repaired where it needs to be. Call it before importing timm.

    Raises MissingExtraError when it is not installed, and whatever else its import raises.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"this model needs torchvision ({error}); install it with `pip install 'offramp[vision]'`"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _forget("torchvision")
    if not _libraries:
        _libraries.append(_define_operators())
    torchvision = importlib.import_module("torchvision")
    boxes = importlib.import_module("torchvision.ops.boxes")
    setattr(boxes, "_assert_has_ops", lambda: None)  # noqa: B010 - it is no public attribute that a checker knows
    logger.warning(
        "torchvision %s does not match torch %s: its compiled operators did not load and `nms` runs in plain torch",
        torchvision.__version__,
        torch.__version__,
    )
    return torchvision


def _forget(package: str) -> None:
    """Drops what a failed import left behind."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def _define_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}{_SCHEMA}")
    library.impl("nms", nms, "CPU")
    return library


def nms(boxes_N4: Tensor, scores_N: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression: indices of the boxes kept, by falling score.

    A box (x1, y1, x2, y2) is dropped when it overlaps a kept one of higher score by more than the threshold (IoU).
    """
    order = scores_N.argsort(descending=True, stable=True)
    boxes = boxes_N4[order]
    area_N = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    dropped_N = torch.zeros(len(boxes), dtype=torch.bool)
    kept = []
    for index in range(len(boxes)):
        if dropped_N[index]:
            continue
        kept.append(index)
        corner_low = torch.maximum(boxes[index, :2], boxes[:, :2])
        corner_high = torch.minimum(boxes[index, 2:], boxes[:, 2:])
        shared_N = (corner_high - corner_low).clamp(min=0).prod(1)
        dropped_N |= shared_N / (area_N[index] + area_N - shared_N) > iou_threshold
    return order[torch.tensor(kept, dtype=torch.long)]
