"""benchmarks/apart.py: models in processes of their own, asked alike, and gone when it is done."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_opponents import load
from torch import Tensor

from offramp.streams import Batch

Made = tuple[Callable[[Tensor], None], Batch]
ROWS = Batch((torch.arange(100.0)[:, None],))


def quick() -> Made:
    return (lambda _: None), ROWS


def slow() -> Made:
    return (lambda _: time.sleep(0.002)), ROWS


def broken() -> Made:
    os._exit(1)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load("apart")
    monkeypatch.setattr(module, "LEAST_TURNS", 2)
    return module


def test_every_model_answers_as_many_calls_and_the_slow_one_is_slower(apart: Any) -> None:
    rows = apart.timed({"quick": quick, "slow": slow}, sizes=(1, 8), budget_s=0.0)
    assert [(row["batch_size"], row["model"]) for row in rows] == [(1, "quick"), (1, "slow"), (8, "quick"), (8, "slow")]
    assert {row["calls"] for row in rows} == {2 * apart.CALLS}
    for row in rows:
        assert (row["p50_ms"] >= 2) == (row["model"] == "slow")
        assert 0 < row["p50_ms"] <= row["p95_ms"]
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_ends_the_run(apart: Any) -> None:
    with pytest.raises(EOFError):
        apart.timed({"broken": broken}, sizes=(1,), budget_s=0.0)
    assert multiprocessing.active_children() == []


def test_calls_go_on_where_those_of_the_turn_before_ended(apart: Any) -> None:
    seen: list[float] = []
    for turn in (0, 1):
        times_ms = apart._calls_ms(lambda x: seen.append(float(x[0, 0])), ROWS, turn, 2, lambda: None)
        assert len(times_ms) == apart.CALLS
    each = apart.CALLS + 1
    timed = seen[1:each] + seen[each + 1 :]
    assert timed == [float(2 * call % 98) for call in range(2 * apart.CALLS)]
