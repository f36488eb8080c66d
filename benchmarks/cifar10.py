"""ResNet-18 on CIFAR-10: caches trained on the training images, tuned and certified on 5,000 test images.

The remaining 2,500 test images, which nothing else has seen, are evaluated on. Tolerances 0.5, 1 and 2 %, three seeds.

    python benchmarks/cifar10.py --out benchmarks/results/cifar10.json

With `--records FILE`, what the first seed's caches said about the 5,000 tune and certify images is kept as .npz: the
real records of tests/test_guarantee.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import common
import numpy as np

from offramp.choosing import WEIGHT_FLOPS, Learned
from offramp.cost import shares
from offramp.recording import CERTIFY, TUNE


def keep_records(learned: Learned, file: Path) -> None:
    parts = [learned.candidates.records(learned.trained, part) for part in (TUNE, CERTIFY)]
    before, cache = shares(learned.costs, weight_flops=WEIGHT_FLOPS)
    np.savez_compressed(
        file,
        confidence=np.concatenate([part.confidence_NK for part in parts]).astype(np.float32),
        agreement=np.concatenate([part.agreement_NK for part in parts]),
        reads=np.array(parts[0].reads_K),
        before=before,
        cache=cache,
    )


def main() -> None:
    options = common.arguments(__doc__, records=True)
    zoo = common.zoo()

    def normalize(x):  # type: ignore[no-untyped-def]
        return zoo.normalize(x, "cifar10")

    test = common.images("cifar10/test.parquet", normalize, side=32, seed=0)
    train = common.images("cifar10/train.parquet", normalize, side=32)
    certify, held_out = test.rows(slice(0, 5000)), test.rows(slice(5000, None))
    rows = []
    for seed, learned in common.fits(zoo.resnet18_cifar10(), train, certify, options):
        if seed == 0 and options.records is not None:
            keep_records(learned, options.records)
        rows += [common.row(learned, held_out, tolerance, seed, options) for tolerance in options.tolerances]
        print(common.table(rows), file=sys.stderr, flush=True)
    print(common.table(rows))
    common.finish(common.document("ResNet-18 / CIFAR-10", rows), options.out)


if __name__ == "__main__":
    main()
