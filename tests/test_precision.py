"""Where bfloat16 pays, and what is rounded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offramp.precision import has_fast_bfloat16, rounding


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True}, False), ({}, False)],
)
def test_a_cpu_is_fast_in_bfloat16_where_it_multiplies_matrices_of_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_fast_bfloat16(torch.device("cpu")) is expected
    assert has_fast_bfloat16(torch.device("meta")) is False


def test_a_torch_that_cannot_tell_is_taken_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_fast_bfloat16(torch.device("cpu")) is False


def test_a_gpu_that_multiplies_in_tf32_rounds_more(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(dtype=torch.float32, is_cuda=True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert rounding(on_gpu) == 5e-3
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert rounding(on_gpu) == rounding(torch.ones(1)) == 1e-4
    assert rounding(torch.ones(1, dtype=torch.bfloat16)) == 2e-2
