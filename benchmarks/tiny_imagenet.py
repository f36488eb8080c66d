"""Harder cases on 20,000 Tiny-ImageNet images: MobileNetV2 (ImageNet) at 128 px, and ResNet-56 (CIFAR-100) at 32 px.

12,000 images train caches, 5,000 tune and certify, 3,000 are evaluated on. The images of both models are traffic
without labels here: their classes are not those that the files are labelled with, so no accuracy is reported.

    python benchmarks/tiny_imagenet.py mobilenet_v2 --seeds 1 --out benchmarks/results/mobilenet_v2.json
    python benchmarks/tiny_imagenet.py resnet56 --seeds 1 --out benchmarks/results/resnet56_cifar100.json
"""

from __future__ import annotations

import sys
from typing import Any

import common
import numpy as np


def cases(zoo: Any) -> dict[str, tuple[str, Any, int, Any]]:
    """name -> (title, builder, side in pixels, transform)."""
    return {
        "mobilenet_v2": (
            "MobileNetV2 / Tiny-ImageNet 128 px",
            zoo.mobilenet_v2_imagenet,
            128,
            lambda x: x.float() / 127.5 - 1,
        ),
        "resnet56": (
            "ResNet-56 (CIFAR-100) / Tiny-ImageNet 32 px",
            zoo.resnet56_cifar100,
            32,
            lambda x: zoo.normalize(x, "cifar100"),
        ),
    }


def main() -> None:
    known = ("mobilenet_v2", "resnet56")
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.exit(f"say which model: {' | '.join(known)}")
    name = sys.argv.pop(1)
    options = common.arguments(__doc__)
    title, build, side, transform = cases(common.zoo())[name]
    pictures = common.images("tiny_imagenet/train_100pc.parquet", transform, side=side, seed=0)
    pictures.labels = np.zeros(0, dtype=np.int64)
    train, certify, held_out = (pictures.rows(slice(a, b)) for a, b in ((0, 12000), (12000, 17000), (17000, 20000)))
    rows = []
    for seed, learned in common.fits(build(), train, certify, options):
        rows += [common.row(learned, held_out, tolerance, seed, options) for tolerance in options.tolerances]
        print(common.table(rows), file=sys.stderr, flush=True)
    print(common.table(rows))
    common.finish(common.document(title, rows), options.out)


if __name__ == "__main__":
    main()
