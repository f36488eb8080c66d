"""Caches for a model of your own: fit, look at the plan, save, load, and see where each request left.

python examples/own_model.py [--quick]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import offramp


class Net(nn.Module):
    """Stands in for your pretrained model: easy inputs could be told apart early, it runs to the end for all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64 if index else 16, 64) for index in range(8))
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        logits: Tensor = self.head(x)
        return logits


def traffic(count: int, seed: int) -> list[Tensor]:
    """Unlabelled inputs in batches: anything that yields batches will do, a DataLoader for example."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count // 128, 128, 16, generator=generator))


def main(*, quick: bool) -> None:
    torch.manual_seed(0)
    model = Net().eval()

    cached = offramp.fit(
        model,
        traffic(1024 if quick else 8000, seed=1),
        tolerance=0.05,
        time_budget_s=5 if quick else 30,
        progress=not quick,
    )
    print("plan:", [cache.name for cache in cached.plan.caches] or cached.plan.reason)
    print(f"certificate: at most {cached.certificate.bound:.2%} differ, {cached.certificate.confidence_level:.0%} sure")

    with tempfile.TemporaryDirectory() as folder:
        offramp.save(cached, Path(folder) / "cached")
        cached = offramp.load(Path(folder) / "cached", model)

    prediction = cached.predict(traffic(128, seed=2)[0][:8])
    for answer, left_at in zip(prediction.answer_B.tolist(), prediction.left_at_B.tolist(), strict=True):
        print(f"answer {answer}, left at {cached.exits[left_at]}")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
