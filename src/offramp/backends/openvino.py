"""OpenVINO on the CPU: float32, bfloat16 by its precision hint, and INT8 by NNCF's post-training quantisation.

The graph goes from PyTorch straight into OpenVINO's own form, through its frontend, as in `openvino.convert_model`.
That function, NNCF and the mere import of OpenVINO report to Intel unless the user has opted out; here they do not.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.backends.base import Backend, Job, not_installed
from offramp.backends.exporting import attends, quiet
from offramp.backends.part import Program
from offramp.errors import BackendError

_PRECISION = "INFERENCE_PRECISION_HINT"
_HINTS = {"float32": "f32", "bfloat16": "bf16"}  # none with int8: what is not quantised may be in bfloat16 as well


class OpenVino(Backend):
    """The part in one stream, tuned for latency.

    It computes float16 as float32 on most CPUs: a rounding to half precision inside of a part is left out, as in the
    reduction of a cache. Build such a part from what comes behind that rounding.
    """

    name = "openvino"
    precisions = ("float32", "bfloat16", "int8")
    only_on = "cpu"
    faster_static = True

    def missing(self) -> str | None:
        return not_installed(("openvino", "nncf"), extra="openvino")

    def program(self, job: Job) -> Program:
        with _without_telemetry():
            import openvino
            from openvino.frontend import FrontEndManager
            from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

        exported = job.exported()
        names = exported.graph_signature.user_inputs
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchFXPythonDecoder.from_exported_program(exported)  # the frontend does not keep it alive
        model = frontend.convert(frontend.load(decoder))
        slots = [job.form.inputs[number] for number in _numbers(model.inputs, names)]
        shapes = [openvino.PartialShape((job.static_rows or -1, *slot.shape)) for slot in slots]
        model.reshape(dict(enumerate(shapes)))
        if job.precision == "int8":
            model = _quantised(model, job, names, transformer=attends(exported))
        return _Request(model, names, job)


class _Request:
    """A compiled model with one request, on as many threads as torch has. Calls wait for each other."""

    def __init__(self, model: Any, names: Sequence[str], job: Job) -> None:
        import openvino

        self._wrap = openvino.Tensor
        hint = _HINTS.get(job.precision)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        } | ({} if hint is None else {_PRECISION: hint})
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        used = str(compiled.get_property(_PRECISION).to_string())
        if hint not in (None, used):
            raise BackendError(f"openvino computes in {used} on this CPU when asked for {hint}; take another precision")
        self._inputs = _numbers(compiled.inputs, names)
        self._outputs = range(len(compiled.outputs))
        self._request, self._lock = compiled.create_infer_request(), threading.Lock()
        self.stored_bytes = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        given = [inputs[number].detach().contiguous() for number in self._inputs]
        with self._lock:
            # Inputs are read where they are, while this call holds them. Outputs are copied: their memory is the
            # request's, and the next call writes into it.
            for number, tensor in enumerate(given):
                self._request.set_input_tensor(number, self._wrap(tensor.numpy(), shared_memory=True))
            self._request.infer(share_outputs=True)  # what it returns is a dictionary whose look-ups take 0.02 ms
            outputs = [self._request.get_output_tensor(number).data.copy() for number in self._outputs]
        return [torch.from_numpy(output) for output in outputs]


def _numbers(ports: Sequence[Any], names: Sequence[str]) -> list[int]:
    """Which input each port takes. OpenVINO may leave out what is not used, and give a port more names."""
    return [next(number for number, name in enumerate(names) if name in port.names) for port in ports]


def _quantised(model: Any, job: Job, names: Sequence[str], *, transformer: bool) -> Any:
    with _without_telemetry():
        import nncf

    numbers = _numbers(model.inputs, names)
    items = [{names[number]: batch[number].numpy() for number in numbers} for batch in job.calibration_batches()]
    # Its progress bars go to stdout.
    with quiet("nncf"), contextlib.redirect_stdout(io.StringIO()):
        return nncf.quantize(
            model,
            nncf.Dataset(items),
            subset_size=len(items),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Inside, OpenVINO and NNCF are imported without what they report with, and leave logging as it is.

    Where the user has imported them already, they stay as they are.
    """
    absent = object()
    reporter = sys.modules.get("openvino_telemetry", absent)
    loggers = logging.getLoggerClass()
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        logging.setLoggerClass(loggers)
        del sys.modules["openvino_telemetry"]
        if reporter is not absent:
            sys.modules["openvino_telemetry"] = reporter  # type: ignore[assignment]
