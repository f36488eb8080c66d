"""What is kept of the traffic: the newest, and a uniform sample, within a number of bytes."""

from __future__ import annotations

import threading

import pytest
import torch

from offramp.errors import InputError
from offramp.reservoir import Reservoir
from offramp.streams import Batch

EXAMPLE = Batch((torch.zeros(1, 2),), {"mask": torch.zeros(1, dtype=torch.long)})
ROW_BYTES = 2 * 4 + 8


def numbered(first: int, rows: int) -> Batch:
    number = torch.arange(first, first + rows)
    return Batch((number[:, None].expand(-1, 2).float(),), {"mask": number})


def parts(reservoir: Reservoir) -> tuple[list[int], list[int]]:
    held = reservoir.inputs()
    assert torch.equal(held.args[0], held.kwargs["mask"][:, None].expand(-1, 2).float()), "rows stay together"
    number = held.kwargs["mask"].tolist()
    return number[: len(number) // 2], number[len(number) // 2 :]


@pytest.mark.parametrize("sizes", [[1] * 23, [5, 5, 13], [23], [2, 21], []])
def test_the_newest_are_held_in_their_order(sizes: list[int]) -> None:
    reservoir = Reservoir(EXAMPLE, 2 * 7 * ROW_BYTES + 3, seed=0)
    first = 0
    for rows in sizes:
        reservoir.add(numbered(first, rows))
        first += rows
    uniform, recent = parts(reservoir)
    assert recent == list(range(first))[-7:]
    assert len(set(uniform)) == len(uniform) == min(first, 7)
    assert reservoir.seen == first
    assert len(reservoir) == len(uniform) + len(recent)
    assert reservoir.bytes == len(reservoir) * ROW_BYTES <= 2 * 7 * ROW_BYTES + 3


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_other_part_is_a_uniform_sample(rows: int) -> None:
    counts = torch.zeros(40, dtype=torch.long)
    for seed in range(150):
        reservoir = Reservoir(EXAMPLE, 2 * 12 * ROW_BYTES, seed=seed)
        for first in range(0, 40, rows):
            reservoir.add(numbered(first, min(rows, 40 - first)))
        counts[parts(reservoir)[0]] += 1
    assert counts.sum() == 150 * 12
    # Each is in with probability 0.3, so 45 times of 150, and once more or less in 5.6.
    assert 45 - 4 * 5.6 < int(counts.min()) <= int(counts.max()) < 45 + 4 * 5.6


def test_what_is_held_is_a_copy() -> None:
    reservoir = Reservoir(EXAMPLE, 2 * 4 * ROW_BYTES)
    batch = numbered(0, 4)
    reservoir.add(batch)
    batch.kwargs["mask"].fill_(99)
    reservoir.inputs().kwargs["mask"].fill_(99)
    assert parts(reservoir)[1] == [0, 1, 2, 3]


def test_inputs_of_inference_mode_and_with_gradients_are_kept() -> None:
    reservoir = Reservoir(Batch((torch.zeros(1, 2),)), 64)
    with torch.inference_mode():
        reservoir.add(Batch((torch.ones(1, 2),)))
    reservoir.add(Batch((torch.ones(1, 2, requires_grad=True) * 2,)))
    held = reservoir.inputs().args[0]
    assert held[:, 0].tolist() == [1, 2, 1, 2]
    assert not held.requires_grad


def test_many_threads_fill_it() -> None:
    reservoir = Reservoir(EXAMPLE, 2 * 50 * ROW_BYTES)
    threads = [
        threading.Thread(target=lambda at=at: [reservoir.add(numbered(at, 3)) for _ in range(40)]) for at in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reservoir.seen == 8 * 40 * 3
    uniform, recent = parts(reservoir)
    assert len(uniform) == len(recent) == 50


def test_too_little_room_is_refused() -> None:
    with pytest.raises(InputError, match=rf"31 bytes have no room.*expected at least {2 * ROW_BYTES}"):
        Reservoir(EXAMPLE, 31)
