"""Recent inputs, in a fixed number of bytes: half of it the newest, half a uniform sample of all that ever came."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import torch
from torch import Tensor

from offramp.errors import InputError, StorageError
from offramp.streams import Batch, concatenated


class Reservoir:
    """Keeps at most `max_bytes` of inputs in the form of `example`, on its device. Thread-safe.

    Which inputs are in the uniform part follows from their numbers and a random generator alone (Vitter's Algorithm R,
    ACM TOMS 11, 1985). An input may be in both parts. InputError when there is no room for one row in each.

    folder: keep them in files there instead of in memory, so that they outlive the process however it ends: a later one
    takes them over as far as `seen`, which its caller has kept, says, and begins anew where they have another size. A
    row that was being written when the process was killed may be half old and half new. StorageError when the files
    cannot be made; they have their full size at once, because a disk that is full cannot be told to a process that
    writes through a map.
    """

    def __init__(
        self,
        example: Batch,
        max_bytes: int,
        *,
        seed: int | None = None,
        folder: Path | None = None,
        seen: int = 0,
    ) -> None:
        self.row_bytes = sum(tensor[:1].numel() * tensor.element_size() for tensor in example.tensors)
        self.part_rows = max_bytes // 2 // self.row_bytes
        if self.part_rows < 1:
            raise InputError(
                f"{max_bytes} bytes have no room for two inputs of {self.row_bytes} bytes; expected at least "
                f"{2 * self.row_bytes}, or `keep='nothing'`"
            )
        self._device = example.tensors[0].device
        self.seen = seen
        if folder is None:
            self._recent, self._uniform = (
                [tensor.new_empty(self.part_rows, *tensor.shape[1:]) for tensor in example.tensors] for _ in range(2)
            )
        else:
            self._recent, self._uniform = (self._files(folder, part, example) for part in ("recent", "uniform"))
        self._positional, self._names = len(example.args), list(example.kwargs)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._number = torch.arange(self.part_rows)  # of the input in each slot of the uniform part

    def _files(self, folder: Path, part: str, example: Batch) -> list[Tensor]:
        maps = []
        for number, tensor in enumerate(example.tensors):
            file, shape = folder / f"{part}.{number}.bin", (self.part_rows, *tensor.shape[1:])
            mapped, is_new = _mapped(file, shape, tensor.dtype)
            maps.append(mapped)
            self.seen = 0 if is_new else self.seen
        return maps

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
            for slot, row in chosen.items():
                self._number[slot] = self.seen + row
                for kept, tensor in zip(self._uniform, batch.tensors, strict=True):
                    kept[slot].copy_(tensor[row])
            for kept, tensor in zip(self._recent, batch.tensors, strict=True):
                _copy_round(kept, self.seen, tensor)
            self.seen += len(batch)

    def inputs(self) -> Batch:
        """Copies of what is held: the uniform part, then the newest, oldest first."""
        with self._lock:
            return self._held(torch.arange(min(self.seen, self.part_rows)))

    def requests(self) -> Batch:
        """The same, with the input of each request once."""
        with self._lock:
            return self._held(self._older())

    @property
    def different(self) -> int:
        """Of how many requests the input is held."""
        return min(self.seen, self.part_rows) + len(self._older())

    def _held(self, slots: Tensor) -> Batch:
        """These of the uniform part, and all of the newest."""
        held = min(self.seen, self.part_rows)
        first = self.seen % self.part_rows if held == self.part_rows else 0
        uniform = self._batch([tensor.index_select(0, slots.to(tensor.device)) for tensor in self._uniform])
        recent = self._batch([tensor[:held].roll(-first, 0) for tensor in self._recent])
        return concatenated([uniform, recent]).to(self._device)

    def _older(self) -> Tensor:
        """Slots of the uniform part whose inputs are not among the newest as well."""
        held = min(self.seen, self.part_rows)
        return (self._number[:held] < self.seen - self.part_rows).nonzero().flatten()

    def _slot(self, number: int) -> int | None:
        """Where in the uniform part the input of this number goes, if anywhere."""
        if number < self.part_rows:
            return number
        slot = self._random.randrange(number + 1)
        return slot if slot < self.part_rows else None

    def _batch(self, tensors: list[Tensor]) -> Batch:
        named = dict(zip(self._names, tensors[self._positional :], strict=True))
        return Batch(tuple(tensors[: self._positional]), named)


class Fresh:
    """The next inputs that come, all of them, up to `rows`; then no more. Thread-safe."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._held: list[Batch] = []
        self._count = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        return self._count >= self.rows

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Copies rows of this batch as long as there is room. All batches must have one form."""
        with self._lock:
            if self.full:
                return
            taken = batch.rows(slice(0, self.rows - self._count))
            self._held.append(
                Batch(tuple(t.clone() for t in taken.args), {name: t.clone() for name, t in taken.kwargs.items()})
            )
            self._count += len(taken)

    def inputs(self) -> Batch:
        """All of them, in the order in which they came."""
        with self._lock:
            return concatenated(self._held)


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
    """A tensor whose memory is this file, and whether the file is new. What is in one of the right size stays."""
    count = torch.Size(shape).numel()
    size = count * dtype.itemsize
    try:
        is_new = not file.exists() or file.stat().st_size != size
        if is_new:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            with file.open("wb") as made:
                os.posix_fallocate(made.fileno(), 0, size) if hasattr(os, "posix_fallocate") else made.truncate(size)
        return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape), is_new
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"could not keep recent inputs in {file}: {getattr(error, 'strerror', None) or error}. Free some space, or "
            "pass a smaller reservoir_bytes."
        ) from error


def _copy_round(ring: Tensor, first: int, rows: Tensor) -> None:
    """Write rows, the first of which has this number, to their places in a ring; if it is too short, the last ones."""
    skipped = max(0, len(rows) - len(ring))
    start, rows = (first + skipped) % len(ring), rows[skipped:]
    before_end = min(len(rows), len(ring) - start)
    ring[start : start + before_end].copy_(rows[:before_end])
    if before_end < len(rows):
        ring[: len(rows) - before_end].copy_(rows[before_end:])
