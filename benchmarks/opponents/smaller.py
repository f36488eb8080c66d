"""A smaller static model of the same task, trained by others with labels."""

from __future__ import annotations

import time

from offramp.cost import count_flops
from offramp.errors import InputError
from opponents.base import Built, Case, Opponent, tensor_bytes


def build(case: Case, _tolerance: float | None) -> Built:
    if case.smaller is None:
        raise InputError("no smaller model of this task and input is at hand")
    started = time.monotonic()
    name, model = case.smaller
    rows = case.sample.rows(slice(0, 1))
    flops = count_flops(lambda: model(*rows.args, **rows.kwargs))
    return Built(
        model,
        tensor_bytes(model),
        time.monotonic() - started,
        flops / case.costs.backbone.flops,
        details={"model": name, "training": "elsewhere, with labels; not in the seconds"},
    )


OPPONENTS = (Opponent("smaller static model", "None.", build),)
