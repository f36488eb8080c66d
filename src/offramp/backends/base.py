"""What a back end is: it builds parts for one runtime."""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from offramp.backends.exporting import exported, quiet
from offramp.backends.form import Form
from offramp.backends.part import Part, Program
from offramp.errors import BackendError, InputError, OfframpError

EXAMPLE_ROWS = 4  # a graph for any number of rows is traced with more than one: sizes of 1 are special in torch


@dataclass(frozen=True)
class Job:
    """What is to be built. `example` has EXAMPLE_ROWS or `static_rows` rows, in the layout that the form names."""

    module: nn.Module
    form: Form
    example: tuple[Tensor, ...]
    precision: str
    static_rows: int | None
    calibration: Iterable[Sequence[Tensor]]

    def exported(self) -> ExportedProgram:
        """The part as a graph, for any number of rows or for `static_rows`."""
        return exported(self.module, self.form, self.example, any_rows=self.static_rows is None)

    def calibration_batches(self) -> list[list[Tensor]]:
        """The inputs to calibrate on, one row at a time, or `static_rows`; what is left over is left out.

        A quantiser that is given larger batches may take their rows for one input.
        """
        size, batches = self.static_rows or 1, []
        for given in self.calibration:
            starts = range(0, self.form.rows(given) - size + 1, size)
            batches += [[tensor[start : start + size].contiguous() for tensor in given] for start in starts]
        if not batches:
            raise InputError(
                f"{self.precision} is calibrated on inputs of the part, and there are none of {size} rows; pass some "
                "hundred rows as `calibration`, in tuples of tensors like the example"
            )
        return batches


class Backend(ABC):
    """Builds parts for one runtime. What it is called, and the precisions that it knows."""

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    only_on: ClassVar[str | None] = None  # the type of device that it runs on, where that is one alone
    faster_static: ClassVar[bool] = False  # whether a fixed number of rows is worth a program of its own

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot be used here and what to do about it, or None when it can."""

    @abstractmethod
    def program(self, job: Job) -> Program:
        """Does the work of `build`; may raise anything. Runs without gradients and without warnings."""

    def build(
        self,
        module: nn.Module,
        example: tuple[Tensor, ...],
        *,
        precision: str = "float32",
        static_rows: int | None = None,
        calibration: Iterable[tuple[Tensor, ...]] = (),
    ) -> Part:
        """The part that `module`, in eval mode, is on this runtime, on as many threads as torch has now.

        example: a few rows of its inputs. static_rows: the only number of rows that it will be called with, which can
        be faster. calibration: inputs that "int8" finds its scales on, like the example.

        Raises InputError for arguments that do not fit and BackendError when the runtime is missing or fails.
        """
        self._check(module, example, precision, static_rows)
        started = time.monotonic()
        with quiet(), torch.inference_mode(mode=False), torch.no_grad():
            job = _job(module, example, precision, static_rows, calibration)
            try:
                program = self.program(job) if any(source >= 0 for source in job.form.sources) else _Nothing()
                build_s = time.monotonic() - started
                part = Part(self.name, precision, job.form, program, static_rows=static_rows, build_s=build_s)
                _try(part, job)
            except OfframpError:
                raise
            except Exception as error:  # whatever a runtime raises on a module that it does not know
                rows = "any number of" if static_rows is None else static_rows
                raise BackendError(
                    f"{self.name} cannot run {type(module).__name__} in {precision}; tried it for {rows} rows of "
                    f"{', '.join(map(str, job.form.inputs))}: {type(error).__name__}: {_shortly(error)}. Take "
                    "another backend or precision for this part."
                ) from error
        return part

    def _check(self, module: nn.Module, example: Sequence[Tensor], precision: str, static_rows: int | None) -> None:
        if precision not in self.precisions:
            raise InputError(f"{self.name} knows no precision {precision!r}; known: {', '.join(self.precisions)}")
        if static_rows is not None and static_rows < 1:
            raise InputError(f"static_rows is {static_rows}; expected a number of rows from 1, or None for any number")
        rows = {tensor.shape[:1] for tensor in example}
        if len(rows) != 1 or rows & {(), (0,)}:
            shapes = [tuple(tensor.shape) for tensor in example]
            raise InputError(f"the example has tensors of shapes {shapes}; expected the same rows of each, at least 1")
        training = [name or "the part itself" for name, inner in module.named_modules() if _trains(inner)]
        if training:
            raise InputError(f"the part is in train mode ({', '.join(training[:5])}); call `.eval()` on it first")
        if problem := self.missing():
            raise BackendError(f"{self.name} cannot be used here: {problem}")
        if self.only_on not in (None, example[0].device.type):
            raise BackendError(
                f"{self.name} runs on {self.only_on} here, and the part is on {example[0].device}; move it there, or "
                "take another backend"
            )


@dataclass(frozen=True)
class _Nothing:
    """The program of a module that only hands its inputs through."""

    stored_bytes: int = 0

    def __call__(self, _inputs: Sequence[Tensor], /) -> Sequence[Tensor]:
        return ()


def not_installed(packages: Sequence[str], extra: str) -> str | None:
    """What `Backend.missing` says about optional packages."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed; run: pip install 'offramp[{extra}]'" if absent else None


def _job(
    module: nn.Module,
    example: Sequence[Tensor],
    precision: str,
    static_rows: int | None,
    calibration: Iterable[Sequence[Tensor]],
) -> Job:
    form = Form.of(module, example)
    index = torch.arange(static_rows or EXAMPLE_ROWS, device=form.device) % len(example[0])
    slots = zip(form.inputs, example, strict=True)
    rows = tuple(slot.laid_out(tensor.detach().index_select(0, index)) for slot, tensor in slots)
    return Job(module, form, rows, precision, static_rows, calibration)


def _try(part: Part, job: Job) -> None:
    """Warms the part up, and shows that it gives what it should. Raises when it does not."""
    counts = [job.static_rows] if job.static_rows else [1, EXAMPLE_ROWS]
    for count in counts:
        output = part(*(tensor[:count] for tensor in job.example))
        outputs = (output,) if isinstance(output, Tensor) else output
        for slot, tensor in zip(part.form.outputs, outputs, strict=True):
            if not slot.fits(tensor) or len(tensor) != count:
                raise ValueError(f"it gives {tuple(tensor.shape)} {tensor.dtype} where {slot} was expected")


def _trains(module: nn.Module) -> bool:
    # A plain nn.Module only holds others, as in graphs; it is made in train mode, and has no behaviour.
    return module.training and type(module) is not nn.Module


def _shortly(error: BaseException) -> str:
    """The beginning of an error's text in one line: OpenVINO's say what is wrong in the third."""
    return " ".join(str(error).split())[:300].rstrip(".") or "without a message"
