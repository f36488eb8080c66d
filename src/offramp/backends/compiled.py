"""PyTorch's own compiler, TorchInductor: in this process, or ahead of time into a library (AOTInductor).

Both start from an exported graph. `torch.compile` would look at the same module through Dynamo, whose guards compile
again, in the middle of a request, when a part is called in inference mode or under another number of threads; its
programs are lost when anything calls `torch._dynamo.reset`. Here nothing is compiled after `build`.

A graph for any number of rows is only valid from two rows on, so one row has a program of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from offramp.backends.base import Backend, Job
from offramp.backends.exporting import tensor_bytes
from offramp.backends.form import Form
from offramp.backends.part import Program

_OPTIONS = {
    "freezing": True,  # weights become constants: folded, and stored as the kernels read them
    "compile_threads": 1,  # no pool of processes that stays behind
    "emulate_precision_casts": True,  # a cache rounds its features to half precision, and means it
}


class Compiled(Backend):
    """TorchInductor in this process. What it stores is counted as the weights of the module."""

    name = "compile"
    precisions = ("float32", "bfloat16")

    def missing(self) -> str | None:
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler):
            return None
        return f"no C++ compiler found ({compiler}); install one, or name it in the environment variable CXX"

    def program(self, job: Job) -> Program:
        return _program(job, _compiled, tensor_bytes(job.module))


class AotInductor(Compiled):
    """TorchInductor ahead of time: the part is a shared library, and its call hardly touches Python."""

    name = "aotinductor"

    def program(self, job: Job) -> Program:
        return _program(job, _library, 0)


Call = Callable[..., Sequence[Tensor]]


@dataclasses.dataclass(frozen=True)
class _Inductor:
    """`many` takes any number of rows from 2, or as many as it was built for; `one` takes one."""

    many: Call
    one: Call
    form: Form
    stored_bytes: int

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        # Compiled code takes the layout of the example for granted.
        given = [slot.laid_out(tensor.detach()) for slot, tensor in zip(self.form.inputs, inputs, strict=True)]
        return (self.one if len(inputs[0]) == 1 else self.many)(*given)


def _program(job: Job, build: Callable[[Job, ExportedProgram], tuple[Call, int]], weight_bytes: int) -> Program:
    many, many_bytes = build(job, job.exported())
    one, one_bytes = many, 0
    if job.static_rows is None:
        single = dataclasses.replace(job, example=tuple(tensor[:1] for tensor in job.example), static_rows=1)
        one, one_bytes = build(single, single.exported())
    return _Inductor(many, one, job.form, weight_bytes + many_bytes + one_bytes)


def _compiled(job: Job, program: ExportedProgram) -> tuple[Call, int]:
    import torch._inductor as inductor  # takes as long as importing all the rest of torch

    module: Any = program.module(check_guards=False)
    # The exporter's own stand-ins for the inputs: they alone know which sizes are those of the batch.
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    with _precision(job):
        call: Call = inductor.standalone_compile(
            module, inputs, dynamic_shapes="from_graph", options={"config_patches": _OPTIONS}
        )
    return call, 0


def _library(job: Job, program: ExportedProgram) -> tuple[Call, int]:
    import torch._inductor as inductor

    with tempfile.TemporaryDirectory() as folder, _precision(job):
        package = str(Path(folder, "part.pt2"))
        inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=_OPTIONS)
        call: Call = inductor.aoti_load_package(package)  # unpacks it into a folder that goes when `call` goes
        return call, Path(package).stat().st_size


def _precision(job: Job) -> contextlib.AbstractContextManager[object]:
    if job.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(job.form.device.type, torch.bfloat16, cache_enabled=False)
