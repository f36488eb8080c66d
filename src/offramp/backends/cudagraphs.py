"""CUDA graphs: the kernels of a part, recorded once per number of rows and then launched by one call.

For few rows a GPU is done with a kernel before Python has queued the next. A recorded graph has fixed addresses and
shapes, so there is one per bucket of rows, with inputs and outputs of its own; what is called with fewer rows runs in
the next larger bucket. It has not run on a GPU yet: tests play a recording back by Python, on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offramp.backends.base import Backend, Job
from offramp.backends.eager import Eager
from offramp.backends.part import Program

BUCKETS = (1, 2, 4, 8, 16, 32)  # above, kernels run for longer than their launches take
WARM_UP_RUNS = 3  # in which libraries choose their kernels and take their memory


class CudaGraphs(Backend):
    """PyTorch's own kernels, as `Eager` calls them, replayed. More rows than the largest bucket run as in `Eager`.

    Every bucket holds the memory of its own intermediate values. Threads that call a part use one CUDA stream, as they
    do by default: their calls wait for each other on the host alone.
    """

    name = "cudagraphs"
    precisions = ("float32", "bfloat16")
    only_on = "cuda"

    def missing(self) -> str | None:
        return None if torch.cuda.is_available() else "torch finds no CUDA device; take another backend for the CPU"

    def program(self, job: Job) -> Program:
        return _Graphs(job, Eager().program(job))


class _Graphs:
    def __init__(self, job: Job, eager: Program) -> None:
        self._eager = eager
        sizes = BUCKETS if job.static_rows is None else (job.static_rows,)
        self._graphs = [_Graph(size, job, eager) for size in sizes]
        self.stored_bytes = eager.stored_bytes + sum(graph.buffer_bytes for graph in self._graphs)

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        rows = inputs[0].shape[0]
        for graph in self._graphs:
            if rows <= graph.size:
                return graph(inputs, rows)
        return self._eager(inputs)


class _Graph:
    """The part for up to `size` rows."""

    def __init__(self, size: int, job: Job, eager: Program) -> None:
        self.size, self._lock = size, threading.Lock()
        index = torch.arange(size, device=job.form.device) % len(job.example[0])
        self._inputs = [
            slot.laid_out(tensor.index_select(0, index)).clone()
            for slot, tensor in zip(job.form.inputs, job.example, strict=True)
        ]
        self._replay, self._outputs = record(lambda: eager(self._inputs))
        self.buffer_bytes = sum(tensor.nbytes for tensor in (*self._inputs, *self._outputs))

    def __call__(self, inputs: Sequence[Tensor], rows: int) -> Sequence[Tensor]:
        with self._lock:  # the next call writes into the same buffers
            for buffer, tensor in zip(self._inputs, inputs, strict=True):
                buffer[:rows].copy_(tensor.detach())  # the other rows are those of earlier calls: rows do not mix
            self._replay()
            return [output[:rows].clone() for output in self._outputs]


def record(run: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """What replays the kernels that `run` queues, and the tensors that each replay writes anew. All CUDA calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_RUNS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs
