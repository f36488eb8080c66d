"""A distilled student of the same cost as our certified plan's mean, answering everything alone.

It is a LearnedCache at the input, the widest within that share of FLOPs, trained through Candidates with the recipe
that the search uses, and given as much time as a whole fit of ours.
"""

from __future__ import annotations

import time

from torch import Tensor

from offramp.caches import LearnedCache
from offramp.candidates import Candidates, Trained
from offramp.cost import count_flops
from offramp.distillation import Stop
from offramp.errors import InputError
from offramp.progress import bar
from offramp.search import Search
from offramp.streams import Batch
from opponents.base import Built, Case, Opponent, tensor_bytes

PLAN_AT = 0.01  # the tolerance of the plan whose cost it has


def build(case: Case, tolerance: float | None) -> Built:
    del tolerance  # a static model knows none
    student = trained(case, PLAN_AT)
    cache, split_model = student.cache, case.split_model
    assert isinstance(cache, LearnedCache)

    def call(*args: Tensor, **kwargs: Tensor) -> Tensor:
        logits: Tensor = cache(split_model.activation(0, split_model.flatten(Batch(args, kwargs))))
        return logits

    rows = case.sample.rows(slice(0, 1))
    return Built(
        call,
        tensor_bytes(cache),
        student.log.seconds,
        count_flops(lambda: call(*rows.args, **rows.kwargs)) / case.costs.backbone.flops,
        details={"student": cache.shape.label, "steps": student.log.steps, "final_loss": student.log.final_loss},
    )


def trained(case: Case, tolerance: float) -> Trained:
    """The student, or, from the folder, one of the same shape that an earlier call trained."""
    candidates = Candidates(
        case.split_model,
        case.task,
        case.recording,
        case.costs,
        seed=case.seed,
        deadline=time.monotonic() + case.time_budget_s,
        stop=Stop(),
        workdir=case.folder / "student",
        show=False,
    )
    cache = widest_within(candidates, case.our_flops.get(tolerance), tolerance)
    recipe = Search(candidates, tolerance=tolerance).recipe(cache)  # the search's own: a fair student gets no other
    with bar(cache.name, 1, show=False) as progress:
        candidates.train(cache, recipe, case.time_budget_s, progress)
    return candidates.named(cache.name)


def widest_within(candidates: Candidates, share: float | None, tolerance: float) -> LearnedCache:
    if share is None:
        raise InputError(f"there is no plan of ours at {tolerance:g}, whose cost the student is to match")
    if share >= 1:
        raise InputError(f"our plan at {tolerance:g} saves nothing: there is no cost to match")
    point = candidates.split.points[0]
    shape = candidates.widest(point, "student" if point.dtype.is_floating_point else "transformer", share)
    if shape is None:
        raise InputError(f"even the narrowest student costs more than {share:.3f} of the backbone")
    return candidates.build(point, shape)


OPPONENTS = (Opponent("distilled student of our plan's cost", "None.", build),)
