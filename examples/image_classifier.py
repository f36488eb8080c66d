"""Caches for an image classifier from transformers, loaded from a folder as a user's own would be.

To run at once and without a download, the folder is made here: a small ResNet with random weights. Put your own folder
and your own images in its place. Needs `pip install 'offramp[hf]'`.

    python examples/image_classifier.py [--quick]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

import offramp


def make_folder(folder: Path) -> None:
    """A saved model; yours comes from `save_pretrained` or from a hub."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic", num_labels=4
    )
    ResNetForImageClassification(config).save_pretrained(folder)


def make_images(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Unlabelled traffic in batches, as keyword arguments of the model: blobs of light in one of four colours."""
    generator = torch.Generator().manual_seed(seed)
    tint = torch.rand(count, 3, 1, 1, generator=generator) * 4 - 2
    images = tint + 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    return [{"pixel_values": images[start : start + 64]} for start in range(0, count, 64)]


def main(*, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()

    traffic, fresh = make_images(600 if quick else 2400, seed=1), make_images(300, seed=2)
    cached = offramp.fit(model, traffic, tolerance=0.05, time_budget_s=5 if quick else 60, progress=not quick)

    output = cached(**fresh[0])  # the same call, the same output type
    print(type(output).__name__, tuple(output.logits.shape))
    print("plan:", [cache.name for cache in cached.plan.caches] or cached.plan.reason)
    evaluation = offramp.evaluate(cached, fresh)
    print(f"differs on {evaluation.disagreement:.1%} of fresh inputs, runs {evaluation.flops_ratio:.0%} of the FLOPs")


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
