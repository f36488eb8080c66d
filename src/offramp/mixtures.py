"""Mixtures: images made of two recorded ones, about which the backbone is asked as about any other input.

A backbone is surer of images like those that it was trained on than of what it will be asked, and a long training shows
a student the same few of them again and again. Mixtures are new to both. Half of them are weighted sums (mixup, Zhang
et al., arXiv 1710.09412, section 2), half have a rectangle of the other image in them (CutMix, Yun et al., arXiv
1905.04899, section 3.1), the share of either image being drawn evenly. Nobody says what the answer should be: as in
"function matching" (Beyer et al., arXiv 2106.05237, section 3) backbone and student see the same mixture, so whatever
the backbone says about it is right. What they are worth is in docs/experiments.md.

Only the backbone's logits are kept; the images are made anew, from the same draws, each time that they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.precision import has_fast_bfloat16
from offramp.progress import Bar
from offramp.recording import MAX_BATCH, Recording, keeps_answers, takes_images
from offramp.splitting import SplitModel
from offramp.tasks import Classification

PER_ROW, MOST = 2, 100_000  # mixtures per train row, and in all


@dataclass(frozen=True)
class Mixtures:
    """M images to be. Each is made of the recorded inputs number `pair_M2`; `share_M` of it comes from the first. Those
    with an odd number have a rectangle of the second in them, which lies at `corner_M2` of the room that it has; the
    others are sums. `logits_MC` is what the backbone says about them, NaN where it says nothing."""

    inputs: NDArray[Any]
    pair_M2: NDArray[np.intp]
    share_M: NDArray[np.float32]
    corner_M2: NDArray[np.float32]
    logits_MC: Tensor

    @property
    def numbers(self) -> NDArray[np.intp]:
        """Of the mixtures about which the backbone has said something."""
        return np.flatnonzero(self.logits_MC.isfinite().all(1).numpy())

    def images(self, index_B: NDArray[np.intp]) -> Tensor:
        """(B, C, H, W) float32, on the CPU: the mixtures of these numbers."""
        first_BCHW, second_BCHW = (torch.from_numpy(self.inputs[row_B]).float() for row_B in self.pair_M2[index_B].T)
        share_B = torch.from_numpy(self.share_M[index_B])
        corner_B2 = torch.from_numpy(self.corner_M2[index_B])
        pasted_B = torch.from_numpy(index_B % 2 == 1).view(-1, 1, 1, 1)
        outside_BHW = pasted_share(share_B, corner_B2, *first_BCHW.shape[-2:])
        weight_B1HW = torch.where(pasted_B, outside_BHW.unsqueeze(1), share_B.view(-1, 1, 1, 1))
        return second_BCHW + weight_B1HW * (first_BCHW - second_BCHW)


def pasted_share(share_B: Tensor, corner_B2: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) 0 inside a rectangle that covers 1 - share of the image, about, and has its shape; 1 outside."""
    length_B = (1 - share_B).sqrt()
    rows_BH = _between(height, length_B, corner_B2[:, 0])
    columns_BW = _between(width, length_B, corner_B2[:, 1])
    return 1 - (rows_BH[:, :, None] & columns_BW[:, None, :]).float()


def _between(side: int, length_B: Tensor, start_B: Tensor) -> Tensor:
    """(B, side) which positions are in intervals of these lengths, as shares of the side, that start at these shares of
    the room that is left."""
    length_B = (side * length_B).round()
    start_B = (start_B * (side - length_B)).round()
    position = torch.arange(side)
    return (position >= start_B[:, None]) & (position < (start_B + length_B)[:, None])


class Mixer:
    """Asks the backbone about mixtures of these recorded rows. bfloat16: it may answer in it. known: (M, C) what it
    said about all of them when it was asked before."""

    def __init__(
        self,
        split: SplitModel,
        task: Classification,
        recording: Recording,
        rows: NDArray[np.intp],
        *,
        seed: int,
        bfloat16: bool,
        known: Tensor | None = None,
    ) -> None:
        self._split, self._task, self._recording, self._rows = split, task, recording, rows
        self._seed, self.bfloat16 = seed, bfloat16
        self.known = known if known is not None and len(known) == self.count else None

    @property
    def suits(self) -> bool:
        """Whether the inputs are images and nothing else, and were recorded."""
        return self._recording.has_inputs and takes_images(self._split)

    @property
    def count(self) -> int:
        """How many mixtures these rows are worth."""
        return min(PER_ROW * len(self._rows), MOST)

    def ask(self, *, stopped: Callable[[], bool], progress: Bar) -> Mixtures:
        """`count` mixtures; the backbone is asked about no more of them once the user has stopped it."""
        if self.known is not None:
            progress.advance(self.count)
            return replace(self._drawn, logits_MC=self.known)
        fast, logits_MC = self._faithful, self._drawn.logits_MC.clone()
        for start in range(0, self.count, MAX_BATCH):
            if stopped():
                break
            index_B = np.arange(start, min(start + MAX_BATCH, self.count))
            logits_MC[index_B] = self._logits(self._drawn.images(index_B), bfloat16=fast)
            progress.advance(len(index_B))
        return replace(self._drawn, logits_MC=logits_MC)

    def estimated_seconds(self) -> float:
        """Of `ask`, from one timed batch; 0 where it was asked before."""
        if self.known is not None:
            return 0.0
        fast, some_BCHW = self._faithful, self._drawn.images(self._first)
        started = time.monotonic()
        self._logits(some_BCHW, bfloat16=fast)
        return (time.monotonic() - started) * self.count / len(self._first)

    @cached_property
    def _drawn(self) -> Mixtures:
        """The mixtures, without what the backbone says."""
        random, count = np.random.default_rng(self._seed), self.count
        pair_M2 = random.choice(self._rows, (count, 2))
        share_M, corner_M2 = random.random(count, dtype=np.float32), random.random((count, 2), dtype=np.float32)
        nothing_yet = torch.tensor(torch.nan).expand(count, self._recording.logits_NC.shape[1])
        return Mixtures(self._recording.features[0], pair_M2, share_M, corner_M2, nothing_yet)

    @property
    def _first(self) -> NDArray[np.intp]:
        return np.arange(min(MAX_BATCH, self.count))

    @cached_property
    def _faithful(self) -> bool:
        """Whether the backbone keeps its answers in bfloat16, and the hardware multiplies that."""
        if not self.bfloat16 or not has_fast_bfloat16(self._split.device):
            return False
        some_BCHW = self._drawn.images(self._first)
        return keeps_answers(partial(self._logits, some_BCHW), self._task)

    @torch.no_grad()
    def _logits(self, images_BCHW: Tensor, *, bfloat16: bool) -> Tensor:
        """(B, C) the backbone's, on the CPU."""
        batch = self._split.example.passing(images_BCHW).to(self._split.device)
        with torch.autocast(self._split.device.type, torch.bfloat16, enabled=bfloat16):
            leaves = self._split.backbone_leaves(batch)
        return self._task.logits(leaves).float().cpu()
