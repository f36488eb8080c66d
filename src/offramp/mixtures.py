"""Mixtures: images made of two recorded ones, about which the backbone is asked as about any other input.

A backbone is surer of images like those that it was trained on than of what it will be asked, and a long training shows
a student the same few of them again and again. Mixtures are new to both. Half of them are weighted sums (mixup, Zhang
et al., arXiv 1710.09412, section 2), half have a rectangle of the other image in them (CutMix, Yun et al., arXiv
1905.04899, section 3.1), the share of either image being drawn evenly. Nobody says what the answer should be: as in
"function matching" (Beyer et al., arXiv 2106.05237, section 3) backbone and student see the same mixture, so whatever
the backbone says about it is right. What they are worth is in docs/experiments.md.

Only what the backbone makes of them is kept: its logits, and at some split points what caches read there. The images
are made anew, from the same draws, each time that they are needed.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.observing import activations
from offramp.precision import has_fast_bfloat16
from offramp.progress import Bar
from offramp.recording import MAX_BATCH, Recording, keeps_answers, storing, takes_images, unnamed_file, write_all
from offramp.splitting import SplitModel
from offramp.tasks import Classification
from offramp.types import version

PER_ROW, MOST = 2, 100_000  # mixtures per train row, and in all
WHAT = "what the backbone says about mixtures"

Column = int | None  # of what is kept: a split point's, by its position, or the logits


@dataclass(frozen=True)
class Mixtures:
    """M images to be. Each is made of the recorded inputs number `pair_M2`; `share_M` of it comes from the first. Those
    with an odd number have a rectangle of the second in them, which lies at `corner_M2` of the room that it has; the
    others are sums. Of the first of them, as many as the backbone was asked about, `logits_MC` is what it says, NaN
    where it has no answer, and `features` what caches at some split points read, by position: (M, *reduced shape)."""

    inputs: NDArray[Any]
    pair_M2: NDArray[np.intp]
    share_M: NDArray[np.float32]
    corner_M2: NDArray[np.float32]
    logits_MC: Tensor
    features: Mapping[int, NDArray[Any]]

    @property
    def numbers(self) -> NDArray[np.intp]:
        """Of the mixtures about which the backbone has said something."""
        return np.flatnonzero(self.logits_MC.isfinite().all(1).numpy())

    def at(self, position: int, index_B: NDArray[np.intp]) -> Tensor:
        """(B, ...) float32, on the CPU: what caches at this split point read of the mixtures of these numbers."""
        return torch.from_numpy(self.features[position][index_B]).float() if position else self.images(index_B)

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


def suits_mixing(split: SplitModel, recording: Recording) -> bool:
    """Whether the inputs are images and nothing else, and were recorded."""
    return recording.has_inputs and takes_images(split)


class Mixer:
    """Asks the backbone about mixtures of these recorded rows.

    bfloat16: it may answer in it. keep: the positions of split points, not the input's, at which caches are to learn
    from them. folder: where what it says is kept for a later run, once it has said all; None: in files without a name.
    """

    def __init__(
        self,
        split: SplitModel,
        task: Classification,
        recording: Recording,
        rows: NDArray[np.intp],
        *,
        seed: int,
        bfloat16: bool,
        keep: Sequence[int] = (),
        folder: Path | None = None,
    ) -> None:
        self._split, self._task, self._recording, self._rows = split, task, recording, rows
        self._seed, self._bfloat16, self._folder = seed, bfloat16, folder
        reduced = {position: recording.features[position] for position in keep}
        self._columns: dict[Column, tuple[tuple[int, ...], np.dtype[Any]]] = {
            None: (recording.logits_NC.shape[1:], np.dtype(np.float32)),
            **{position: (feature.shape[1:], feature.dtype) for position, feature in reduced.items()},
        }

    @property
    def count(self) -> int:
        """How many mixtures these rows are worth."""
        return min(PER_ROW * len(self._rows), MOST)

    @cached_property
    def known(self) -> bool:
        """Whether an earlier run has asked about all of them."""
        return self._folder is not None and all(map(self._is_whole, self._columns))

    def ask(self, *, stopped: Callable[[], bool], progress: Bar) -> Mixtures:
        """`count` mixtures; the backbone is asked about no more of them once the user has stopped it. StorageError
        where the disk is full."""
        if self.known:
            progress.advance(self.count)
            with storing(WHAT, self._folder):
                return self._mixtures({column: self._file(column) for column in self._columns}, self.count)
        fast, asked = self._faithful, 0
        with ExitStack() as opened:
            files = {column: opened.enter_context(self._new(column)) for column in self._columns}
            while asked < self.count and not stopped():
                index_B = np.arange(asked, min(asked + MAX_BATCH, self.count))
                said = self._said(self._drawn.images(index_B), bfloat16=fast)
                with storing(WHAT, self._folder):
                    for column, file in files.items():
                        write_all(file, said[column].numpy().tobytes())
                asked += len(index_B)
                progress.advance(len(index_B))
            with storing(WHAT, self._folder):
                mixtures = self._mixtures(files, asked)
                if self._folder is not None and asked == self.count:
                    for column in files:
                        os.replace(self._unfinished(column), self._file(column))
        return mixtures

    def estimated_seconds(self) -> float:
        """Of `ask`, from one timed batch; 0 where it was asked before."""
        if self.known:
            return 0.0
        fast, some_BCHW = self._faithful, self._drawn.images(self._first)
        started = time.monotonic()
        self._said(some_BCHW, bfloat16=fast)
        return (time.monotonic() - started) * self.count / len(self._first)

    @cached_property
    def _drawn(self) -> Mixtures:
        """The mixtures, without what the backbone says."""
        random, count = np.random.default_rng(self._seed), self.count
        pair_M2 = random.choice(self._rows, (count, 2))
        share_M, corner_M2 = random.random(count, dtype=np.float32), random.random((count, 2), dtype=np.float32)
        nothing_yet = torch.empty(0, self._recording.logits_NC.shape[1])
        return Mixtures(self._recording.features[0], pair_M2, share_M, corner_M2, nothing_yet, {})

    @property
    def _first(self) -> NDArray[np.intp]:
        return np.arange(min(MAX_BATCH, self.count))

    @cached_property
    def _faithful(self) -> bool:
        """Whether the backbone keeps its answers in bfloat16, and the hardware multiplies that."""
        if not self._bfloat16 or not has_fast_bfloat16(self._split.device):
            return False
        some_BCHW = self._drawn.images(self._first)
        return keeps_answers(partial(self._logits, some_BCHW), self._task)

    def _logits(self, images_BCHW: Tensor, *, bfloat16: bool) -> Tensor:
        return self._said(images_BCHW, bfloat16=bfloat16)[None]

    @torch.no_grad()
    def _said(self, images_BCHW: Tensor, *, bfloat16: bool) -> dict[Column, Tensor]:
        """What is kept of these, on the CPU: (B, C) logits, and what caches read at the split points."""
        batch = self._split.example.passing(images_BCHW)
        features, logits_BC = activations(self._split, self._recording.reductions, self._task, batch, bfloat16=bfloat16)
        return {column: (logits_BC if column is None else features[column]).cpu() for column in self._columns}

    # -- files -------------------------------------------------------------------------------------

    def _mixtures(self, files: Mapping[Column, IO[bytes] | Path], rows: int) -> Mixtures:
        """With what these files say about the first of them."""
        said = {column: self._mapped(file, column, rows) for column, file in files.items()}
        logits_MC = torch.from_numpy(said[None])
        return replace(self._drawn, logits_MC=logits_MC, features={at: said[at] for at in said if at is not None})

    def _mapped(self, file: IO[bytes] | Path, column: Column, rows: int) -> NDArray[Any]:
        shape, dtype = self._columns[column]
        if not rows:
            return np.zeros((0, *shape), dtype)
        return np.memmap(file, dtype, "r+", shape=(rows, *shape))  # torch takes no read-only maps

    def _is_whole(self, column: Column) -> bool:
        shape, dtype = self._columns[column]
        path = self._file(column)
        return path.exists() and path.stat().st_size == self.count * math.prod(shape) * dtype.itemsize

    @contextmanager
    def _new(self, column: Column) -> Iterator[IO[bytes]]:
        """An empty file for a column; in a folder under another name until all columns are whole."""
        if self._folder is None:
            with unnamed_file(WHAT, None) as unnamed:
                yield unnamed
            return
        path = self._unfinished(column)
        with storing(WHAT, self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = path.open("wb+", buffering=0)
        try:
            with file:
                yield file
        finally:
            path.unlink(missing_ok=True)

    def _unfinished(self, column: Column) -> Path:
        return self._file(column).with_suffix(".tmp")

    def _file(self, column: Column) -> Path:
        assert self._folder is not None
        return self._folder / f"mixtures_{self._digest}_{'logits' if column is None else column}.bin"

    @cached_property
    def _digest(self) -> str:
        """Of all that decides what is said: mixtures are drawn from the rows in their order."""
        points = [point.name for point in self._split.points]
        digest = hashlib.sha256(self._recording.keys_N[self._rows].tobytes())
        digest.update(f"{self._split.fingerprint} {points} {self._seed} {self._bfloat16} {version()}".encode())
        return digest.hexdigest()[:16]
