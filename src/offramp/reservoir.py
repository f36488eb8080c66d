"""Recent inputs, in a fixed number of bytes: half of it the newest, half a uniform sample of all that ever came."""

from __future__ import annotations

import random
import threading

import torch
from torch import Tensor

from offramp.errors import InputError
from offramp.streams import Batch, concatenated


class Reservoir:
    """Keeps at most `max_bytes` of inputs in the form of `example`, on its device. Thread-safe.

    Which inputs are in the uniform part follows from their numbers and a random generator alone (Vitter's Algorithm R,
    ACM TOMS 11, 1985). An input may be in both parts. InputError when there is no room for one row in each.
    """

    def __init__(self, example: Batch, max_bytes: int, *, seed: int | None = None) -> None:
        self.row_bytes = sum(tensor[:1].numel() * tensor.element_size() for tensor in example.tensors)
        self.part_rows = max_bytes // 2 // self.row_bytes
        if self.part_rows < 1:
            raise InputError(
                f"{max_bytes} bytes have no room for two inputs of {self.row_bytes} bytes; expected at least "
                f"{2 * self.row_bytes}, or `keep_inputs=False`"
            )
        self._recent, self._uniform = (
            [tensor.new_empty(self.part_rows, *tensor.shape[1:]) for tensor in example.tensors] for _ in range(2)
        )
        self._positional, self._names = len(example.args), list(example.kwargs)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.seen = 0

    def __len__(self) -> int:
        return 2 * min(self.seen, self.part_rows)

    @property
    def bytes(self) -> int:
        """Of the inputs that are held."""
        return len(self) * self.row_bytes

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Copies rows of this batch, whose tensors are in the form and order of the example's."""
        with self._lock:
            chosen = {slot: row for row in range(len(batch)) if (slot := self._slot(self.seen + row)) is not None}
            for kept, tensor in zip(self._uniform, batch.tensors, strict=True):
                for slot, row in chosen.items():
                    kept[slot].copy_(tensor[row])
            for kept, tensor in zip(self._recent, batch.tensors, strict=True):
                _copy_round(kept, self.seen, tensor)
            self.seen += len(batch)

    def inputs(self) -> Batch:
        """Copies of what is held: the uniform part, then the newest, oldest first."""
        with self._lock:
            held = min(self.seen, self.part_rows)
            first = self.seen % self.part_rows if held == self.part_rows else 0
            uniform = self._batch([tensor[:held].clone() for tensor in self._uniform])
            recent = self._batch([tensor[:held].roll(-first, 0) for tensor in self._recent])
        return concatenated([uniform, recent])

    def _slot(self, number: int) -> int | None:
        """Where in the uniform part the input of this number goes, if anywhere."""
        if number < self.part_rows:
            return number
        slot = self._random.randrange(number + 1)
        return slot if slot < self.part_rows else None

    def _batch(self, tensors: list[Tensor]) -> Batch:
        named = dict(zip(self._names, tensors[self._positional :], strict=True))
        return Batch(tuple(tensors[: self._positional]), named)


def _copy_round(ring: Tensor, first: int, rows: Tensor) -> None:
    """Write rows, the first of which has this number, to their places in a ring; if it is too short, the last ones."""
    skipped = max(0, len(rows) - len(ring))
    start, rows = (first + skipped) % len(ring), rows[skipped:]
    before_end = min(len(rows), len(ring) - start)
    ring[start : start + before_end].copy_(rows[:before_end])
    if before_end < len(rows):
        ring[: len(rows) - before_end].copy_(rows[before_end:])
