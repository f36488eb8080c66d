"""torchvision and timm beside a CPU build of torch."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch

from offramp.errors import MissingExtraError
from offramp.torchvision_shim import import_torchvision, nms

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed (extra `vision`)"
)
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed (extra `vision`)"
)


def in_a_fresh_process(code: str) -> str:
    """What `code` prints: an import can be tried once per process."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout + result.stderr


def test_nms_keeps_the_best_of_overlapping_boxes() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 9]])
    scores = torch.tensor([0.5, 0.9, 0.3, 0.1])
    assert nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert nms(boxes, scores, 0.99).tolist() == [1, 0, 2, 3]
    assert nms(boxes[:0], scores[:0], 0.5).tolist() == []


def test_nms_does_not_count_empty_boxes_as_overlapping() -> None:
    empty = torch.zeros(2, 4)
    assert nms(empty, torch.tensor([0.1, 0.2]), 0.5).tolist() == [1, 0]


def test_a_missing_torchvision_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match=r"offramp\[vision\]"):
        import_torchvision()


def test_an_error_of_another_kind_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_name: str) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="something else"):
        import_torchvision()


@needs_torchvision
def test_torchvision_models_and_nms_work() -> None:
    printed = in_a_fresh_process(
        "import torch\n"
        "from offramp.torchvision_shim import import_torchvision\n"
        "first, second = import_torchvision(), import_torchvision()\n"
        "assert first is second\n"
        "print(tuple(first.models.resnet18().eval()(torch.zeros(2, 3, 32, 32)).shape))\n"
        "boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11]])\n"
        "print(first.ops.nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist())\n"
    )
    assert "(2, 1000)" in printed
    assert "[1]" in printed


@needs_torchvision
def test_it_says_at_most_once_that_it_was_needed() -> None:
    printed = in_a_fresh_process(
        "from offramp.torchvision_shim import import_torchvision\nimport_torchvision()\nimport_torchvision()\n"
    )
    assert printed.count("does not match torch") <= 1


@needs_timm
def test_timm_imports_after_it() -> None:
    printed = in_a_fresh_process(
        "import torch\n"
        "from offramp.torchvision_shim import import_torchvision\n"
        "import_torchvision()\n"
        "import timm\n"
        "model = timm.create_model('resnet18', num_classes=7).eval()\n"
        "print(tuple(model(torch.zeros(1, 3, 32, 32)).shape))\n"
    )
    assert "(1, 7)" in printed
