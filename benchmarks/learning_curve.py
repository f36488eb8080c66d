"""Certified saving at 1 % against the number of unlabelled inputs: ResNet-18 on CIFAR-10.

Caches are trained on the first 500, 2,000 or 10,000 training images, all of one recording; the certification stream
(5,000 test images) and the 2,500 images evaluated on are those of cifar10.py, whose rows at 1 % are the point for
50,000.
`--time-budget` is per size and for the training alone. No augmented copies are asked for here, which fit() would do
for the two smaller sizes.

    python benchmarks/learning_curve.py --time-budget 120 --out benchmarks/results/learning_curve.json
"""

from __future__ import annotations

import dataclasses
import sys

import common

from offramp.fitting import learn
from offramp.recording import TRAIN, Recording, record
from offramp.splitting import split
from offramp.tasks import task_named

SIZES = (500, 2_000, 10_000)
UNUSED = 3  # a part that nothing reads


def with_train_rows(recording: Recording, size: int) -> Recording:
    """The recording with only its first `size` training rows in use."""
    part_N = recording.part_N.copy()
    part_N[recording.index(TRAIN)[size:]] = UNUSED
    return dataclasses.replace(recording, part_N=part_N)


def main() -> None:
    options = common.arguments(__doc__)
    tolerance, seed = 0.01, 0
    zoo = common.zoo()
    backbone = zoo.resnet18_cifar10()

    def normalize(x):  # type: ignore[no-untyped-def]
        return zoo.normalize(x, "cifar10")

    test = common.images("cifar10/test.parquet", normalize, side=32, seed=0)
    train = common.images("cifar10/train.parquet", normalize, side=32).rows(slice(0, max(SIZES)))
    certify, held_out = test.rows(slice(0, 5000)), test.rows(slice(5000, None))
    parts = split(backbone, next(iter(train))[0][:4])
    recorded = record(parts, task_named("classification"), train, certify, seed=seed)
    rows = []
    for size in SIZES:
        learned = learn(
            backbone,
            with_train_rows(recorded, size),
            time_budget_s=options.time_budget,
            seed=seed,
            progress=False,
            workdir=options.workdir,
        )
        rows.append({"unlabelled_inputs": size} | common.row(learned, held_out, tolerance, seed, options))
        print(common.table(rows), file=sys.stderr, flush=True)
    print(common.table(rows))
    common.finish(common.document("Learning curve, ResNet-18 / CIFAR-10 at 1 %", rows), options.out)


if __name__ == "__main__":
    main()
