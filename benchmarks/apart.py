"""Models timed in turn, each in a process of its own, as each would be served.

In one process they share torch's threads, which keep the cores busy for some 10 ms after each parallel region: the next
model then waits for threads that the one before it has left awake. The pause lets those of another process go to sleep.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from offramp.cost import synchronizer
from offramp.streams import Batch

LEAST_TURNS = 10
CALLS = 16  # of one model in a row, in each turn
PAUSE_S = 0.02

Model = Callable[..., Any]
Make = Callable[[], tuple[Model, Batch]]  # the model, and the rows that it is timed on


def timed(makes: Mapping[str, Make], sizes: Sequence[int], budget_s: float) -> list[dict[str, Any]]:
    """Mean, p50 and p95 in milliseconds of one call, per batch size and model, the device being waited for.

    makes: picklable. Every model answers the same batches one after the other, `CALLS` in each of its turns; the call
    before them is not timed. budget_s: for each batch size.
    """
    rows = []
    with ExitStack() as running:
        ask = {name: running.enter_context(_process(make)) for name, make in makes.items()}
        for connection in ask.values():
            connection.recv()  # it has built its model
        for size in sizes:
            times_ms = _in_turn(ask, size, budget_s)
            rows += [{"batch_size": size, "model": name, **_summary(values)} for name, values in times_ms.items()]
    return rows


def _in_turn(ask: Mapping[str, Connection], size: int, budget_s: float) -> dict[str, list[float]]:
    times_ms: dict[str, list[float]] = {name: [] for name in ask}
    started, turn = time.perf_counter(), 0
    while turn < LEAST_TURNS or time.perf_counter() - started < budget_s:
        for name, connection in ask.items():
            time.sleep(PAUSE_S)
            connection.send((turn, size))
            times_ms[name] += connection.recv()
        turn += 1
    return times_ms


def _summary(times_ms: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(times_ms, (50, 95))
    return {"mean_ms": float(np.mean(times_ms)), "p50_ms": float(p50), "p95_ms": float(p95), "calls": len(times_ms)}


@contextmanager
def _process(make: Make) -> Iterator[Connection]:
    """It ends when its end of the pipe is closed."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, make), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join()


def _answer(connection: Connection, make: Make) -> None:
    model, sample = make()
    wait = synchronizer(sample.tensors[0].device)
    connection.send(None)
    while True:
        try:
            turn, size = connection.recv()
        except EOFError:
            return
        connection.send(_calls_ms(model, sample, turn, size, wait))


@torch.inference_mode()
def _calls_ms(model: Model, sample: Batch, turn: int, size: int, wait: Callable[[], None]) -> list[float]:
    """Of the batches of this turn. The one before them, untimed, brings the model into the memory caches."""
    times_ms = []
    for call in range(-1, CALLS):
        first = (turn * CALLS + call) * size % (len(sample) - size)
        batch = sample.rows(slice(first, first + size))
        begun = time.perf_counter()
        model(*batch.args, **batch.kwargs)
        wait()
        times_ms.append((time.perf_counter() - begun) * 1000)
    return times_ms[1:]
