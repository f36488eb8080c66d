"""Certified saving at 1 % against the number of unlabelled inputs: ResNet-18 on CIFAR-10.

Caches are trained on the first 500, 2,000 or 10,000 training images; the certification stream (5,000 test images) and
the 2,500 images evaluated on are those of cifar10.py, whose rows at 1 % are the point for 50,000.

    python benchmarks/learning_curve.py --out benchmarks/results/learning_curve.json
"""

from __future__ import annotations

import sys

import common

SIZES = (500, 2_000, 10_000)


def main() -> None:
    options = common.arguments(__doc__)
    options.seeds, tolerance = 1, 0.01
    zoo = common.zoo()

    def normalize(x):  # type: ignore[no-untyped-def]
        return zoo.normalize(x, "cifar10")

    test = common.images("cifar10/test.parquet", normalize, side=32, seed=0)
    train = common.images("cifar10/train.parquet", normalize, side=32)
    certify, held_out = test.rows(slice(0, 5000)), test.rows(slice(5000, None))
    rows = []
    for size in SIZES:
        for seed, learned in common.fits(zoo.resnet18_cifar10(), train.rows(slice(0, size)), certify, options):
            rows.append({"unlabelled_inputs": size} | common.row(learned, held_out, tolerance, seed, options))
        print(common.table(rows), file=sys.stderr, flush=True)
    print(common.table(rows))
    common.finish(common.document("learning curve, ResNet-18 / CIFAR-10 at 1 %", rows, options), options.out)


if __name__ == "__main__":
    main()
