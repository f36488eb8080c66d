"""A part: what a back end makes of a module. Same call, same form and types of output, on another runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from offramp.backends.form import Form, Output
from offramp.errors import InputError


class Program(Protocol):
    """What a runtime runs: the tensors to compute, without gradients, from inputs that fit.

    Nothing writes into what it has returned.
    """

    @property
    def stored_bytes(self) -> int: ...

    def __call__(self, inputs: Sequence[Tensor], /) -> Sequence[Tensor]: ...


class Part:
    """A module on another runtime. Called like the module, it returns what the module would, up to its precision.

    Takes any number of rows, or exactly `static_rows` where that is set; any layout in memory. A live value that the
    module hands through comes back as the same tensor. bytes: stored size of weights and program. build_s: seconds.
    """

    def __init__(
        self, backend: str, precision: str, form: Form, program: Program, *, static_rows: int | None, build_s: float
    ) -> None:
        self.backend, self.precision, self.form, self.static_rows = backend, precision, form, static_rows
        self.bytes, self.build_s = program.stored_bytes, build_s
        self._program: Program | None = program

    def __call__(self, *inputs: Tensor) -> Output:
        """Raises InputError when the inputs do not fit, or after `close`."""
        if self._program is None:
            raise InputError(f"this part on {self.backend} was closed; build it again")
        rows = self.form.rows(inputs)
        if self.static_rows not in (None, rows):
            raise InputError(f"this part was built for exactly {self.static_rows} rows; received {rows}")
        return self.run(*inputs) if rows else self.form.restore(inputs, self.form.empty())

    def run(self, *inputs: Tensor) -> Output:
        """The same for inputs that are known to fit, at least one row: between parts, checks add up."""
        assert self._program is not None
        return self.form.restore(inputs, self._program(inputs))

    def close(self) -> None:
        """Lets go of the runtime's memory now, and not when this object is no longer used."""
        self._program = None

    def __repr__(self) -> str:
        rows = "any number of" if self.static_rows is None else self.static_rows
        return f"Part({self.backend}, {self.precision}, {rows} rows of {', '.join(map(str, self.form.inputs))})"
