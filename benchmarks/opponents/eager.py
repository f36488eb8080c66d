"""The full model itself: its row shows the noise of the measurement, and what all ratios are ratios of."""

from __future__ import annotations

from opponents.base import Built, Case, Opponent, tensor_bytes


def build(case: Case, _tolerance: float | None) -> Built:
    return Built(case.backbone, tensor_bytes(case.backbone), build_s=0.0, flops_ratio=1.0)


OPPONENTS = (Opponent("full model, eager", "It is the full model.", build),)
