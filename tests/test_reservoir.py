"""What is kept of the traffic: the newest, and a uniform sample, within a number of bytes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from offramp.errors import InputError, StorageError
from offramp.reservoir import Fresh, Reservoir
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


@pytest.mark.parametrize("rows", [0, 5, 7, 8, 13, 14, 40])
def test_the_input_of_each_request_once(rows: int) -> None:
    reservoir = Reservoir(EXAMPLE, 2 * 7 * ROW_BYTES, seed=3)
    for number in range(rows):
        reservoir.add(numbered(number, 1))
    uniform, recent = parts(reservoir)
    once = reservoir.requests().kwargs["mask"].tolist()
    assert sorted(once) == sorted({*uniform, *recent})
    assert reservoir.different == len(once)
    assert once[len(once) - len(recent) :] == recent, "the newest last"


def test_files_outlive_it(tmp_path: Path) -> None:
    first = Reservoir(EXAMPLE, 2 * 7 * ROW_BYTES, seed=1, folder=tmp_path)
    first.add(numbered(0, 20))
    kept = first.inputs()
    again = Reservoir(EXAMPLE, 2 * 7 * ROW_BYTES, seed=2, folder=tmp_path, seen=first.seen)
    assert torch.equal(again.inputs().kwargs["mask"], kept.kwargs["mask"])
    again.add(numbered(20, 2))
    assert parts(again)[1] == list(range(15, 22))


def test_files_of_another_size_are_begun_anew(tmp_path: Path) -> None:
    before = Reservoir(EXAMPLE, 2 * 7 * ROW_BYTES, folder=tmp_path)
    before.add(numbered(1, 5))
    smaller = Reservoir(EXAMPLE, 2 * 3 * ROW_BYTES, folder=tmp_path, seen=before.seen)
    assert (smaller.seen, len(smaller)) == (0, 0), "not five rows of zeros"
    smaller.add(numbered(1, 1))
    assert smaller.inputs().kwargs["mask"].tolist() == [1, 1]


def test_a_full_disk_is_told_before_anything_is_written_through_a_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left on device. Free some space, or pass a smaller"):
        Reservoir(EXAMPLE, 1 << 10, folder=tmp_path)


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [20], [1] * 12, [10, 5]])
def test_the_next_inputs_are_all_taken_and_no_more(sizes: list[int]) -> None:
    fresh, first = Fresh(10), 0
    for rows in sizes:
        batch = numbered(first, rows)
        fresh.add(batch)
        batch.kwargs["mask"].fill_(99)
        first += rows
    assert fresh.full
    assert fresh.inputs().kwargs["mask"].tolist() == list(range(10))
