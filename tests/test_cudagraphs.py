"""Graphs per bucket of rows: bucket, padding, copies and threads, with a recording that Python plays back on the CPU.
What only a GPU can show is in the tests of the back ends, which skip without one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import MaskedEncoder
from test_backends import mixed, mixed_inputs, tensors
from torch import Tensor

from offramp.backends import Part, check, cudagraphs
from offramp.backends.cudagraphs import BUCKETS, CudaGraphs
from offramp.errors import BackendError

replayed: list[int] = []  # the rows of every graph that was replayed


def played_back(run: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """As a graph does it: into the same tensors every time."""
    outputs = [output.clone() for output in run()]

    def replay() -> None:
        replayed.append(len(outputs[0]))
        for output, again in zip(outputs, run(), strict=True):
            output.copy_(again)

    return replay, outputs


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaGraphs]:
    monkeypatch.setattr(cudagraphs, "record", played_back)
    monkeypatch.setattr(CudaGraphs, "only_on", None)
    monkeypatch.setattr(CudaGraphs, "missing", lambda self: None)
    yield CudaGraphs()
    replayed.clear()


@pytest.fixture
def part(backend: CudaGraphs) -> Part:
    built = backend.build(mixed(), mixed_inputs(3))
    replayed.clear()
    return built


@pytest.mark.parametrize(
    ("rows", "bucket"), [(0, []), (1, [1]), (2, [2]), (3, [4]), (4, [4]), (5, [8]), (17, [32]), (32, [32]), (33, [])]
)
def test_rows_run_in_the_next_larger_bucket_and_get_the_modules_answer(
    part: Part, rows: int, bucket: list[int]
) -> None:
    inputs = mixed_inputs(rows, seed=rows)
    received = tensors(part(*inputs))
    assert replayed == bucket
    for one, other in zip(received, mixed()(*inputs), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        torch.testing.assert_close(one, other)


def test_rows_of_earlier_calls_change_nothing(part: Part) -> None:
    """They stay in the buffers as padding, whatever they were."""
    ids, mask, image, spare = mixed_inputs(4)
    part(ids, mask, torch.full_like(image, torch.nan), spare)
    difference = check(part, mixed(), [mixed_inputs(3, seed=1), mixed_inputs(4, seed=2)])
    assert difference.within, difference


def test_outputs_are_the_callers_own(part: Part) -> None:
    first = mixed_inputs(4)
    outputs = tensors(part(*first))
    before = [output.clone() for output in outputs]
    for rows in (4, 3, 9, 4):
        part(*mixed_inputs(rows, seed=rows))
    assert all(torch.equal(one, other) for one, other in zip(outputs, before, strict=True))
    outputs[1].fill_(7.0)
    difference = check(part, mixed(), [first])
    assert difference.within, difference


def test_any_layout_and_mode_is_taken(part: Part) -> None:
    ids, mask, image, spare = mixed_inputs(8)
    strided = (ids[::2], mask[::2], image[::2].contiguous(memory_format=torch.channels_last), spare[::2])
    with torch.inference_mode():
        inside = tensors(part(*(tensor.clone() for tensor in strided)))[1]
    logits = tensors(part(*strided[:2], strided[2].requires_grad_(), strided[3]))[1]
    assert not logits.requires_grad
    assert torch.equal(inside, logits)
    torch.testing.assert_close(logits, mixed()(*strided)[1])


def test_threads_get_their_own_answers(part: Part) -> None:
    inputs = [mixed_inputs(1 + seed % 8, seed=seed) for seed in range(80)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda given: tensors(part(*given))[1], inputs))
    for given, answer in zip(inputs, answers, strict=True):
        torch.testing.assert_close(answer, mixed()(*given)[1])


def test_a_fixed_number_of_rows_has_one_graph(backend: CudaGraphs) -> None:
    many, three = (backend.build(mixed(), mixed_inputs(3), static_rows=rows) for rows in (None, 3))
    replayed.clear()
    three(*mixed_inputs(3))
    assert replayed == [3]
    assert three.bytes < many.bytes


def test_a_stage_with_several_live_values_in_bfloat16(backend: CudaGraphs) -> None:
    torch.manual_seed(0)
    module = MaskedEncoder().eval()
    ids, mask = torch.randint(0, 50, (5, 9)), torch.ones(5, 9, dtype=torch.long)
    mask[::2, 5:] = 0
    half = backend.build(module, (ids, mask), precision="bfloat16")
    assert check(half, module, [(ids, mask)]).relative < 0.05


def test_buckets_grow_by_no_more_than_twice() -> None:
    assert all(one < other <= 2 * one for one, other in itertools.pairwise(BUCKETS)), "at most half of it is padding"
    assert BUCKETS[0] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(BackendError, match="cudagraphs cannot be used here: torch finds no CUDA device"):
        CudaGraphs().build(mixed(), mixed_inputs(3))


def test_a_part_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaGraphs, "missing", lambda self: None)
    with pytest.raises(BackendError, match="cudagraphs runs on cuda here, and the part is on cpu"):
        CudaGraphs().build(mixed(), mixed_inputs(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_real_graphs_give_the_modules_answers() -> None:
    module = mixed().cuda()
    part = CudaGraphs().build(module, tuple(tensor.cuda() for tensor in mixed_inputs(3)))
    for rows in (1, 2, 3, 8, 32, 33):
        given = tuple(tensor.cuda() for tensor in mixed_inputs(rows, seed=rows))
        difference = check(part, module, [given])
        assert difference.within, difference
