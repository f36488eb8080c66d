"""An optimized model: what is kept of how it was made, and how it is made once more.

Its parts are programs for one machine and are not stored. They are built again where the model is loaded, and the model
must then answer its sample as it did when it was saved.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

import torch
from torch import Tensor

from offramp.errors import BackendError
from offramp.model import CachedModel
from offramp.parts import Choice, Layout, Recipe, exceeds, lay_out
from offramp.streams import Batch
from offramp.types import Certificate, CostTable, Plan


class OptimizedModel(CachedModel):
    """A cached model whose parts run on back ends. What it was made of, and how, is its `origin`."""

    origin: Origin

    def report(self) -> dict[str, Any]:
        """That of the model that it was made from, with a section of its own: parts, plan and certificate."""
        decided = {"plan": self.plan.to_json(), "certificate": self.certificate.to_json()}
        return {**self.origin.base.report(), "optimized": {**self.summary["optimized"], **decided}}


@dataclass(frozen=True)
class Origin:
    """base: the model as it was fitted. sample: rows that calibrated the parts. hardware: where that was."""

    base: CachedModel
    sample: Batch
    choices: tuple[Choice, ...]
    caches: tuple[str, ...]
    hardware: dict[str, str]


def model_of(origin: Origin, layout: Layout, plan: Plan, certificate: Certificate, costs: CostTable) -> OptimizedModel:
    names, base = {planned.name for planned in plan.caches}, origin.base
    caches = [cache for cache in layout.caches if cache.name in names]
    model = OptimizedModel(layout.split, caches, plan, certificate, costs, task=base.task, summary=base.summary)
    model.origin = origin
    return model


def rebuild(
    origin: Origin, plan: Plan, certificate: Certificate, costs: CostTable, expected: Answers, *, progress: bool = True
) -> OptimizedModel:
    """The optimized model once more, from what `save` kept of it.

    Raises BackendError when a part cannot be built here, or when the model does not answer the sample as `expected`.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        layout = lay_out(origin.base, origin.caches, Recipe(origin.choices), origin.sample, show=progress)
        model = model_of(origin, layout, plan, certificate, costs)
        differ = answers(model, origin.sample).differ(expected)
    if exceeds(differ, len(origin.sample), certificate.tolerance):
        raise BackendError(
            f"the optimized model, built again, answers {100 * differ:.1f} % of {len(origin.sample)} inputs otherwise "
            f"than when it was saved, more than the tolerance of {100 * certificate.tolerance:g} %"
        )
    return model


@dataclass(frozen=True)
class Answers:
    """(2, N) what an optimized model answers to its sample and where each row leaves, one by one and all at once."""

    answer: Tensor
    left_at: Tensor

    def differ(self, other: Answers) -> float:
        """The larger share of rows that are answered otherwise or elsewhere."""
        apart = (self.answer != other.answer) | (self.left_at != other.left_at)
        return float(apart.double().mean(1).max())


def answers(model: OptimizedModel, sample: Batch) -> Answers:
    each = [sample.rows(slice(row, row + 1)) for row in range(len(sample))]
    one = [model.predict(*row.args, **row.kwargs) for row in each]
    many = model.predict(*sample.args, **sample.kwargs)
    return Answers(
        torch.stack([torch.cat([said.answer_B for said in one]), many.answer_B]).cpu(),
        torch.stack([torch.cat([said.left_at_B for said in one]), many.left_at_B]).cpu(),
    )


def hardware() -> dict[str, str]:
    """What the programs of a part depend on: processor, device, threads, runtimes."""
    found = {"processor": _processor(), "threads": str(torch.get_num_threads()), "system": platform.system()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {name: installed(name) for name in ("torch", "onnxruntime", "openvino") if _is_installed(name)}


def _processor() -> str:
    """Its instructions say more than its name, which not every system tells."""
    able = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    return f"{platform.machine()} with {', '.join(sorted(able))}"


def _is_installed(name: str) -> bool:
    try:
        installed(name)
    except PackageNotFoundError:
        return False
    return True
