"""What a model in service keeps of a request whose inputs it may not keep: what caches read of it, and the answer.

An observed request is a recorded one (`offramp.recording`) without its input: the reduced activation at every split
point behind the input, the backbone's logits, and what the request cost when it was served. So it takes a run of the
whole backbone, and caches on the raw input can be neither trained nor tried on such traffic. That equal requests are
equal is known by a digest under a secret that stays in the memory of the process.

Reduced activations say less about a request than the request itself, but they do say something: images can be
reconstructed in part from those of early layers (Mahendran and Vedaldi, CVPR 2015, arXiv 1412.0035).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.caches import Reduction, reduction_for
from offramp.splitting import SplitModel
from offramp.streams import Batch
from offramp.tasks import Classification


def reductions_of(split: SplitModel) -> list[Reduction]:
    """What is kept of the activation at each split point."""
    return [reduction_for(point.shape, is_input=position == 0) for position, point in enumerate(split.points)]


def activations(
    split: SplitModel,
    reductions: Sequence[Reduction],
    task: Classification,
    batch: Batch,
    *,
    bfloat16: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """What caches read at each split point, and the backbone's (B, C) logits, on its device."""
    features = []
    live = split.flatten(batch.to(split.device))
    for position, stage in enumerate(split.stages):
        activation = split.activation(position, live)
        if bfloat16 and activation.is_floating_point():
            # The reduction clamps to the largest number of half precision, which bfloat16 does not have.
            activation = activation.float()
        features.append(reductions[position](activation))
        with torch.autocast(split.device.type, torch.bfloat16, enabled=bfloat16):
            live = stage(*live)
    return features, task.logits(live).float()


class Observer:
    """Makes observed requests of inputs. Thread-safe."""

    def __init__(self, split: SplitModel, task: Classification) -> None:
        self._split, self._task, self._reductions = split, task, reductions_of(split)
        self._secret = secrets.token_bytes(16)

    @torch.inference_mode()
    def __call__(self, batch: Batch, cost_B: Tensor) -> Batch:
        """(activations behind the input..., digests, (B, C) logits, (B,) cost) of these inputs, on the CPU. cost_B:
        what they cost when they were served, in units of the backbone's."""
        batch = self._split.like_example(batch)  # in one form: digests depend on it
        features, logits_BC = activations(self._split, self._reductions, self._task, batch)
        digest_B2 = torch.frombuffer(bytearray(b"".join(batch.row_keys(self._secret))), dtype=torch.int64).view(-1, 2)
        return Batch((*(one.cpu() for one in features[1:]), digest_B2, logits_BC.cpu(), cost_B.float().cpu()))


def features_of(observed: Batch) -> tuple[Tensor, ...]:
    """What caches read, one for each split point behind the input."""
    return observed.args[:-3]


def logits_of(observed: Batch) -> Tensor:
    """(B, C) the backbone's, on the CPU."""
    return observed.args[-2]


def cost_of(observed: Batch) -> float:
    """Mean cost of these requests when they were served."""
    return float(observed.args[-1].double().mean())


def keys_of(observed: Batch) -> list[bytes]:
    """Digests of the inputs, 16 bytes each."""
    return [row.numpy().tobytes() for row in observed.args[-3]]
